"""Who waits, in which order, for how long, and how long a model's turn is while others wait for its room.

Waiters of one model are served together; models take turns. Within a model, and between models, a higher priority
goes first, then who came first; who has waited for half of their patience goes before everybody, so that no priority
lets others starve.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import StrEnum

__all__ = ["BusyPolicy", "Rank", "Turn", "WaitQueue", "Waiter"]

Rank = tuple[bool, int, int]


class BusyPolicy(StrEnum):
    """What a request does when others are in its way."""

    WAIT = "wait"
    FAIL = "fail"
    """503 at once."""
    WAIT_THEN_FAIL = "wait_then_fail"
    """503 after a shorter time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Waiter:
    """A ticket that was not granted yet; times are those of the clock that is handed in."""

    ticket: str
    order: int
    """Counts the requests of all models."""
    since: float
    room_limit: float
    """Until when it waits for others; a load of its own model has a limit of its own."""
    deadline: float = math.inf
    """The client's own: after this nobody wants the answer, whatever the model is doing."""
    priority: int = 0
    keep_alive_seconds: float | None = None

    def rank(self, now: float) -> Rank:
        """Smaller goes first."""
        overdue = now >= (self.since + self.room_limit) / 2
        return (not overdue, 0 if overdue else -self.priority, self.order)

    def given_up_at(self, *, loading: bool) -> float:
        """When it is refused: while its own model loads, only the client's deadline counts."""
        return self.deadline if loading else min(self.deadline, self.room_limit)


class WaitQueue:
    """The waiters of one model."""

    def __init__(self) -> None:
        self._waiters: dict[str, Waiter] = {}

    def __len__(self) -> int:
        return len(self._waiters)

    def __iter__(self) -> Iterator[Waiter]:
        return iter(self._waiters.values())

    def add(self, waiter: Waiter) -> None:
        self._waiters[waiter.ticket] = waiter

    def remove(self, ticket: str) -> None:
        self._waiters.pop(ticket, None)

    def in_order(self, now: float) -> list[Waiter]:
        return sorted(self._waiters.values(), key=lambda waiter: waiter.rank(now))

    def best(self, now: float) -> Waiter:
        """Who goes first; there has to be somebody."""
        return min(self._waiters.values(), key=lambda waiter: waiter.rank(now))

    def take_best(self, now: float) -> Waiter:
        waiter = self.best(now)
        del self._waiters[waiter.ticket]
        return waiter

    def take_all(self) -> list[Waiter]:
        waiters, self._waiters = list(self._waiters.values()), {}
        return waiters

    def not_counting(self, since: float, now: float) -> None:
        """The time from ``since`` to ``now`` was no waiting for others: nobody's patience was used up by it."""
        for ticket, waiter in self._waiters.items():
            spent = now - max(since, waiter.since)
            self._waiters[ticket] = replace(waiter, room_limit=waiter.room_limit + spent)

    def take_late(self, now: float, *, loading: bool) -> list[Waiter]:
        """Those whose time is over."""
        late = [waiter for waiter in self._waiters.values() if now >= waiter.given_up_at(loading=loading)]
        for waiter in late:
            del self._waiters[waiter.ticket]
        return late

    def next_deadline(self, *, loading: bool) -> float:
        return min((waiter.given_up_at(loading=loading) for waiter in self._waiters.values()), default=math.inf)


@dataclass(slots=True, kw_only=True)
class Turn:
    """What a model may serve while others wait for its room: so long, so many, and not longer than it is wanted.

    A turn is given to a model that becomes ready while others wait: it has cost a load, and without a turn two
    alternating clients would cost one load per request. One that nobody waited for has none and leaves when asked.
    """

    ends_at: float
    left: int
    """Requests that may still begin."""
    lull_seconds: float
    """So long without a request means that nobody is coming: the turn is over early."""

    def over_at(self, *, idle_since: float | None) -> float:
        """When it is over as things stand; ``idle_since`` None while requests run."""
        if self.left <= 0:
            return -math.inf
        return self.ends_at if idle_since is None else min(self.ends_at, idle_since + self.lull_seconds)
