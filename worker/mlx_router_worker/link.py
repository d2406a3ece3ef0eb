"""The worker's two sockets.

``Link`` is the socket thread: it decodes what comes from the router, hands it to the compute loop through a queue, and
answers ``GetStats`` by itself, so that a worker answers while it loads and while it generates. The progress it reports
is written by the compute loop: being alive and getting on are two different signals. ``Outlet`` is the compute loop's
own way out.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any

import zmq

from mlx_router_shared.codec import MAX_MESSAGE_BYTES, decode_to_worker, encode
from mlx_router_shared.errors import ProtocolError
from mlx_router_shared.protocol import FromWorker, GetStats, Hello, Shutdown, Stats, ToWorker, Welcome, events_identity
from mlx_router_worker.engine import EngineReading

__all__ = ["Link", "Outlet", "Progress"]

log = logging.getLogger(__name__)

_LINGER_MS = 2000  # the last error message must get out; a router that is gone must not hold us
_EXIT_OUT_OF_TIME = 3
_EXIT_PROTOCOL = 4


@dataclass(slots=True)
class Progress:
    """Written by the compute loop, read by the socket thread; single attributes, so no lock."""

    steps: int = 0
    streams: int = 0
    moved_at: float = field(default_factory=time.monotonic)
    reading: EngineReading = field(default_factory=EngineReading)

    def stats(self) -> Stats:
        return Stats(
            steps=self.steps,
            step_age_seconds=time.monotonic() - self.moved_at if self.streams else 0.0,
            streams=self.streams,
            tokens_total=self.reading.tokens_total,
            memory_bytes=self.reading.memory_bytes,
            cache_bytes=self.reading.cache_bytes,
            peak_bytes=self.reading.peak_bytes,
        )


class Outlet:
    """Where the compute loop sends from: a socket of its own, on its own thread.

    Handing each step to the socket thread would cost a change of threads, and with it the interpreter's lock, in every
    step: 5 % of the speed of a single stream, measured on a small model.
    """

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], endpoint: str, worker_id: str) -> None:
        self._socket = _connect(context, endpoint, events_identity(worker_id))

    def send(self, message: FromWorker) -> None:
        self.send_bytes(encode(message))

    def send_bytes(self, data: bytes) -> None:
        """Bytes as they are; the fake engine sends rubbish this way."""
        self._socket.send(data)

    def close(self) -> None:
        self._socket.close()


class Link:
    """The socket thread. Says hello when it starts, then serves until ``close``."""

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        endpoint: str,
        hello: Hello,
        worker_id: str,
        inbox: SimpleQueue[Any],
        progress: Progress,
    ) -> None:
        self._context = context
        self._endpoint = endpoint
        self._hello = hello
        self._worker_id = worker_id
        self._inbox = inbox
        self._progress = progress
        self._wake_read, self._wake_write = os.pipe()
        os.set_blocking(self._wake_read, False)
        os.set_blocking(self._wake_write, False)
        self._closing = threading.Event()
        self.shutdown_requested = False
        """A plain attribute: the signal handler sets it, and may be interrupted by itself while it holds a lock."""
        self._thread = threading.Thread(target=self._run, name="link", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def wake(self) -> None:
        """Have the thread look at the progress now; callable from any thread."""
        try:
            os.write(self._wake_write, b"\0")
        except BlockingIOError:
            pass  # the pipe is full of wake-ups already

    def close(self) -> None:
        """End the thread; what was sent goes out within the linger time of the context."""
        self._closing.set()
        self.wake()
        self._thread.join(_LINGER_MS / 1000 + 1)

    def _run(self) -> None:
        socket = _connect(self._context, self._endpoint, self._worker_id)
        socket.send(encode(self._hello))
        poller = zmq.Poller()
        poller.register(socket, zmq.POLLIN)
        poller.register(self._wake_read, zmq.POLLIN)
        interval = 0.0
        next_stats = 0.0
        told_steps = 0
        busy = False
        while not self._closing.is_set():
            # With work on hand the thread wakes up for the next Stats; without, only for messages.
            wait = int(max(0.0, next_stats - time.monotonic()) * 1000) + 1 if busy else None
            ready = dict(poller.poll(wait))
            if self._wake_read in ready:
                os.read(self._wake_read, 65536)
            if socket in ready:
                for message in self._receive(socket):
                    if isinstance(message, Welcome):
                        interval = message.stats_interval_seconds
                    elif isinstance(message, GetStats):
                        socket.send(encode(self._progress.stats()))
                    else:
                        if isinstance(message, Shutdown):
                            self.shutdown_requested = True
                            self._bound_exit(message.limit_seconds)
                        self._inbox.put(message)
            busy = interval > 0 and self._progress.streams > 0
            at_rest = interval > 0 and not busy and self._progress.steps != told_steps
            if (busy and time.monotonic() >= next_stats) or at_rest:
                told_steps = self._progress.steps
                socket.send(encode(self._progress.stats()))
                next_stats = time.monotonic() + interval
        socket.close()

    def _receive(self, socket: zmq.Socket[bytes]) -> list[ToWorker]:
        messages: list[ToWorker] = []
        while True:
            try:
                frame = socket.recv(zmq.NOBLOCK)
            except zmq.Again:
                return messages
            try:
                messages.append(decode_to_worker(frame))
            except ProtocolError as error:
                # A router that cannot be understood cannot be obeyed: whoever it is, we serve it no longer.
                log.error("event=protocol_error error=%s", error)
                os._exit(_EXIT_PROTOCOL)

    @staticmethod
    def _bound_exit(limit_seconds: float) -> None:
        """The compute loop may be deep in a load that nothing can interrupt: the promise to leave holds anyway."""

        def leave() -> None:
            time.sleep(limit_seconds)
            os._exit(_EXIT_OUT_OF_TIME)

        threading.Thread(target=leave, name="exit-limit", daemon=True).start()


def _connect(context: zmq.Context[zmq.Socket[bytes]], endpoint: str, identity: str) -> zmq.Socket[bytes]:
    socket = context.socket(zmq.DEALER)
    socket.setsockopt(zmq.IDENTITY, identity.encode())
    socket.setsockopt(zmq.LINGER, _LINGER_MS)
    socket.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
    # Bounded by the number of live requests, each of which the router bounds; a full mark would block us.
    socket.setsockopt(zmq.SNDHWM, 0)
    socket.connect(endpoint)
    return socket
