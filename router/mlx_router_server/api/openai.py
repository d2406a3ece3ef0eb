"""OpenAI's routes."""

from __future__ import annotations

import secrets
from typing import Any, Literal

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from mlx_router_server.api.answer import Answer, AnswerStyle
from mlx_router_server.api.server import read_body, server_of
from mlx_router_server.api.wishes import read_wishes
from mlx_router_server.catalogue.entry import ModelEntry
from mlx_router_server.dialects import openai_answers as answers
from mlx_router_server.dialects.call import Call
from mlx_router_server.dialects.openai_requests import parse_chat_completion, parse_completion
from mlx_router_shared.errors import InvalidRequest

__all__ = ["routes"]


def _json(data: Any) -> Response:
    return Response(msgspec.json.encode(data), media_type="application/json")


async def models(request: Request) -> Response:
    server = server_of(request)
    await server.catalogue.wait_ready()
    return _json({"object": "list", "data": [_model(entry, entry.name.display) for entry in server.listed()]})


async def model(request: Request) -> Response:
    """One model; its name may hold slashes, encoded or not."""
    requested = request.path_params["name"]
    return _json(_model(await server_of(request).resolve(requested), requested))


def _model(entry: ModelEntry, name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": int(entry.files.modified_at), "owned_by": entry.name.namespace}


async def chat_completions(request: Request) -> Answer:
    call = parse_chat_completion(await read_body(request))
    return await _answer(request, "chat", "chatcmpl-", call)


async def completions(request: Request) -> Answer:
    call = parse_completion(await read_body(request))
    return await _answer(request, "completion", "cmpl-", call)


async def _answer(request: Request, kind: Literal["chat", "completion"], prefix: str, call: Call) -> Answer:
    server = server_of(request)
    if not call.model.strip() and not server.settings.default_model:
        raise InvalidRequest("model is required", param="model")
    entry = await server.resolve(call.model)
    server.check_capabilities(entry, call.model, call.needs)
    answer_id = prefix + secrets.token_hex(16)
    style = AnswerStyle(
        whole=lambda transcript, moment: answers.render_answer(kind, answer_id, call.model, transcript, moment),
        stream=lambda: answers.OpenAIStream(kind, answer_id, call.model, include_usage=call.include_usage),
        error=answers.error_body,
    )
    return Answer(server, server.plan(entry), call, read_wishes(request, call.keep_alive_seconds), style)


def routes() -> list[BaseRoute]:
    return [
        Route("/v1/models", models),
        Route("/v1/models/{name:path}", model),
        Route("/v1/chat/completions", chat_completions, methods=["POST"]),
        Route("/v1/completions", completions, methods=["POST"]),
    ]
