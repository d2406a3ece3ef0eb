"""The outermost layer: counts every request by how it was answered, and names it in whatever is logged meanwhile.

Pure ASGI, because it must not touch a stream.
"""

from __future__ import annotations

from typing import Final

from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

__all__ = ["Meter", "api_of", "note_model"]

_LEFT: Final = 499
_METHODS: Final = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})


def note_model(scope: Scope, name: str) -> None:
    """Say which model of the catalogue a request is for, so that it is counted there."""
    scope["state"]["model"] = name


def api_of(route: str) -> str:
    """``ollama``, ``openai``, ``anthropic``, ``admin``, or ``other``."""
    if route.startswith("/v1/messages"):
        return "anthropic"
    for prefix, api in (("/v1/", "openai"), ("/api/", "ollama"), ("/admin/", "admin")):
        if route.startswith(prefix):
            return api
    return "other"


class Meter:
    """Wraps the application and all of its other layers."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        metrics = scope["app"].state.server.metrics
        state = scope.setdefault("state", {})
        status = _LEFT

        async def send_and_look(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        metrics.in_progress.inc()
        try:
            await self._app(scope, receive, send_and_look)
        finally:
            metrics.in_progress.dec()
            route = scope.get("route")
            path = route.path if isinstance(route, Route) else "unknown"
            method = scope["method"] if scope["method"] in _METHODS else "other"
            metrics.requests.labels(api_of(path), path, method, state.get("model", ""), str(status)).inc()
