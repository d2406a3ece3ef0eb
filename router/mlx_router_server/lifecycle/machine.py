"""The lifecycle of all models: events in, effects out, no I/O and no clock.

One owner calls ``handle``, one event at a time; nobody else changes anything here, so a look and the claim that
follows from it are one step. Whatever settles a question wakes everybody who asked it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import assert_never

from mlx_router_server.lifecycle import ends, room, service
from mlx_router_server.lifecycle.books import Books
from mlx_router_server.lifecycle.events import (
    BudgetLearned,
    Effect,
    Event,
    LeaseRequested,
    LeaseReturned,
    LimitsChanged,
    LoadProgressed,
    LoadWanted,
    MemoryRead,
    PinChanged,
    Refuse,
    ShutdownHastened,
    ShutdownRequested,
    Ticked,
    TrimMemory,
    UnloadRequested,
    WorkerExited,
    WorkerFailed,
    WorkerReady,
    WorkerReclaimed,
    WorkerStarted,
)
from mlx_router_server.lifecycle.forecast import expected_wait, forecast_load, retry_after, room_is_made, why_refused
from mlx_router_server.lifecycle.limits import Limits
from mlx_router_server.lifecycle.memory import MemoryReading, Pressure
from mlx_router_server.lifecycle.queueing import BusyPolicy, Waiter
from mlx_router_server.lifecycle.record import Departure, ModelRecord
from mlx_router_server.lifecycle.spec import ModelSpec
from mlx_router_server.lifecycle.states import Cause, State
from mlx_router_server.lifecycle.views import LoadForecast, ModelView, WaiterView
from mlx_router_shared.errors import (
    Busy,
    MlxRouterError,
    ShuttingDown,
    WaitedTooLong,
)

__all__ = ["Lifecycle", "Limits"]

_LEAVING = "the server is shutting down"


class Lifecycle:
    """The door to the books; see ``room`` for loading, ``service`` for leases, ``ends`` for leaving."""

    def __init__(self, limits: Limits, new_worker_id: Callable[[], str]) -> None:
        self._books = Books(limits, new_worker_id)
        self._order = 0

    # ------------------------------------------------------------------ looking

    @property
    def limits(self) -> Limits:
        return self._books.limits

    @property
    def memory(self) -> MemoryReading | None:
        """The last reading."""
        return self._books.memory

    @property
    def reserved_bytes(self) -> int:
        """Promised to workers that are starting, loaded or on their way out."""
        return self._books.reserved_bytes

    @property
    def waiting(self) -> int:
        return self._books.waiting

    @property
    def workers(self) -> int:
        return len(self._books.by_worker)

    def views(self) -> list[ModelView]:
        return [record.view() for record in self._books.records.values()]

    def view(self, model: str) -> ModelView | None:
        record = self._books.records.get(model)
        return record.view() if record else None

    def queue(self, now: float) -> list[WaiterView]:
        """Everybody who waits, in the order in which they would be served if all had the same model."""
        waiting = [(waiter, record) for record in self._books.records.values() for waiter in record.queue]
        waiting.sort(key=lambda pair: pair[0].rank(now))
        return [
            WaiterView(
                ticket=waiter.ticket, model=record.spec.name, position=position, priority=waiter.priority,
                since=waiter.since, given_up_at=waiter.given_up_at(loading=record.loading),
            )
            for position, (waiter, record) in enumerate(waiting, 1)
        ]  # fmt: skip

    def forecast(self, spec: ModelSpec, now: float) -> LoadForecast:
        """What a request for this model would cause at this moment; changes nothing."""
        return forecast_load(self._books, spec, now)

    def next_deadline(self) -> float:
        """When ``Ticked`` is due; infinite when nothing waits for the clock."""
        deadlines = [math.inf]
        for record in self._books.records.values():
            deadlines.append(service.next_expiry(record))
            if record.queue:
                deadlines.append(record.queue.next_deadline(loading=record.loading))
            if record.state is State.QUEUED:
                deadlines.append(record.look_again_at)
            elif record.state is State.DRAINING:
                deadlines.append(record.drain_deadline)
        return min(deadlines)

    # ----------------------------------------------------------------- deciding

    def handle(self, event: Event, now: float) -> list[Effect]:
        """Take one event at the time ``now`` (seconds, any origin, never backwards) and say what to do."""
        books = self._books
        books.effects = []
        match event:
            case LeaseRequested():
                self._lease_requested(event, now)
            case LeaseReturned():
                service.lease_returned(books, event.ticket, now)
            case LoadWanted():
                self._load_wanted(event, now)
            case UnloadRequested():
                self._unload_requested(event, now)
            case PinChanged():
                self._pin_changed(event, now)
            case WorkerStarted():
                if (record := books.by_worker.get(event.worker)) and record.state is State.STARTING:
                    books.move(record, State.LOADING, now)
            case LoadProgressed():
                if (record := books.by_worker.get(event.worker)) and record.state is State.LOADING:
                    record.fraction = event.fraction
                return books.effects  # nothing follows from it: it only makes forecasts better
            case WorkerReady():
                service.worker_ready(books, event, now)
            case WorkerFailed() | WorkerExited():
                ends.worker_failed(books, event, now)
            case WorkerReclaimed():
                ends.reclaimed(books, event.worker, now)
            case MemoryRead():
                self._memory_read(event.reading, now)
            case BudgetLearned():
                books.limits = replace(books.limits, budget_bytes=event.budget_bytes, wired_bytes=event.wired_bytes)
            case LimitsChanged():
                books.limits = event.limits
            case ShutdownRequested():
                self._shutdown_requested(now)
            case ShutdownHastened():
                self._shutdown_hastened(now)
            case Ticked():
                self._ticked(now)
            case _:
                assert_never(event)
        self._settle(now)
        books.update_shares()
        if isinstance(event, LeaseRequested):
            self._refuse_if_busy(event.ticket, now)
        return books.effects

    def take_effects(self) -> list[Effect]:
        """What was decided before ``handle`` raised, once."""
        effects, self._books.effects = self._books.effects, []
        return effects

    def _settle(self, now: float) -> None:
        """Room for those who wait, leases for those who can have them, until nothing follows from anything."""
        self._queue_wishes(now)
        room.admit_queued(self._books, now)
        room.keep_what_nobody_needs_gone(self._books, now)
        while service.serve(self._books, now):
            room.admit_queued(self._books, now)

    # ----------------------------------------------------------------- requests

    def _lease_requested(self, event: LeaseRequested, now: float) -> None:
        books = self._books
        record = books.record(event.spec, now)
        if event.explicit and record.state in (State.BACKOFF, State.FAILED):
            self._forgive(record)
            books.move(record, State.UNLOADED, now)
        self._order += 1
        if error := self._why_not(record, event, now):
            books.effects.append(Refuse(ticket=event.ticket, error=error))
            return
        limits = books.limits
        short = limits.busy_policy is BusyPolicy.WAIT_THEN_FAIL
        patience = limits.busy_wait_seconds if short else limits.queue_timeout_seconds
        record.queue.add(
            Waiter(
                ticket=event.ticket, order=self._order, since=now, room_limit=now + patience,
                deadline=math.inf if event.deadline_seconds is None else now + event.deadline_seconds,
                priority=event.priority, keep_alive_seconds=event.keep_alive_seconds,
            )
        )  # fmt: skip
        books.by_ticket[event.ticket] = record
        if record.state is State.READY and record.content != record.spec.content:
            # What runs ends with the old files; the model is loaded again for whoever waits.
            ends.drain(books, record, Cause.OPERATOR, "its files have changed", now, limit_seconds=math.inf)
        if record.state in (State.UNLOADED, State.BACKOFF, State.FAILED):
            books.move(record, State.QUEUED, now)

    def _why_not(self, record: ModelRecord, event: LeaseRequested, now: float) -> MlxRouterError | None:
        """The reason to refuse a new ticket at once, if there is one."""
        books = self._books
        name = record.spec.name
        if books.leaving:
            return ShuttingDown(_LEAVING)
        if error := why_refused(books, record, now):
            return error
        if event.deadline_seconds is not None:
            wait = expected_wait(books, record, now)
            if wait is not None and wait > event.deadline_seconds:
                text = f"model '{name}' cannot begin within {event.deadline_seconds:g} s: about {math.ceil(wait)} s"
                return WaitedTooLong(text, retry_after_seconds=max(1, math.ceil(wait)))
        return None

    def _refuse_if_busy(self, ticket: str, now: float) -> None:
        """Policy ``fail``: a load of one's own is waited for, and idle models that leave for it; others are not."""
        books = self._books
        record = books.by_ticket.get(ticket)
        if books.limits.busy_policy is not BusyPolicy.FAIL or record is None or ticket in record.leases:
            return
        leaving_for_it = record.state is State.QUEUED and room_is_made(books, record.spec.name, record.waiting_for)
        if record.loading or leaving_for_it:
            return
        error = Busy(f"model '{record.spec.name}' cannot begin now: {record.reason or 'others are being served'}",
                     retry_after_seconds=retry_after(books, record, now))  # fmt: skip
        record.queue.remove(ticket)
        books.by_ticket.pop(ticket)
        books.effects.append(Refuse(ticket=ticket, error=error))
        books.drop_if_unwanted(record, now)

    # ----------------------------------------------------------------- operator

    def _load_wanted(self, event: LoadWanted, now: float) -> None:
        record = self._books.record(event.spec, now)
        if record.state is State.UNLOADED and not self._books.leaving:
            record.wanted = event.reason

    def _queue_wishes(self, now: float) -> None:
        """Models that are wanted by nobody in particular get in line when they are at rest."""
        for record in self._books.in_state(State.UNLOADED):
            if record.wanted and not self._books.leaving:
                self._books.move(record, State.QUEUED, now)

    def _unload_requested(self, event: UnloadRequested, now: float) -> None:
        record = self._books.records.get(event.model)
        if record is None or (event.by_client and record.pinned):
            return
        if record.state in (State.BACKOFF, State.FAILED):
            if not event.by_client:
                self._forgive(record)
                self._books.move(record, State.UNLOADED, now)
        elif record.loading or record.state in (State.READY, State.DRAINING):
            # One that drains for another may come to stay: then this holds.
            record.keep_alive_seconds = 0.0
            stays = record.keep_alive if event.by_client else 0.0
            cause = Cause.CLIENT if event.by_client else Cause.OPERATOR
            record.told_to_leave = Departure(cause, event.reason) if stays <= 0 else None
            record.expires_at = now + stays
            idle = record.state is State.READY and not record.leases and not record.queue
            if idle and record.told_to_leave:
                ends.leave_idle(self._books, record, now)

    @staticmethod
    def _forgive(record: ModelRecord) -> None:
        record.failures, record.retry_at = 0, 0.0

    def _pin_changed(self, event: PinChanged, now: float) -> None:
        record = self._books.record(event.spec, now)
        record.pinned_by_operator = event.pinned
        if record.expires_at is not None:
            record.expires_at = now + record.keep_alive
        if event.pinned:
            record.told_to_leave = None
            if record.state is State.DRAINING and record.evicted_for is not None:
                ends.keep(self._books, record, "pinned by the operator", now)

    # ------------------------------------------------------------------- memory

    def _memory_read(self, reading: MemoryReading, now: float) -> None:
        """Tight: give freed buffers back. Critical: one idle model leaves per reading, cheapest to bring back first."""
        books = self._books
        worse = reading.pressure > books.pressure
        eased = reading.pressure < books.pressure
        books.memory = reading
        if worse or eased:
            books.decided("memory_pressure", "", level=reading.pressure.name.lower(), available=reading.available_bytes)
        if worse or reading.pressure is Pressure.CRITICAL:
            for record in books.in_state(State.READY, State.DRAINING):
                assert record.worker is not None
                books.effects.append(TrimMemory(worker=record.worker))
        if reading.pressure is not Pressure.CRITICAL or any(books.in_state(State.STOPPING)):
            return
        idle = [r for r in books.in_state(State.READY) if not r.leases and not r.queue and not r.stays]
        if idle:
            victim = min(idle, key=lambda r: (r.load_seconds / max(r.reserved_bytes, 1), r.last_used))
            ends.stop(books, victim, Cause.PRESSURE, "the machine is short of memory", now)

    # --------------------------------------------------------------------- time

    def _ticked(self, now: float) -> None:
        books = self._books
        for record in books.in_state(State.DRAINING):
            if now >= record.drain_deadline and (newcomer := ends.drain_limit_passed(books, record, now)):
                limit = books.limits.drain_timeout_seconds
                text = f"'{record.spec.name}' is still in use after {limit:g} s"
                self._give_up_newcomer(newcomer, text, now)
        for record in books.in_state(State.READY):
            if now >= service.next_expiry(record):
                ends.leave_idle(books, record, now)
        for record in list(books.records.values()):
            self._refuse_late(record, now)

    def _give_up_newcomer(self, model: str, text: str, now: float) -> None:
        newcomer = self._books.records[model]
        if newcomer.state is State.QUEUED:
            after = retry_after(self._books, newcomer, now)
            room.give_up(self._books, newcomer, WaitedTooLong(text, retry_after_seconds=after), now)

    def _refuse_late(self, record: ModelRecord, now: float) -> None:
        books = self._books
        for waiter in record.queue.take_late(now, loading=record.loading):
            waited = f"{now - waiter.since:.3g} s"
            text = f"model '{record.spec.name}' could not begin within {waited}"
            if record.reason:
                text += f": {record.reason}"
            error = WaitedTooLong(text, retry_after_seconds=retry_after(books, record, now))
            books.decided("waited_too_long", record.spec.name, ticket=waiter.ticket, waited=waited)
            books.refuse(waiter, error)
        books.drop_if_unwanted(record, now)

    # --------------------------------------------------------------- the router

    def _shutdown_requested(self, now: float) -> None:
        books = self._books
        books.leaving = True
        for record in list(books.records.values()):
            books.refuse_all(record, ShuttingDown(_LEAVING))
            record.wanted = ""
            books.drop_if_unwanted(record, now)
            if record.state is State.READY:
                limit = books.limits.drain_timeout_seconds
                ends.drain(books, record, Cause.SHUTDOWN, _LEAVING, now, limit_seconds=limit)
            elif record.loading:
                ends.stop(books, record, Cause.SHUTDOWN, _LEAVING, now)
            elif record.state is State.DRAINING:
                record.evicted_for = None
                if not record.cut:
                    record.drain_deadline = now + books.limits.drain_timeout_seconds

    def _shutdown_hastened(self, now: float) -> None:
        for record in self._books.in_state(State.DRAINING):
            if not record.cut:
                ends.cut(self._books, record, _LEAVING, now)
