"""What is handed to the supervisor and what it shows of its workers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mlx_router_server.lifecycle.limits import Limits
from mlx_router_server.lifecycle.memory import MemoryReading
from mlx_router_server.lifecycle.spec import ModelSpec
from mlx_router_server.workers.memory import read_memory
from mlx_router_server.workers.source import SourceKind
from mlx_router_shared.protocol import ModelFacts

__all__ = ["Failure", "LoadPlan", "SupervisorOptions", "Wishes", "WorkerView"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SupervisorOptions:
    """What the operator decides; times in seconds."""

    limits: Limits
    worker_source: SourceKind = SourceKind.AUTO
    standby_workers: int = 1
    load_timeout_seconds: float = 600.0
    warm_up_timeout_seconds: float = 60.0
    stop_timeout_seconds: float = 10.0
    prefill_share: float = 0.46
    longest_gap_ms: float = 150.0
    prefix_cache_bytes: int = 0
    """The most that each worker keeps of prompts and answers; it keeps less where requests need the memory."""
    stall_timeout_seconds: float = 120.0
    """0: a worker may take as long as it likes for one step."""
    measurements: Path | None = None
    """Where measured sizes are remembered; None: only as long as the router lives."""
    learn_budget: bool = False
    """The budget is ours to choose: a device that recommends one is followed (macOS)."""
    read_memory: Callable[[], MemoryReading] = read_memory
    memory_interval_seconds: float = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadPlan:
    """A model and everything that is needed to load it."""

    spec: ModelSpec
    path: str
    engine: str
    context_tokens: int
    parallel: int
    measured_as: str
    """The key under which measurements of this load are remembered."""
    adapter: str = ""
    """The folder of a LoRA adapter, or nothing."""
    draft: str = ""
    """The folder of a model that guesses ahead, or nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wishes:
    """What a request says about how it wants to be served, apart from what it asks."""

    keep_alive_seconds: float | None = None
    priority: int = 0
    deadline_seconds: float | None = None
    cache_prompt: bool = True
    """Whether states of its prompt and answer may be kept, and kept ones be used."""
    cache_scope: str = ""
    """Which requests it shares kept states with: those of the same API key."""
    explicit: bool = False
    """An operator's load, which forgets earlier failures."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerView:
    """What is known of a model's worker at this moment."""

    pid: int
    stage: str
    fraction: float
    memory_bytes: int
    streams: int
    tokens_total: int
    facts: ModelFacts | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """How a worker of a model last failed; for the operator, so with every detail."""

    at: float
    """Wall clock."""
    reason: str
    stderr_tail: tuple[str, ...]
