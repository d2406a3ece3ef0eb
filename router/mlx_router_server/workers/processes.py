"""The worker processes of one router: where they connect to, how they are started, and which of them live.

Workers connect to a socket in the run directory. A cleaner of temporary files may remove that directory while the
router runs, so it is checked before each start, and made again.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
from collections.abc import Callable

from mlx_router_server.workers.forking import ForkServer
from mlx_router_server.workers.handle import WorkerHandle
from mlx_router_server.workers.launcher import launch
from mlx_router_server.workers.link import WorkerLink
from mlx_router_server.workers.memory import process_bytes
from mlx_router_server.workers.run_directory import RunDirectory
from mlx_router_shared.protocol import Bootstrap, Hello

__all__ = ["WorkerProcesses"]

log = logging.getLogger(__name__)


class WorkerProcesses:
    """``open`` inside a running event loop, ``close`` when every process has ended."""

    def __init__(self, on_hello: Callable[[Hello], None]) -> None:
        """``on_hello`` is called with the first message of each worker."""
        self._on_hello = on_hello
        self._workers: dict[int, WorkerHandle] = {}
        self._helpers: set[int] = set()
        """Pids of fork servers."""
        self._directory: RunDirectory | None = None
        self._link: WorkerLink | None = None
        self._renewing = asyncio.Lock()

    async def open(self) -> None:
        """Make the run directory and bind the socket. Raises ``OSError`` if that is impossible."""
        self._directory = await asyncio.to_thread(RunDirectory.create)
        self._link = WorkerLink(self._directory.endpoint)

    async def close(self) -> None:
        if self._link is not None:
            await self._link.close()
        if self._directory is not None:
            self._directory.remove()

    async def start(
        self, engine: str, *, fork_server: ForkServer | None = None, background: bool = False
    ) -> WorkerHandle:
        """Start a worker, with ``fork_server`` by forking; it has no model yet, and has not said hello.

        ``background`` has it do its imports at a low CPU priority. Raises ``OSError`` or ``ForkUnavailable`` if it
        cannot be started.
        """
        assert self._link is not None
        directory = await self._whole_directory(self._link)
        worker_id, token = "p-" + secrets.token_hex(8), secrets.token_urlsafe(24)
        process = await (launch(worker_id) if fork_server is None else fork_server.fork(worker_id))
        directory.note_worker(process.pid)
        handle = WorkerHandle(
            worker_id, engine, process, self._link, token, is_forked=fork_server is not None
        )  # fmt: skip
        if handle.is_forked:
            # All of it now; until its first token it will have written to about half of the pages. Measured then.
            handle.shared_bytes = process_bytes(process.pid) // 2
        self._workers[process.pid] = handle
        handle.on_hello = self._on_hello
        handle.on_reaped = self._forget
        process.begin(
            Bootstrap(
                endpoint=directory.endpoint, worker_id=worker_id, token=token, engine=engine, background=background
            )
        )
        return handle

    def bytes_of_others(self, pid: int) -> int:
        """The memory in bytes of the router and all of its workers but one."""
        workers = sum(worker.memory_bytes for other, worker in self._workers.items() if other != pid)
        return workers + sum(process_bytes(other) for other in (os.getpid(), *self._helpers))

    def note_helper(self, pid: int) -> None:
        """Record a process that is no worker, so that the next router ends it if this one cannot."""
        self._helpers.add(pid)
        if self._directory is not None:
            self._directory.note_worker(pid)

    def forget_helper(self, pid: int) -> None:
        """It has ended."""
        self._helpers.discard(pid)
        if self._directory is not None:
            self._directory.forget_worker(pid)

    async def _whole_directory(self, link: WorkerLink) -> RunDirectory:
        """The run directory, made again if it was removed; workers that are connected stay so."""
        async with self._renewing:
            directory = self._directory
            assert directory is not None
            if await asyncio.to_thread(directory.is_whole):
                return directory
            new = await asyncio.to_thread(RunDirectory.create)
            log.warning("event=run_directory_lost path=%r new=%r", str(directory.path), str(new.path))
            try:
                link.bind(new.endpoint)
            except OSError:
                new.remove()
                raise
            for pid in (*self._workers, *self._helpers):
                new.note_worker(pid)
            self._directory = new
            directory.remove()
            return new

    def _forget(self, pid: int) -> None:
        self._workers.pop(pid, None)
        if self._directory is not None:
            self._directory.forget_worker(pid)
