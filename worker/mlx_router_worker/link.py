"""The socket thread: the only user of the DEALER socket.

It decodes what comes from the router and hands it to the compute loop through a queue, sends what the compute loop
puts out, and answers ``GetStats`` by itself, so that a worker answers while it loads and while it generates. The
progress it reports is written by the compute loop: being alive and getting on are two different signals.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from queue import SimpleQueue

import zmq

from mlx_router_shared.codec import MAX_MESSAGE_BYTES, decode_to_worker, encode
from mlx_router_shared.errors import ProtocolError
from mlx_router_shared.protocol import FromWorker, GetStats, Shutdown, Stats, ToWorker, Welcome
from mlx_router_worker.engine import EngineReading

__all__ = ["Link", "Progress"]

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


class Link:
    """Connects to the router and carries messages both ways until ``close``."""

    def __init__(self, endpoint: str, worker_id: str, inbox: SimpleQueue[ToWorker], progress: Progress) -> None:
        self._endpoint = endpoint
        self._worker_id = worker_id
        self._inbox = inbox
        self._progress = progress
        self._outbox: deque[bytes] = deque()
        self._wake_read, self._wake_write = os.pipe()
        os.set_blocking(self._wake_read, False)
        os.set_blocking(self._wake_write, False)
        self._closing = threading.Event()
        self.shutdown_requested = threading.Event()
        self._thread = threading.Thread(target=self._run, name="link", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def send(self, message: FromWorker) -> None:
        """Queue a message; callable from any thread, never blocks."""
        self.send_bytes(encode(message))

    def send_bytes(self, data: bytes) -> None:
        """Queue bytes as they are; the fake engine sends rubbish this way."""
        self._outbox.append(data)
        self.wake()

    def wake(self) -> None:
        """Have the socket thread look at the progress now; callable from any thread."""
        try:
            os.write(self._wake_write, b"\0")
        except BlockingIOError:
            pass  # the pipe is full of wake-ups already

    def close(self) -> None:
        """Send what is queued, for at most the linger time, and end the thread."""
        self._closing.set()
        self.send_bytes(b"")
        self._thread.join(_LINGER_MS / 1000 + 1)

    def _run(self) -> None:
        context = zmq.Context()
        socket = context.socket(zmq.DEALER)
        socket.setsockopt(zmq.IDENTITY, self._worker_id.encode())
        socket.setsockopt(zmq.LINGER, _LINGER_MS)
        socket.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
        # Bounded by the number of live requests, each of which the router bounds; a full mark would block us.
        socket.setsockopt(zmq.SNDHWM, 0)
        socket.connect(self._endpoint)
        poller = zmq.Poller()
        poller.register(socket, zmq.POLLIN)
        poller.register(self._wake_read, zmq.POLLIN)
        interval = 0.0
        next_stats = 0.0
        busy = False
        while True:
            # With work on hand the thread wakes up for the next Stats; without, only for messages.
            wait = int(max(0.0, next_stats - time.monotonic()) * 1000) + 1 if busy else None
            ready = dict(poller.poll(wait))
            if self._wake_read in ready:
                os.read(self._wake_read, 65536)
            while self._outbox:
                if data := self._outbox.popleft():
                    socket.send(data)
            if self._closing.is_set():
                break
            if socket in ready:
                for message in self._receive(socket):
                    if isinstance(message, Welcome):
                        interval = message.stats_interval_seconds
                    elif isinstance(message, GetStats):
                        socket.send(encode(self._progress.stats()))
                    else:
                        if isinstance(message, Shutdown):
                            self.shutdown_requested.set()
                            self._bound_exit(message.limit_seconds)
                        self._inbox.put(message)
            was_busy, busy = busy, interval > 0 and self._progress.streams > 0
            if (busy and time.monotonic() >= next_stats) or (was_busy and not busy):
                socket.send(encode(self._progress.stats()))
                next_stats = time.monotonic() + interval
        socket.close()
        context.term()

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
