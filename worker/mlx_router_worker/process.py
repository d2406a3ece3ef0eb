"""The life of a worker process: read the bootstrap line, watch the parent, import the engine, say hello, compute.

Four threads: ``compute`` owns the engine, main prepares requests for it, ``link`` owns the socket, ``parent`` waits for
the end of standard input. The router
holds the other end of that pipe and writes nothing more to it, so the end of file means that the router is gone,
however it died, on every platform.
"""

from __future__ import annotations

import gc
import logging
import os
import signal
import sys
import threading
import time
from functools import cache, partial
from importlib.metadata import PackageNotFoundError, version
from queue import SimpleQueue
from typing import Any

import zmq

from mlx_router_shared.codec import decode_bootstrap
from mlx_router_shared.errors import ProtocolError
from mlx_router_shared.protocol import PROTOCOL_VERSION, Hello, Shutdown
from mlx_router_worker.engine_imports import ENGINE_KINDS, import_engine
from mlx_router_worker.link import Link, Outlet, Progress
from mlx_router_worker.loop import ComputeLoop
from mlx_router_worker.priority import at_low_priority

__all__ = ["ignore_terminal_interrupts", "main"]

log = logging.getLogger(__name__)

_EXIT_USAGE = 2
_EXIT_ORPHANED = 6
_ORPHAN_GRACE_SECONDS = 1.0


def main() -> None:
    """Run a worker for the router at the other end of standard input; the process ends here."""
    began = time.monotonic()
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(message)s")
    ignore_terminal_interrupts()
    try:
        bootstrap = decode_bootstrap(sys.stdin.buffer.readline(65536))
        if bootstrap.engine not in ENGINE_KINDS:
            raise ProtocolError(f"unknown engine kind {bootstrap.engine!r}")
    except ProtocolError as error:
        print(f"mlx_router_worker is started by mlx-router, not by hand ({error})", file=sys.stderr)
        sys.exit(_EXIT_USAGE)
    inbox: SimpleQueue[Any] = SimpleQueue()
    threading.Thread(target=_watch_parent, args=(inbox, _take_stdin()), name="parent", daemon=True).start()
    progress = Progress()
    context = zmq.Context()
    outlet = Outlet(context, bootstrap.endpoint, bootstrap.worker_id)
    load_class = partial(import_engine, bootstrap.engine)
    engine_class = at_low_priority(load_class) if bootstrap.background else load_class()
    engine = engine_class(outlet.send_bytes)
    # What the imports left behind stays for the life of the process; looked through once, and then never again.
    gc.collect()
    gc.freeze()
    hello = Hello(
        protocol_version=PROTOCOL_VERSION,
        pid=os.getpid(),
        token=bootstrap.token,
        engine=bootstrap.engine,
        import_seconds=time.monotonic() - began,
        versions=_versions(),
        working_set_bytes=getattr(engine, "working_set_bytes", 0),
    )
    link = Link(context, bootstrap.endpoint, hello, bootstrap.worker_id, inbox, progress)
    signal.signal(signal.SIGTERM, lambda *_: _terminate(link, inbox))
    link.start()
    loop = ComputeLoop(engine, outlet, link, inbox, progress)

    def compute() -> None:
        status = loop.run()
        outlet.close()
        link.close()
        context.term()  # waits until the last message is out, for the linger time at most
        # Interpreter shutdown would run destructors in an order that MLX's threads do not like, and nothing is left.
        logging.shutdown()
        sys.stderr.flush()
        os._exit(status)

    thread = threading.Thread(target=compute, name="compute", daemon=True)
    thread.start()
    loop.prepare()
    thread.join()


def ignore_terminal_interrupts() -> None:
    """A terminal's ctrl-C is for the router, which then ends its workers in order."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _terminate(link: Link, inbox: SimpleQueue[Any]) -> None:
    """The first request to leave is carried out in order; TERM on top of it means that order took too long."""
    if link.shutdown_requested:
        os._exit(128 + signal.SIGTERM)
    link.shutdown_requested = True
    inbox.put(Shutdown(reason="SIGTERM"))


def _take_stdin() -> int:
    """Move the router's pipe to a descriptor of its own and leave an empty standard input in its place, so that a
    library that asks a question gets the end of file instead of blocking."""
    pipe = os.dup(0)
    empty = os.open(os.devnull, os.O_RDONLY)
    os.dup2(empty, 0)
    os.close(empty)
    sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115  # for the life of the process
    return pipe


def _watch_parent(inbox: SimpleQueue[Any], pipe: int) -> None:
    while os.read(pipe, 4096):
        pass
    inbox.put(Shutdown(reason="the router is gone"))
    time.sleep(_ORPHAN_GRACE_SECONDS)
    os._exit(_EXIT_ORPHANED)


@cache
def _versions() -> dict[str, str]:
    found = {"python": sys.version.split()[0]}
    for package in ("mlx", "mlx-lm", "mlx-router-server"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
