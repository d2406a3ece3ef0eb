"""The last so many of something, by number, and everybody who follows them.

Lives in one event loop; nothing here waits, so that adding costs whoever adds nothing, however slow a reader is. A
reader that has fallen behind loses nothing that the ring still has, and sees by the numbers what it lost.
"""

from __future__ import annotations

import asyncio
import secrets
from collections import deque
from collections.abc import AsyncGenerator
from typing import Generic, TypeVar

__all__ = ["Ring"]

Item = TypeVar("Item")


class Ring(Generic[Item]):
    """``add`` from anywhere in the loop; ``follow`` to read, from now on or from a number on."""

    def __init__(self, kept: int) -> None:
        self._items: deque[Item] = deque(maxlen=kept)
        self._last = 0
        self.run = secrets.token_hex(4)
        """Whose numbers these are: those of a ring from before the router was started anew mean something else."""
        self._readers: set[asyncio.Event] = set()
        self._closed = False

    @property
    def next_number(self) -> int:
        """What the next item will be counted as; the first is 1."""
        return self._last + 1

    def add(self, item: Item) -> None:
        self._items.append(item)
        self._last += 1
        self._wake()

    def close(self) -> None:
        """Let go of everybody who follows: an endless answer must not hold up the end of the router."""
        self._closed = True
        self._wake()

    def _wake(self) -> None:
        for reader in self._readers:
            reader.set()

    def since(self, after: int) -> list[tuple[int, Item]]:
        """What is still there beyond that number, with the numbers."""
        count = min(max(self._last - after, 0), len(self._items))
        return [(self._last - back + 1, self._items[-back]) for back in range(count, 0, -1)]

    async def follow(self, after: int | None = None) -> AsyncGenerator[list[tuple[int, Item]], None]:
        """What ``since`` gives, whenever there is something, never an empty list; None begins now. Ends with ``close``,
        after what was added before."""
        after = self._last if after is None else after
        added = asyncio.Event()
        self._readers.add(added)
        try:
            while True:
                added.clear()
                if items := self.since(after):
                    after = items[-1][0]
                    yield items
                elif self._closed:
                    return
                else:
                    await added.wait()
        finally:
            self._readers.discard(added)
