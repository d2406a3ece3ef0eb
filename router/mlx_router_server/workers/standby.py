"""One worker that has imported everything and waits for a model, so that a load costs reading weights only."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Final

from mlx_router_server.workers.handle import StopReport, WorkerHandle
from mlx_router_shared.errors import MlxRouterError, WorkerDied

__all__ = ["StandbyPool"]

log = logging.getLogger(__name__)

_ANSWER_SECONDS: Final = 2.0
_HELLO_SECONDS: Final = 120.0
_MOST_FAILURES: Final = 3


class StandbyPool:
    """Owns the workers without a model; ``take`` hands one over, ``refill`` replaces it later."""

    def __init__(self, size: int, start: Callable[[str], Awaitable[WorkerHandle]]) -> None:
        self._size = size
        self._start = start
        self._ready: list[WorkerHandle] = []
        self._filling: asyncio.Task[None] | None = None
        self._failures = 0
        self._closed = False
        self._ending: set[asyncio.Task[StopReport]] = set()

    @property
    def workers(self) -> list[WorkerHandle]:
        return list(self._ready)

    async def take(self, engine: str) -> WorkerHandle | None:
        """A worker that could load at once, or None. One that is about to be ready is waited for: starting another
        beside it would only slow both down."""
        if engine != "mlx":
            return None
        while True:
            while self._ready:
                worker = self._ready.pop(0)
                if not worker.exited.is_set() and await self._answers(worker):
                    return worker
            if self._filling is None or self._filling.done():
                return None
            await asyncio.wait([self._filling])

    async def _answers(self, worker: WorkerHandle) -> bool:
        """Whether it could be given a model; one that hangs is ended."""
        try:
            await worker.get_stats(_ANSWER_SECONDS)
        except asyncio.CancelledError:
            if worker.exited.is_set():
                return False
            self._ready.insert(0, worker)  # whoever wanted it does not want it any more
            raise
        except (TimeoutError, WorkerDied):
            log.warning("event=standby_hangs worker=%s pid=%d", worker.worker_id, worker.pid)
            self._ending.add(task := asyncio.create_task(worker.stop("it hangs", 0.0, hung=True), name="standby-end"))
            task.add_done_callback(self._ending.discard)
            return False
        return True

    def resize(self, size: int) -> None:
        """From the next refill on; one too many is used up before another is started."""
        self._size = size

    def refill(self) -> None:
        """Start what is missing; called when no load runs, because imports would compete with it for the cores."""
        self._ready = [worker for worker in self._ready if not worker.exited.is_set()]
        full = len(self._ready) >= self._size
        busy = self._filling is not None and not self._filling.done()
        # An installation that cannot start workers must not start them for ever; a load will say what is wrong.
        if not (full or busy or self._closed or self._failures >= _MOST_FAILURES):
            self._filling = asyncio.create_task(self._fill(), name="standby")

    async def _fill(self) -> None:
        while len(self._ready) < self._size and self._failures < _MOST_FAILURES:
            worker: WorkerHandle | None = None
            try:
                worker = await self._start("mlx")
                await worker.wait_hello(_HELLO_SECONDS)
            except asyncio.CancelledError:
                if worker is not None:
                    await worker.stop("the router is leaving", 0.0)
                raise
            except (MlxRouterError, OSError) as error:
                self._failures += 1
                log.warning("event=standby_failed error=%r", str(error))
                if worker is not None:
                    await worker.stop("did not become ready", 1.0)
            else:
                self._failures = 0
                self._ready.append(worker)
                log.info("event=standby_ready worker=%s pid=%d", worker.worker_id, worker.pid)

    async def close(self, stop_seconds: float) -> None:
        """End all of them; returns when they are reaped."""
        self._closed = True
        if self._filling is not None:
            self._filling.cancel()
            await asyncio.gather(self._filling, return_exceptions=True)
        workers, self._ready = self._ready, []
        await asyncio.gather(*(worker.stop("the router is leaving", stop_seconds) for worker in workers), *self._ending)
