"""Another program that answers at an address, in a thread of the test."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import HTTPServer

from tests.support.router import DEADLINE

__all__ = ["serving"]


@contextmanager
def serving(server: HTTPServer) -> Iterator[int]:
    """Serve until the block ends; yields the port."""

    def serve() -> None:
        server.serve_forever(poll_interval=0.02)
        server.server_close()

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        thread.join(DEADLINE)
