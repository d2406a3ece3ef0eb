"""What happened, for those who watch: a bounded ring, and everybody who listens now.

Lives in the event loop of the router; nothing here waits, so that telling costs the teller nothing.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import deque
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Any, Final

__all__ = ["Happening", "Happenings"]

_KEPT: Final = 1000
_MOST_UNREAD: Final = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class Happening:
    """One entry of ``/admin/events``."""

    number: int
    at: float
    """Wall clock, seconds since 1970."""
    kind: str
    data: dict[str, Any]


class Happenings:
    """``tell`` from anywhere in the loop; ``follow`` to read, from now on or from a number on."""

    def __init__(self) -> None:
        self._ring: deque[Happening] = deque(maxlen=_KEPT)
        self._numbers = itertools.count(1)
        self._listeners: set[asyncio.Queue[Happening | None]] = set()
        self._closed = False

    def tell(self, kind: str, **data: Any) -> None:
        """Write down, and wake who listens; somebody who does not read loses the oldest."""
        happening = Happening(number=next(self._numbers), at=time.time(), kind=kind, data=data)
        self._ring.append(happening)
        self._hand_out(happening)

    def close(self) -> None:
        """Let go of everybody who listens: an endless answer must not hold up the end of the router."""
        self._closed = True
        self._hand_out(None)

    def _hand_out(self, happening: Happening | None) -> None:
        for listener in self._listeners:
            if listener.full():
                listener.get_nowait()
            listener.put_nowait(happening)

    async def follow(self, after: int | None = None) -> AsyncGenerator[Happening, None]:
        """What is still known after that number, then everything as it happens; None begins now."""
        listener: asyncio.Queue[Happening | None] = asyncio.Queue(_MOST_UNREAD)
        known = [] if after is None else [happening for happening in self._ring if happening.number > after]
        self._listeners.add(listener)
        try:
            for happening in known:
                yield happening
            while not self._closed or not listener.empty():
                if (following := await listener.get()) is None:
                    return
                yield following
        finally:
            self._listeners.discard(listener)
