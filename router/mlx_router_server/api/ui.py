"""``/ui``: the page for people. Files of this package as they are; what they show, they ask for by the APIs."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

__all__ = ["UI_PATHS", "routes"]

_FOLDER: Final = Path(__file__).resolve().parent.parent / "ui"
_TYPES: Final = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
_NAMES: Final = (
    "api.js", "chat.js", "dom.js", "happenings.js", "icon.svg", "main.js", "models.js", "ui.css",
)  # fmt: skip
UI_PATHS: Final = frozenset({"/ui", "/ui/", *(f"/ui/{name}" for name in _NAMES)})
"""Open to everybody who may reach the server: there is nothing in these files that is not in every installation."""

_HEADERS: Final = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cache-control": "no-cache",
}


async def page(request: Request) -> Response:
    return _file("index.html")


async def asset(request: Request) -> Response:
    name = request.path_params["name"]
    if name not in _NAMES:
        raise HTTPException(404)
    return _file(name)


def _file(name: str) -> Response:
    """One of a few small files, which are in the system's cache after the first time."""
    data = (_FOLDER / name).read_bytes()
    kind = _TYPES[Path(name).suffix]
    return Response(data, headers={**_HEADERS, "content-type": f"{kind}; charset=utf-8"})


def routes() -> list[BaseRoute]:
    return [Route("/ui", page), Route("/ui/{name}", asset)]
