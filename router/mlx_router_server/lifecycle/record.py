"""What is remembered of one model."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from mlx_router_server.lifecycle.admission import Resident
from mlx_router_server.lifecycle.queueing import Turn, WaitQueue
from mlx_router_server.lifecycle.spec import ModelSpec, Share
from mlx_router_server.lifecycle.states import HOLDS_MEMORY, Cause, State
from mlx_router_server.lifecycle.views import ModelView

__all__ = ["Departure", "ModelRecord"]

_EWMA = 0.3


@dataclass(frozen=True, slots=True)
class Departure:
    """Why a model leaves: a word to count and a sentence to read."""

    cause: Cause
    reason: str


@dataclass(slots=True)
class ModelRecord:
    """Mutable, and changed by ``Lifecycle`` alone."""

    spec: ModelSpec
    state: State = State.UNLOADED
    since: float = 0.0
    queue: WaitQueue = field(default_factory=WaitQueue)
    wanted: str = ""
    """Why it shall be loaded although nobody waits: preload, or restoring; empty when it need not."""
    reason: str = ""
    cause: Cause = Cause.OPERATOR
    """Why it drains; means nothing in other states."""
    pinned_by_operator: bool | None = None

    # while it has a worker
    worker: str | None = None
    reserved_bytes: int = 0
    share: Share | None = None
    """The limits that its worker was given last."""
    memory_bytes: int = 0
    leases: dict[str, float] = field(default_factory=dict)
    """By ticket: since when."""
    fraction: float = 0.0
    content: str = ""
    """``spec.content`` at the time when the load began."""
    was_ready: bool = False
    started_at: float = 0.0
    ready_at: float = 0.0
    idle_since: float = 0.0
    turn: Turn | None = None
    keep_alive_seconds: float | None = None
    """The duration of the last request that named one, since the load."""
    expires_at: float | None = None
    told_to_leave: Departure | None = None
    """It goes as soon as nobody uses it, whatever its keep-alive."""
    failed: bool = False
    """The worker that is being stopped failed; says where to go once it is gone."""
    drain_deadline: float = math.inf
    cut: bool = False
    """Its streams were told to end; whoever does not even read that is not waited for much longer."""
    evicted_for: str | None = None
    """The model that wants the room; None when it leaves for another reason, and then in any case."""

    # while it waits for room
    yields_to: str | None = None
    """Who got its room; goes first, however long somebody has waited for this one."""
    waiting_for: tuple[str, ...] = ()
    look_again_at: float = math.inf
    """When somebody in its way may be asked to leave."""
    displaced: list[str] = field(default_factory=list)
    """Who was evicted for it and may be brought back if it fails."""

    # over all its workers
    last_used: float = 0.0
    load_seconds: float = 0.0
    lease_seconds: float = 0.0
    """A running mean of how long requests take; 0 when none was seen."""
    loads: int = 0
    failures: int = 0
    retry_at: float = 0.0

    @property
    def pinned(self) -> bool:
        return self.spec.pinned if self.pinned_by_operator is None else self.pinned_by_operator

    @property
    def keep_alive(self) -> float:
        """Seconds that an idle model stays; infinite: for ever."""
        return math.inf if self.pinned else self.spec.keep_alive.effective(self.keep_alive_seconds)

    @property
    def stays(self) -> bool:
        """Pinned by the operator, or asked to stay for ever by a request: never evicted."""
        return self.keep_alive == math.inf

    @property
    def loading(self) -> bool:
        return self.state in (State.STARTING, State.LOADING)

    def note_lease_end(self, seconds: float) -> None:
        self.lease_seconds += _EWMA * (seconds - self.lease_seconds) if self.lease_seconds else seconds

    def movable_at(self, min_residency_seconds: float) -> float:
        """From when on it may be asked to leave; infinite: not at all."""
        if self.state is not State.READY or self.stays:
            return math.inf
        if self.told_to_leave:
            return self.ready_at
        at = self.ready_at + min_residency_seconds
        if self.turn is not None:
            at = max(at, self.turn.over_at(idle_since=None if self.leases else self.idle_since))
        return at

    def resident(self, min_residency_seconds: float) -> Resident | None:
        """The record as admission sees it; None when it holds no memory."""
        if self.state not in HOLDS_MEMORY:
            return None
        return Resident(
            model=self.spec.name,
            reserved_bytes=self.reserved_bytes,
            leaving=self.state in (State.DRAINING, State.STOPPING),
            stopping=self.state is State.STOPPING,
            movable_at=self.movable_at(min_residency_seconds),
            settling=self.loading and not self.stays,
            in_flight=len(self.leases),
            load_seconds=self.load_seconds,
            last_used=self.last_used,
        )

    def view(self) -> ModelView:
        return ModelView(
            name=self.spec.name,
            state=self.state,
            since=self.since,
            worker=self.worker,
            reserved_bytes=self.reserved_bytes,
            memory_bytes=self.memory_bytes,
            in_flight=len(self.leases),
            queued=len(self.queue),
            pinned=self.pinned,
            expires_at=self.expires_at,
            loads=self.loads,
            failures=self.failures,
            retry_at=self.retry_at,
            reason=self.reason,
            waiting_for=self.waiting_for,
        )
