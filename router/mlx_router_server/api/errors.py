"""Errors that never reached an answer, in the shape of the API whose path was called."""

from __future__ import annotations

import logging
from typing import Any

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from mlx_router_server.api.disconnect import ClientLeft
from mlx_router_server.api.server import BodyTooLarge
from mlx_router_server.dialects import ollama_answers, openai_answers
from mlx_router_server.dialects.statuses import for_the_public, retry_after, status_of
from mlx_router_shared.errors import InvalidRequest, MlxRouterError

__all__ = ["install"]

log = logging.getLogger(__name__)


def install(app: Starlette) -> None:
    app.add_exception_handler(MlxRouterError, _known)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(ClientLeft, _nobody)
    app.add_exception_handler(Exception, _unknown)


def _body(request: Request, error: MlxRouterError) -> dict[str, Any]:
    dialect = openai_answers if request.url.path.startswith("/v1/") else ollama_answers
    body: dict[str, Any] = dialect.error_body(error)
    return body


def _json(request: Request, error: MlxRouterError, status: int, headers: dict[str, str] | None = None) -> Response:
    body = msgspec.json.encode(_body(request, error))
    return Response(body, status_code=status, headers=headers, media_type="application/json")


async def _known(request: Request, error: Exception) -> Response:
    assert isinstance(error, MlxRouterError)
    error = for_the_public(error)
    wait = retry_after(error)
    headers = {"retry-after": str(wait)} if wait is not None else None
    return _json(request, error, 413 if isinstance(error, BodyTooLarge) else status_of(error), headers)


async def _http(request: Request, error: Exception) -> Response:
    """Unknown paths and wrong methods."""
    assert isinstance(error, HTTPException)
    headers = dict(error.headers or {})
    if request.url.path.startswith("/v1/"):
        text = {404: f"unknown url: {request.method} {request.url.path}", 405: "method not allowed"}
        body = _body(request, InvalidRequest(text.get(error.status_code, error.detail)))
        body["error"]["code"] = {404: "unknown_url", 405: "method_not_supported"}.get(error.status_code)
        return Response(msgspec.json.encode(body), error.status_code, headers, "application/json")
    text_404 = {404: "404 page not found", 405: "405 method not allowed"}
    return PlainTextResponse(text_404.get(error.status_code, error.detail), error.status_code, headers)


async def _nobody(request: Request, error: Exception) -> Response:
    """The status that servers log when nobody is there to read an answer."""
    return Response(status_code=499)


async def _unknown(request: Request, error: Exception) -> Response:
    """A defect of ours: the details are in the log, not in the answer."""
    log.error("event=internal_error path=%r", request.url.path, exc_info=error)
    return _json(request, MlxRouterError("internal server error"), 500)
