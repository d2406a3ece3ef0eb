"""The worker that counts tokens: no weights, one for all models, started when it is first asked, ended when idle."""

from __future__ import annotations

import asyncio
import logging
from contextlib import aclosing
from typing import Final

from mlx_router_server.workers.handle import WorkerHandle, WorkerLeft
from mlx_router_server.workers.source import WorkerSource
from mlx_router_shared.errors import EngineFailed, Overloaded, ShuttingDown
from mlx_router_shared.generation import Counted, CountRequest, Failure, error_of

__all__ = ["TokenCounter"]

log = logging.getLogger(__name__)

_IDLE_SECONDS: Final = 300.0
_STOP_SECONDS: Final = 2.0
_MOST_OPEN: Final = 256


class TokenCounter:
    """Owns its process; ``count`` any number at once. Gets its worker from ``source``."""

    def __init__(self, engine: str, source: WorkerSource) -> None:
        self._engine = engine
        self._source = source
        self._worker: WorkerHandle | None = None
        self._starting = asyncio.Lock()
        self._open = 0
        self._idle: asyncio.TimerHandle | None = None
        self._tasks: set[asyncio.Task[object]] = set()
        self._closed = False

    @property
    def pids(self) -> list[int]:
        return [self._worker.pid] if self._worker is not None and not self._worker.exited.is_set() else []

    async def count(self, request: CountRequest) -> Counted:
        """Raises ``MlxRouterError``; nothing is left behind when the caller is cancelled."""
        if self._open >= _MOST_OPEN:
            raise Overloaded("server busy, please try again.  maximum pending requests exceeded")
        self._open += 1
        if self._idle is not None:
            self._idle.cancel()
        try:
            try:
                return await self._ask(await self._ready(), request)
            except WorkerLeft:  # another program stopped it, which has nothing to do with the request
                return await self._ask(await self._ready(), request)
        finally:
            self._open -= 1
            if not self._open and not self._closed:
                self._idle = asyncio.get_running_loop().call_later(_IDLE_SECONDS, self._rest)

    async def _ask(self, worker: WorkerHandle, request: CountRequest) -> Counted:
        async with aclosing(worker.generate(request)) as batches:
            async for events in batches:
                for event in events:
                    if isinstance(event, Counted):
                        return event
                    if isinstance(event, Failure):
                        raise error_of(event)
        raise EngineFailed("the prompt was not counted")

    async def _ready(self) -> WorkerHandle:
        async with self._starting:
            if self._closed:
                raise ShuttingDown("the server is shutting down")
            if self._worker is None or self._worker.exited.is_set():
                self._worker = await self._greeted()
            return self._worker

    async def _greeted(self) -> WorkerHandle:
        """Return a new worker that has said hello."""
        worker = (await self._source.take(self._engine)).worker
        log.info("event=counter_ready worker=%s pid=%d", worker.worker_id, worker.pid)
        return worker

    def check_progress(self, now: float, limit_seconds: float) -> None:
        """End it when it has work and does not get on with it; whoever waits is told, and the next one gets another."""
        worker = self._worker
        if worker is None or worker.exited.is_set() or not worker.unfinished_requests:
            return
        still = now - worker.progress_at
        if still > limit_seconds:
            log.error("event=counter_stalled worker=%s seconds=%.1f", worker.worker_id, still)
            self._worker = None
            worker.fail_requests(f"counting tokens made no progress for {still:.3g} s and was ended")
            self._end(worker, "it does not get on", hung=True)

    def _end(self, worker: WorkerHandle, reason: str, *, hung: bool = False) -> None:
        task: asyncio.Task[object] = asyncio.create_task(
            worker.stop(reason, _STOP_SECONDS, hung=hung), name="counter-end"
        )
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _rest(self) -> None:
        """Nobody has asked for a while: its memory is worth more than the second that it takes to start again."""
        if self._worker is not None and not self._open:
            self._end(self._worker, "idle")
            self._worker = None

    async def close(self, stop_seconds: float) -> None:
        """End it; returns when it is reaped."""
        self._closed = True
        if self._idle is not None:
            self._idle.cancel()
        async with self._starting:
            worker, self._worker = self._worker, None
        if worker is not None:
            await worker.stop("the router is leaving", stop_seconds)
        await asyncio.gather(*self._tasks, return_exceptions=True)
