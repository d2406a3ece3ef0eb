"""What the lifecycle is told (events, past tense) and what it wants done (effects, imperative)."""

from __future__ import annotations

from dataclasses import dataclass, field

from mlx_router_server.lifecycle.limits import Limits
from mlx_router_server.lifecycle.memory import MemoryReading
from mlx_router_server.lifecycle.spec import ModelSpec, Share
from mlx_router_server.lifecycle.states import Cause, State
from mlx_router_shared.errors import MlxRouterError

__all__ = [
    "BudgetLearned",
    "CancelStreams",
    "Decided",
    "Effect",
    "Event",
    "Grant",
    "LeaseRequested",
    "LeaseReturned",
    "LimitsChanged",
    "LoadProgressed",
    "LoadWanted",
    "MemoryRead",
    "Moved",
    "PinChanged",
    "Refuse",
    "SetShare",
    "ShutdownHastened",
    "ShutdownRequested",
    "StartWorker",
    "StopWorker",
    "Ticked",
    "TrimMemory",
    "UnloadRequested",
    "WorkerExited",
    "WorkerFailed",
    "WorkerReady",
    "WorkerReclaimed",
    "WorkerStarted",
]


# ---------------------------------------------------------------------------------------------------- events


@dataclass(frozen=True, slots=True, kw_only=True)
class LeaseRequested:
    """Somebody wants to use a model; ``keep_alive_seconds`` None leaves the duration as it is."""

    ticket: str
    spec: ModelSpec
    keep_alive_seconds: float | None = None
    priority: int = 0
    deadline_seconds: float | None = None
    """From now; a request that cannot begin by then is refused."""
    explicit: bool = False
    """An operator's load: clears what earlier failures left behind."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LeaseReturned:
    """A ticket is not needed any more, whether it was granted or still waited. Idempotent."""

    ticket: str


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadWanted:
    """A model shall be loaded for nobody in particular, if that costs nobody anything."""

    spec: ModelSpec
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class UnloadRequested:
    """A model shall leave once nobody uses it; a model that is not loaded is left alone."""

    model: str
    reason: str = "requested"
    by_client: bool = False
    """Within what the operator allows: pins, minimum and lock of keep_alive hold."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PinChanged:
    """The operator pins a model, or takes the pin off, until the router ends."""

    spec: ModelSpec
    pinned: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerStarted:
    """The worker of a model has said hello and was told to load."""

    worker: str


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadProgressed:
    """A worker tells how far its load is, from 0 to 1."""

    worker: str
    fraction: float


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerReady:
    """The model of this worker is loaded; ``memory_bytes`` is what the worker holds now."""

    worker: str
    memory_bytes: int
    load_seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerFailed:
    """The worker did not get its model loaded, or does not get on; it may still be alive."""

    worker: str
    error: MlxRouterError
    hung: bool = False
    """It does not do what it is told either: it gets no time for an orderly end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerExited:
    """The process of this worker has been reaped, expected or not."""

    worker: str
    error: MlxRouterError
    was_stopped: bool = False
    """It exited on a SIGTERM that this router did not send; that is not counted as a failure of its model."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerReclaimed:
    """The memory of this worker was seen to be back, or was given up on after its time limit."""

    worker: str


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryRead:
    """The machine's memory was looked at."""

    reading: MemoryReading


@dataclass(frozen=True, slots=True, kw_only=True)
class BudgetLearned:
    """A worker told what its device recommends; 0 wired bytes where nothing is wired."""

    budget_bytes: int
    wired_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LimitsChanged:
    """The operator has changed what is allowed; what has been granted stays granted."""

    limits: Limits


@dataclass(frozen=True, slots=True, kw_only=True)
class ShutdownRequested:
    """The router leaves: refuse, drain, stop everything."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ShutdownHastened:
    """Now: running requests are ended with a visible error."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ticked:
    """A deadline named by ``next_deadline`` has come."""


Event = (
    LeaseRequested
    | LeaseReturned
    | LoadWanted
    | UnloadRequested
    | PinChanged
    | WorkerStarted
    | LoadProgressed
    | WorkerReady
    | WorkerFailed
    | WorkerExited
    | WorkerReclaimed
    | MemoryRead
    | BudgetLearned
    | LimitsChanged
    | ShutdownRequested
    | ShutdownHastened
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
    share: Share
    waited_seconds: float
    """How long the first request has waited for room."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SetShare:
    """A measurement has changed what this worker may use."""

    worker: str
    share: Share


@dataclass(frozen=True, slots=True, kw_only=True)
class TrimMemory:
    """Have this worker give back what it keeps without needing it."""

    worker: str


@dataclass(frozen=True, slots=True, kw_only=True)
class StopWorker:
    """Go down the stop ladder, then watch the memory come back."""

    worker: str
    cause: Cause
    reason: str
    successor: str | None = None
    """The model that gets the room."""
    drain_seconds: float = 0.0
    """How long its last requests took to finish."""
    hung: bool = False
    """No time for an orderly end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CancelStreams:
    """The drain limit is over: end the running requests of this worker with a visible error."""

    worker: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Moved:
    """A model is in another state; for those who watch."""

    model: str
    old: State
    new: State
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Decided:
    """One line for the log: a decision that was taken, with its reason."""

    what: str
    model: str
    fields: dict[str, str | int | float] = field(default_factory=dict)


Effect = Grant | Refuse | StartWorker | SetShare | TrimMemory | StopWorker | CancelStreams | Moved | Decided
