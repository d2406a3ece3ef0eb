"""What a ring has and gets, as server-sent events, for as long as somebody listens."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import aclosing
from typing import Any, Final

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from mlx_router_server.api.disconnect import ClientLeft, unless_client_leaves
from mlx_router_server.api.heartbeat import Heartbeat, beating
from mlx_router_server.telemetry.ring import Ring

__all__ = ["RingStream", "last_event_id"]

_HEARTBEAT_SECONDS: Final = 15.0
_HEADERS: Final = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]


def last_event_id(request: Request, ring: Ring[Any]) -> int | None:
    """Where a client broke off: its header ``Last-Event-ID``, or the parameter ``after``, a number alone; None begins
    now, and so does nonsense. With an id of another run everything is new."""
    last = request.headers.get("last-event-id") or request.query_params.get("after", "")
    run, separator, number = last.rpartition("-")
    if not re.fullmatch("[0-9]{1,18}", number):
        return None
    return int(number) if not separator or run == ring.run else 0


class RingStream(Response):
    """An endless response; ends when the client leaves or the server does.

    ``describe`` gives the kind and the data of an item, or None to pass over it. A reader that was too slow for the
    ring gets an event ``missed`` with how many are lost.
    """

    def __init__(
        self, ring: Ring[Any], after: int | None, describe: Callable[[Any], tuple[str, dict[str, Any]] | None]
    ) -> None:
        super().__init__()
        self._ring = ring
        self._after = after
        self._describe = describe
        self._heartbeat = Heartbeat()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope.get("method") == "HEAD":
            await send({"type": "http.response.start", "status": 200, "headers": _HEADERS})
            await send({"type": "http.response.body", "body": b""})
            return
        try:
            await unless_client_leaves(receive, self._follow(send))
        except ClientLeft:
            pass

    async def _follow(self, send: Send) -> None:
        async def beat() -> None:
            await send({"type": "http.response.body", "body": b": alive\n\n", "more_body": True})

        # A number from before the router was started anew means nothing in this ring.
        after = 0 if self._after is not None and self._after >= self._ring.next_number else self._after
        last = self._ring.next_number - 1 if after is None else after
        await send({"type": "http.response.start", "status": 200, "headers": _HEADERS})
        await beat()
        async with (
            beating(self._heartbeat, _HEARTBEAT_SECONDS, beat),
            aclosing(self._ring.follow(last)) as following,
        ):
            async for items in following:
                body = b"".join(self._frame(number, item) for number, item in items)
                if (missed := items[0][0] - last - 1) > 0:
                    body = b"event: missed\ndata: " + msgspec.json.encode({"count": missed}) + b"\n\n" + body
                last = items[-1][0]
                if body:
                    await send({"type": "http.response.body", "body": body, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    def _frame(self, number: int, item: Any) -> bytes:
        described = self._describe(item)
        if described is None:
            return b""
        kind, data = described
        return f"id: {self._ring.run}-{number}\nevent: {kind}\ndata: ".encode() + msgspec.json.encode(data) + b"\n\n"
