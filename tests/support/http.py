"""HTTP without a client library: what came, as it came."""

from __future__ import annotations

import http.client
import json
import socket
from typing import Any
from urllib.parse import urlsplit

from tests.support.router import RouterProcess

__all__ = ["RawStream", "Reply", "call"]


class Reply:
    """Status, headers and body of one exchange, as they came."""

    def __init__(
        self, router: RouterProcess, method: str, path: str, body: bytes | None, headers: dict[str, str]
    ) -> None:
        parts = urlsplit(router.url)
        connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=30)
        try:
            connection.request(method, path, body, headers)
            response = connection.getresponse()
            self.status = response.status
            self.headers = response.headers
            self.body = response.read()
        finally:
            connection.close()

    def json(self) -> Any:
        return json.loads(self.body)

    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.body.splitlines()]


def call(router: RouterProcess, method: str, path: str, body: Any = None, **headers: str) -> Reply:
    data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
    return Reply(router, method, path, data, {name.replace("_", "-"): value for name, value in headers.items()})


class RawStream:
    """An HTTP response as bytes, because client libraries hide how a stream ends."""

    def __init__(
        self, router: RouterProcess, path: str, body: dict[str, Any], *, receive_buffer: int | None = None
    ) -> None:
        parts = urlsplit(router.url)
        self.socket = socket.socket()
        self.socket.settimeout(20)
        if receive_buffer is not None:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        self.socket.connect((parts.hostname, parts.port))
        data = json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: {len(data)}\r\n\r\n"
        self.socket.sendall(head.encode() + data)

    def read_until(self, mark: bytes) -> bytes:
        data = b""
        while mark not in data:
            part = self.socket.recv(65536)
            assert part, f"the stream ended without {mark!r}: {data[-300:]!r}"
            data += part
        return data

    def read_to_end(self) -> bytes:
        data = b""
        while part := self.socket.recv(65536):
            data += part
        self.socket.close()
        return data
