"""Signs of life on a stream that has nothing to say yet: clients and proxies give up a connection that is silent.

The first one commits the status line, so an error that comes later has to be told inside the stream; therefore none
is sent before a client could lose its patience.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

__all__ = ["Heartbeat", "beating"]


class Heartbeat:
    """Knows when something was last sent; ``sent`` is cheap enough for every token."""

    def __init__(self) -> None:
        self._sent_at = time.monotonic()

    def sent(self, now: float) -> None:
        self._sent_at = now

    async def beat(self, interval_seconds: float, send: Callable[[], Awaitable[None]]) -> None:
        """Send a sign of life after each so long silence, for ever."""
        while True:
            await asyncio.sleep(max(self._sent_at + interval_seconds - time.monotonic(), 0.001))
            if time.monotonic() - self._sent_at >= interval_seconds:
                self._sent_at = time.monotonic()
                await send()


@asynccontextmanager
async def beating(
    heartbeat: Heartbeat, interval_seconds: float, send: Callable[[], Awaitable[None]]
) -> AsyncIterator[None]:
    """Signs of life while the block runs; none with an interval of 0. The block's own sends may interleave with them,
    frame by frame."""
    if not interval_seconds:
        yield
        return
    task = asyncio.create_task(heartbeat.beat(interval_seconds, send), name="heartbeat")
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
