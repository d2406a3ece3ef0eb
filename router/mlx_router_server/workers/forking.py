"""The router's side of the fork server: one process that has done the imports and forks workers (Linux only).

The fork server reaps the workers and reports their exit statuses. Their ends are seen by pidfds, so that they are
noticed also while the fork server hangs, or after it has ended; workers live on without it.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import signal
import socket
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from typing import Any, Final, TypeVar

from mlx_router_server.workers.launcher import WorkerProcess, spawn
from mlx_router_server.workers.liveness import Liveness
from mlx_router_shared.codec import decode_from_fork_server, encode_forking
from mlx_router_shared.errors import ProtocolError
from mlx_router_shared.forking import (
    MAX_FORK_MESSAGE_BYTES,
    Forked,
    ForkFailed,
    ForkServerReady,
    ForkWorker,
    FromForkServer,
    Retire,
    ToForkServer,
    WorkerEnded,
    exit_status,
)

__all__ = ["ForkServer", "ForkUnavailable"]

log = logging.getLogger(__name__)

_T = TypeVar("_T")
_POLL_SECONDS: Final = 0.25
_STILL_SECONDS: Final = 1.0
"""A fork server that uses no CPU time for so long while it is asked for something hangs."""
_IMPORT_SECONDS: Final = 120.0
_FORK_SECONDS: Final = 10.0
_STATUS_SECONDS: Final = 0.5
_CLOSE_SECONDS: Final = 1.0


class ForkUnavailable(Exception):
    """The fork server cannot fork a worker: start one in another way."""


class _ForkedProcess:
    """A ``ChildProcess`` that the fork server has forked."""

    def __init__(
        self, pid: int, pidfd: int, stdin: int, stderr: asyncio.StreamReader, close_stderr: Callable[[], None],
        status: asyncio.Future[int], server_closed: asyncio.Future[None], unreported: set[int],
    ) -> None:  # fmt: skip
        self.pid = pid
        self.stderr = stderr
        self._pidfd = pidfd
        self._stdin = stdin
        self._close_stderr = close_stderr
        self._status = status
        self._server_closed = server_closed
        self._unreported = unreported
        self._ended = asyncio.Event()
        asyncio.get_running_loop().add_reader(pidfd, self._on_end)

    @property
    def alive(self) -> bool:
        return not self._ended.is_set()

    async def wait(self) -> int | None:
        await self._ended.wait()
        if not self._status.done():
            reported: list[asyncio.Future[Any]] = [self._status, self._server_closed]
            await asyncio.wait(reported, timeout=_STATUS_SECONDS, return_when=asyncio.FIRST_COMPLETED)
        if self._status.done():
            return self._status.result()
        if not self._server_closed.done():
            self._unreported.add(self.pid)
        return _reap_orphan(self.pid)

    def signal_group(self, number: signal.Signals) -> None:
        if not self.alive:
            return
        try:
            os.killpg(self.pid, number)
        except ProcessLookupError:  # it has no group of its own yet
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, number)

    def write(self, data: bytes) -> None:
        with suppress(OSError):  # it has ended
            os.write(self._stdin, data)

    def close(self) -> None:
        """Close what is held of it; called once it has ended."""
        if self._pidfd >= 0:
            os.close(self._pidfd)
            os.close(self._stdin)
            self._close_stderr()
            self._pidfd = self._stdin = -1

    def _on_end(self) -> None:
        asyncio.get_running_loop().remove_reader(self._pidfd)
        self._ended.set()


def _reap_orphan(pid: int) -> int | None:
    """Reap a worker that has ended after its fork server. Returns its exit status; None if it is not our child.

    Where this process is the init of a container, such workers are its children, and would stay zombies.
    """
    try:
        result = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG)
    except OSError:
        return None
    return exit_status(result) if result is not None else None


class ForkServer:
    """Created by ``start``; ``fork`` any number of workers at once; ``retire`` or ``close`` it in the end."""

    def __init__(self, control: socket.socket, process: WorkerProcess, engines: tuple[str, ...]) -> None:
        self.engines = engines
        """The engine kinds whose imports it was started to do."""
        self.closed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Done once it has ended, or was given up: it reports nothing any more."""
        self.on_exit: Callable[[int], None] | None = None
        """Called with its pid when it has ended."""
        self.unsafe = ""
        """Why no worker can be forked from it, ever; else empty."""
        self._control = control
        self._process = process
        self._ready: asyncio.Future[ForkServerReady] = asyncio.get_running_loop().create_future()
        self._requests = itertools.count(1)
        self._answers: dict[int, asyncio.Future[tuple[int, int]]] = {}
        """The pid and the pidfd that a request waits for."""
        self._statuses: dict[int, asyncio.Future[int]] = {}
        """The exit status of the worker that was forked for a request."""
        self._unreported: set[int] = set()
        """Pids of workers that ended and whose exit status it did not report in time."""
        asyncio.get_running_loop().add_reader(control, self._read)
        self._exit = asyncio.create_task(self._await_exit(), name=f"fork-server-{process.pid}")

    @classmethod
    async def start(cls, engines: tuple[str, ...]) -> ForkServer:
        """Start the process. Raises ``OSError`` when it cannot be started."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        try:
            child = await spawn("mlx_router_worker.fork_server", *engines, stdin=theirs.fileno())
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        return cls(ours, WorkerProcess("fork-server", child), engines)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def usable(self) -> bool:
        """Whether it lives and has not been given up."""
        return not self.closed.done()

    @property
    def has_ended(self) -> bool:
        """Whether its process is reaped."""
        return self._exit.done()

    @property
    def is_ready(self) -> bool:
        return self.usable and self._ready.done()

    async def wait_ready(self) -> ForkServerReady:
        """Wait until its imports are done. Raises ``ForkUnavailable`` when it ends, hangs or must not fork."""
        ready = await self._answer(self._ready, _IMPORT_SECONDS)
        if ready.unsafe:
            raise ForkUnavailable(ready.unsafe)
        return ready

    async def fork(self, worker_id: str) -> WorkerProcess:
        """Fork a worker that waits for its bootstrap. Raises ``ForkUnavailable``; a worker that exists then ends."""
        await self.wait_ready()
        loop = asyncio.get_running_loop()
        number = next(self._requests)
        with ExitStack() as always, ExitStack() as on_failure:
            stdin, our_stdin = os.pipe()
            always.callback(os.close, stdin)
            on_failure.callback(os.close, our_stdin)  # which ends a worker that is forked all the same
            our_stderr, stderr = os.pipe()
            always.callback(os.close, stderr)
            file = on_failure.enter_context(os.fdopen(our_stderr, "rb", 0))
            reader = asyncio.StreamReader()
            transport, _ = await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), file)
            on_failure.callback(transport.close)
            answer = self._answers[number] = loop.create_future()
            status = self._statuses[number] = loop.create_future()
            always.callback(self._answers.pop, number)
            on_failure.callback(self._abandon, number)
            self._send(ForkWorker(request=number), [stdin, stderr])
            pid, pidfd = await self._answer(answer, _FORK_SECONDS)
            on_failure.pop_all()
        process = _ForkedProcess(pid, pidfd, our_stdin, reader, transport.close, status, self.closed, self._unreported)
        return WorkerProcess(worker_id, process)

    def _abandon(self, number: int) -> None:
        """Forget a request, whether it has been answered or not."""
        del self._statuses[number]
        answer = self._answers[number]
        if answer.done() and not answer.cancelled() and answer.exception() is None:
            os.close(answer.result()[1])

    async def _answer(self, answer: asyncio.Future[_T], limit_seconds: float) -> _T:
        """Wait for an answer for as long as the process works on something. Raises ``ForkUnavailable``."""
        end = time.monotonic() + limit_seconds
        liveness = Liveness(self.pid)
        awaited: list[asyncio.Future[Any]] = [answer, self.closed]
        while not answer.done():
            await asyncio.wait(awaited, timeout=_POLL_SECONDS, return_when=asyncio.FIRST_COMPLETED)
            if answer.done():
                break
            if not self.usable:
                raise ForkUnavailable("the fork server has ended")
            if liveness.still_seconds() > _STILL_SECONDS or time.monotonic() > end:
                self.give_up("it does not answer")
                raise ForkUnavailable("the fork server does not answer")
        return answer.result()

    def retire(self) -> None:
        """Have it fork no more; it ends with its last worker, whose exit status it reports."""
        with suppress(ForkUnavailable):
            self._send(Retire(), [])

    def give_up(self, reason: str) -> None:
        """Kill it, because it hangs or breaks the protocol. Its workers live on."""
        if self.usable:
            log.warning("event=fork_server_killed pid=%d reason=%r", self.pid, reason)
            self._process.signal_group(signal.SIGKILL)
            self._close_control()

    async def close(self) -> None:
        """End it; returns when it is reaped."""
        self._close_control()  # which it takes as its order to exit
        await asyncio.wait([self._exit], timeout=_CLOSE_SECONDS)
        if not self._exit.done():
            self._process.signal_group(signal.SIGKILL)
        await self._exit

    def _send(self, message: ToForkServer, descriptors: list[int]) -> None:
        if not self.usable:
            raise ForkUnavailable("the fork server has ended")
        try:
            socket.send_fds(self._control, [encode_forking(message)], descriptors)
        except OSError as error:  # also one whose buffer is full, because it does not read
            raise ForkUnavailable(f"the fork server cannot be reached: {error}") from None

    def _read(self) -> None:
        while self.usable:
            try:
                data, descriptors, _, _ = socket.recv_fds(
                    self._control, MAX_FORK_MESSAGE_BYTES, 1, socket.MSG_CMSG_CLOEXEC
                )
            except BlockingIOError:
                return
            except OSError:
                data, descriptors = b"", []
            if not data:  # it has ended, or is about to
                self._close_control()
                return
            try:
                self._take(decode_from_fork_server(data), descriptors)
            except ProtocolError as error:
                self.give_up(f"protocol error: {error.message}")

    def _take(self, message: FromForkServer, descriptors: list[int]) -> None:
        match message:
            case ForkServerReady():
                if not self._ready.done():
                    self.unsafe = message.unsafe
                    self._ready.set_result(message)
            case Forked():
                if len(descriptors) != 1:
                    raise ProtocolError("Forked without a pidfd")
                answer = self._answers.get(message.request)
                if answer is None or answer.done():  # its request was given up
                    os.close(descriptors[0])
                else:
                    answer.set_result((message.pid, descriptors[0]))
            case ForkFailed():
                answer = self._answers.get(message.request)
                if answer is not None and not answer.done():
                    answer.set_exception(ForkUnavailable(message.reason))
            case WorkerEnded():
                status = self._statuses.pop(message.request, None)
                if status is not None:
                    status.set_result(message.status)

    def _close_control(self) -> None:
        if self.usable:
            asyncio.get_running_loop().remove_reader(self._control)
            self._control.close()
            self.closed.set_result(None)

    async def _await_exit(self) -> None:
        status = await self._process.wait()
        self._read()  # what it has sent before its end
        self._close_control()
        for pid in self._unreported:
            _reap_orphan(pid)
        log.info("event=fork_server_ended pid=%d status=%s", self.pid, status)
        if self.on_exit is not None:
            self.on_exit(self.pid)
