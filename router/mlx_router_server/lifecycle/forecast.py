"""How long something will take, as far as progress and experience tell; and what a load would do, without doing it."""

from __future__ import annotations

import math
from typing import Final, assert_never

from mlx_router_server.lifecycle.admission import Admit, Blocked, Evict, TooLarge, Wait, choose_admission
from mlx_router_server.lifecycle.books import Books
from mlx_router_server.lifecycle.record import ModelRecord
from mlx_router_server.lifecycle.spec import ModelSpec
from mlx_router_server.lifecycle.states import State
from mlx_router_server.lifecycle.views import LoadForecast

__all__ = ["expected_wait", "forecast_load", "retry_after"]

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


def forecast_load(books: Books, spec: ModelSpec, now: float) -> LoadForecast:
    """What a request for this model would cause at this moment."""
    record = books.records.get(spec.name) or ModelRecord(spec=spec, since=now, load_seconds=spec.load_seconds or 0.0)

    def say(action: str, reason: str, **more: tuple[str, ...]) -> LoadForecast:
        wait = None if action == "refuse" else expected_wait(books, record, now)
        return LoadForecast(
            model=spec.name, state=record.state, action=action, reason=reason, estimate_bytes=spec.estimate_bytes,
            budget_bytes=books.limits.budget_bytes, reserved_bytes=books.reserved_bytes, wait_seconds=wait, **more,
        )  # fmt: skip

    if record.state is State.READY:
        return say("serve", "it is loaded")
    if record.loading:
        return say("join", "it is being loaded")
    if record.state in (State.DRAINING, State.STOPPING):
        return say("wait", f"it is leaving: {record.reason}", wait_for=(spec.name,))
    if record.state in (State.BACKOFF, State.FAILED) and now < record.retry_at:
        return say("refuse", f"it failed and is tried again in {math.ceil(record.retry_at - now)} s: {record.reason}")
    ahead = [other for other in books.in_state(State.QUEUED) if other is not record and other.queue]
    verdict = choose_admission(
        estimate_bytes=spec.estimate_bytes,
        budget_bytes=books.limits.budget_bytes,
        max_loaded=books.limits.max_loaded_models,
        residents=[r for other in books.records.values() if (r := other.resident(books.limits.min_residency_seconds))],
        now=now,
        promised_bytes=sum(other.spec.estimate_bytes for other in ahead),
        promised_count=len(ahead),
    )
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
