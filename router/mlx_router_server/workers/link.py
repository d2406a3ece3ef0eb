"""The ROUTER socket: every message to and from every worker passes here.

Only identities that were announced before are listened to, and only after their token was right. A peer that sends
what is no message is cut off at once. ROUTER_MANDATORY is set, because a ROUTER socket otherwise drops messages for
a peer that is gone without a word.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import zmq

from mlx_router_shared.codec import MAX_MESSAGE_BYTES, decode_from_worker, encode
from mlx_router_shared.errors import ProtocolError, WorkerDied
from mlx_router_shared.protocol import PROTOCOL_VERSION, FromWorker, Hello, ToWorker, Welcome, events_identity

__all__ = ["WorkerLink"]

log = logging.getLogger(__name__)

_HIGH_WATER_MARK: Final = 10_000
_STATS_INTERVAL_SECONDS: Final = 1.0
_MESSAGES_PER_TURN: Final = 100

OnMessage = Callable[[FromWorker], None]
OnBroken = Callable[[str], None]


@dataclass(slots=True)
class _Peer:
    worker_id: str
    token: str
    on_message: OnMessage
    on_broken: OnBroken
    greeted: bool = False


class WorkerLink:
    """Created and closed inside a running event loop.

    A plain socket, watched by its file descriptor: pyzmq's asyncio sockets cost a future and a task switch per message.
    The descriptor is edge-triggered (libzmq's documentation of ZMQ_FD), so everything is read until nothing is left,
    and looked for again after each send, which may have used up the edge.
    """

    def __init__(self, endpoint: str) -> None:
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.SNDHWM, _HIGH_WATER_MARK)
        self._socket.setsockopt(zmq.RCVHWM, _HIGH_WATER_MARK)
        self._socket.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
        self.bind(endpoint)
        self._peers: dict[bytes, _Peer] = {}
        self.late_messages = 0
        """Messages of peers that are not, or no longer, listened to."""
        self._loop = asyncio.get_running_loop()
        self._look_again: asyncio.Handle | None = None
        self._descriptor = int(self._socket.getsockopt(zmq.FD))
        self._loop.add_reader(self._descriptor, self._read)

    def bind(self, endpoint: str) -> None:
        """Take connections there as well. Raises ``OSError``."""
        try:
            self._socket.bind(endpoint)
        except zmq.ZMQError as error:
            raise OSError(error.errno, f"{endpoint}: {error.strerror}") from None

    def expect(self, worker_id: str, token: str, on_message: OnMessage, on_broken: OnBroken) -> None:
        """Listen to this worker from now on. ``on_broken`` is called once if it talks nonsense."""
        peer = _Peer(worker_id, token, on_message, on_broken)
        self._peers[worker_id.encode()] = self._peers[events_identity(worker_id).encode()] = peer

    def forget(self, worker_id: str) -> None:
        self._peers.pop(worker_id.encode(), None)
        self._peers.pop(events_identity(worker_id).encode(), None)

    def send(self, worker_id: str, message: ToWorker) -> None:
        """Hand a message to the socket; raises ``WorkerDied`` when the worker is not connected or does not read."""
        try:
            self._socket.send_multipart([worker_id.encode(), encode(message)], zmq.NOBLOCK)
        except zmq.ZMQError as error:
            raise WorkerDied(f"the worker process cannot be reached ({error})") from None
        finally:
            if self._look_again is None:
                self._look_again = self._loop.call_soon(self._read)

    def read_now(self) -> None:
        """Take the messages that have arrived, without waiting for the event loop to find them."""
        self._read()

    async def close(self) -> None:
        self._loop.remove_reader(self._descriptor)
        if self._look_again is not None:
            self._look_again.cancel()
        self._socket.close()
        self._context.term()

    def _read(self) -> None:
        """Take what is there, but let others have their turn after a while."""
        self._look_again = None
        for _ in range(_MESSAGES_PER_TURN):
            try:
                frames = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            self._take(frames)
        if self._look_again is None:
            self._look_again = self._loop.call_soon(self._read)

    def _take(self, frames: list[bytes]) -> None:
        peer = self._peers.get(frames[0])
        if peer is None or len(frames) != 2:
            self.late_messages += 1
            return
        worker_id = peer.worker_id
        try:
            message = decode_from_worker(frames[1])
            if isinstance(message, Hello):
                self._check(message, peer)
                peer.greeted = True
                self.send(worker_id, Welcome(stats_interval_seconds=_STATS_INTERVAL_SECONDS))
            elif not peer.greeted:
                raise ProtocolError(f"{type(message).__name__} before Hello")
            peer.on_message(message)
        except ProtocolError as error:
            log.error("event=protocol_error worker=%s error=%r", worker_id, error.message)
            self.forget(worker_id)
            peer.on_broken(error.message)
        except WorkerDied:
            pass  # gone between its hello and our welcome: its exit is awaited elsewhere

    def _check(self, hello: Hello, peer: _Peer) -> None:
        if not hmac.compare_digest(hello.token, peer.token):
            raise ProtocolError("a worker said hello with a wrong token")
        if hello.protocol_version != PROTOCOL_VERSION:
            raise ProtocolError(
                f"the worker speaks protocol version {hello.protocol_version}, this router {PROTOCOL_VERSION}: "
                "both must come from the same installation"
            )
