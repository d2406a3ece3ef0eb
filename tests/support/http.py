"""HTTP without a client library: what came, as it came."""

from __future__ import annotations

import http.client
import json
from typing import Any
from urllib.parse import urlsplit

from tests.support.router import RouterProcess

__all__ = ["Reply", "call"]


class Reply:
    """Status, headers and body of one exchange, as they came."""

    def __init__(
        self, router: RouterProcess, method: str, path: str, body: bytes | None, headers: dict[str, str]
    ) -> None:
        parts = urlsplit(router.url)
        connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=30)
        connection.request(method, path, body, headers)
        response = connection.getresponse()
        self.status = response.status
        self.headers = response.headers
        self.body = response.read()
        connection.close()

    def json(self) -> Any:
        return json.loads(self.body)

    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.body.splitlines()]


def call(router: RouterProcess, method: str, path: str, body: Any = None, **headers: str) -> Reply:
    data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
    return Reply(router, method, path, data, {name.replace("_", "-"): value for name, value in headers.items()})
