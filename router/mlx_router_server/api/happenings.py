"""``/admin/events``: what happens, as server-sent events, for as long as somebody listens."""

from __future__ import annotations

from contextlib import aclosing
from typing import Final

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from mlx_router_server.api.disconnect import ClientLeft, unless_client_leaves
from mlx_router_server.api.heartbeat import Heartbeat, beating
from mlx_router_server.telemetry.events import Happening, Happenings

__all__ = ["HappeningStream"]

_HEARTBEAT_SECONDS: Final = 15.0
_HEADERS: Final = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]


class HappeningStream(Response):
    """An endless response; ends when the client leaves or the server does."""

    def __init__(self, happenings: Happenings, after: int | None) -> None:
        super().__init__()
        self._happenings = happenings
        self._after = after
        self._heartbeat = Heartbeat()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await unless_client_leaves(receive, self._follow(send))
        except ClientLeft:
            pass

    async def _follow(self, send: Send) -> None:
        async def beat() -> None:
            await send({"type": "http.response.body", "body": b": alive\n\n", "more_body": True})

        await send({"type": "http.response.start", "status": 200, "headers": _HEADERS})
        await beat()
        async with (
            beating(self._heartbeat, _HEARTBEAT_SECONDS, beat),
            aclosing(self._happenings.follow(self._after)) as following,
        ):
            async for happening in following:
                await send({"type": "http.response.body", "body": _frame(happening), "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def _frame(happening: Happening) -> bytes:
    data = msgspec.json.encode({"at": happening.at, **happening.data})
    return f"id: {happening.number}\nevent: {happening.kind}\ndata: ".encode() + data + b"\n\n"
