"""The books of the lifecycle: every record, who has which ticket, and the effects of the event that is being handled.

The rooms beside this one (``room``, ``service``, ``ends``) decide; what they share stands here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final

from mlx_router_server.lifecycle.events import Decided, Effect, Moved, Refuse, SetShare
from mlx_router_server.lifecycle.limits import Limits
from mlx_router_server.lifecycle.memory import MemoryReading, Pressure, share_of
from mlx_router_server.lifecycle.queueing import Waiter
from mlx_router_server.lifecycle.record import ModelRecord
from mlx_router_server.lifecycle.spec import ModelSpec, Share
from mlx_router_server.lifecycle.states import HOLDS_MEMORY, State, check_transition
from mlx_router_shared.errors import MlxRouterError

__all__ = ["Books"]

_SHARES_SURPLUS: Final = (State.STARTING, State.LOADING, State.READY, State.DRAINING)


class Books:
    """Knows every model that was ever asked for since the start; the catalogue knows the others."""

    def __init__(self, limits: Limits, new_worker_id: Callable[[], str]) -> None:
        self.limits = limits
        self.new_worker_id = new_worker_id
        self.records: dict[str, ModelRecord] = {}
        self.by_worker: dict[str, ModelRecord] = {}
        self.by_ticket: dict[str, ModelRecord] = {}
        self.effects: list[Effect] = []
        self.leaving = False
        self.memory: MemoryReading | None = None

    def record(self, spec: ModelSpec, now: float) -> ModelRecord:
        """The record of this model, with what is known of it now."""
        record = self.records.setdefault(spec.name, ModelRecord(spec=spec, since=now))
        record.spec = spec
        if not record.loads and spec.load_seconds is not None:
            record.load_seconds = spec.load_seconds
        return record

    def in_state(self, *states: State) -> Iterator[ModelRecord]:
        return (record for record in list(self.records.values()) if record.state in states)

    @property
    def waiting(self) -> int:
        return sum(len(record.queue) for record in self.records.values())

    @property
    def reserved_bytes(self) -> int:
        """Promised to workers that are starting, loaded or on their way out."""
        return sum(record.reserved_bytes for record in self.in_state(*HOLDS_MEMORY))

    @property
    def pressure(self) -> Pressure:
        return self.memory.pressure if self.memory is not None else Pressure.NORMAL

    def contended(self, record: ModelRecord) -> bool:
        """Somebody waits for room, and not for this model's own."""
        return any(other is not record and len(other.queue) for other in self.in_state(State.QUEUED))

    def share(self, record: ModelRecord) -> Share:
        """Return the limits of its worker: its reservation, and an equal part of what no worker has reserved."""
        sharing = sum(1 for _ in self.in_state(*_SHARES_SURPLUS))
        surplus = max(self.limits.budget_bytes - self.reserved_bytes, 0) // max(sharing, 1)
        return share_of(
            record.reserved_bytes, budget_bytes=self.limits.budget_bytes, wired_bytes=self.limits.wired_bytes,
            loaded_bytes=record.memory_bytes or record.spec.loaded_bytes, surplus_bytes=surplus,
        )  # fmt: skip

    def update_shares(self) -> None:
        """Tell each worker whose limits have changed."""
        for record in self.in_state(*_SHARES_SURPLUS):
            share = self.share(record)
            if record.worker is not None and share != record.share:
                record.share = share
                self.effects.append(SetShare(worker=record.worker, share=share))

    # -------------------------------------------------------------- writing down

    def move(self, record: ModelRecord, state: State, now: float) -> None:
        check_transition(record.spec.name, record.state, state)
        self.effects.append(Moved(model=record.spec.name, old=record.state, new=state, reason=record.reason))
        record.state = state
        record.since = now

    def decided(self, what: str, model: str, **fields: str | int | float) -> None:
        self.effects.append(Decided(what=what, model=model, fields=fields))

    def refuse(self, waiter: Waiter, error: MlxRouterError) -> None:
        """Tell somebody who was taken out of a queue."""
        self.by_ticket.pop(waiter.ticket, None)
        self.effects.append(Refuse(ticket=waiter.ticket, error=error))

    def refuse_all(self, record: ModelRecord, error: MlxRouterError) -> None:
        for waiter in record.queue.take_all():
            self.refuse(waiter, error)

    def drop_if_unwanted(self, record: ModelRecord, now: float) -> None:
        """A model in the queue for which nobody waits any more leaves it."""
        if record.state is State.QUEUED and not record.queue and not record.wanted:
            record.waiting_for = ()
            self.move(record, State.UNLOADED, now)
