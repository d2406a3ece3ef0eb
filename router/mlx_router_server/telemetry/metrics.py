"""Figures for Prometheus: what is counted as it happens, and what is read when somebody asks.

A registry of its own per application. Counting follows what ``Happenings`` tells and what the edge of the API sees;
nothing else in the program knows that it is counted. Labels are bounded: models are those of the catalogue, routes
those of the application, causes and outcomes are words of the program. Not thread-safe; it lives in the event loop.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import choose_encoder
from prometheus_client.process_collector import ProcessCollector

from mlx_router_server.telemetry.events import Happening

__all__ = ["Metrics", "ModelFigures", "RouterFigures"]

_WAITS: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_TOKENS: Final = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.035, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
_LAGS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.5, 1, 5)
_LOAD_STAGES: Final = ("waited", "spawn", "import", "weights", "warm_up", "ready_seen")
_LEAVE_STAGES: Final = ("drain", "exit", "reap", "memory_back")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFigures:
    """One model that was asked for, now; sizes in bytes."""

    name: str
    state: str
    leases: int
    waiting: int
    reserved_bytes: int
    memory_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterFigures:
    """Everything that is read when somebody asks; sizes in bytes."""

    version: str
    started_at: float
    budget_bytes: int
    reserved_bytes: int
    available_bytes: int
    total_bytes: int
    standby_workers: int
    models: Iterable[ModelFigures]


class Metrics:
    """One running application's; ``observe`` follows the happenings, ``render`` answers a scrape."""

    def __init__(self) -> None:
        registry = self._registry = CollectorRegistry()
        ProcessCollector(namespace="mlx_router", registry=registry)
        labels = ("api", "route", "method", "model", "status")
        self.requests = Counter(
            "mlx_router_requests", "HTTP requests that have been answered, or left by their client (status 499).",
            labels, registry=registry,
        )  # fmt: skip
        self.in_progress = Gauge(
            "mlx_router_requests_in_progress", "HTTP requests being answered now.", registry=registry
        )
        self.answers = Counter(
            "mlx_router_answers", "Inference requests that have ended, by how: ok, client_left, or an error code.",
            ("model", "outcome"), registry=registry,
        )  # fmt: skip
        self.prompt_tokens = Counter(
            "mlx_router_prompt_tokens", "Tokens of prompts that were answered.", ("model",), registry=registry
        )
        self.completion_tokens = Counter(
            "mlx_router_completion_tokens", "Tokens of whole answers.", ("model",), registry=registry
        )
        self.first_token = Histogram(
            "mlx_router_time_to_first_token_seconds", "From the request to the first token, loads and waits included.",
            ("model",), buckets=_WAITS, registry=registry,
        )  # fmt: skip
        self.between_tokens = Histogram(
            "mlx_router_time_between_tokens_seconds", "Mean time between two tokens of an answer, one value an answer.",
            ("model",), buckets=_TOKENS, registry=registry,
        )  # fmt: skip
        self.queue_wait = Histogram(
            "mlx_router_queue_wait_seconds", "From the request to its lease: loads, and waits for others.", ("model",),
            buckets=_WAITS, registry=registry,
        )  # fmt: skip
        self.loads = Counter("mlx_router_loads", "Models that became ready.", ("model",), registry=registry)
        self.unloads = Counter("mlx_router_unloads", "Models that left, by why.", ("model", "cause"), registry=registry)
        self.evictions = Counter(
            "mlx_router_evictions", "Models that left for another one or for the machine, by why.",
            ("model", "cause"), registry=registry,
        )  # fmt: skip
        self.failures = Counter(
            "mlx_router_worker_failures", "Loads that failed, and workers that died or hung.", ("model",),
            registry=registry,
        )  # fmt: skip
        self.stages = Histogram(
            "mlx_router_swap_stage_seconds", "Stages of coming and leaving.", ("stage",), buckets=_WAITS,
            registry=registry,
        )  # fmt: skip
        self.kills = Counter("mlx_router_kill_incidents", "Workers that had to be killed.", registry=registry)
        self.stranded = Counter(
            "mlx_router_stranded_incidents", "Workers whose memory was not seen to come back.", registry=registry
        )
        self.returned = Counter(
            "mlx_router_memory_returned_bytes", "Memory that came back from workers that ended.", registry=registry
        )
        self.loop_lag = Histogram(
            "mlx_router_loop_lag_seconds", "How late the router's event loop was, looked at once a second.",
            buckets=_LAGS, registry=registry,
        )  # fmt: skip
        self._now = _Gauges(registry)

    def observe(self, happening: Happening) -> None:
        """Called by ``Happenings`` with each."""
        data = happening.data
        match happening.kind:
            case "request_ended":
                self._answered(data)
            case "loaded":
                self.loads.labels(data["model"]).inc()
                self._note_stages(_LOAD_STAGES, data)
            case "unloaded":
                self._unloaded(data)
            case "decision" if data["what"] == "worker_failed":
                self.failures.labels(data["model"]).inc()

    def _answered(self, data: dict[str, object]) -> None:
        model = data["model"] if data["known"] else ""
        self.answers.labels(model, data["outcome"]).inc()
        for counter, name in ((self.prompt_tokens, "prompt_tokens"), (self.completion_tokens, "completion_tokens")):
            counter.labels(model).inc(_number(data[name]))
        for histogram, name in (
            (self.first_token, "first_token_seconds"), (self.between_tokens, "between_tokens_seconds"),
            (self.queue_wait, "waited_seconds"),
        ):  # fmt: skip
            if data[name] is not None:
                histogram.labels(model).observe(_number(data[name]))

    def _unloaded(self, data: dict[str, object]) -> None:
        model, cause = data["model"], data["cause"]
        self.unloads.labels(model, cause).inc()
        if cause in ("evicted", "pressure"):
            self.evictions.labels(model, cause).inc()
        self._note_stages(_LEAVE_STAGES, data)
        self.kills.inc(data["rung"] == "kill")
        self.stranded.inc(data["verdict"] == "stranded")
        self.returned.inc(max(_number(data["returned_bytes"]), 0))

    def _note_stages(self, stages: tuple[str, ...], data: dict[str, object]) -> None:
        for stage in stages:
            self.stages.labels(stage).observe(_number(data[f"{stage}_seconds"]))

    def render(self, accept: str, figures: RouterFigures) -> tuple[bytes, str]:
        """The exposition and its media type, in the form that a scraper's Accept header asks for."""
        self._now.set(figures)
        encode, media_type = choose_encoder(accept)
        return encode(self._registry), media_type


def _number(value: object) -> float:
    assert isinstance(value, int | float)
    return float(value)


class _Gauges:
    """What is set right before a scrape is answered."""

    def __init__(self, registry: CollectorRegistry) -> None:
        def gauge(name: str, text: str, labels: tuple[str, ...] = ()) -> Gauge:
            return Gauge(f"mlx_router_{name}", text, labels, registry=registry)

        self._info = gauge("info", "Always 1; the version of the router.", ("version",))
        self._started = gauge("start_time_seconds", "When the router started, seconds since 1970.")
        self._budget = gauge("memory_budget_bytes", "What all models may use together.")
        self._reserved = gauge("memory_reserved_bytes", "What is reserved of it.")
        self._available = gauge("memory_available_bytes", "What the machine has free.")
        self._total = gauge("memory_total_bytes", "What the machine has.")
        self._standby = gauge("standby_workers", "Idle worker processes that wait for a model.")
        self._state = gauge("model_state", "1 for the state that a model is in.", ("model", "state"))
        self._leases = gauge("leases", "Requests that use a model now.", ("model",))
        self._waiting = gauge("waiting", "Requests that wait for a model.", ("model",))
        self._model_reserved = gauge("model_memory_reserved_bytes", "What is reserved for a model.", ("model",))
        self._measured = gauge("model_memory_measured_bytes", "What a model's worker holds.", ("model",))

    def set(self, figures: RouterFigures) -> None:
        self._info.labels(figures.version).set(1)
        self._started.set(figures.started_at)
        self._budget.set(figures.budget_bytes)
        self._reserved.set(figures.reserved_bytes)
        self._available.set(figures.available_bytes)
        self._total.set(figures.total_bytes)
        self._standby.set(figures.standby_workers)
        for gauge in (self._state, self._leases, self._waiting, self._model_reserved, self._measured):
            gauge.clear()  # a model that was removed is no longer told of
        for model in figures.models:
            self._state.labels(model.name, model.state).set(1)
            self._leases.labels(model.name).set(model.leases)
            self._waiting.labels(model.name).set(model.waiting)
            self._model_reserved.labels(model.name).set(model.reserved_bytes)
            self._measured.labels(model.name).set(model.memory_bytes)
