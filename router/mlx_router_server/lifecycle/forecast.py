"""How long something will take, as far as progress and experience tell; and what a load would do, without doing it."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Final, assert_never

from mlx_router_server.lifecycle.admission import Admit, Blocked, Evict, TooLarge, Wait
from mlx_router_server.lifecycle.books import Books
from mlx_router_server.lifecycle.memory import Pressure
from mlx_router_server.lifecycle.queueing import BusyPolicy
from mlx_router_server.lifecycle.record import ModelRecord
from mlx_router_server.lifecycle.room import admission_verdict, short_of_memory
from mlx_router_server.lifecycle.spec import ModelSpec
from mlx_router_server.lifecycle.states import State
from mlx_router_server.lifecycle.views import LoadForecast
from mlx_router_shared.errors import BackingOff, MemoryPressure, MlxRouterError, Overloaded

__all__ = ["expected_wait", "forecast_load", "retry_after", "room_is_made", "serves_at_once", "why_refused"]

FALLBACK_SECONDS: Final = 30
_TELLING_FRACTION: Final = 0.05  # before that the rest of a load cannot be told from its beginning


def _rest_of_load(record: ModelRecord, now: float) -> float | None:
    if record.state is State.LOADING and record.fraction >= _TELLING_FRACTION:
        return (now - record.since) * (1 - record.fraction) / record.fraction
    if record.load_seconds:
        return max(record.load_seconds - (now - record.since if record.state is State.LOADING else 0.0), 0.0)
    return None


def expected_wait(books: Books, record: ModelRecord, now: float) -> float | None:
    """Seconds until a request for this model that came now would begin; None when nothing tells."""
    if record.state is State.READY:
        ahead = len(record.queue) + len(record.leases) + 1 - record.spec.parallel
        if ahead <= 0:
            return 0.0
        return record.lease_seconds * math.ceil(ahead / record.spec.parallel) if record.lease_seconds else None
    own = _rest_of_load(record, now)
    if record.loading or own is None:
        return own
    in_the_way = [books.records[name] for name in record.waiting_for if name in books.records]
    others = [_rest_of_load(other, now) or 0.0 for other in in_the_way if other.loading]
    others += [other.lease_seconds for other in in_the_way if other.leases]
    return own + max(others, default=0.0)


def retry_after(books: Books, record: ModelRecord, now: float) -> int:
    """Whole seconds for a ``Retry-After`` header, at least 1."""
    wait = expected_wait(books, record, now)
    others = [rest for other in books.in_state(State.LOADING) if (rest := _rest_of_load(other, now)) is not None]
    known = [] if wait is None else [wait]
    return max(1, math.ceil(max(known + others))) if known + others else FALLBACK_SECONDS


def serves_at_once(record: ModelRecord) -> bool:
    """Whether a request would begin at once, with the files that are there now."""
    busy = len(record.leases) + len(record.queue)
    return record.state is State.READY and record.content == record.spec.content and busy < record.spec.parallel


def why_refused(books: Books, record: ModelRecord, now: float) -> MlxRouterError | None:
    """The reason to refuse a new request at once, if there is one: asked by the decision and by the forecast."""
    name = record.spec.name
    failing = record.state in (State.BACKOFF, State.FAILED) or (record.state is State.STOPPING and record.failed)
    if failing and now < record.retry_at:
        pause = math.ceil(record.retry_at - now)
        text = f"model '{name}' failed and is tried again in {pause} s: {record.reason}"
        return BackingOff(text, retry_after_seconds=pause)
    unloaded = record.state in (State.UNLOADED, State.BACKOFF, State.FAILED)
    if unloaded and books.pressure is Pressure.CRITICAL:
        text = f"model '{name}' is not loaded now: the machine is short of memory"
        return MemoryPressure(text, retry_after_seconds=10)
    if not serves_at_once(record) and books.waiting >= books.limits.max_queue:
        text = "server busy, please try again.  maximum pending requests exceeded"
        return Overloaded(text, retry_after_seconds=retry_after(books, record, now))
    return None


def room_is_made(books: Books, model: str, in_the_way: tuple[str, ...]) -> bool:
    """Whether all that is in the way of a model is being evicted for it, which the policy ``fail`` waits for."""
    return bool(in_the_way) and all(books.records[name].evicted_for == model for name in in_the_way)


def forecast_load(books: Books, spec: ModelSpec, now: float) -> LoadForecast:
    """What a request for this model would cause at this moment."""
    record = books.records.get(spec.name)
    record = replace(record, spec=spec) if record is not None else ModelRecord(
        spec=spec, since=now, load_seconds=spec.load_seconds or 0.0
    )  # fmt: skip

    def say(action: str, reason: str, **more: tuple[str, ...]) -> LoadForecast:
        wait = None if action == "refuse" else expected_wait(books, record, now)
        return LoadForecast(
            model=spec.name, state=record.state, action=action, reason=reason, estimate_bytes=spec.estimate_bytes,
            budget_bytes=books.limits.budget_bytes, reserved_bytes=books.reserved_bytes, wait_seconds=wait, **more,
        )  # fmt: skip

    fails_when_busy = books.limits.busy_policy is BusyPolicy.FAIL
    if error := why_refused(books, record, now):
        return say("refuse", error.message)
    is_current = record.content == spec.content
    has_place = serves_at_once(record)
    if record.state is State.READY and is_current:
        if has_place or not fails_when_busy:
            return say("serve", "it is loaded")
        return say("refuse", "others are being served, and busy_policy is fail")
    if record.loading:
        return say("join", "it is being loaded")
    if record.state in (State.READY, State.DRAINING, State.STOPPING):
        if fails_when_busy:
            return say("refuse", "it is leaving, and busy_policy is fail")
        reason = record.reason if record.state is not State.READY else "its files have changed"
        return say("wait", f"it is leaving: {reason}", wait_for=(spec.name,))
    ahead = [other for other in books.in_state(State.QUEUED) if other.spec.name != spec.name and other.queue]
    verdict = admission_verdict(books, record, now, sum(other.spec.estimate_bytes for other in ahead), len(ahead))
    if isinstance(verdict, Admit) and (shortage := short_of_memory(books, record)):
        return say("refuse" if fails_when_busy else "wait", shortage)
    if isinstance(verdict, Wait) and fails_when_busy and not room_is_made(books, spec.name, verdict.models):
        return say("refuse", "others are in the way, and busy_policy is fail")
    match verdict:
        case Admit():
            return say("load", "there is room")
        case Evict():
            drain = tuple(name for name in verdict.victims if books.records[name].leases)
            return say("evict", "the room of others is needed", evict=verdict.victims, drain=drain)
        case Wait():
            names = verdict.models or tuple(other.spec.name for other in ahead)
            return say("wait", "others are in the way and may not or need not be asked to leave yet", wait_for=names)
        case TooLarge():
            return say("refuse", f"it is too large for this machine: {verdict.reason}")
        case Blocked():
            return say("refuse", "its room is held by pinned models", pinned=verdict.pinned)
        case _:
            assert_never(verdict)
