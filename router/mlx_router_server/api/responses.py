"""OpenAI's /v1/responses: answers, and the few of them that are kept."""

from __future__ import annotations

import secrets
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from mlx_router_server.api.answer import Answer, AnswerStyle, answer
from mlx_router_server.api.body import parse_body
from mlx_router_server.api.count import count_tokens
from mlx_router_server.api.response_store import Stored
from mlx_router_server.api.server import caller_of, server_of
from mlx_router_server.dialects.call import Moment, StreamRenderer, Transcript
from mlx_router_server.dialects.responses_answers import ResponsesStream, render_answer, turn_of
from mlx_router_server.dialects.responses_requests import ResponsesCall, parse_responses
from mlx_router_shared.errors import NotFound, PreviousResponseMissing
from mlx_router_shared.generation import Message

__all__ = ["routes"]


def _new_id(prefix: str) -> str:
    return prefix + secrets.token_hex(16)


def _json(data: Any, headers: dict[str, str] | None = None) -> Response:
    return Response(msgspec.json.encode(data), headers=headers, media_type="application/json")


async def create(request: Request) -> Answer:
    server, caller = server_of(request), caller_of(request)
    asked = await parse_body(request, parse_responses)
    history = _history(request, asked)
    answer_id = _new_id("resp_")
    renderer = ResponsesStream(answer_id, asked, _new_id)
    final: dict[str, Any] = {}

    def whole(transcripts: list[Transcript], moment: Moment) -> dict[str, Any]:
        final.update(render_answer(answer_id, asked, transcripts[0], moment, _new_id))
        return final

    def stream() -> StreamRenderer:
        return renderer

    def keep(transcripts: list[Transcript]) -> None:
        server.responses.put(
            renderer.final or final,
            [*history, *asked.messages, turn_of(transcripts[0])],
            [{"id": _new_id("msg_"), **item} for item in asked.items],
            most=server.settings.responses_kept,
            seconds=server.settings.responses_keep_seconds,
            owner=caller.digest,
            model_names=server.names_of(asked.call.model, caller),
        )

    style = AnswerStyle(
        whole=whole, stream=stream, on_end=keep if asked.store else None,
        thinking="reasoning.effort", effort="reasoning.effort",
    )  # fmt: skip
    return await answer(request, asked.after(history), style)


def _history(request: Request, asked: ResponsesCall) -> list[Message]:
    """What went before; never left out in silence, because the model would have lost its memory."""
    if not asked.previous_response_id:
        return []
    stored = _find(request, asked.previous_response_id)
    if stored is None:
        raise PreviousResponseMissing(
            f"Previous response with id '{asked.previous_response_id}' not found: it was never stored, or long ago",
            param="previous_response_id",
        )
    return stored.messages


def _find(request: Request, response_id: str) -> Stored | None:
    """A response that this caller made, of a model that it may still use."""
    server, caller = server_of(request), caller_of(request)
    stored = server.responses.get(response_id, caller.digest)
    return stored if stored is not None and caller.may_use(stored.model_names) else None


def _stored(request: Request) -> Stored:
    response_id = request.path_params["response_id"]
    stored = _find(request, response_id)
    if stored is None:
        raise NotFound(f"Response with id '{response_id}' not found", param="response_id")
    return stored


async def retrieve(request: Request) -> Response:
    return _json(_stored(request).response)


async def delete(request: Request) -> Response:
    response_id = request.path_params["response_id"]
    _stored(request)
    server_of(request).responses.delete(response_id, caller_of(request).digest)
    return _json({"id": response_id, "object": "response.deleted", "deleted": True})


async def input_items(request: Request) -> Response:
    items = _stored(request).input_items
    ids = [str(item["id"]) for item in items]
    return _json(
        {
            "object": "list",
            "data": items,
            "has_more": False,
            "first_id": ids[0] if ids else None,
            "last_id": ids[-1] if ids else None,
        }
    )


async def input_tokens(request: Request) -> Response:
    asked = await parse_body(request, parse_responses)
    counted = await count_tokens(request, asked.after(_history(request, asked)))
    return _json({"object": "response.input_tokens", "input_tokens": counted.tokens}, counted.headers)


def routes() -> list[BaseRoute]:
    return [
        Route("/v1/responses", create, methods=["POST"]),
        Route("/v1/responses/input_tokens", input_tokens, methods=["POST"]),
        Route("/v1/responses/{response_id}", retrieve),
        Route("/v1/responses/{response_id}", delete, methods=["DELETE"]),
        Route("/v1/responses/{response_id}/input_items", input_items),
    ]
