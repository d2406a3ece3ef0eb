"""OpenAI's routes, and the reranking that others have put beside them."""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable
from typing import Any, Literal

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from mlx_router_server.api.answer import Answer, AnswerStyle, answer
from mlx_router_server.api.body import parse_body
from mlx_router_server.api.errors import is_anthropic
from mlx_router_server.api.server import caller_of, server_of
from mlx_router_server.catalogue.entry import Capability, ModelEntry
from mlx_router_server.catalogue.kinds import Kind
from mlx_router_server.dialects import openai_answers as answers
from mlx_router_server.dialects.anthropic_answers import model_entry
from mlx_router_server.dialects.call import Call
from mlx_router_server.dialects.embedding_requests import parse_embeddings, parse_rerank
from mlx_router_server.dialects.openai_completions import parse_completion
from mlx_router_server.dialects.openai_requests import parse_chat_completion
from mlx_router_server.lifecycle.states import State
from mlx_router_shared.errors import InvalidRequest

__all__ = ["routes"]


def _json(data: Any) -> Response:
    return Response(msgspec.json.encode(data), media_type="application/json")


async def models(request: Request) -> Response:
    """The same path for two APIs; each object has the keys of both, and a header tells which list is wanted."""
    server = server_of(request)
    await server.catalogue.wait_ready()
    query = dict(request.query_params)
    wanted = _filter(query)
    entries = [entry for entry in server.listed(caller_of(request)) if wanted(entry)]
    if is_anthropic(request.scope):
        return _json(_page([_model(entry, server.state(entry), entry.name.display) for entry in entries], query))
    items = server.list_models("models", _item, entries)
    return Response(b'{"object":"list","data":[' + items + b"]}", media_type="application/json")


def _item(entry: ModelEntry, state: State) -> bytes:
    return msgspec.json.encode(_model(entry, state, entry.name.display))


def _filter(query: dict[str, str]) -> Callable[[ModelEntry], bool]:
    """``type`` and ``capability`` narrow the list; without them it is everything that can be asked for."""
    kind, capability = query.get("type"), query.get("capability")
    for name, said, known in (("type", kind, Kind), ("capability", capability, Capability)):
        if said is not None and said not in set(known):
            raise InvalidRequest(f"{name} is none of {', '.join(known)}", param=name)
    return lambda entry: (
        (kind is None or entry.files.kind == kind) and (capability is None or capability in entry.files.capabilities)
    )


def _page(data: list[dict[str, Any]], query: dict[str, str]) -> dict[str, Any]:
    """Anthropic's pages: ``limit``, ``after_id`` or ``before_id``; iterators go on while ``has_more``."""
    text = query.get("limit") or "20"
    limit = int(text) if re.fullmatch("[0-9]{1,9}", text) else 0
    if not 1 <= limit <= 1000:
        raise InvalidRequest("limit must be between 1 and 1000", param="limit")
    ids = [entry["id"] for entry in data]
    if (after := query.get("after_id")) is not None:
        data = data[ids.index(after) + 1 :] if after in ids else []
    elif (before := query.get("before_id")) is not None:
        data = data[: ids.index(before)][-limit:] if before in ids else []
    page = data[:limit]
    return {
        "data": page,
        "has_more": len(data) > limit,
        "first_id": page[0]["id"] if page else None,
        "last_id": page[-1]["id"] if page else None,
    }


async def model(request: Request) -> Response:
    """One model; its name may hold slashes, encoded or not."""
    requested, server = request.path_params["name"], server_of(request)
    entry = await server.resolve(requested, caller_of(request))
    return _json(_model(entry, server.state(entry), requested))


def _model(entry: ModelEntry, state: State, name: str) -> dict[str, Any]:
    """The keys of both APIs, and what is known besides."""
    files = entry.files
    return {
        **model_entry(name, files.modified_at, files.context_tokens),
        "object": "model",
        "created": int(files.modified_at),
        "owned_by": entry.name.namespace,
        # For pickers that want to know more; no client minds.
        "kind": files.kind,
        "capabilities": sorted(files.capabilities),
        "size": files.size_bytes,
        "context_length": files.context_tokens,
        "aliases": list(entry.aliases),
        "state": state,
    }


async def chat_completions(request: Request) -> Answer:
    call = await parse_body(request, parse_chat_completion)
    return await _generate(request, "chat", "chatcmpl-", call)


async def completions(request: Request) -> Answer:
    call = await parse_body(request, parse_completion)
    return await _generate(request, "completion", "cmpl-", call)


async def _generate(request: Request, kind: Literal["chat", "completion"], prefix: str, call: Call) -> Answer:
    answer_id = prefix + secrets.token_hex(16)
    style = AnswerStyle(
        whole=lambda transcripts, moment: answers.render_answer(
            kind, answer_id, call.model, transcripts, call.choices_per_prompt, moment
        ),
        stream=lambda: answers.OpenAIStream(
            kind,
            answer_id,
            call.model,
            include_usage=call.include_usage,
            choices=len(call.requests),
            choices_per_prompt=call.choices_per_prompt,
        ),
    )
    return await answer(request, call, style)


async def embeddings(request: Request) -> Answer:
    asked = await parse_body(request, parse_embeddings)
    style = AnswerStyle(
        whole=lambda transcripts, moment: answers.embeddings_answer(
            asked.call.model, transcripts, as_base64=asked.as_base64
        )
    )
    return await answer(request, asked.call, style)


async def rerank(request: Request) -> Answer:
    asked = await parse_body(request, parse_rerank)
    answer_id = "rerank-" + secrets.token_hex(16)
    style = AnswerStyle(
        whole=lambda transcripts, moment: answers.rerank_answer(
            asked.call.model, answer_id, asked.documents, transcripts[0],
            top_n=asked.top_n, with_documents=asked.with_documents,
        )
    )  # fmt: skip
    return await answer(request, asked.call, style)


def routes() -> list[BaseRoute]:
    return [
        Route("/v1/models", models),
        Route("/v1/models/{name:path}", model),
        Route("/v1/chat/completions", chat_completions, methods=["POST"]),
        Route("/v1/completions", completions, methods=["POST"]),
        Route("/v1/embeddings", embeddings, methods=["POST"]),
        Route("/v1/rerank", rerank, methods=["POST"]),
        Route("/api/rerank", rerank, methods=["POST"]),
    ]
