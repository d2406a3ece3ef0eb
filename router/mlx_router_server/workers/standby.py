"""Idle workers: processes whose imports are done and that have no model yet."""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Final, Protocol

from mlx_router_server.workers.handle import WorkerHandle
from mlx_router_shared.errors import MlxRouterError, WorkerDied

__all__ = ["OnProcess", "StandbyPool"]

log = logging.getLogger(__name__)

_ANSWER_SECONDS: Final = 2.0
_MOST_FAILURES: Final = 3
_RATE_SECONDS: Final = 10.0
"""Loads of the last so many seconds count for the number of idle workers: a few times what a start takes."""
_SURPLUS_SECONDS: Final = 60.0
_PRIO_DARWIN_PROCESS: Final = 4  # <sys/resource.h> of macOS


OnProcess = Callable[[WorkerHandle], None]
"""Called as soon as the process of a worker exists."""


class Start(Protocol):
    """Start a worker of an engine kind and return it once it has said hello; ``background``: at a low CPU priority."""

    async def __call__(self, engine: str, on_process: OnProcess | None, *, background: bool) -> WorkerHandle: ...


class StandbyPool:
    """``take`` hands an idle worker over; ``refill`` and ``prepare`` start others."""

    def __init__(self, start: Start, end: Callable[[WorkerHandle], None]) -> None:
        """``end`` ends a worker that is not used."""
        self._start = start
        self._end = end
        self._size = self._most = 0
        self._idle: list[WorkerHandle] = []
        self._starting: dict[asyncio.Task[None], str] = {}
        """The tasks that start a worker, and of which engine kind."""
        self._importing: set[int] = set()
        """Pids of workers that have not said hello."""
        self._taken_at: deque[float] = deque(maxlen=1)
        self._failures = 0
        self._trim: asyncio.TimerHandle | None = None
        self._is_closed = False

    @property
    def workers(self) -> list[WorkerHandle]:
        return [worker for worker in self._idle if not worker.exited.is_set()]

    @property
    def wanted(self) -> int:
        """The number of idle workers to keep: the configured one, more while loads follow each other closely."""
        recent = sum(time.monotonic() - at < _RATE_SECONDS for at in self._taken_at)
        return min(max(self._size, recent), self._most)

    def resize(self, size: int, extra: int = 0) -> None:
        """Keep ``size`` idle workers, and up to ``extra`` more by the rate of loads, from the next ``refill`` on."""
        self._size, self._most = size, size + extra
        self._taken_at = deque(self._taken_at, maxlen=self._most or 1)

    async def take(self, engine: str) -> WorkerHandle | None:
        """Return an idle worker, or None. One that is being started is waited for: starting another beside it would
        only slow both down."""
        self._taken_at.append(time.monotonic())
        while True:
            while worker := self._pop(engine):
                if not worker.exited.is_set() and await self._answers(worker):
                    return worker
            starting = [task for task, kind in self._starting.items() if kind == engine]
            if not starting:
                return None
            for pid in self._importing:
                _end_low_priority(pid)
            await asyncio.wait(starting, return_when=asyncio.FIRST_COMPLETED)

    def _pop(self, engine: str) -> WorkerHandle | None:
        for index, worker in enumerate(self._idle):
            if worker.engine == engine:
                return self._idle.pop(index)
        return None

    async def _answers(self, worker: WorkerHandle) -> bool:
        """Return whether a worker is alive and not hung; one that hangs is ended."""
        try:
            await worker.get_stats(_ANSWER_SECONDS)
        except asyncio.CancelledError:
            if worker.exited.is_set():
                return False
            self._idle.insert(0, worker)  # its load was given up
            raise
        except (TimeoutError, WorkerDied):
            log.warning("event=standby_hangs worker=%s pid=%d", worker.worker_id, worker.pid)
            self._end(worker)
            return False
        return True

    def prepare(self, engine: str) -> None:
        """Start a worker for a load that is about to happen, unless there is one. It is ended if it is not taken."""
        there = engine in self._starting.values() or any(worker.engine == engine for worker in self.workers)
        if not there and not self._is_closed:
            self._begin(engine, background=False)

    def refill(self) -> None:
        """Start what is missing, at a low priority."""
        missing = self.wanted - len(self.workers) - len(self._starting)
        # An installation that cannot start workers must not try without end; a load reports what is wrong.
        if missing > 0 and self._failures < _MOST_FAILURES and not self._is_closed:
            for _ in range(missing):
                self._begin("mlx", background=True)
        self._trim_later()

    def _begin(self, engine: str, *, background: bool) -> None:
        task = asyncio.create_task(self._fill(engine, background), name=f"standby-{engine}")
        self._starting[task] = engine
        task.add_done_callback(self._starting.pop)

    async def _fill(self, engine: str, background: bool) -> None:
        pids: list[int] = []

        def note(worker: WorkerHandle) -> None:
            pids.append(worker.pid)
            self._importing.add(worker.pid)

        try:
            worker = await self._start(engine, note, background=background)
        except (MlxRouterError, OSError) as error:
            self._failures += 1
            log.warning("event=standby_failed error=%r", str(error))
            return
        finally:
            self._importing.difference_update(pids)
        self._failures = 0
        self._idle.append(worker)
        log.info("event=standby_ready worker=%s pid=%d", worker.worker_id, worker.pid)
        self._trim_later()

    def _trim_later(self) -> None:
        """End in a while what is more than wanted by then."""
        if self._trim is not None:
            self._trim.cancel()
        self._trim = asyncio.get_running_loop().call_later(_SURPLUS_SECONDS, self._end_surplus)

    def _end_surplus(self) -> None:
        self._idle = self.workers
        while len(self._idle) > self.wanted:
            self._end(self._idle.pop(0))

    async def close(self) -> None:
        """End all idle workers; the caller waits for their exit."""
        self._is_closed = True
        if self._trim is not None:
            self._trim.cancel()
        starting = list(self._starting)
        for task in starting:
            task.cancel()
        await asyncio.gather(*starting, return_exceptions=True)
        idle, self._idle = self._idle, []
        for worker in idle:
            self._end(worker)


def _end_low_priority(pid: int) -> None:
    """Have a worker do its imports at the normal priority, because a load waits (macOS, where that is possible)."""
    if sys.platform == "darwin":
        with suppress(OSError):
            os.setpriority(_PRIO_DARWIN_PROCESS, pid, 0)
