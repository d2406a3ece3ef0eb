"""The single way to obtain a worker whose imports are done: forked, from standby, or started for the occasion.

- ``fork`` (Linux): a fork server does the imports once and forks workers in milliseconds.
- ``standby``: idle workers wait for a model; more of them while loads follow each other closely.
- ``spawn``: every worker is started when it is needed and does its own imports.

``auto`` is ``fork`` on Linux and ``standby`` elsewhere; with ``standby_workers = 0`` it is ``spawn``. Whatever fails
falls back to the next: no load fails because a fork server or a standby worker does.
"""

from __future__ import annotations

import asyncio
import logging
import math
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from mlx_router_server.workers.forking import ForkServer, ForkUnavailable
from mlx_router_server.workers.handle import WorkerHandle
from mlx_router_server.workers.processes import WorkerProcesses
from mlx_router_server.workers.standby import OnProcess, StandbyPool
from mlx_router_shared.errors import MlxRouterError

__all__ = ["SourceKind", "SourceView", "Supply", "WorkerSource"]

log = logging.getLogger(__name__)

_HELLO_SECONDS: Final = 120.0
_STILL_SECONDS: Final = 20.0
_FORKED_STILL_SECONDS: Final = 2.0
"""A forked worker that has not said hello and uses no CPU time for so long hangs: nothing is left to import."""
_MOST_FORK_FAILURES: Final = 3
_NO_FORK_SECONDS: Final = 600.0
"""After so many failures in a row, forking is not tried for so long."""
_SHARED_ENGINES: Final = ("mlx", "embed", "tokenizer")
"""The engine kinds that a fork server imports from the beginning; others once a model has needed them."""
_CHEAP_ENGINES: Final = ("fake",)
_MOST_EXTRA: Final = 3
"""Standby workers beyond the configured number while loads follow each other closely."""
_END_SECONDS: Final = 1.0
_FORKED_AHEAD: Final = 1
"""Idle workers to keep beside a fork server: their own memory is a few megabytes, and a load saves the fork."""


class SourceKind(StrEnum):
    """The setting ``worker_source``."""

    AUTO = "auto"
    FORK = "fork"
    STANDBY = "standby"
    SPAWN = "spawn"


@dataclass(frozen=True, slots=True, kw_only=True)
class Supply:
    """A worker that has said hello, and how long that took in seconds."""

    worker: WorkerHandle
    origin: SourceKind
    """How it was obtained; never ``auto``."""
    spawn_seconds: float
    import_seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceView:
    """What operators see of the source."""

    kind: SourceKind
    """What is in use; never ``auto``."""
    reason: str
    """Why it is not what the settings ask for; else empty."""
    fork_server_pid: int | None
    fork_server_ready: bool
    fork_server_engines: list[str]
    """The engine kinds that it imports before it forks."""
    standby_pids: list[int]


class WorkerSource:
    """Owns the fork server and the idle workers. ``start`` inside a running event loop, ``close`` before it ends."""

    def __init__(self, kind: SourceKind, standby_workers: int, processes: WorkerProcesses) -> None:
        self._processes = processes
        self._server: ForkServer | None = None
        self._server_starting: asyncio.Task[ForkServer] | None = None
        self._servers: list[ForkServer] = []
        """All that have not ended: the present one, and former ones that wait for the end of their workers."""
        self._engines: tuple[str, ...] = _SHARED_ENGINES
        self._not_shared: set[str] = set(_CHEAP_ENGINES)
        """Engine kinds that a fork server does not import."""
        self._replacing: asyncio.Task[None] | None = None
        self._ending: set[asyncio.Task[object]] = set()
        self._is_closed = False
        self._pool = StandbyPool(self._start, lambda worker: self._end(worker, "it is not needed"))
        self._configure(kind, standby_workers)

    @property
    def kind(self) -> SourceKind:
        """What is in use; never ``auto``."""
        if self._configured is SourceKind.FORK and self._no_fork_reason:
            if time.monotonic() >= self._fork_again_at:
                return SourceKind.FORK
            return SourceKind.STANDBY if self._standby_workers else SourceKind.SPAWN
        return self._configured

    def view(self) -> SourceView:
        server = self._server if self._server is not None and self._server.usable else None
        return SourceView(
            kind=self.kind,
            reason=self._no_fork_reason if self._configured is SourceKind.FORK else "",
            fork_server_pid=server.pid if server is not None else None,
            fork_server_ready=server is not None and server.is_ready,
            fork_server_engines=list(server.engines) if server is not None else [],
            standby_pids=[worker.pid for worker in self._pool.workers],
        )

    def _configure(self, kind: SourceKind, standby_workers: int) -> None:
        self._configured = _resolve(kind, standby_workers)
        self._standby_workers = standby_workers
        self._fork_failures = 0
        self._no_fork_reason = "" if sys.platform == "linux" else "it needs Linux"
        self._fork_again_at = math.inf if self._no_fork_reason else 0.0
        self._apply()

    def _apply(self) -> None:
        kind = self.kind
        if kind is SourceKind.FORK:
            self._pool.resize(_FORKED_AHEAD)
        elif kind is SourceKind.STANDBY:
            self._pool.resize(self._standby_workers, _MOST_EXTRA)
        else:
            self._pool.resize(0)

    def reconfigure(self, kind: SourceKind, standby_workers: int) -> None:
        """Obtain workers this way from now on."""
        self._configure(kind, standby_workers)
        if self.kind is not SourceKind.FORK and self._server is not None:
            self._server.retire()
            self._server = None

    # ------------------------------------------------------------------------------ workers

    async def take(self, engine: str, on_process: OnProcess | None = None) -> Supply:
        """Return a worker of an engine kind that has said hello and has no model.

        ``on_process`` is called as soon as its process exists, and again if another one must be started; what it
        raises is raised here. Raises ``MlxRouterError`` or ``OSError``; then every process of it is being ended.
        """
        began = time.monotonic()
        worker = await self._pool.take(engine)
        if worker is not None:
            if on_process is not None:
                self._hand_over(worker, on_process)
            if self.kind is SourceKind.STANDBY:
                self._pool.refill()
            origin = SourceKind.FORK if worker.is_forked else SourceKind.STANDBY
            waited = time.monotonic() - began  # for one that was being started
            return Supply(worker=worker, origin=origin, spawn_seconds=0.0, import_seconds=waited)
        worker = await self._start(engine, on_process, background=False)
        assert worker.hello is not None
        import_seconds = worker.hello.import_seconds
        return Supply(
            worker=worker, origin=SourceKind.FORK if worker.is_forked else SourceKind.SPAWN,
            import_seconds=import_seconds, spawn_seconds=max(time.monotonic() - began - import_seconds, 0.0),
        )  # fmt: skip

    def prepare(self, engine: str) -> None:
        """Have a worker ready for a load that waits for memory; returns at once."""
        if engine not in _CHEAP_ENGINES:
            self._pool.prepare(engine)

    def refill(self) -> None:
        """Start what is missing. Called when no load and no first token is under way, which it would slow down."""
        if self._is_closed:
            return
        self._apply()
        self._pool.refill()
        if self.kind is SourceKind.FORK:
            if self._server is None or not self._server.usable:
                self._begin_server()
            elif self._server.engines != self._engines and self._server.is_ready and self._replacing is None:
                self._replacing = asyncio.create_task(self._replace_server(), name="fork-server-replace")

    async def _start(self, engine: str, on_process: OnProcess | None, *, background: bool) -> WorkerHandle:
        if self.kind is SourceKind.FORK:
            try:
                return await self._fork(engine, on_process)
            except ForkUnavailable as error:
                log.warning("event=fork_failed engine=%s reason=%r", engine, str(error))
        worker = await self._processes.start(engine, background=background)
        return await self._greeted(worker, on_process)

    async def _greeted(
        self,
        worker: WorkerHandle,
        on_process: OnProcess | None,
        still_seconds: float = _STILL_SECONDS,
    ) -> WorkerHandle:
        """Wait for a worker's hello; one that does not say it is ended."""
        if on_process is not None:
            self._hand_over(worker, on_process)
        try:
            await worker.wait_hello(_HELLO_SECONDS, still_seconds)
        except BaseException:
            self._end(worker, "it did not say hello", hung=True)
            raise
        return worker

    def _hand_over(self, worker: WorkerHandle, on_process: OnProcess) -> None:
        try:
            on_process(worker)
        except BaseException:
            self._end(worker, "its load was given up")
            raise

    def _end(self, worker: WorkerHandle, reason: str, *, hung: bool = False) -> None:
        self._keep(asyncio.create_task(worker.stop(reason, _END_SECONDS, hung=hung), name="worker-end"))

    def _keep(self, task: asyncio.Task[object]) -> None:
        self._ending.add(task)
        task.add_done_callback(self._ending.discard)

    # -------------------------------------------------------------------------- fork server

    async def _fork(self, engine: str, on_process: OnProcess | None) -> WorkerHandle:
        """Return a forked worker that has said hello. Raises ``ForkUnavailable``."""
        server = await self._running_server()
        try:
            worker = await self._processes.start(engine, fork_server=server)
        except ForkUnavailable as error:
            self._note_fork_failure(server, str(error))
            raise
        try:
            await self._greeted(worker, on_process, _FORKED_STILL_SECONDS)
        except MlxRouterError as error:
            if worker.is_stopping:
                raise
            reason = f"a forked worker did not say hello: {error.message}"
            self._note_fork_failure(server, reason)
            raise ForkUnavailable(reason) from None
        self._fork_failures, self._no_fork_reason = 0, ""
        if engine not in self._engines and engine not in self._not_shared:
            self._engines = (*self._engines, engine)  # the next fork server imports it
        return worker

    async def _running_server(self) -> ForkServer:
        """Return the fork server; one that has ended is replaced. Raises ``ForkUnavailable``."""
        if self._server is None or not self._server.usable:
            self._begin_server()
        if self._server_starting is not None:
            await asyncio.wait([self._server_starting])
        if self._server is None:
            raise ForkUnavailable("the fork server could not be started")
        return self._server

    def _begin_server(self) -> None:
        if self._server_starting is None:
            self._server_starting = asyncio.create_task(self._start_server(self._engines), name="fork-server-start")
            self._server_starting.add_done_callback(self._server_started)

    def _server_started(self, task: asyncio.Task[ForkServer]) -> None:
        self._server_starting = None
        if task.cancelled():
            return
        if error := task.exception():
            log.warning("event=fork_server_failed error=%r", str(error))
            self._server = None
        elif self._is_closed or self.kind is not SourceKind.FORK:
            self._keep(asyncio.create_task(task.result().close(), name="fork-server-close"))
        else:
            self._server = task.result()

    async def _start_server(self, engines: tuple[str, ...]) -> ForkServer:
        server = await ForkServer.start(engines)
        self._processes.note_helper(server.pid)
        server.on_exit = self._processes.forget_helper
        self._servers = [*(other for other in self._servers if not other.has_ended), server]
        return server

    async def _replace_server(self) -> None:
        """Start a fork server that imports more, and let the present one end with its last worker."""
        try:
            new = await self._start_server(self._engines)
            try:
                ready = await new.wait_ready()
            except (ForkUnavailable, asyncio.CancelledError):
                await new.close()
                raise
        except (ForkUnavailable, OSError) as error:
            log.warning("event=fork_server_not_replaced error=%r", str(error))
            self._not_shared.update(set(self._engines) - set(_SHARED_ENGINES))
            self._engines = _SHARED_ENGINES if self._server is None else self._server.engines
        else:
            self._not_shared.update(ready.import_errors)
            if self._server is not None:
                self._server.retire()
            self._server = new
            log.info("event=fork_server_ready pid=%d engines=%s", new.pid, ",".join(ready.engines))
        finally:
            self._replacing = None

    def _note_fork_failure(self, server: ForkServer, reason: str) -> None:
        """Do without a fork server after several failures in a row; its end is one failure for all who wait for it."""
        if server is not self._server:
            return
        self._fork_failures += 1
        is_given_up = bool(server.unsafe) or self._fork_failures >= _MOST_FORK_FAILURES
        if is_given_up:
            self._no_fork_reason = reason
            self._fork_again_at = math.inf if server.unsafe else time.monotonic() + _NO_FORK_SECONDS
            log.warning("event=fork_server_given_up reason=%r instead=%s", reason, self.kind.value)
            self._apply()
        if is_given_up or not server.usable:
            server.retire()
            self._server = None

    # --------------------------------------------------------------------------------- end

    async def close_idle(self) -> None:
        """Start nothing any more and end the idle workers; returns when they are reaped."""
        self._is_closed = True
        for task in (self._replacing, self._server_starting):
            if task is not None:
                task.cancel()
                with suppress(asyncio.CancelledError, Exception):
                    await task
        await self._pool.close()
        while self._ending:
            await asyncio.gather(*self._ending, return_exceptions=True)

    async def close(self) -> None:
        """End the fork servers. Called after the end of the last worker, whose exit status they report."""
        await asyncio.gather(*(server.close() for server in self._servers), return_exceptions=True)


def _resolve(kind: SourceKind, standby_workers: int) -> SourceKind:
    """Return what the settings ask for on this platform; never ``auto``."""
    if kind is SourceKind.AUTO:
        if not standby_workers:
            return SourceKind.SPAWN
        return SourceKind.FORK if sys.platform == "linux" else SourceKind.STANDBY
    if kind is SourceKind.STANDBY and not standby_workers:
        return SourceKind.SPAWN
    return kind
