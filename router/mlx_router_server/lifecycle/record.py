"""What is remembered of one model, and what others may see of it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from mlx_router_server.lifecycle.admission import Resident
from mlx_router_server.lifecycle.events import ModelSpec
from mlx_router_server.lifecycle.states import HOLDS_MEMORY, State

__all__ = ["ModelRecord", "ModelView", "Waiter"]


@dataclass(frozen=True, slots=True)
class Waiter:
    """A ticket that was not granted yet; ``order`` counts requests of all models."""

    ticket: str
    order: int
    since: float
    keep_alive_seconds: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelView:
    """A copy of the facts of one model: may inform, must never gate (they are old when they are read).

    Times are those of the clock that was handed to the lifecycle.
    """

    name: str
    state: State
    since: float
    worker: str | None
    reserved_bytes: int
    memory_bytes: int
    in_flight: int
    queued: int
    pinned: bool
    expires_at: float | None
    """None while it is not loaded; infinite when it stays for ever."""
    loads: int
    failures: int
    reason: str
    """The last human sentence about why it is where it is."""
    waiting_for: tuple[str, ...]


@dataclass(slots=True)
class ModelRecord:
    """Mutable, and changed by ``Lifecycle`` alone."""

    spec: ModelSpec
    state: State = State.UNLOADED
    since: float = 0.0
    worker: str | None = None
    reserved_bytes: int = 0
    memory_bytes: int = 0
    waiters: dict[str, Waiter] = field(default_factory=dict)
    leases: set[str] = field(default_factory=set)
    keep_alive_seconds: float | None = None
    """The duration of the last request that named one, since the load."""
    expires_at: float | None = None
    last_used: float = 0.0
    load_seconds: float = 0.0
    loads: int = 0
    failures: int = 0
    was_ready: bool = False
    failed: bool = False
    """The worker that is being stopped failed; says where to go once it is gone."""
    retry_at: float = 0.0
    reason: str = ""
    drain_deadline: float = math.inf
    evicted_for: str | None = None
    """The model that wants the room; None when it leaves for another reason, and then in any case."""
    waiting_for: tuple[str, ...] = ()

    @property
    def keep_alive(self) -> float:
        """Seconds that an idle model stays; infinite: for ever."""
        return self.spec.keep_alive_seconds if self.keep_alive_seconds is None else self.keep_alive_seconds

    @property
    def stays(self) -> bool:
        """Pinned by the operator, or asked to stay for ever by a request."""
        return self.spec.pinned or self.keep_alive == math.inf

    @property
    def oldest(self) -> int:
        """The order of its first waiter."""
        return next(iter(self.waiters.values())).order

    def resident(self) -> Resident | None:
        """The record as admission sees it; None when it holds no memory."""
        if self.state not in HOLDS_MEMORY:
            return None
        return Resident(
            model=self.spec.name,
            reserved_bytes=self.reserved_bytes,
            leaving=self.state in (State.DRAINING, State.STOPPING),
            movable=self.state is State.READY and not self.stays,
            settling=self.state in (State.STARTING, State.LOADING) and not self.stays,
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
            queued=len(self.waiters),
            pinned=self.spec.pinned,
            expires_at=self.expires_at,
            loads=self.loads,
            failures=self.failures,
            reason=self.reason,
            waiting_for=self.waiting_for,
        )
