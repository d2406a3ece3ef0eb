"""The fork server: import what workers need once, then fork a worker whenever the router asks (Linux only).

A forked worker has paid for no import and shares the pages of the imported modules with its siblings. What makes the
fork safe:

- One thread. A fork copies only the calling thread, so a lock that another one holds is never released in the
  child. The number of threads is checked before each fork.
- No MLX operation, and no GPU. MLX's stream threads and a GPU driver's state do not survive a fork.
- No ZeroMQ context, no event loop, no signal handlers, no secrets: the environment is a worker's, and each token is
  read by the worker itself.
- Own random numbers, session and standard streams for each worker; descriptors of the fork server are closed in it.

Its standard input is the control socket; see ``mlx_router_shared.forking``. When that closes, the router has ended.
"""

from __future__ import annotations

import gc
import logging
import os
import random
import selectors
import socket
import sys
import time
from typing import Final, NoReturn

from mlx_router_shared.codec import decode_to_fork_server, encode_forking
from mlx_router_shared.errors import ProtocolError
from mlx_router_shared.forking import (
    MAX_FORK_MESSAGE_BYTES,
    Forked,
    ForkFailed,
    ForkServerReady,
    ForkWorker,
    FromForkServer,
    Retire,
    WorkerEnded,
    exit_status,
)
from mlx_router_worker.engine_imports import ENGINE_KINDS, import_engine
from mlx_router_worker.engines.device import is_cpu_only
from mlx_router_worker.process import ignore_terminal_interrupts, main

__all__ = ["serve"]

_FILES_OF_A_WORKER: Final = 2
_EXIT_USAGE: Final = 2
_EXIT_UNSAFE: Final = 7
_PROCESS_NAME: Final = "mlx-worker"  # at most 15 bytes


def serve(engines: list[str]) -> None:
    """Import ``engines`` and serve the control socket on standard input. Returns in each forked worker only, which has
    its own standard streams by then."""
    began = time.monotonic()
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(message)s")
    ignore_terminal_interrupts()
    gc.disable()  # a collection would write to pages that the workers share
    control = _take_control_socket()
    # numpy's OpenBLAS starts its threads when it is imported; no engine computes with it.
    os.environ["OPENBLAS_NUM_THREADS"] = "1"
    done, failed = _import(engines)
    gc.collect()
    gc.freeze()
    unsafe = _why_unsafe()
    server = _ForkServer(control)
    server.send(
        ForkServerReady(
            import_seconds=time.monotonic() - began, engines=done, import_errors=failed, unsafe=unsafe
        )
    )  # fmt: skip
    if unsafe:
        os._exit(_EXIT_UNSAFE)
    server.run()


def _import(engines: list[str]) -> tuple[list[str], dict[str, str]]:
    """Return the kinds that were imported, and for the others the reason why not."""
    done: list[str] = []
    failed: dict[str, str] = {}
    for kind in engines:
        try:
            import_engine(kind)
        except Exception as error:  # whatever a broken extra raises: a worker that needs it reports it
            failed[kind] = f"{type(error).__name__}: {error}"
        else:
            done.append(kind)
    return done, failed


def _why_unsafe() -> str:
    """Return why no worker can be forked from this process; "" if it can."""
    if not is_cpu_only():
        return "MLX uses a GPU here, whose driver does not survive a fork"
    if (threads := _threads()) > 1:
        return f"the imported libraries have started threads: {threads} instead of 1"
    if not hasattr(os, "pidfd_open"):
        return "this Python cannot open pidfds"
    try:
        os.close(os.pidfd_open(os.getpid()))
    except OSError as error:
        return f"pidfd_open is not available: {error}"
    return ""


def _threads() -> int:
    return len(os.listdir("/proc/self/task"))


def _take_control_socket() -> socket.socket:
    """Move the control socket to a descriptor of its own; standard input becomes empty."""
    control = socket.socket(fileno=os.dup(0))
    control.set_inheritable(False)
    empty = os.open(os.devnull, os.O_RDONLY)
    os.dup2(empty, 0)
    os.close(empty)
    return control


class _ForkServer:
    def __init__(self, control: socket.socket) -> None:
        self._control = control
        self._selector = selectors.DefaultSelector()
        self._selector.register(control, selectors.EVENT_READ)
        self._workers: dict[int, int] = {}
        """The pidfd of each living worker, and the request that it was forked for."""
        self._is_retired = False

    def send(self, message: FromForkServer, descriptors: list[int] | None = None) -> None:
        try:
            socket.send_fds(self._control, [encode_forking(message)], descriptors or [])
        except OSError:
            os._exit(0)  # the router has ended

    def run(self) -> None:
        """Serve until the router has ended; returns in each forked worker only."""
        while not (self._is_retired and not self._workers):
            for key, _ in self._selector.select():
                if key.fileobj is not self._control:
                    self._reap(key.fd)
                elif self._serve_one():
                    return
        os._exit(0)

    def _serve_one(self) -> bool:
        """Receive a message and act on it. Returns whether this process is a forked worker now."""
        try:
            data, descriptors, _, _ = socket.recv_fds(
                self._control, MAX_FORK_MESSAGE_BYTES, _FILES_OF_A_WORKER, socket.MSG_CMSG_CLOEXEC
            )
        except OSError:
            data, descriptors = b"", []
        if not data:
            os._exit(0)  # the router has ended, which the workers notice by themselves
        try:
            message = decode_to_fork_server(data)
        except ProtocolError as error:
            _exit_on_protocol_error(str(error))
        if isinstance(message, Retire):
            self._is_retired = True
            return False
        if len(descriptors) != _FILES_OF_A_WORKER:
            _exit_on_protocol_error(f"{len(descriptors)} descriptors with ForkWorker")
        return self._fork(message, descriptors)

    def _fork(self, message: ForkWorker, descriptors: list[int]) -> bool:
        stdin, stderr = descriptors
        try:
            if (threads := _threads()) > 1:
                raise OSError(f"a library has started threads: {threads} instead of 1")
            pid = os.fork()
        except OSError as error:
            self.send(ForkFailed(request=message.request, reason=str(error)))
            return False
        else:
            if pid == 0:
                self._become_worker(stdin, stderr)
                return True
            pidfd = os.pidfd_open(pid)
            self._workers[pidfd] = message.request
            self._selector.register(pidfd, selectors.EVENT_READ)
            self.send(Forked(request=message.request, pid=pid), [pidfd])
            return False
        finally:
            os.close(stdin)
            os.close(stderr)

    def _become_worker(self, stdin: int, stderr: int) -> None:
        os.setsid()  # also its own process group
        os.dup2(stdin, 0)
        os.dup2(stderr, 2)
        self._selector.close()
        self._control.close()
        for pidfd in self._workers:
            os.close(pidfd)
        self._workers = {}
        # Python's own generator seeds itself anew after a fork; numpy's does not. The engines seed MLX's.
        if (numpy_random := sys.modules.get("numpy.random")) is not None:
            numpy_random.seed(random.SystemRandom().getrandbits(32))
        try:
            with open("/proc/self/comm", "w", encoding="ascii") as file:
                file.write(_PROCESS_NAME)
        except OSError:
            pass  # for people only
        gc.enable()

    def _reap(self, pidfd: int) -> None:
        result = os.waitid(os.P_PIDFD, pidfd, os.WEXITED)
        assert result is not None
        self._selector.unregister(pidfd)
        os.close(pidfd)
        self.send(WorkerEnded(request=self._workers.pop(pidfd), status=exit_status(result)))


def _exit_on_protocol_error(reason: str) -> NoReturn:
    print(f"fork server: {reason}", file=sys.stderr, flush=True)
    os._exit(_EXIT_USAGE)


if __name__ == "__main__":
    kinds = sys.argv[1:]
    if sys.stdin is None or not kinds or not set(kinds) <= ENGINE_KINDS:
        print("the fork server is started by mlx-router, not by hand", file=sys.stderr)
        sys.exit(_EXIT_USAGE)
    serve(kinds)
    main()
