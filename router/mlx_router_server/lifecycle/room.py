"""Room for those who wait: who is admitted, who has to leave for it, and who cannot be helped."""

from __future__ import annotations

import math
from typing import assert_never

from mlx_router_server.lifecycle.admission import (
    Admit,
    Blocked,
    Evict,
    TooLarge,
    Verdict,
    Wait,
    choose_admission,
    human_bytes,
)
from mlx_router_server.lifecycle.books import Books
from mlx_router_server.lifecycle.ends import drain, keep
from mlx_router_server.lifecycle.events import StartWorker
from mlx_router_server.lifecycle.memory import Pressure
from mlx_router_server.lifecycle.queueing import BusyPolicy
from mlx_router_server.lifecycle.record import ModelRecord
from mlx_router_server.lifecycle.states import Cause, State
from mlx_router_shared.errors import MemoryPinned, MlxRouterError, ModelTooLarge

__all__ = ["admission_verdict", "admit_queued", "give_up", "keep_what_nobody_needs_gone", "short_of_memory"]


def admit_queued(books: Books, now: float) -> None:
    """Give room to the models that wait for it, in their order; a later one may pass only where it takes nothing."""
    promised_bytes = promised_count = 0
    for record in _in_order(books, now):
        record.look_again_at = math.inf
        verdict, shortage = _verdict_now(books, record, now, promised_bytes, promised_count)
        if isinstance(verdict, Evict) and record.queue:
            for name in verdict.victims:
                _evict(books, books.records[name], record, now)
            after, shortage = _verdict_now(books, record, now, promised_bytes, promised_count)
            if isinstance(after, Admit):  # what is being stopped may take its time to exit
                verdict = after
        match verdict:
            case Admit():
                _start(books, record, now)
                continue
            case TooLarge():
                text = f"model '{record.spec.name}' is too large for this machine: {verdict.reason}"
                give_up(books, record, ModelTooLarge(text), now)
                continue
            case Blocked():
                text = f"no memory for model '{record.spec.name}': it is held by pinned {', '.join(verdict.pinned)}"
                give_up(books, record, MemoryPinned(text, retry_after_seconds=30), now)
                continue
            case Evict() | Wait() if not record.queue and not _all_leaving(books, verdict):
                record.wanted = ""  # by nobody in particular: not worth anybody's place
                books.decided("not_loaded", record.spec.name, reason="others would have to leave for it")
                books.drop_if_unwanted(record, now)
                continue
            case Evict():
                _note_wait(books, record, verdict.victims, "asked to leave")
            case Wait():
                record.look_again_at = verdict.until
                _note_wait(books, record, verdict.models, shortage or "in the way")
            case _:
                assert_never(verdict)
        promised_bytes += record.spec.estimate_bytes
        promised_count += 1


def _verdict_now(
    books: Books, record: ModelRecord, now: float, promised_bytes: int, promised_count: int
) -> tuple[Verdict, str]:
    """Return the verdict, and what the machine is short of if that alone keeps the model from loading."""
    verdict = admission_verdict(books, record, now, promised_bytes, promised_count)
    if isinstance(verdict, Admit) and (shortage := short_of_memory(books, record)):
        return Wait(), shortage
    return verdict, ""


def _all_leaving(books: Books, verdict: Evict | Wait) -> bool:
    """Whether this waits only for what is on its way out anyway."""
    leaving = (State.DRAINING, State.STOPPING)
    return isinstance(verdict, Wait) and all(books.records[name].state in leaving for name in verdict.models)


def _in_order(books: Books, now: float) -> list[ModelRecord]:
    """By their best waiter; a model whose turn is over comes after the one it left for, and what nobody waits for
    comes last."""
    waited_for = [record for record in books.in_state(State.QUEUED) if record.queue]
    wished = [record for record in books.in_state(State.QUEUED) if not record.queue]
    return sorted(waited_for, key=lambda r: (_yields(books, r), r.queue.best(now).rank(now))) + wished


def _yields(books: Books, record: ModelRecord) -> bool:
    """Unless the one it left for does not want the room any more."""
    other = books.records[record.yields_to] if record.yields_to is not None else None
    return other is not None and other.state is State.QUEUED and len(other.queue) > 0


def admission_verdict(
    books: Books, record: ModelRecord, now: float, promised_bytes: int, promised_count: int
) -> Verdict:
    residency = books.limits.min_residency_seconds
    return choose_admission(
        estimate_bytes=record.spec.estimate_bytes,
        budget_bytes=books.limits.budget_bytes,
        max_loaded=books.limits.max_loaded_models,
        residents=[found for other in books.records.values() if (found := other.resident(residency))],
        now=now,
        promised_bytes=promised_bytes,
        promised_count=promised_count,
        may_drain=books.limits.busy_policy is not BusyPolicy.FAIL,
    )


def short_of_memory(books: Books, record: ModelRecord) -> str:
    """Return why the machine's own memory, beside the books, keeps a model from being loaded; "" if it does not."""
    if books.memory is None:
        return ""
    if books.pressure is Pressure.CRITICAL:
        return "the machine is short of memory"
    wanted = record.spec.estimate_bytes - record.spec.growth_bytes
    if record.failures and books.memory.available_bytes < wanted:
        return f"it failed before, and only {human_bytes(books.memory.available_bytes)} are free"
    return ""


def _note_wait(books: Books, record: ModelRecord, models: tuple[str, ...], why: str) -> None:
    """One line in the log when what it waits for has changed."""
    if models != record.waiting_for or not models:
        text = f"{', '.join(models)}: {why}" if models else why
        if record.reason != text:
            record.reason = text
            books.decided("waiting", record.spec.name, reason=text, waiters=len(record.queue))
    record.waiting_for = models


def _start(books: Books, record: ModelRecord, now: float) -> None:
    record.worker = books.new_worker_id()
    books.by_worker[record.worker] = record
    record.reserved_bytes = record.spec.estimate_bytes
    record.content = record.spec.content
    record.waiting_for = ()
    record.started_at = now
    record.yields_to = None
    for other in books.records.values():
        if other.yields_to == record.spec.name:
            other.yields_to = None  # it has what was left to it
    record.reason = record.wanted
    books.move(record, State.STARTING, now)
    books.decided("loading", record.spec.name, reserved=human_bytes(record.reserved_bytes), worker=record.worker)
    waited = now - min((waiter.since for waiter in record.queue), default=now)
    record.share = books.share(record)
    books.effects.append(
        StartWorker(worker=record.worker, model=record.spec.name, share=record.share, waited_seconds=waited)
    )


def give_up(books: Books, record: ModelRecord, error: MlxRouterError, now: float) -> None:
    """Everybody who waits for this model is told why it cannot be had."""
    books.decided("refused", record.spec.name, reason=error.message)
    books.refuse_all(record, error)
    record.waiting_for, record.wanted, record.displaced = (), "", []
    record.reason = error.message
    books.move(record, State.UNLOADED, now)


def _evict(books: Books, victim: ModelRecord, newcomer: ModelRecord, now: float) -> None:
    victim.evicted_for = newcomer.spec.name
    newcomer.displaced.append(victim.spec.name)
    limit = books.limits.drain_timeout_seconds
    drain(books, victim, Cause.EVICTED, f"evicted for {newcomer.spec.name}", now, limit_seconds=limit)


def keep_what_nobody_needs_gone(books: Books, now: float) -> None:
    """A model that drains for a newcomer which has left, or has found room elsewhere, goes on serving."""
    for record in books.in_state(State.DRAINING):
        if record.evicted_for is None:
            continue
        newcomer = books.records[record.evicted_for]
        if newcomer.state is not State.QUEUED:
            keep(books, record, f"{newcomer.spec.name} does not need its room any more", now)
