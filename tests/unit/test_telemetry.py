"""Rings and figures, without a router."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from mlx_router_server.access.keys import KeyRing
from mlx_router_server.api import errors
from mlx_router_server.api.meter import Meter
from mlx_router_server.api.ring_stream import RingStream
from mlx_router_server.app import create_app
from mlx_router_server.lifecycle.states import Cause
from mlx_router_server.settings import Settings
from mlx_router_server.telemetry.events import Happenings
from mlx_router_server.telemetry.inspection import Inspected, Inspection
from mlx_router_server.telemetry.logs import CURRENT_REQUEST, LogRing
from mlx_router_server.telemetry.metrics import Metrics, ModelFigures, RouterFigures
from mlx_router_server.telemetry.ring import Ring
from mlx_router_server.workers.timings import EvictionTimings, SwapTimings
from mlx_router_shared.errors import ModelNotFound


def _figures(*models: ModelFigures) -> RouterFigures:
    return RouterFigures(
        version="1", started_at=2.0, budget_bytes=3, reserved_bytes=4, available_bytes=5, total_bytes=6,
        standby_workers=1, models=models,
    )  # fmt: skip


def _values(metrics: Metrics, *models: ModelFigures) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    body, media_type = metrics.render("", _figures(*models))
    assert media_type.startswith("text/plain")
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(body.decode())
        for sample in family.samples
    }


def _at(values: dict[tuple[str, frozenset[tuple[str, str]]], float], name: str, **labels: str) -> float:
    return values.get((f"mlx_router_{name}", frozenset(labels.items())), 0.0)


def _eviction(**more: object) -> EvictionTimings:
    known: dict[str, object] = {
        "model": "a", "cause": Cause.EVICTED, "reason": "evicted for b", "drain_seconds": 0.5, "exit_seconds": 0.1,
        "reap_seconds": 0.01, "memory_back_seconds": 0.2, "held_bytes": 100, "returned_bytes": 90,
        "verdict": "returned", "rung": "shutdown",
    }  # fmt: skip
    return EvictionTimings(**(known | more))  # type: ignore[arg-type]


def test_what_is_told_is_counted() -> None:
    metrics, happenings = Metrics(), Happenings()
    happenings.observers.append(metrics.observe)
    ended = {
        "model": "a", "known": True, "outcome": "ok", "prompt_tokens": 7, "completion_tokens": 11,
        "first_token_seconds": 0.02, "between_tokens_seconds": 0.004, "waited_seconds": 0.001,
    }  # fmt: skip
    happenings.tell("request_ended", **ended)
    happenings.tell("request_ended", **ended)
    refused = dict.fromkeys(("first_token_seconds", "between_tokens_seconds", "waited_seconds"))
    happenings.tell("request_ended", **ended | refused | {"known": False, "outcome": "model_not_found"})
    timings = SwapTimings(model="a", started_at=1.0)
    timings.weights_seconds = 3.0
    happenings.tell("loaded", **timings.as_dict())
    happenings.tell("unloaded", **_eviction().as_dict())
    happenings.tell("unloaded", **_eviction(cause=Cause.IDLE, rung="kill", verdict="stranded").as_dict())
    happenings.tell("decision", what="worker_failed", model="a", reason="x")
    happenings.tell("decision", what="waiting", model="a", reason="x")
    values = _values(metrics)
    assert _at(values, "answers_total", model="a", outcome="ok") == 2
    assert _at(values, "answers_total", model="", outcome="model_not_found") == 1, "a name is no label before it is one"
    assert _at(values, "prompt_tokens_total", model="a") == 14
    assert _at(values, "completion_tokens_total", model="a") == 22
    assert _at(values, "time_to_first_token_seconds_count", model="a") == 2
    assert _at(values, "time_to_first_token_seconds_bucket", model="a", le="0.025") == 2
    assert _at(values, "time_to_first_token_seconds_bucket", model="a", le="0.01") == 0
    assert _at(values, "time_between_tokens_seconds_sum", model="a") == pytest.approx(0.008)
    assert _at(values, "queue_wait_seconds_count", model="a") == 2
    assert _at(values, "loads_total", model="a") == 1
    assert _at(values, "swap_stage_seconds_sum", stage="weights") == 3
    assert _at(values, "swap_stage_seconds_sum", stage="drain") == 1
    assert _at(values, "unloads_total", model="a", cause="evicted") == 1
    assert _at(values, "unloads_total", model="a", cause="idle") == 1
    assert _at(values, "evictions_total", model="a", cause="evicted") == 1
    assert _at(values, "evictions_total", model="a", cause="idle") == 0
    assert _at(values, "worker_failures_total", model="a") == 1
    assert _at(values, "kill_incidents_total") == 1
    assert _at(values, "stranded_incidents_total") == 1
    assert _at(values, "memory_returned_bytes_total") == 180


def test_a_defect_is_counted_as_500_and_named_like_any_other_answer() -> None:
    async def boom(request: Request) -> Response:
        raise ZeroDivisionError

    async def half(request: Request) -> Response:
        async def parts() -> AsyncGenerator[bytes, None]:
            yield b"x"
            raise ZeroDivisionError

        return StreamingResponse(parts())

    async def left(request: Request) -> Response:
        raise ClientDisconnect

    app = Starlette(
        routes=[Route("/api/boom", boom), Route("/v1/boom", boom), Route("/half", half), Route("/left", left)],
        middleware=[Middleware(Meter), Middleware(errors.LastResort)],
    )
    errors.install(app)
    app.state.server = SimpleNamespace(metrics=(metrics := Metrics()), keys=KeyRing((), None))
    client = TestClient(app, raise_server_exceptions=False)
    assert client.get("/api/boom").json() == {"error": "internal server error"}
    assert client.get("/v1/boom").json()["error"]["type"] == "api_error"
    client.get("/half")
    client.get("/left")
    counted = {
        (dict(labels)["route"], dict(labels)["status"]): value
        for (name, labels), value in _values(metrics).items() if name == "mlx_router_requests_total"
    }  # fmt: skip
    assert counted == {("/api/boom", "500"): 1, ("/v1/boom", "500"): 1, ("/half", "200"): 1, ("/left", "499"): 1}


def test_the_last_resort_is_the_innermost_layer_of_the_application() -> None:
    """Else what it answers is not counted, named or kept like other answers."""
    layers: list[Any] = [layer.cls for layer in create_app(Settings()).user_middleware]
    assert layers[-1] is errors.LastResort
    assert layers[0] is Meter


def test_a_model_that_is_gone_is_no_longer_told_of() -> None:
    metrics = Metrics()
    model = ModelFigures(name="a", state="ready", leases=2, waiting=3, reserved_bytes=10, memory_bytes=9)
    values = _values(metrics, model)
    assert _at(values, "model_state", model="a", state="ready") == 1
    assert [_at(values, name, model="a") for name in ("leases", "waiting")] == [2, 3]
    assert _at(values, "model_memory_measured_bytes", model="a") == 9
    assert (_at(values, "memory_budget_bytes"), _at(values, "info", version="1")) == (3, 1)
    assert not [name for name, labels in _values(metrics) if ("model", "a") in labels]


def test_two_applications_count_apart() -> None:
    one, other = Metrics(), Metrics()
    one.in_progress.inc()
    assert _at(_values(one), "requests_in_progress") == 1
    assert _at(_values(other), "requests_in_progress") == 0


def test_openmetrics_is_given_to_who_asks() -> None:
    body, media_type = Metrics().render("application/openmetrics-text; version=1.0.0", _figures())
    assert media_type.startswith("application/openmetrics-text")
    assert body.endswith(b"# EOF\n")


async def _read(ring: Ring[int], after: int | None, most: int) -> list[tuple[int, int]]:
    found: list[tuple[int, int]] = []
    async for items in ring.follow(after):
        found += items
        if len(found) >= most:
            break
    return found


def test_a_slow_reader_loses_nothing_within_the_ring_and_sees_what_it_lost() -> None:
    async def play() -> None:
        ring: Ring[int] = Ring(5)
        reader = ring.follow()
        first = asyncio.ensure_future(anext(reader))
        await asyncio.sleep(0)
        for number in range(1, 4):
            ring.add(number * 10)
        got = list(await first)
        for number in range(4, 14):
            ring.add(number * 10)
        got += await anext(reader)
        assert got[0] == (1, 10)
        assert got[-5:] == [(9, 90), (10, 100), (11, 110), (12, 120), (13, 130)]
        assert [number for number, _ in got] == sorted({number for number, _ in got}), "nothing twice"
        assert await _read(ring, 10, 3) == [(11, 110), (12, 120), (13, 130)]
        assert await _read(ring, 0, 5) == got[-5:]
        waiting = asyncio.ensure_future(anext(reader))
        await asyncio.sleep(0)
        ring.close()
        with pytest.raises(StopAsyncIteration):
            await waiting
        assert ring.since(12) == [(13, 130)]

    asyncio.run(play())


def test_lines_come_from_any_thread_and_name_their_request() -> None:
    async def play() -> None:
        handler = LogRing()
        log = logging.getLogger("ring-test")
        log.propagate = False
        log.setLevel("INFO")
        log.addHandler(handler)
        CURRENT_REQUEST.set("req_1")
        log.info("event=a model=%r", "m:latest")
        log.info("event=b request=%s text=%r", "req_2", "x\ny")
        await asyncio.to_thread(log.warning, "event=c worker=%s", "m:latest")
        await asyncio.sleep(0)
        lines = [line for _, line in handler.ring.since(0)]
        log.removeHandler(handler)
        assert [line.text for line in lines] == [
            "event=a model='m:latest' request=req_1", "event=b request=req_2 text='x\\ny'",
            "event=c worker=m:latest request=req_1",
        ]  # fmt: skip
        assert [line.is_about(frozenset({"m:latest"})) for line in lines] == [True, False, True]
        assert [line.level for line in lines] == ["info", "info", "warning"]

    asyncio.run(play())


def _inspected(request: str) -> Inspected:
    return Inspected(request=request, at=0.0, method="POST", path="/api/chat", headers=[])


def test_only_so_many_requests_are_kept_and_none_when_it_is_off() -> None:
    inspection = Inspection()
    inspection.add(_inspected("lost"))
    assert inspection.newest_first() == []
    inspection.configure(2)
    for name in ("a", "b", "c"):
        inspection.add(_inspected(name))
    assert [kept.request for kept in inspection.newest_first()] == ["c", "b"]
    assert inspection.find("b").request == "b"
    with pytest.raises(ModelNotFound):
        inspection.find("a")
    inspection.configure(0)
    assert inspection.newest_first() == []


def test_of_a_long_body_the_beginning_is_kept_and_the_length() -> None:
    inspected = _inspected("a")
    for _ in range(5):
        inspected.body.add(b"x" * 100_000)
    whole = inspected.whole()["body"]
    assert (whole["bytes"], whole["cut"], len(whole["text"])) == (500_000, True, 256 * 1024)


@pytest.mark.parametrize(("after", "missed"), [(0, 3), (2, 1), (3, 0), (99, 3), (None, 0)])
def test_a_stream_tells_how_much_its_reader_has_missed(after: int | None, missed: int) -> None:
    """Of five items the ring has kept two; 99 is a number of a router from before."""

    async def play() -> bytes:
        ring: Ring[int] = Ring(2)
        for item in range(1, 6):
            ring.add(item)
        ring.close()
        body = b""

        async def receive() -> Any:
            await asyncio.Event().wait()

        async def send(message: Any) -> None:
            nonlocal body
            body += message.get("body", b"")

        await RingStream(ring, after, lambda item: ("item", {"value": item}))({"type": "http"}, receive, send)
        return body

    told = asyncio.run(play()).decode()
    assert (f'event: missed\ndata: {{"count":{missed}}}\n\n' in told) == (missed > 0)
    assert told.count("event: item") == (0 if after is None else 2)
