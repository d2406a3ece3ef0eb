"""The limits that have to hold before there is a request: connections, the size of headers, the time they may take.

On top of uvicorn's protocol on httptools, which has none of these. Each connection has two timers: one runs while the
headers of a request are awaited, from the first byte of them on, and on a fresh connection from the start; the other
while a client leaves unread what was sent to it.
"""

from __future__ import annotations

import asyncio
import logging
import resource
import socket
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

__all__ = ["WireLimits", "guarded_protocol"]

log = logging.getLogger(__name__)

_OWN_FILES: Final = 256
"""Descriptors that workers, logs and listeners need, beside connections."""
_SAY_EVERY_SECONDS: Final = 10.0
_UNSENT_BYTES: Final = 128 * 1024
"""How much of an answer the system takes before it can send it; without a bound that is 4 MB on Linux, and a client
that does not read would be noticed only after as much."""
_NOTSENT_LOWAT: Final = {"linux": 25, "darwin": 0x201}.get(sys.platform)
"""TCP_NOTSENT_LOWAT, which Python names on Linux only."""
_LINGER_SECONDS: Final = 30.0
_LINGER_SILENCE_SECONDS: Final = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class WireLimits:
    """In force for the next request; 0 is no limit."""

    header_bytes: int
    seconds: float
    reading_seconds: float
    """How long what was sent may lie here before any of it is taken."""


class _UnchunkedCycle(RequestResponseCycle):
    """Answers an HTTP/1.0 request, which knows no chunks: a body without a length ends with the connection."""

    _has_length = True

    async def send(self, message: Any) -> None:
        if message["type"] == "http.response.start" and not self.response_started:
            self._has_length = any(name.lower() == b"content-length" for name, _ in message.get("headers", []))
            if not self._has_length:
                self.chunked_encoding = False
        elif not self._has_length:
            self.expected_content_length = len(message.get("body", b""))  # no length was declared
        await super().send(message)


class _AnsweredTransport:
    """The transport as a response sees it: ``close`` lets the rest of the request in first, so that the client can read
    the response."""

    def __init__(self, transport: asyncio.Transport, linger: Callable[[], None]) -> None:
        self._transport = transport
        self.close = linger

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)


def guarded_protocol(max_connections: int, limits: Callable[[], WireLimits]) -> type[HttpToolsProtocol]:
    """The protocol class for uvicorn; ``limits`` is asked at each request, since settings are read again.

    More connections than ``max_connections``, or than the system has descriptors for, are closed at once.
    """
    descriptors = _raise_descriptor_limit(max_connections)
    most = min(max_connections or 1 << 30, descriptors - min(_OWN_FILES, descriptors // 2))
    if most < max_connections:
        log.warning("event=few_descriptors limit=%d connections=%d hint=%r", descriptors, most, "raise ulimit -n")
    said = [-_SAY_EVERY_SECONDS]

    class GuardedProtocol(HttpToolsProtocol):
        _timer: asyncio.TimerHandle | None = None
        _unread: asyncio.TimerHandle | None = None
        _header_bytes = 0
        _in_headers = True
        _declining = False
        _lingering: asyncio.TimerHandle | None = None
        _linger_until = 0.0
        _discarded = False

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn does
            super().connection_made(transport)
            _bound_unsent(transport)
            if len(self.connections) > most:
                self._say_full()
                transport.abort()
                return
            self._expect_headers()

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop_timer()
            self._read_again()
            if self._lingering is not None:
                self._lingering.cancel()
            super().connection_lost(exc)

        def pause_writing(self) -> None:
            super().pause_writing()
            seconds = limits().reading_seconds
            if seconds and self._unread is None:
                self._unread = self.loop.call_later(seconds, self._check_still_reading, self._left())

        def resume_writing(self) -> None:
            self._read_again()
            super().resume_writing()

        def data_received(self, data: bytes) -> None:
            if self._lingering is not None:
                self._discarded = True
                return
            if self._in_headers:
                self._header_bytes += len(data)
            self._feed(data)
            # What came with the headers may be the body: only headers that are still not complete are too long.
            limit = limits().header_bytes
            if self._in_headers and limit and self._header_bytes > limit:
                self._refuse(431, "Request Header Fields Too Large", "the headers are longer than max_header_bytes")

        def _feed(self, data: bytes) -> None:
            """As uvicorn's ``data_received``, but an offer to change the protocol is declined instead of ending the
            parsing: Java's client offers h2c with every request, and its body follows."""
            self._unset_keepalive_if_required()
            while data and not self._is_over:
                try:
                    self.parser.feed_data(data)
                    return
                except httptools.HttpParserUpgrade as upgrade:
                    data = data[upgrade.args[0] :]
                    self._decline_upgrade()
                except httptools.HttpParserError:
                    if not self._is_over:
                        self.send_400_response("Invalid HTTP request received.")
                    return

        @property
        def _is_over(self) -> bool:
            """Whether this connection answers no further request."""
            return self.transport.is_closing() or self._lingering is not None

        def _decline_upgrade(self) -> None:
            """Parse what follows the headers as their body, by a new parser that is given the same framing headers."""
            if self._is_over:
                return
            framing = [
                b"%s: %s\r\n" % (name, value)
                for name, value in self.headers
                if name in (b"content-length", b"transfer-encoding")
            ]
            self.parser = httptools.HttpRequestParser(self)
            self._declining = True
            try:
                self.parser.feed_data(b"POST / HTTP/1.1\r\n" + b"".join(framing) + b"\r\n")
            except httptools.HttpParserError:
                self.send_400_response("Invalid HTTP request received.")
            finally:
                self._declining = False

        def on_url(self, url: bytes) -> None:
            if not self._declining:
                super().on_url(url)

        def on_header(self, name: bytes, value: bytes) -> None:
            if not self._declining:
                super().on_header(name, value)

        def on_message_begin(self) -> None:
            if self._declining or self._is_over:
                return
            super().on_message_begin()
            self._in_headers = True
            if self._timer is None:
                self._expect_headers()

        def on_headers_complete(self) -> None:
            if self._declining or self._is_over:
                return
            self._in_headers = False
            self._stop_timer()
            limit = limits().header_bytes
            size = len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)
            self._header_bytes = 0
            if limit and size > limit:
                self._refuse(431, "Request Header Fields Too Large", "the headers are longer than max_header_bytes")
                return
            super().on_headers_complete()
            self.cycle.transport = _AnsweredTransport(self.transport, self._close_answered)  # type: ignore[assignment]
            if self.scope["http_version"] == "1.0":
                # The task that answers has been made and has not run yet.
                self.cycle.__class__ = _UnchunkedCycle

        def on_body(self, body: bytes) -> None:
            if not self._is_over:
                super().on_body(body)

        def on_message_complete(self) -> None:
            offers_upgrade = not self._declining and self.parser.should_upgrade()
            if not self._is_over and not offers_upgrade:
                super().on_message_complete()

        def on_response_complete(self) -> None:
            if self._lingering is None:
                super().on_response_complete()

        # ----------------------------------------------------------------- own

        def _close_answered(self) -> None:
            if self._in_headers or self.cycle.more_body:
                self._linger()
            else:
                self.transport.close()

        def _linger(self) -> None:
            """End the answer, and take what the client still sends for a while: if the connection were closed at once,
            the system would reset it, and the client would lose the answer that says why."""
            if self._is_over:
                return
            self._stop_timer()
            self.transport.write_eof()
            self.flow.resume_reading()
            self._linger_until = self.loop.time() + _LINGER_SECONDS
            self._lingering = self.loop.call_later(_LINGER_SILENCE_SECONDS, self._check_still_sending)

        def _check_still_sending(self) -> None:
            if not self._discarded or self.loop.time() > self._linger_until:
                self.transport.abort()
                return
            self._discarded = False
            self._lingering = self.loop.call_later(_LINGER_SILENCE_SECONDS, self._check_still_sending)

        def _expect_headers(self) -> None:
            seconds = limits().seconds
            if seconds:
                self._timer = self.loop.call_later(seconds, self._too_slow)

        def _stop_timer(self) -> None:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None

        def _too_slow(self) -> None:
            self._timer = None
            if not self._is_over:
                self._refuse(408, "Request Timeout", "the headers took longer than request_timeout_seconds")

        def _read_again(self) -> None:
            if self._unread is not None:
                self._unread.cancel()
                self._unread = None

        def _left(self) -> int:
            """Bytes that the system has not taken yet."""
            return self.transport.get_write_buffer_size()

        def _check_still_reading(self, before: int) -> None:
            """Whoever does not holds a place with the model, and everything that waits for that place."""
            self._unread = None
            left, seconds = self._left(), limits().reading_seconds
            if left < before and seconds:
                self._unread = self.loop.call_later(seconds, self._check_still_reading, left)
                return
            log.warning("event=client_stalled client=%r", self.client)
            self.transport.abort()

        def _refuse(self, status: int, phrase: str, text: str) -> None:
            log.warning("event=connection_refused status=%d client=%r", status, self.client)
            body = text.encode()
            self.transport.write(
                b"HTTP/1.1 %d %s\r\ncontent-type: text/plain; charset=utf-8\r\ncontent-length: %d\r\n"
                b"connection: close\r\n\r\n%s" % (status, phrase.encode(), len(body), body)
            )
            self._linger()

        def _say_full(self) -> None:
            now = self.loop.time()
            if now - said[0] >= _SAY_EVERY_SECONDS:  # one line for a flood, not one for each drop
                said[0] = now
                log.warning("event=connections_full limit=%d", most)

    return GuardedProtocol


def _bound_unsent(transport: asyncio.Transport) -> None:
    """Have the socket count as full when ``_UNSENT_BYTES`` wait in the system to be sent."""
    connection = transport.get_extra_info("socket")
    if _NOTSENT_LOWAT is not None and connection.family in (socket.AF_INET, socket.AF_INET6):
        with suppress(OSError):  # macOS refuses options for a connection that the client has reset
            connection.setsockopt(socket.IPPROTO_TCP, _NOTSENT_LOWAT, _UNSENT_BYTES)


def _raise_descriptor_limit(connections: int) -> int:
    """Have the system give enough descriptors, as far as it does; some give 256 by default."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = connections + 2 * _OWN_FILES
    if soft != resource.RLIM_INFINITY and soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        except (OSError, ValueError):
            soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return 1 << 30 if soft == resource.RLIM_INFINITY else soft
