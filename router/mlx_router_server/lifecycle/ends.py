"""How models leave: stopped, drained, failed, reclaimed."""

from __future__ import annotations

import math
from typing import Final

from mlx_router_server.lifecycle.backoff import FAILURES_BEFORE_GIVING_UP, pause_after
from mlx_router_server.lifecycle.books import Books
from mlx_router_server.lifecycle.events import CancelStreams, StopWorker, WorkerExited, WorkerFailed
from mlx_router_server.lifecycle.record import Departure, ModelRecord
from mlx_router_server.lifecycle.states import Cause, State
from mlx_router_shared.errors import BackingOff

__all__ = ["cut", "drain", "drain_limit_passed", "keep", "leave_idle", "reclaimed", "stop", "worker_failed"]


_LAST_SECONDS: Final = 5.0


def stop(books: Books, record: ModelRecord, cause: Cause, reason: str, now: float, *, hung: bool = False) -> None:
    """End its worker; whoever uses it is told by its streams, so nobody should."""
    assert record.worker is not None
    drained = now - record.since if record.state is State.DRAINING else 0.0
    record.reason = reason
    books.move(record, State.STOPPING, now)
    books.decided("stopping", record.spec.name, reason=reason, worker=record.worker)
    books.effects.append(
        StopWorker(
            worker=record.worker, cause=cause, reason=reason, successor=record.evicted_for, drain_seconds=drained,
            hung=hung,
        )
    )  # fmt: skip


def drain(books: Books, record: ModelRecord, cause: Cause, reason: str, now: float, *, limit_seconds: float) -> None:
    """Let running requests finish and begin no others; stops at once what nobody uses."""
    if not record.leases:
        stop(books, record, cause, reason, now)
        return
    record.cause, record.reason = cause, reason
    record.drain_deadline, record.cut = now + limit_seconds, False
    books.move(record, State.DRAINING, now)
    books.decided("draining", record.spec.name, reason=reason, in_flight=len(record.leases))


def drain_limit_passed(books: Books, record: ModelRecord, now: float) -> str | None:
    """Cancel what still runs, or keep the model; then the name of the newcomer that gets nothing is returned."""
    assert record.worker is not None
    if record.evicted_for is None or books.limits.cancel_at_drain_limit:
        if record.cut:
            stop(books, record, record.cause, record.reason, now)
        else:
            cut(books, record, record.reason, now)
        return None
    # What runs is worth more than what waits.
    newcomer = record.evicted_for
    keep(books, record, "still in use at the drain limit", now)
    return newcomer


def cut(books: Books, record: ModelRecord, reason: str, now: float) -> None:
    """End the streams of a draining model with a visible error; it is stopped in any case soon after."""
    assert record.worker is not None
    record.cut, record.drain_deadline = True, now + _LAST_SECONDS
    books.effects.append(CancelStreams(worker=record.worker, reason=reason))


def keep(books: Books, record: ModelRecord, reason: str, now: float) -> None:
    """A draining model stays after all, and need not be brought back by whoever wanted its room."""
    newcomer = books.records.get(record.evicted_for or "")
    if newcomer is not None and record.spec.name in newcomer.displaced:
        newcomer.displaced.remove(record.spec.name)
    record.evicted_for, record.drain_deadline, record.cut = None, math.inf, False
    record.reason = ""
    books.move(record, State.READY, now)
    books.decided("kept", record.spec.name, reason=reason)


def leave_idle(books: Books, record: ModelRecord, now: float) -> None:
    """Nobody uses it, and its keep-alive is over or it was told to leave before."""
    told = record.told_to_leave
    if told is None:
        told = Departure(Cause.IDLE, "idle for its keep_alive" if record.keep_alive > 0 else "keep_alive is 0")
    stop(books, record, told.cause, told.reason, now)


def worker_failed(books: Books, event: WorkerFailed | WorkerExited, now: float) -> None:
    """A load went wrong, or a worker died or hangs. One that was ready is replaced for those who still wait."""
    record = books.by_worker.get(event.worker)
    if record is None or record.state is State.STOPPING:
        return
    if record.was_ready and isinstance(event, WorkerExited) and event.was_stopped:
        books.decided("worker_left", record.spec.name, reason=event.error.message)
        stop(books, record, Cause.OPERATOR, event.error.message, now)
        return
    record.failed = True
    record.failures += 1
    record.retry_at = now + pause_after(record.failures, served=record.was_ready)
    books.decided("worker_failed", record.spec.name, reason=event.error.message, failures=record.failures)
    if not record.was_ready:
        books.refuse_all(record, event.error)
        record.wanted = ""
        _wish_back_the_displaced(books, record)
    stop(books, record, Cause.FAILURE, event.error.message, now, hung=isinstance(event, WorkerFailed) and event.hung)


def _wish_back_the_displaced(books: Books, record: ModelRecord) -> None:
    if books.limits.restore_on_failure and not books.leaving:
        for name in record.displaced:
            books.records[name].wanted = f"restored after '{record.spec.name}' failed to load"
    record.displaced = []


def reclaimed(books: Books, worker: str, now: float) -> None:
    """Its memory is back, or will not come."""
    record = books.by_worker.pop(worker, None)
    if record is None:
        return
    for ticket in record.leases:  # of a worker that died: they must not count for the next one
        books.by_ticket.pop(ticket, None)
    failed = record.failed
    record.leases = {}
    newcomer = books.records.get(record.evicted_for or "")
    record.yields_to = newcomer.spec.name if newcomer is not None and newcomer.state is State.QUEUED else None
    record.worker, record.evicted_for, record.turn = None, None, None
    record.reserved_bytes = record.memory_bytes = 0
    record.share = None
    record.keep_alive_seconds = record.expires_at = None
    record.was_ready = record.failed = record.cut = False
    record.told_to_leave = None
    record.drain_deadline = math.inf
    record.fraction = 0.0
    if failed and now < record.retry_at:
        given_up = record.failures >= FAILURES_BEFORE_GIVING_UP
        pause = math.ceil(record.retry_at - now)
        text = f"model '{record.spec.name}' failed and is tried again in {pause} s: {record.reason}"
        books.refuse_all(record, BackingOff(text, retry_after_seconds=pause))
        record.wanted = ""
        books.move(record, State.FAILED if given_up else State.BACKOFF, now)
    else:
        books.move(record, State.QUEUED if record.queue or record.wanted else State.UNLOADED, now)
