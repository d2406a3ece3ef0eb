"""Keys on every route but few: the root that programs probe, the two that say whether the router is there, and the
files of the page, which asks for a key itself.

Pure ASGI. Where there are no keys, everybody may do everything, on addresses of this machine only: a request that
reached another address is refused, whoever started the server and however.
"""

from __future__ import annotations

import logging
from typing import Final

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Send
from starlette.types import Scope as AsgiScope

from mlx_router_server.access.keys import EVERYBODY, Caller, Scope
from mlx_router_server.api.edge import is_loopback
from mlx_router_server.api.errors import error_response
from mlx_router_server.api.server import Server
from mlx_router_server.api.ui import UI_PATHS
from mlx_router_shared.errors import Forbidden, Unauthenticated

__all__ = ["OPEN_PATHS", "SCOPES", "Auth", "scope_of"]

log = logging.getLogger(__name__)

OPEN_PATHS: Final = frozenset({"/", "/health", "/ready"}) | UI_PATHS
SCOPES: Final[dict[str, Scope]] = {
    "/api/pull": Scope.PULL,
    "/api/create": Scope.PULL,
    "/api/copy": Scope.PULL,
    "/api/push": Scope.PULL,
    "/api/blobs/": Scope.PULL,
    "/api/delete": Scope.ADMIN,
    "/admin/": Scope.ADMIN,
    "/metrics": Scope.ADMIN,
    "/ui": Scope.ADMIN,
    "/api/": Scope.INFERENCE,
    "/v1/": Scope.INFERENCE,
}
"""By the beginning of a path; the first that fits counts."""


def scope_of(path: str) -> Scope:
    """What a key has to open; a path that nobody thought of is for the operator."""
    return next((scope for prefix, scope in SCOPES.items() if path.startswith(prefix)), Scope.ADMIN)


class Auth:
    """Wraps the application, inside ``Edge``."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: AsgiScope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            server: Server = scope["app"].state.server
            try:
                scope.setdefault("state", {})["caller"] = self._admit(server, scope)
            except (Unauthenticated, Forbidden) as error:
                path = server.keys.masked(scope["path"][:200])
                log.warning("event=refused path=%r code=%s client=%r", path, error.code, scope["client"])
                response = error_response(scope, error)
                if isinstance(error, Unauthenticated):
                    response.headers["www-authenticate"] = "Bearer"
                await response(scope, receive, send)
                return
        await self._app(scope, receive, send)

    @staticmethod
    def _admit(server: Server, scope: AsgiScope) -> Caller:
        path: str = scope["path"]
        if path in OPEN_PATHS:
            return EVERYBODY
        if not server.keys:
            address, port = scope.get("server") or ("127.0.0.1", 0)
            # Without a port it is a socket in the file system, which has permissions of its own.
            if server.settings.insecure_bind or port is None or is_loopback(address):
                return EVERYBODY
            raise Forbidden(
                "this server has no keys, and answers without them only at addresses of its own machine: "
                "mlx-router keys add, or insecure_bind = true"
            )
        presented = _presented(Headers(scope=scope))
        if not presented:
            raise Unauthenticated("this server wants a key: send it as Authorization: Bearer KEY, or as x-api-key: KEY")
        caller = server.keys.identify(presented)
        if caller is None:
            raise Unauthenticated("the key is not valid here")
        if not caller.may(needed := scope_of(path)):
            raise Forbidden(f"the key {caller.name!r} has not the scope {needed}")
        return caller


def _presented(headers: Headers) -> str:
    """From ``Authorization: Bearer``, ``x-api-key``, or ``api-key``, as Azure's clients send it."""
    kind, _, key = headers.get("authorization", "").partition(" ")
    if kind.lower() == "bearer" and key.strip():
        return key.strip()
    return (headers.get("x-api-key") or headers.get("api-key") or "").strip()
