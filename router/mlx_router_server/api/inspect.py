"""Keeps the last requests and their answers where the operator wants that, and logs them where that is wanted.

Off by default, shown to the admin scope alone, keys taken out. What passes is never changed.
"""

from __future__ import annotations

import logging
import time
from typing import Final

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mlx_router_server.api.server import Server
from mlx_router_server.telemetry.inspection import Inspected

__all__ = ["Inspector"]

log = logging.getLogger(__name__)

_SECRET_HEADERS: Final = frozenset({b"authorization", b"x-api-key", b"api-key", b"cookie", b"proxy-authorization"})
_PATHS: Final = ("/api/", "/v1/")
_UPLOADS: Final = "/api/blobs/"


class Inspector:
    """Wraps the application inside ``Auth``: what was refused there is not kept."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        server: Server | None = scope["app"].state.server if scope["type"] == "http" else None
        wanted = server is not None and (server.settings.inspect_requests or server.settings.log_prompts)
        if server is None or not wanted or not scope["path"].startswith(_PATHS) or scope["path"].startswith(_UPLOADS):
            await self._app(scope, receive, send)
            return
        began = time.monotonic()
        seen = Inspected(
            request=scope["state"]["request_id"], at=time.time(), method=scope["method"],
            path=server.keys.masked(scope["path"]),
            headers=[(name.decode("latin-1"), "****" if name.lower() in _SECRET_HEADERS else value.decode("latin-1"))
                     for name, value in scope["headers"]],
        )  # fmt: skip
        server.inspection.add(seen)

        async def receive_and_keep() -> Message:
            message = await receive()
            if message["type"] == "http.request":
                seen.body.add(message.get("body", b""))
            return message

        async def send_and_keep(message: Message) -> None:
            if message["type"] == "http.response.start":
                seen.status = message["status"]
            elif message["type"] == "http.response.body":
                seen.answer.add(message.get("body", b""))
            await send(message)

        try:
            await self._app(scope, receive_and_keep, send_and_keep)
        finally:
            seen.seconds = round(time.monotonic() - began, 3)
            if server.settings.log_prompts and seen.body.size:
                log.info("event=prompt request=%s path=%r body=%r answer=%r", seen.request, seen.path,
                         seen.body.beginning(), seen.answer.beginning())  # fmt: skip
