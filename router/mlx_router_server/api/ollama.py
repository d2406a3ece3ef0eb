"""Ollama's routes."""

from __future__ import annotations

import asyncio
import time
from typing import Any, Final, Literal

import msgspec
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import BaseRoute, Route

from mlx_router_server.api.answer import Answer, AnswerStyle, load_only
from mlx_router_server.api.disconnect import unless_client_leaves
from mlx_router_server.api.server import Server, read_body, server_of
from mlx_router_server.api.wishes import read_wishes
from mlx_router_server.catalogue.entry import ModelEntry
from mlx_router_server.catalogue.safetensors import list_tensors
from mlx_router_server.dialects import ollama_answers as answers
from mlx_router_server.dialects.ollama_requests import GenerateCall, parse_chat, parse_generate, parse_show
from mlx_router_server.lifecycle.states import State
from mlx_router_server.lifecycle.views import ModelView
from mlx_router_shared.errors import InvalidRequest

__all__ = ["OLLAMA_VERSION", "routes"]

# The release of Ollama's API that this server follows. Clients compare it: Codex refuses anything below 0.13.4.
OLLAMA_VERSION: Final = "0.32.0"
_JSON: Final = "application/json; charset=utf-8"
_LOADED: Final = (State.READY, State.DRAINING, State.STOPPING)


def _json(data: Any) -> Response:
    return Response(msgspec.json.encode(data), media_type=_JSON)


async def root(request: Request) -> Response:
    """Clients probe for exactly this text."""
    return PlainTextResponse("Ollama is running")


async def version(request: Request) -> Response:
    return _json({"version": OLLAMA_VERSION})


async def tags(request: Request) -> Response:
    server = server_of(request)
    await server.catalogue.wait_ready()
    models = []
    for entry in server.listed():
        details = {**_details(entry), "context_length": entry.files.context_tokens}
        models.append({**_head(entry), "modified_at": answers.local_time(entry.files.modified_at), "details": details,
                       "capabilities": sorted(entry.files.capabilities)})  # fmt: skip
    return _json({"models": models})


async def running(request: Request) -> Response:
    """/api/ps: never waits for anything."""
    server = server_of(request)
    entries = {entry.name.display: entry for entry in server.catalogue.entries()}
    loaded = [view for view in server.supervisor.views() if view.state in _LOADED and view.name in entries]
    loaded.sort(key=lambda view: view.expires_at or 0.0, reverse=True)
    return _json({"models": [_running(server, entries[view.name], view) for view in loaded]})


def _running(server: Server, entry: ModelEntry, view: ModelView) -> dict[str, Any]:
    worker = server.supervisor.worker_view(view.worker)
    size = max(worker.memory_bytes if worker else 0, view.memory_bytes, entry.files.weights_bytes, 1)
    now = time.time()
    left = (view.expires_at or time.monotonic()) - time.monotonic()
    expires = answers.forever_from(now) if left == float("inf") else now + left
    context = worker.facts.context_tokens if worker and worker.facts else entry.files.context_tokens
    return {
        **_head(entry),
        "size": size,
        "details": _details(entry),
        "expires_at": answers.local_time(expires),
        "size_vram": size,
        "context_length": context,
    }


async def show(request: Request) -> Response:
    server = server_of(request)
    name, verbose = parse_show(await read_body(request))
    entry = await server.resolve(name)
    files = entry.files
    body: dict[str, Any] = {
        "modelfile": f"# served by mlx-router from {entry.source}\nFROM {entry.name.display}\n",
        "template": files.template,
        "details": _details(entry),
        "model_info": files.info,
        "capabilities": sorted(files.capabilities),
        "modified_at": answers.local_time(files.modified_at),
    }
    if files.license:
        body["license"] = files.license
    if verbose:
        body["tensors"] = await asyncio.to_thread(list_tensors, entry.path)
    return _json(body)


async def chat(request: Request) -> Answer | Response:
    return await _generate(request, "chat", parse_chat(await read_body(request)))


async def generate(request: Request) -> Answer | Response:
    return await _generate(request, "generate", parse_generate(await read_body(request)))


async def _generate(request: Request, kind: Literal["chat", "generate"], asked: GenerateCall) -> Answer | Response:
    server = server_of(request)
    if kind == "chat" and not asked.model.strip() and not server.settings.default_model:
        raise InvalidRequest("model is required", param="model")
    entry = await server.resolve(asked.model)
    plan = server.plan(entry)
    wishes = read_wishes(request, asked.keep_alive_seconds)
    if asked.call is None:
        if asked.keep_alive_seconds == 0:
            server.unload_for_client(plan.spec.name)
            return _json(answers.load_answer(kind, asked.model, time.time(), "unload"))
        await unless_client_leaves(request.receive, load_only(server, plan, wishes))
        return _json(answers.load_answer(kind, asked.model, time.time(), "load"))
    server.check_capabilities(entry, asked.model, asked.call.needs)
    style = AnswerStyle(
        whole=lambda transcript, moment: answers.render_answer(kind, asked.model, transcript, moment),
        stream=lambda: answers.OllamaStream(kind, asked.model),
        error=answers.error_body,
        whole_media_type=_JSON,
    )
    return Answer(server, plan, asked.call, wishes, style)


def _head(entry: ModelEntry) -> dict[str, Any]:
    name = entry.name.display
    return {"name": name, "model": name, "size": entry.files.size_bytes, "digest": entry.files.digest}


def _details(entry: ModelEntry) -> dict[str, Any]:
    files = entry.files
    return {
        "parent_model": "",
        "format": "safetensors",
        "family": files.family,
        "families": [files.family],
        "parameter_size": answers.human_count(files.parameters),
        "quantization_level": files.quantization,
    }


def routes() -> list[BaseRoute]:
    return [
        Route("/", root),
        Route("/api/version", version),
        Route("/api/tags", tags),
        Route("/api/ps", running),
        Route("/api/show", show, methods=["POST"]),
        Route("/api/chat", chat, methods=["POST"]),
        Route("/api/generate", generate, methods=["POST"]),
    ]
