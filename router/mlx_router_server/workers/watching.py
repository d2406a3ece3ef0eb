"""What is looked at again and again: the machine's memory, and whether workers get on with their work."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable
from typing import Final, Protocol

from mlx_router_server.lifecycle.memory import MemoryReading

__all__ = ["watch_memory", "watch_progress"]

log = logging.getLogger(__name__)

_LATE_SECONDS: Final = 1.0


async def watch_memory(
    read: Callable[[], MemoryReading], tell: Callable[[MemoryReading], None], interval_seconds: float
) -> None:
    """For ever; a reading that fails is a warning."""
    while True:
        try:
            tell(read())
        except OSError as error:
            log.warning("event=memory_unreadable error=%r", str(error))
        await asyncio.sleep(interval_seconds)


class _Watched(Protocol):
    def check_progress(self, now: float, limit_seconds: float) -> None: ...


async def watch_progress(runs: Callable[[], Iterable[_Watched]], limit: Callable[[], float]) -> None:
    """For ever: report workers that have work and make no step for ``limit`` seconds; 0: never.

    A look that comes late says nothing about them: the router itself, or the whole machine, was asleep.
    """
    looked = time.monotonic()
    while True:
        seconds = limit()
        interval = min(1.0, seconds / 4) if seconds else 1.0
        await asyncio.sleep(interval)
        now = time.monotonic()
        if seconds and now - looked < 2 * interval + _LATE_SECONDS:
            for run in list(runs()):
                run.check_progress(now, seconds)
        looked = now
