"""What the lifecycle is told (events, past tense) and what it wants done (effects, imperative)."""

from __future__ import annotations

from dataclasses import dataclass, field

from mlx_router_shared.errors import MlxRouterError

__all__ = [
    "CancelStreams",
    "Decided",
    "Effect",
    "Event",
    "Grant",
    "LeaseRequested",
    "LeaseReturned",
    "ModelSpec",
    "Refuse",
    "ShutdownRequested",
    "StartWorker",
    "StopWorker",
    "Ticked",
    "UnloadRequested",
    "WorkerExited",
    "WorkerFailed",
    "WorkerReady",
    "WorkerReclaimed",
    "WorkerStarted",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """What has to be known of a model to decide about it."""

    name: str
    estimate_bytes: int
    pinned: bool = False
    keep_alive_seconds: float = 300.0
    """For requests that do not say; infinite: for ever."""


# ---------------------------------------------------------------------------------------------------- events


@dataclass(frozen=True, slots=True, kw_only=True)
class LeaseRequested:
    """Somebody wants to use a model; ``keep_alive_seconds`` None leaves the duration as it is."""

    ticket: str
    spec: ModelSpec
    keep_alive_seconds: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LeaseReturned:
    """A ticket is not needed any more, whether it was granted or still waited. Idempotent."""

    ticket: str


@dataclass(frozen=True, slots=True, kw_only=True)
class UnloadRequested:
    """A model shall leave once nobody uses it; a model that is not loaded is left alone."""

    model: str
    reason: str = "requested"


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerStarted:
    """The worker of a model has said hello and was told to load."""

    worker: str


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerReady:
    """The model of this worker is loaded; ``memory_bytes`` is what the worker holds now."""

    worker: str
    memory_bytes: int
    load_seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerFailed:
    """The worker did not get its model loaded; it may still be alive."""

    worker: str
    error: MlxRouterError


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerExited:
    """The process of this worker has been reaped, expected or not."""

    worker: str
    error: MlxRouterError


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerReclaimed:
    """The memory of this worker was seen to be back, or was given up on after its time limit."""

    worker: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ShutdownRequested:
    """The router leaves: refuse, drain, stop everything."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ticked:
    """A deadline named by ``next_deadline`` has come."""


Event = (
    LeaseRequested
    | LeaseReturned
    | UnloadRequested
    | WorkerStarted
    | WorkerReady
    | WorkerFailed
    | WorkerExited
    | WorkerReclaimed
    | ShutdownRequested
    | Ticked
)


# --------------------------------------------------------------------------------------------------- effects


@dataclass(frozen=True, slots=True, kw_only=True)
class Grant:
    """Let this ticket use this worker."""

    ticket: str
    worker: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Refuse:
    """Tell this ticket that it gets nothing, and why."""

    ticket: str
    error: MlxRouterError


@dataclass(frozen=True, slots=True, kw_only=True)
class StartWorker:
    """Get a process, from standby or new, and have it load the model."""

    worker: str
    model: str
    waited_seconds: float
    """How long the first request has waited for room."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StopWorker:
    """Go down the stop ladder, then watch the memory come back."""

    worker: str
    reason: str
    successor: str | None = None
    """The model that gets the room."""
    drain_seconds: float = 0.0
    """How long its last requests took to finish."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CancelStreams:
    """The drain limit is over: end the running requests of this worker with a visible error."""

    worker: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Decided:
    """One line for the log: a decision that was taken, with its reason."""

    what: str
    model: str
    fields: dict[str, str | int | float] = field(default_factory=dict)


Effect = Grant | Refuse | StartWorker | StopWorker | CancelStreams | Decided
