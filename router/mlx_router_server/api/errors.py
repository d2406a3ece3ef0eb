"""Errors in the shape of the API whose path was called; one place for all of them.

An error that ends an answer before its first byte takes the same way as one that never reached an answer.
"""

from __future__ import annotations

import logging
from typing import Any, Final

import msgspec
from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mlx_router_server.api.body import BodyTooLarge, BodyTooSlow, UnsupportedEncoding
from mlx_router_server.api.disconnect import ClientLeft
from mlx_router_server.dialects import anthropic_answers, ollama_answers, openai_answers
from mlx_router_server.dialects.statuses import for_the_public, retry_after, status_of
from mlx_router_shared.errors import InvalidRequest, MlxRouterError

__all__ = ["LastResort", "error_response", "install", "is_anthropic"]

log = logging.getLogger(__name__)

_BODY_STATUSES: Final = {BodyTooLarge: 413, BodyTooSlow: 408, UnsupportedEncoding: 415}


def install(app: Starlette) -> None:
    app.add_exception_handler(MlxRouterError, _known)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(ClientLeft, _nobody)
    app.add_exception_handler(ClientDisconnect, _nobody)
    app.add_exception_handler(Exception, _unknown)


class LastResort:
    """The innermost layer: what no handler has an answer for gets one here, so that the layers around it count it, name
    it and mark it as any other. What they raise themselves is for the handler that ``install`` puts outside of all."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        begun = False

        async def send_and_look(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        try:
            await self._app(scope, receive, send_and_look)
        except Exception as error:
            if begun or scope["type"] != "http":
                raise
            response = await _unknown(Request(scope), error)
            await response(scope, receive, send)


def is_anthropic(scope: Scope) -> bool:
    """Whether a request speaks Anthropic's API: by its path, or on a shared path by its header."""
    path: str = scope["path"]
    if path == "/v1/messages" or path.startswith("/v1/messages/"):
        return True
    return path.startswith("/v1/models") and "anthropic-version" in Headers(scope=scope)


def error_response(scope: Scope, error: MlxRouterError) -> Response:
    """The whole answer that tells of an error."""
    error = for_the_public(error)
    wait = retry_after(error)
    headers = {"retry-after": str(wait)} if wait is not None else {}
    if isinstance(error, BodyTooLarge | BodyTooSlow):
        headers["connection"] = "close"  # the rest of the body is not read
    status = next((status for kind, status in _BODY_STATUSES.items() if isinstance(error, kind)), status_of(error))
    if is_anthropic(scope):
        status = anthropic_answers.status_of_error(error, status)
    return Response(msgspec.json.encode(_body(scope, error, status)), status, headers, "application/json")


def _body(scope: Scope, error: MlxRouterError, status: int) -> dict[str, Any]:
    if is_anthropic(scope):
        return anthropic_answers.error_body(error, status, scope.get("state", {}).get("request_id", ""))
    if scope["path"].startswith("/v1/"):
        return openai_answers.error_body(error)
    return ollama_answers.error_body(error)


async def _known(request: Request, error: Exception) -> Response:
    assert isinstance(error, MlxRouterError)
    return error_response(request.scope, error)


async def _http(request: Request, error: Exception) -> Response:
    """Unknown paths and wrong methods."""
    assert isinstance(error, HTTPException)
    headers = dict(error.headers or {})
    status = error.status_code
    if request.url.path.startswith("/v1/"):
        text = {404: f"unknown url: {request.method} {request.url.path}", 405: "method not allowed"}
        body = _body(request.scope, InvalidRequest(text.get(status, error.detail)), status)
        if not is_anthropic(request.scope):
            body["error"]["code"] = {404: "unknown_url", 405: "method_not_supported"}.get(status)
        return Response(msgspec.json.encode(body), status, headers, "application/json")
    text_404 = {404: "404 page not found", 405: "405 method not allowed"}
    return PlainTextResponse(text_404.get(status, error.detail), status, headers)


async def _nobody(request: Request, error: Exception) -> Response:
    """The status that servers log when nobody is there to read an answer."""
    return Response(status_code=499)


async def _unknown(request: Request, error: Exception) -> Response:
    """A defect of ours: the details are in the log, not in the answer."""
    path = request.app.state.server.keys.masked(request.url.path)
    log.error("event=internal_error path=%r", path, exc_info=error)
    return error_response(request.scope, MlxRouterError("internal server error"))
