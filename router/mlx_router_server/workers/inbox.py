"""The events of a request that its reader has not taken yet."""

from __future__ import annotations

import asyncio
from typing import Final

from mlx_router_shared.generation import Event, Failure, Finish

__all__ = ["Inbox"]

_MOST_UNREAD_EVENTS: Final = 20_000


class Inbox:
    """Created with its request; closed by the last event."""

    __slots__ = ("_events", "_waiter", "closed")

    def __init__(self) -> None:
        self._events: list[Event] = []
        self._waiter: asyncio.Future[None] | None = None
        self.closed = False

    def put(self, events: list[Event]) -> bool:
        """Returns False when the reader is too far behind to be served any longer."""
        if self.closed:
            return True
        self._events += events
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
        if isinstance(events[-1], Finish | Failure):
            self.closed = True
        return len(self._events) <= _MOST_UNREAD_EVENTS

    async def take(self) -> list[Event]:
        """All unread events, at least one."""
        while not self._events:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        events, self._events = self._events, []
        return events
