"""Admission by bytes: may this model start now, which models must be evicted first, or can it never fit?

One memory rule, never two modes: loading beside and stopping first are its two outcomes. The bytes of a worker that is
being stopped count in full until its memory has been seen to come back. It is no loaded model any more, so it does not
count against ``max_loaded``: where memory allows, the next model loads while it exits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

__all__ = ["Admit", "Blocked", "Evict", "Resident", "TooLarge", "Verdict", "Wait", "choose_admission", "human_bytes"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Resident:
    """A worker that holds a reservation."""

    model: str
    reserved_bytes: int
    leaving: bool
    """Draining or stopping: its room is spoken for."""
    stopping: bool
    """Serves nobody any more; holds its bytes until they are back."""
    movable_at: float
    """From when on it may be asked to leave; infinite for what is pinned or not ready."""
    settling: bool
    """Still loading; it may be movable once it is ready."""
    in_flight: int
    load_seconds: float
    """What it cost to load: what bringing it back would cost."""
    last_used: float


@dataclass(frozen=True, slots=True)
class Admit:
    """There is room."""


@dataclass(frozen=True, slots=True)
class Wait:
    """There will be room: enough is leaving, or will be movable; ``until`` says when to look again at the latest."""

    until: float = math.inf
    models: tuple[str, ...] = ()
    """In the way."""


@dataclass(frozen=True, slots=True)
class Evict:
    """There will be room once these have left; those in use are drained first."""

    victims: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class TooLarge:
    """Would not fit even alone."""

    reason: str


@dataclass(frozen=True, slots=True)
class Blocked:
    """Would fit alone, but pinned models hold the room."""

    pinned: tuple[str, ...]


Verdict = Admit | Wait | Evict | TooLarge | Blocked


def choose_admission(
    *,
    estimate_bytes: int,
    budget_bytes: int,
    max_loaded: int,
    residents: list[Resident],
    now: float,
    promised_bytes: int = 0,
    promised_count: int = 0,
    may_drain: bool = True,
) -> Verdict:
    """Decide about one model that wants to load.

    ``promised_*`` is room that models further ahead in the queue wait for. ``max_loaded`` 0 means no limit. Victims
    are idle ones if those are enough, cheapest to bring back per byte freed first; busy ones only if they are not, and
    with ``may_drain`` false not at all.
    """
    if estimate_bytes > budget_bytes:
        return TooLarge(f"it needs {human_bytes(estimate_bytes)} and the budget is {human_bytes(budget_bytes)}")
    limit = max_loaded or len(residents) + promised_count + 1
    missing_bytes = sum(r.reserved_bytes for r in residents) + promised_bytes + estimate_bytes - budget_bytes
    missing_count = sum(not r.stopping for r in residents) + promised_count + 1 - limit
    if missing_bytes <= 0 and missing_count <= 0:
        return Admit()
    leaving = [r for r in residents if r.leaving]
    missing_bytes -= sum(r.reserved_bytes for r in leaving)
    missing_count -= sum(not r.stopping for r in leaving)
    if missing_bytes <= 0 and missing_count <= 0:
        return Wait(models=tuple(r.model for r in leaving))
    movable = [r for r in residents if r.movable_at <= now and not r.leaving]
    idle = sorted((r for r in movable if not r.in_flight), key=_cost_to_bring_back)
    busy = sorted((r for r in movable if r.in_flight), key=lambda r: (r.in_flight, r.last_used))
    victims: list[Resident] = []
    for resident in idle + (busy if may_drain else []):
        if missing_bytes <= 0 and missing_count <= 0:
            break
        victims.append(resident)
        missing_bytes -= resident.reserved_bytes
        missing_count -= 1
    if missing_bytes > 0 or missing_count > 0:
        later = [r for r in residents if now < r.movable_at < math.inf and not r.leaving]
        settling = [r for r in residents if r.settling]
        in_use = [] if may_drain else busy
        if later or settling or in_use or promised_count:  # who is ahead will be movable in time
            until = min((r.movable_at for r in later), default=math.inf)
            return Wait(until=until, models=tuple(r.model for r in later + settling + in_use))
        return Blocked(tuple(r.model for r in residents if r.movable_at == math.inf and not r.leaving))
    return Evict(tuple(r.model for r in _without_needless(victims, missing_bytes, missing_count)))


def _cost_to_bring_back(resident: Resident) -> tuple[float, float]:
    return (resident.load_seconds / max(resident.reserved_bytes, 1), resident.last_used)


def _without_needless(victims: list[Resident], missing_bytes: int, missing_count: int) -> list[Resident]:
    """Drop victims that turn out not to be needed, dearest first: a big one found late may make small ones stay."""
    kept = list(victims)
    for resident in reversed(victims):
        if missing_bytes + resident.reserved_bytes <= 0 and missing_count + 1 <= 0:
            kept.remove(resident)
            missing_bytes += resident.reserved_bytes
            missing_count += 1
    return kept


def human_bytes(size: int) -> str:
    """Decimal, as disks and Ollama count: ``4.7 GB``, ``815 MB``."""
    value = float(size)
    for unit in ("B", "kB", "MB"):
        if value < 1000:
            return f"{value:.0f} {unit}"
        value /= 1000
    return f"{value:.1f} GB"
