"""The lifecycle of all models: events in, effects out, no I/O and no clock.

One owner calls ``handle``, one event at a time; nobody else changes anything here, so a look and the claim that
follows from it are one step. Whatever settles a question wakes everybody who asked it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import assert_never

from mlx_router_server.lifecycle.admission import (
    Admit,
    Blocked,
    Evict,
    TooLarge,
    Wait,
    choose_admission,
    human_bytes,
)
from mlx_router_server.lifecycle.backoff import FAILURES_BEFORE_GIVING_UP, pause_after
from mlx_router_server.lifecycle.events import (
    CancelStreams,
    Decided,
    Effect,
    Event,
    Grant,
    LeaseRequested,
    LeaseReturned,
    Refuse,
    ShutdownRequested,
    StartWorker,
    StopWorker,
    Ticked,
    UnloadRequested,
    WorkerExited,
    WorkerFailed,
    WorkerReady,
    WorkerReclaimed,
    WorkerStarted,
)
from mlx_router_server.lifecycle.record import ModelRecord, ModelView, Waiter
from mlx_router_server.lifecycle.states import HOLDS_MEMORY, State, check_transition
from mlx_router_shared.errors import (
    BackingOff,
    MemoryPinned,
    MlxRouterError,
    ModelTooLarge,
    Overloaded,
    ShuttingDown,
    Unavailable,
    WaitedTooLong,
)

__all__ = ["Lifecycle", "Limits"]

_WAITS_FOR_ROOM = (State.QUEUED, State.DRAINING, State.STOPPING)


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What the operator allows; 0 loaded models means as many as fit."""

    budget_bytes: int
    max_loaded_models: int = 0
    max_queue: int = 512
    queue_timeout_seconds: float = 600.0
    drain_timeout_seconds: float = 300.0


class Lifecycle:
    """Knows every model that was ever asked for since the start; the catalogue knows the others."""

    def __init__(self, limits: Limits, new_worker_id: Callable[[], str]) -> None:
        self._limits = limits
        self._new_worker_id = new_worker_id
        self._records: dict[str, ModelRecord] = {}
        self._by_worker: dict[str, ModelRecord] = {}
        self._by_ticket: dict[str, ModelRecord] = {}
        self._order = 0
        self._leaving = False
        self._effects: list[Effect] = []

    # ------------------------------------------------------------------ looking

    def views(self) -> list[ModelView]:
        return [record.view() for record in self._records.values()]

    def view(self, model: str) -> ModelView | None:
        record = self._records.get(model)
        return record.view() if record else None

    @property
    def reserved_bytes(self) -> int:
        """Promised to workers that are starting, loaded or on their way out."""
        return sum(r.reserved_bytes for r in self._records.values() if r.state in HOLDS_MEMORY)

    @property
    def waiting(self) -> int:
        return sum(len(record.waiters) for record in self._records.values())

    @property
    def workers(self) -> int:
        return len(self._by_worker)

    def next_deadline(self) -> float:
        """When ``Ticked`` is due; infinite when nothing waits for the clock."""
        deadlines = [math.inf]
        for record in self._records.values():
            if record.state is State.READY and not record.leases and record.expires_at is not None:
                deadlines.append(record.expires_at)
            if record.state is State.DRAINING:
                deadlines.append(record.drain_deadline)
            if record.state in _WAITS_FOR_ROOM and record.waiters:
                oldest = next(iter(record.waiters.values()))
                deadlines.append(oldest.since + self._limits.queue_timeout_seconds)
        return min(deadlines)

    # ----------------------------------------------------------------- deciding

    def handle(self, event: Event, now: float) -> list[Effect]:
        """Take one event at the time ``now`` (seconds, any origin, never backwards) and say what to do."""
        self._effects = []
        match event:
            case LeaseRequested():
                self._lease_requested(event, now)
            case LeaseReturned():
                self._lease_returned(event.ticket, now)
            case UnloadRequested():
                self._unload_requested(event, now)
            case WorkerStarted():
                if (record := self._by_worker.get(event.worker)) and record.state is State.STARTING:
                    self._move(record, State.LOADING, now)
            case WorkerReady():
                self._worker_ready(event, now)
            case WorkerFailed() | WorkerExited():
                self._worker_failed(event.worker, event.error, now)
            case WorkerReclaimed():
                self._worker_reclaimed(event.worker, now)
            case ShutdownRequested():
                self._shutdown_requested(now)
            case Ticked():
                self._ticked(now)
            case _:
                assert_never(event)
        self._admit_queued(now)
        return self._effects

    def _move(self, record: ModelRecord, state: State, now: float) -> None:
        check_transition(record.spec.name, record.state, state)
        record.state = state
        record.since = now

    def _decided(self, what: str, model: str, **fields: str | int | float) -> None:
        self._effects.append(Decided(what=what, model=model, fields=fields))

    # ----------------------------------------------------------------- requests

    def _lease_requested(self, event: LeaseRequested, now: float) -> None:
        record = self._records.setdefault(event.spec.name, ModelRecord(spec=event.spec, since=now))
        record.spec = event.spec
        self._order += 1
        if error := self._why_not(record, now):
            self._effects.append(Refuse(ticket=event.ticket, error=error))
            return
        waiter = Waiter(event.ticket, self._order, now, event.keep_alive_seconds)
        self._by_ticket[event.ticket] = record
        if record.state is State.READY:
            self._grant(record, waiter)
            return
        record.waiters[event.ticket] = waiter
        if record.state in (State.UNLOADED, State.BACKOFF, State.FAILED):
            self._move(record, State.QUEUED, now)

    def _why_not(self, record: ModelRecord, now: float) -> MlxRouterError | None:
        """The reason to refuse a new ticket at once, if there is one."""
        if self._leaving:
            return ShuttingDown("the server is shutting down")
        failing = record.state in (State.BACKOFF, State.FAILED) or (record.state is State.STOPPING and record.failed)
        if failing and now < record.retry_at:
            pause = math.ceil(record.retry_at - now)
            text = f"model '{record.spec.name}' failed and is tried again in {pause} s: {record.reason}"
            return BackingOff(text, retry_after_seconds=pause)
        if record.state is not State.READY and self.waiting >= self._limits.max_queue:
            return Overloaded("server busy, please try again.  maximum pending requests exceeded")
        return None

    def _grant(self, record: ModelRecord, waiter: Waiter) -> None:
        assert record.worker is not None
        record.leases.add(waiter.ticket)
        if waiter.keep_alive_seconds is not None:
            record.keep_alive_seconds = waiter.keep_alive_seconds
        self._effects.append(Grant(ticket=waiter.ticket, worker=record.worker))

    def _lease_returned(self, ticket: str, now: float) -> None:
        record = self._by_ticket.pop(ticket, None)
        if record is None:
            return
        if ticket not in record.leases:
            record.waiters.pop(ticket, None)
            if record.state is State.QUEUED and not record.waiters:
                self._move(record, State.UNLOADED, now)
                record.waiting_for = ()
            return
        record.leases.discard(ticket)
        record.last_used = now
        if record.state in (State.READY, State.DRAINING):
            record.failures = 0  # a request ended with the worker alive: whatever was wrong is over
        if record.leases:
            return
        if record.state is State.DRAINING:
            self._stop(record, record.reason, now)
        elif record.state is State.READY:
            self._rest(record, now)

    def _rest(self, record: ModelRecord, now: float) -> None:
        """The model is idle: start its keep-alive, or let it go at once."""
        record.expires_at = now + record.keep_alive
        if record.keep_alive <= 0:
            self._stop(record, "keep_alive is 0", now)

    def _unload_requested(self, event: UnloadRequested, now: float) -> None:
        record = self._records.get(event.model)
        if record is None:
            return
        if record.state in (State.BACKOFF, State.FAILED):
            record.failures, record.retry_at = 0, 0.0
            self._move(record, State.UNLOADED, now)
        elif record.state in (State.STARTING, State.LOADING, State.READY):
            record.keep_alive_seconds = 0.0
            record.expires_at = now
            if record.state is State.READY and not record.leases:
                self._stop(record, event.reason, now)

    # ------------------------------------------------------------------ workers

    def _worker_ready(self, event: WorkerReady, now: float) -> None:
        record = self._by_worker.get(event.worker)
        if record is None or record.state is not State.LOADING:
            return
        self._move(record, State.READY, now)
        record.was_ready = True
        record.loads += 1
        record.memory_bytes = event.memory_bytes
        record.load_seconds = event.load_seconds
        record.last_used = now
        record.reason = ""
        self._grant_waiters(record)
        if not record.leases:
            self._rest(record, now)
        elif record.expires_at is None:
            record.expires_at = now + record.keep_alive

    def _grant_waiters(self, record: ModelRecord) -> None:
        waiters, record.waiters = list(record.waiters.values()), {}
        for waiter in waiters:
            self._grant(record, waiter)

    def _worker_failed(self, worker: str, error: MlxRouterError, now: float) -> None:
        record = self._by_worker.get(worker)
        if record is None or record.state is State.STOPPING:
            return
        record.failed = True
        record.failures += 1
        record.retry_at = now + pause_after(record.failures, served=record.was_ready)
        for ticket in record.waiters if not record.was_ready else ():
            self._by_ticket.pop(ticket, None)
            self._effects.append(Refuse(ticket=ticket, error=error))
        if not record.was_ready:
            record.waiters = {}
        self._decided("worker_failed", record.spec.name, reason=error.message, failures=record.failures)
        self._stop(record, error.message, now)

    def _worker_reclaimed(self, worker: str, now: float) -> None:
        record = self._by_worker.pop(worker, None)
        if record is None:
            return
        failed, record.failed = record.failed, False
        for ticket in record.leases:  # of a worker that died: they must not count for the next one
            self._by_ticket.pop(ticket, None)
        record.leases.clear()
        record.worker = None
        record.reserved_bytes = record.memory_bytes = 0
        record.keep_alive_seconds = record.expires_at = None
        record.was_ready = False
        record.evicted_for, record.drain_deadline = None, math.inf
        if failed and now < record.retry_at:
            given_up = record.failures >= FAILURES_BEFORE_GIVING_UP
            self._refuse_waiters(record, BackingOff(f"model '{record.spec.name}' failed: {record.reason}"))
            self._move(record, State.FAILED if given_up else State.BACKOFF, now)
        else:
            self._move(record, State.QUEUED if record.waiters else State.UNLOADED, now)

    def _stop(self, record: ModelRecord, reason: str, now: float) -> None:
        assert record.worker is not None
        drained = now - record.since if record.state is State.DRAINING else 0.0
        self._move(record, State.STOPPING, now)
        record.reason = reason
        self._decided("stopping", record.spec.name, reason=reason, worker=record.worker)
        self._effects.append(
            StopWorker(worker=record.worker, reason=reason, successor=record.evicted_for, drain_seconds=drained)
        )

    def _refuse_waiters(self, record: ModelRecord, error: MlxRouterError) -> None:
        for ticket in record.waiters:
            self._by_ticket.pop(ticket, None)
            self._effects.append(Refuse(ticket=ticket, error=error))
        record.waiters = {}

    # --------------------------------------------------------------------- room

    def _admit_queued(self, now: float) -> None:
        """Give room to the models that wait for it, oldest first; a later one may pass only where it takes nothing."""
        promised_bytes = promised_count = 0
        queued = [r for r in self._records.values() if r.state is State.QUEUED and r.waiters]
        for record in sorted(queued, key=lambda r: r.oldest):
            verdict = choose_admission(
                estimate_bytes=record.spec.estimate_bytes,
                budget_bytes=self._limits.budget_bytes,
                max_loaded=self._limits.max_loaded_models,
                residents=[found for r in self._records.values() if (found := r.resident())],
                promised_bytes=promised_bytes,
                promised_count=promised_count,
            )
            match verdict:
                case Admit():
                    self._start(record, now)
                    continue
                case TooLarge():
                    text = f"model '{record.spec.name}' is too large for this machine: {verdict.reason}"
                    self._give_up(record, ModelTooLarge(text), now)
                    continue
                case Blocked():
                    text = f"no memory for model '{record.spec.name}': it is held by pinned {', '.join(verdict.pinned)}"
                    self._give_up(record, MemoryPinned(text, retry_after_seconds=30), now)
                    continue
                case Evict():
                    record.waiting_for = verdict.victims
                    for victim in verdict.victims:
                        self._evict(self._records[victim], record, now)
                case Wait():
                    pass
                case _:
                    assert_never(verdict)
            promised_bytes += record.spec.estimate_bytes
            promised_count += 1

    def _start(self, record: ModelRecord, now: float) -> None:
        record.worker = self._new_worker_id()
        self._by_worker[record.worker] = record
        record.reserved_bytes = record.spec.estimate_bytes
        record.waiting_for = ()
        self._move(record, State.STARTING, now)
        self._decided("loading", record.spec.name, reserved=human_bytes(record.reserved_bytes), worker=record.worker)
        waited = now - next(iter(record.waiters.values())).since
        self._effects.append(StartWorker(worker=record.worker, model=record.spec.name, waited_seconds=waited))

    def _give_up(self, record: ModelRecord, error: MlxRouterError, now: float) -> None:
        self._decided("refused", record.spec.name, reason=error.message)
        self._refuse_waiters(record, error)
        record.waiting_for = ()
        self._move(record, State.UNLOADED, now)

    def _evict(self, victim: ModelRecord, newcomer: ModelRecord, now: float) -> None:
        reason = f"evicted for {newcomer.spec.name}"
        victim.evicted_for = newcomer.spec.name
        if not victim.leases:
            self._stop(victim, reason, now)
            return
        victim.reason = reason
        victim.drain_deadline = now + self._limits.drain_timeout_seconds
        self._move(victim, State.DRAINING, now)
        self._decided("draining", victim.spec.name, reason=reason, in_flight=len(victim.leases))

    # --------------------------------------------------------------------- time

    def _ticked(self, now: float) -> None:
        for record in list(self._records.values()):
            if record.state is State.DRAINING and now >= record.drain_deadline:
                self._drain_limit_passed(record, now)
            idle = record.state is State.READY and not record.leases
            if idle and record.expires_at is not None and now >= record.expires_at:
                self._stop(record, "idle for its keep_alive", now)
            if record.state in _WAITS_FOR_ROOM:
                self._refuse_late(record, now)

    def _drain_limit_passed(self, record: ModelRecord, now: float) -> None:
        if record.evicted_for is None:
            assert record.worker is not None
            record.drain_deadline = math.inf
            self._effects.append(CancelStreams(worker=record.worker, reason=record.reason))
            return
        # What runs is worth more than what waits: the old model is kept and the newcomer is told.
        newcomer = self._records[record.evicted_for]
        record.evicted_for, record.drain_deadline = None, math.inf
        self._move(record, State.READY, now)
        self._decided("kept", record.spec.name, reason="still in use at the drain limit")
        self._grant_waiters(record)
        if newcomer.state is State.QUEUED:
            text = f"'{record.spec.name}' is still in use after {self._limits.drain_timeout_seconds:g} s"
            self._give_up(newcomer, WaitedTooLong(text, retry_after_seconds=30), now)

    def _refuse_late(self, record: ModelRecord, now: float) -> None:
        limit = self._limits.queue_timeout_seconds
        late = [waiter for waiter in record.waiters.values() if now >= waiter.since + limit]
        for waiter in late:
            del record.waiters[waiter.ticket]
            self._by_ticket.pop(waiter.ticket, None)
            text = f"no room for model '{record.spec.name}' within {limit:g} s"
            self._effects.append(Refuse(ticket=waiter.ticket, error=WaitedTooLong(text, retry_after_seconds=30)))
        if late and record.state is State.QUEUED and not record.waiters:
            record.waiting_for = ()
            self._move(record, State.UNLOADED, now)

    def _shutdown_requested(self, now: float) -> None:
        self._leaving = True
        error: Unavailable = ShuttingDown("the server is shutting down")
        for record in self._records.values():
            self._refuse_waiters(record, error)
            if record.state is State.QUEUED:
                self._move(record, State.UNLOADED, now)
            elif record.state is State.READY and record.leases:
                record.reason = "the server is shutting down"
                record.drain_deadline = now + self._limits.drain_timeout_seconds
                self._move(record, State.DRAINING, now)
            elif record.state in (State.STARTING, State.LOADING, State.READY):
                self._stop(record, "the server is shutting down", now)
            elif record.state is State.DRAINING:
                record.evicted_for = None
                record.drain_deadline = now + self._limits.drain_timeout_seconds
