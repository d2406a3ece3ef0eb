"""The life of a worker process: read the bootstrap line, watch the parent, import the engine, say hello, compute.

Three threads: main computes, ``link`` owns the socket, ``parent`` waits for the end of standard input. The router
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
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from queue import SimpleQueue
from typing import Any, cast

import zmq

from mlx_router_shared.codec import decode_bootstrap
from mlx_router_shared.errors import ProtocolError
from mlx_router_shared.protocol import PROTOCOL_VERSION, Hello, Shutdown, ToWorker
from mlx_router_worker.engine import Engine
from mlx_router_worker.file_limit import kept_file_limit
from mlx_router_worker.link import Link, Outlet, Progress
from mlx_router_worker.loop import ComputeLoop

__all__ = ["main"]

log = logging.getLogger(__name__)

_ENGINES = {
    "mlx": ("mlx_router_worker.mlx_engine", "MlxEngine"),
    "embed": ("mlx_router_worker.mlx_embedding", "EmbeddingEngine"),
    "encode": ("mlx_router_worker.vlm_encoders", "EncoderEngine"),
    "rerank": ("mlx_router_worker.vlm_encoders", "RerankEngine"),
    "vlm": ("mlx_router_worker.vlm_engine", "VisionEngine"),
    "tokenizer": ("mlx_router_worker.tokenizer_engine", "TokenizerEngine"),
    "fake": ("mlx_router_worker.fake_engine", "FakeEngine"),
}
_EXIT_USAGE = 2
_EXIT_ORPHANED = 6
_ORPHAN_GRACE_SECONDS = 1.0


def main() -> None:
    """Run a worker for the router at the other end of standard input; the process ends here."""
    began = time.monotonic()
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(message)s")
    # A terminal's ctrl-C is for the router, which then ends its workers in order.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        bootstrap = decode_bootstrap(sys.stdin.buffer.readline(65536))
        module, name = _ENGINES[bootstrap.engine]
    except (ProtocolError, KeyError) as error:
        print(f"mlx_router_worker is started by mlx-router, not by hand ({error})", file=sys.stderr)
        sys.exit(_EXIT_USAGE)
    inbox: SimpleQueue[ToWorker] = SimpleQueue()
    threading.Thread(target=_watch_parent, args=(inbox, _take_stdin()), name="parent", daemon=True).start()
    progress = Progress()
    context = zmq.Context()
    outlet = Outlet(context, bootstrap.endpoint, bootstrap.worker_id)
    # Only the engine that is wanted is imported: the fake one must not cost a second of mlx.
    with kept_file_limit():
        imported = import_module(module)
    engine = cast(Engine, cast(Any, imported).__dict__[name](outlet.send_bytes))
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
    status = ComputeLoop(engine, outlet, link, inbox, progress).run()
    outlet.close()
    link.close()
    context.term()  # waits until the last message is out, for the linger time at most
    # Interpreter shutdown would run destructors in an order that MLX's threads do not like, and nothing is left to do.
    logging.shutdown()
    sys.stderr.flush()
    os._exit(status)


def _terminate(link: Link, inbox: SimpleQueue[ToWorker]) -> None:
    """The first request to leave is carried out in order; TERM on top of it means that order took too long."""
    if link.shutdown_requested.is_set():
        os._exit(128 + signal.SIGTERM)
    link.shutdown_requested.set()
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


def _watch_parent(inbox: SimpleQueue[ToWorker], pipe: int) -> None:
    while os.read(pipe, 4096):
        pass
    inbox.put(Shutdown(reason="the router is gone"))
    time.sleep(_ORPHAN_GRACE_SECONDS)
    os._exit(_EXIT_ORPHANED)


def _versions() -> dict[str, str]:
    found = {"python": sys.version.split()[0]}
    for package in ("mlx", "mlx-lm", "mlx-router-server"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
