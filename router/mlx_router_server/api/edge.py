"""The outermost layer: who may talk to us from a browser, and the id of each request.

Pure ASGI, because it must not touch a stream. A page in a browser is kept out by its Origin, a rebinding DNS name by
the Host header; other programs send neither a foreign Origin nor a foreign Host.
"""

from __future__ import annotations

import fnmatch
import ipaddress
import re
import secrets
import socket
from typing import Final

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mlx_router_server.api.errors import error_response
from mlx_router_server.telemetry.logs import CURRENT_REQUEST
from mlx_router_shared.errors import Forbidden, InvalidRequest

__all__ = ["Edge", "is_loopback"]

_LOCAL_ORIGINS: Final = (
    *(
        f"{scheme}://{host}{port}"
        for scheme in ("http", "https")
        for host in ("localhost", "127.0.0.1", "0.0.0.0", "[::1]")  # noqa: S104  # compared, not bound
        for port in ("", ":*")
    ),
    *("app://*", "file://*", "tauri://*", "vscode-webview://*", "vscode-file://*"),
)
_HOST: Final = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[^\[\]:/?#@\s]*)(?::([0-9]{0,5}))?", re.ASCII)
_SLASHES: Final = re.compile("//+")
_NAMED: Final = ("/admin/models/", "/v1/models/", "/v1/responses/", "/api/blobs/")
"""Paths that end with a name."""
_LOCAL_NAMES: Final = (".localhost", ".local", ".internal")
"""Suffixes that public DNS does not resolve, accepted as Ollama does. Another host of the same network can still
answer for them."""
_STAINLESS: Final = [
    "arch",
    "async",
    "custom-poll-interval",
    "helper-method",
    "lang",
    "os",
    "package-version",
    "poll-helper",
    "retry-count",
    "runtime",
    "runtime-version",
    "timeout",
]
_ALLOW_HEADERS: Final = ",".join(
    ["Authorization", "Content-Type", "User-Agent", "Accept", "X-Requested-With", "OpenAI-Beta"]
    + ["x-api-key", "anthropic-version", "anthropic-beta", "anthropic-dangerous-direct-browser-access"]
    + ["X-Priority", "X-Deadline-Seconds", "X-Keep-Alive", "X-Prefix-Cache"]
    + [f"x-stainless-{name}" for name in _STAINLESS]
)
_ALLOW_METHODS: Final = "GET,POST,PUT,PATCH,DELETE,HEAD,OPTIONS"


class Edge:
    """Wraps the application. ``bound_host`` is the address that is listened on."""

    def __init__(self, app: ASGIApp, *, bound_host: str) -> None:
        self._app = app
        self._loopback = is_loopback(bound_host)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        origin = headers.get("origin")
        host = headers.get("host", "")
        request_id = "req_" + secrets.token_hex(12)
        scope["path"] = _plain_path(scope["path"])
        settings = scope["app"].state.server.settings
        # One id under the names by which the SDKs of OpenAI and of Anthropic look for it.
        extra = {"x-request-id": request_id, "request-id": request_id}
        scope.setdefault("state", {})["request_id"] = request_id
        CURRENT_REQUEST.set(request_id)
        if problem := _head_problem(scope, headers):
            response = error_response(scope, InvalidRequest(problem))
            response.headers.update(extra)
            await response(scope, receive, send)
            return
        if self._loopback and not _is_local_host(host) and not _is_listed(host, settings.allowed_hosts):
            await _refuse(scope, receive, send, extra, f"the Host header {host[:100]!r} is no name of this machine; "
                          "the setting allowed_hosts allows more")  # fmt: skip
            return
        if origin is not None and origin not in (f"http://{host}", f"https://{host}"):
            if not _allows(origin, settings.allowed_origins):
                await _refuse(scope, receive, send, extra, f"pages of {origin[:100]!r} may not use this server; "
                              "the setting allowed_origins allows more")  # fmt: skip
                return
            extra["access-control-allow-origin"] = "*" if "*" in settings.allowed_origins else origin
            extra["vary"] = "Origin"
            extra["access-control-expose-headers"] = "x-request-id,request-id,retry-after,x-ignored-fields"
        if scope["method"] == "OPTIONS" and origin is not None:
            extra |= {
                "access-control-allow-methods": _ALLOW_METHODS,
                "access-control-allow-headers": _ALLOW_HEADERS,
                "access-control-max-age": "43200",
            }
            await Response(status_code=204, headers=extra)(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                fields = MutableHeaders(scope=message)
                for name, value in extra.items():
                    fields.setdefault(name, value)
            await send(message)

        await self._app(scope, receive, send_with_headers)


def _plain_path(path: str) -> str:
    """Without redundant slashes, which appear where a base address and a path are put together. A name of a model in
    the path stays as it is."""
    plain = _SLASHES.sub("/", path)
    if plain.startswith("/ui"):
        return plain
    if any(plain.startswith(prefix) and plain != prefix for prefix in _NAMED):
        return "/" + path.lstrip("/")
    return plain.rstrip("/") or "/"


def _allows(origin: str, allowed: tuple[str, ...]) -> bool:
    return "*" in allowed or any(_matches(origin, pattern) for pattern in allowed + _LOCAL_ORIGINS)


def _matches(origin: str, pattern: str) -> bool:
    """One ``*`` per pattern; in place of a port it stands for digits only."""
    if pattern.endswith(":*"):
        head, _, port = origin.rpartition(":")
        return head == pattern[:-2] and port.isascii() and port.isdigit()
    return fnmatch.fnmatchcase(origin, pattern.replace("[", "[[]"))


def is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _head_problem(scope: Scope, headers: Headers) -> str:
    """Return what is wrong with the headers Host (RFC 9112, section 3.2) and Origin; empty if they are valid."""
    hosts = headers.getlist("host")
    if len(headers.getlist("origin")) > 1:
        return "the request has more than one Origin header"
    if len(hosts) > 1:
        return "the request has more than one Host header"
    if not hosts and scope.get("http_version") not in ("1.0", "0.9"):
        return "the request has no Host header"
    if hosts and _HOST.fullmatch(hosts[0]) is None:
        return "the Host header is neither a name nor an address"
    return ""


def _host_name(host: str) -> str:
    """Without the port and the brackets of an IPv6 address."""
    match = _HOST.fullmatch(host)
    return match[1].strip("[]").lower().rstrip(".") if match is not None else host


def _is_local_host(host: str) -> bool:
    """Whether a Host header is this machine's name, an address of its networks, or a name that cannot be rebound."""
    name = _host_name(host)
    if name in ("", "localhost", socket.gethostname().lower()) or name.endswith(_LOCAL_NAMES):
        return True
    try:
        address = ipaddress.ip_address(name)
    except ValueError:
        return False
    return address.is_loopback or address.is_private or address.is_unspecified


def _is_listed(host: str, allowed: tuple[str, ...]) -> bool:
    name = _host_name(host)
    return any(fnmatch.fnmatchcase(name, pattern.lower().strip("[]").replace("[", "[[]")) for pattern in allowed)


async def _refuse(scope: Scope, receive: Receive, send: Send, headers: dict[str, str], text: str) -> None:
    response = error_response(scope, Forbidden(text))
    response.headers.update(headers)
    await response(scope, receive, send)
