"""What the router tells as it happens, listened to over a real socket."""

from __future__ import annotations

import http.client
import json
import threading
from typing import Any
from urllib.parse import urlsplit

from tests.support.router import RouterProcess

__all__ = ["EventStream"]


class EventStream:
    """A listener of server-sent events in a thread; ``seen`` grows."""

    def __init__(self, router: RouterProcess, last: int | str | None = None, path: str = "/admin/events") -> None:
        parts = urlsplit(router.url)
        self._connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=30)
        self._connection.request("GET", path, headers={} if last is None else {"Last-Event-ID": str(last)})
        self._response = self._connection.getresponse()
        self.run = ""
        self.seen: list[tuple[int, str, dict[str, Any]]] = []
        self.ended = threading.Event()
        assert self._response.readline() == b": alive\n", "it listens from here on"
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        number, kind = 0, ""
        while line := self._response.readline():
            name, _, value = line.decode().rstrip("\n").partition(": ")
            if name == "id":
                self.run, _, digits = value.rpartition("-")
                number = int(digits)
            elif name == "event":
                kind = value
            elif name == "data":
                self.seen.append((number, kind, json.loads(value)))
        self.ended.set()

    def close(self) -> None:
        assert self.ended.wait(10), "the router has ended the stream"
        self._thread.join(10)
        self._response.close()
        self._connection.close()

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [data for _, seen, data in self.seen if seen == kind]
