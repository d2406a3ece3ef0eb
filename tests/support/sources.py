"""Worker processes, fork servers and worker sources in the test's own event loop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

from mlx_router_server.workers.processes import WorkerProcesses
from mlx_router_server.workers.source import SourceKind, WorkerSource
from tests.support.router import wait_until

__all__ = ["run_bounded", "running_source", "server_pid", "worker_processes"]


def run_bounded(test: Callable[[], Coroutine[Any, Any, None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(60):
            await test()

    asyncio.run(bounded())


@asynccontextmanager
async def worker_processes() -> AsyncIterator[WorkerProcesses]:
    processes = WorkerProcesses(lambda hello: None)
    await processes.open()
    try:
        yield processes
    finally:
        await processes.close()


@asynccontextmanager
async def running_source(kind: SourceKind = SourceKind.FORK, standby: int = 1) -> AsyncIterator[WorkerSource]:
    async with worker_processes() as processes:
        source = WorkerSource(kind, standby, processes)
        try:
            yield source
        finally:
            await source.close_idle()
            workers = list(processes._workers.values())
            await asyncio.gather(*(worker.stop("the test is over", 2) for worker in workers))
            await source.close()


async def server_pid(source: WorkerSource) -> int:
    """The pid of its fork server once that is ready."""
    await asyncio.to_thread(wait_until, lambda: source.view().fork_server_ready, "the fork server is ready")
    pid = source.view().fork_server_pid
    assert pid is not None
    return pid
