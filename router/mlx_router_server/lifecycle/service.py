"""Leases: who may use a loaded model now, and what happens when nobody does."""

from __future__ import annotations

import math
from typing import Final

from mlx_router_server.lifecycle.books import Books
from mlx_router_server.lifecycle.ends import leave_idle, stop
from mlx_router_server.lifecycle.events import Grant, WorkerReady
from mlx_router_server.lifecycle.queueing import Turn, Waiter
from mlx_router_server.lifecycle.record import ModelRecord
from mlx_router_server.lifecycle.states import State

__all__ = ["lease_returned", "next_expiry", "rest", "serve", "worker_ready"]

_LONGEST_LULL_SECONDS: Final = 0.5


def serve(books: Books, now: float) -> bool:
    """Let waiters of loaded models begin. Returns whether some model's turn has ended by that."""
    ended = False
    for record in books.in_state(State.READY):
        if record.queue and len(record.leases) < record.spec.parallel:
            ended = _serve_one(books, record, now) or ended
    return ended


def _serve_one(books: Books, record: ModelRecord, now: float) -> bool:
    contended = books.contended(record)
    turn = record.turn if contended else None
    if turn is not None and turn.over_at(idle_since=None) <= now:
        # Its room was not asked for, although it could have been: another turn.
        turn = record.turn = _new_turn(books, record, now)
    while record.queue and len(record.leases) < record.spec.parallel and (turn is None or turn.left > 0):
        _grant(books, record, record.queue.take_best(now), now)
        if turn is not None:
            turn.left -= 1
    return turn is not None and turn.left <= 0


def _new_turn(books: Books, record: ModelRecord, now: float) -> Turn:
    return Turn(
        ends_at=now + books.limits.turn_seconds,
        left=max(books.limits.turn_requests, 1),
        # To wait for another request is worth at most what loading again would cost.
        lull_seconds=min(record.load_seconds, _LONGEST_LULL_SECONDS),
    )


def _grant(books: Books, record: ModelRecord, waiter: Waiter, now: float) -> None:
    assert record.worker is not None
    record.leases[waiter.ticket] = now
    if waiter.keep_alive_seconds is not None:
        record.keep_alive_seconds = waiter.keep_alive_seconds
    books.effects.append(Grant(ticket=waiter.ticket, worker=record.worker))


def lease_returned(books: Books, ticket: str, now: float) -> None:
    """Of somebody who was served, or who does not want to wait any longer."""
    record = books.by_ticket.pop(ticket, None)
    if record is None:
        return
    since = record.leases.pop(ticket, None)
    if since is None:
        record.queue.remove(ticket)
        books.drop_if_unwanted(record, now)
        return
    record.last_used = now
    record.note_lease_end(now - since)
    if record.state in (State.READY, State.DRAINING):
        record.failures = 0  # a request ended with the worker alive: whatever was wrong is over
    if record.leases:
        return
    if record.state is State.DRAINING:
        stop(books, record, record.cause, record.reason, now)
    elif record.state is State.READY:
        rest(books, record, now)


def rest(books: Books, record: ModelRecord, now: float) -> None:
    """The model is idle: start its keep-alive, or let it go at once."""
    record.idle_since = now
    record.expires_at = now + (0.0 if record.told_to_leave else record.keep_alive)
    if record.expires_at <= now and not record.queue:
        leave_idle(books, record, now)


def worker_ready(books: Books, event: WorkerReady, now: float) -> None:
    """The model is loaded; its reservation follows what was measured."""
    record = books.by_worker.get(event.worker)
    if record is None or record.state is not State.LOADING:
        return
    record.was_ready = True
    record.loads += 1
    record.memory_bytes = event.memory_bytes
    record.load_seconds = event.load_seconds
    record.last_used = record.ready_at = record.idle_since = now
    record.reason, record.wanted, record.displaced = "", "", []
    record.queue.not_counting(record.started_at, now)
    books.move(record, State.READY, now)
    _correct_reservation(books, record)
    record.turn = _new_turn(books, record, now) if books.contended(record) else None
    # Before anybody may ask for its room: a load that serves nobody would be for nothing, again and again.
    _serve_one(books, record, now)
    if record.leases:
        record.expires_at = now + record.keep_alive
    else:
        rest(books, record, now)


def _correct_reservation(books: Books, record: ModelRecord) -> None:
    """What was measured, and what may grow; never more than the budget holds, which the next load will respect."""
    if record.spec.fixed:
        return
    wanted = record.memory_bytes + record.spec.growth_bytes
    free = max(books.limits.budget_bytes - books.reserved_bytes, 0)
    reserved = min(wanted, record.reserved_bytes + free)
    if reserved == record.reserved_bytes:
        return
    if wanted > reserved:
        books.decided("over_budget", record.spec.name, wanted=wanted, reserved=reserved)
    record.reserved_bytes = reserved


def next_expiry(record: ModelRecord) -> float:
    """When its keep-alive ends; infinite while it is in use."""
    idle = record.state is State.READY and not record.leases and not record.queue
    return record.expires_at if idle and record.expires_at is not None else math.inf
