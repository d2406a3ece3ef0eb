"""Ollama's routes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any, Final, Literal

import msgspec
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import BaseRoute, Route

from mlx_router_server.api.answer import Answer, AnswerStyle, answer, ignored_headers, load_only
from mlx_router_server.api.body import parse_body
from mlx_router_server.api.count import count_tokens
from mlx_router_server.api.disconnect import unless_client_leaves
from mlx_router_server.api.server import Server, caller_of, server_of
from mlx_router_server.api.wishes import read_wishes
from mlx_router_server.catalogue.entry import ModelEntry
from mlx_router_server.catalogue.overlay import modelfile_of
from mlx_router_server.catalogue.safetensors import list_tensors
from mlx_router_server.dialects import ollama_answers as answers
from mlx_router_server.dialects.call import Moment, Transcript
from mlx_router_server.dialects.ollama_embedding import parse_embed, parse_embeddings
from mlx_router_server.dialects.ollama_management import parse_show
from mlx_router_server.dialects.ollama_requests import GenerateCall, parse_chat, parse_generate
from mlx_router_server.lifecycle.states import State
from mlx_router_server.lifecycle.views import ModelView
from mlx_router_shared.errors import InvalidRequest, ModelNotFound
from mlx_router_shared.generation import GenerationRequest

__all__ = ["OLLAMA_VERSION", "routes"]

# The release of Ollama's API that this server follows. Clients compare it: Codex refuses anything below 0.13.4.
OLLAMA_VERSION: Final = "0.32.0"
_JSON: Final = "application/json; charset=utf-8"
_LOADED: Final = (State.READY, State.DRAINING, State.STOPPING)


def _json(data: Any, headers: dict[str, str] | None = None) -> Response:
    return Response(msgspec.json.encode(data), headers=headers, media_type=_JSON)


async def root(request: Request) -> Response:
    """Clients probe for exactly this text."""
    return PlainTextResponse("Ollama is running")


async def status(request: Request) -> Response:
    """There is no cloud behind this server, and there never will be one that is asked unasked."""
    return _json({"cloud": {"disabled": True, "source": "config"}})


async def no_account(request: Request) -> Response:
    return Response(msgspec.json.encode({"error": "unauthorized"}), status_code=401, media_type=_JSON)


async def no_cloud(request: Request) -> Response:
    text = "ollama cloud is disabled: this server runs local models only"
    return Response(msgspec.json.encode({"error": text}), status_code=403, media_type=_JSON)


async def recommendations(request: Request) -> Response:
    return _json({"recommendations": []})


async def version(request: Request) -> Response:
    return _json({"version": OLLAMA_VERSION})


async def tags(request: Request) -> Response:
    server = server_of(request)
    await server.catalogue.wait_ready()
    items = server.list_models("tags", _tag, server.listed(caller_of(request)))
    return Response(b'{"models":[' + items + b"]}", media_type=_JSON)


def _tag(entry: ModelEntry, state: State) -> bytes:
    """One model of /api/tags; kind, aliases and state are ours."""
    files = entry.files
    return msgspec.json.encode(
        {
            **_head(entry),
            "modified_at": answers.local_time(files.modified_at),
            "details": {**_details(entry), "context_length": files.context_tokens},
            "capabilities": sorted(files.capabilities),
            "kind": files.kind,
            "aliases": entry.aliases,
            "state": state,
        }
    )


async def running(request: Request) -> Response:
    """/api/ps: never waits for anything."""
    server = server_of(request)
    entries = {entry.name.display: entry for entry in server.catalogue.entries()}
    caller = caller_of(request)
    entries = {name: entry for name, entry in entries.items() if caller.may_use(entry.names)}
    loaded = [view for view in server.supervisor.views() if view.state in _LOADED and view.name in entries]
    loaded.sort(key=lambda view: view.expires_at or 0.0, reverse=True)
    return _json({"models": [_running(server, entries[view.name], view) for view in loaded]})


def _running(server: Server, entry: ModelEntry, view: ModelView) -> dict[str, Any]:
    worker = server.supervisor.worker_view(view.worker)
    size = max(worker.memory_bytes if worker else 0, view.memory_bytes, entry.files.weights_bytes, 1)
    now = time.time()
    left = (view.expires_at or time.monotonic()) - time.monotonic()
    expires = min(now + left, answers.forever_from(now))
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
    name, verbose, ignored = await parse_body(request, parse_show)
    headers = ignored_headers(server, ignored)
    entry = await server.resolve(name, caller_of(request))
    files = entry.files
    body: dict[str, Any] = {
        "modelfile": _modelfile(entry),
        "template": files.template,
        "details": _details(entry),
        "model_info": _model_info(request, name, files.info),
        "capabilities": sorted(files.capabilities),
        "modified_at": answers.local_time(files.modified_at),
    }
    if parameters := _parameters(entry):
        body["parameters"] = parameters
    if entry.overlay.system:
        body["system"] = entry.overlay.system
    if entry.overlay.messages:
        body["messages"] = [{"role": turn.role, "content": turn.content} for turn in entry.overlay.messages]
    if files.license:
        body["license"] = files.license
    if verbose:
        body["tensors"] = await asyncio.to_thread(list_tensors, entry.path)
    return _json(body, headers)


def _modelfile(entry: ModelEntry) -> str:
    base = entry.base.display if entry.base is not None else entry.name.display
    adapter = entry.adapter.name if entry.adapter is not None else ""
    return f"# served by mlx-router from {entry.source}\n{modelfile_of(base, entry.overlay, adapter)}"


def _parameters(entry: ModelEntry) -> str:
    """A line for each value, as Ollama's clients read them: those on top, then those of the model's author."""
    lines = []
    for name, value in entry.overlay.parameters.items():
        for one in value if isinstance(value, list) else [value]:
            lines.append(f"{name:<30} {msgspec.json.encode(one).decode()}")
    said = entry.overlay.parameters.keys()
    lines += [line for line in entry.files.parameters_text.splitlines() if line.split(" ", 1)[0] not in said]
    return "\n".join(lines)


def _model_info(request: Request, name: str, info: dict[str, str | int | float]) -> dict[str, str | int | float]:
    """One client shows the base name to its user and expects the name it asked for."""
    if request.headers.get("user-agent", "").startswith("GitHubCopilotChat/"):
        return {**info, "general.basename": name}
    return info


async def chat(request: Request) -> Answer | Response:
    return await _generate(request, "chat", await parse_body(request, parse_chat))


async def generate(request: Request) -> Answer | Response:
    return await _generate(request, "generate", await parse_body(request, parse_generate))


async def _generate(request: Request, kind: Literal["chat", "generate"], asked: GenerateCall) -> Answer | Response:
    if kind == "chat" and not asked.model.strip() and not server_of(request).settings.default_model:
        raise InvalidRequest("model is required", param="model")
    if asked.call is None:
        return await _load_or_unload(request, kind, asked)
    if asked.render_only:
        (canonical,) = asked.call.requests
        assert isinstance(canonical, GenerationRequest)
        counted = await count_tokens(request, asked.call)
        images = sum(len(message.images) for message in canonical.messages)
        rendered = answers.rendered_prompt(kind, asked.model, time.time(), counted.text, images)
        return _json(rendered, counted.headers)
    style = AnswerStyle(
        whole=lambda transcripts, moment: answers.render_answer(kind, asked.model, transcripts[0], moment),
        stream=lambda: answers.OllamaStream(kind, asked.model),
        whole_media_type=_JSON,
        thinking="think",
        effort="think",
    )
    return await answer(request, asked.call, style)


async def _load_or_unload(request: Request, kind: Literal["chat", "generate"], asked: GenerateCall) -> Response:
    server = server_of(request)
    headers = ignored_headers(server, asked.ignored)
    plan = server.plan(await server.resolve(asked.model, caller_of(request)))
    if asked.keep_alive_seconds == 0:
        server.unload_for_client(plan.spec.name)
        return _json(answers.load_answer(kind, asked.model, time.time(), "unload"), headers)
    await unless_client_leaves(request.receive, load_only(server, plan, read_wishes(request, asked.keep_alive_seconds)))
    return _json(answers.load_answer(kind, asked.model, time.time(), "load"), headers)


async def embed(request: Request) -> Answer | Response:
    asked = await parse_body(request, parse_embed)

    def render(transcript: Transcript | None, moment: Moment) -> dict[str, Any]:
        return answers.embed_answer(asked.model, transcript, moment)

    return await _embed(request, asked, render)


async def embeddings(request: Request) -> Answer | Response:
    """The older form, with sentences of its own."""
    asked = await parse_body(request, parse_embeddings)
    if not asked.model.strip() and not server_of(request).settings.default_model:
        raise InvalidRequest("model is required", param="model")

    def render(transcript: Transcript | None, moment: Moment) -> dict[str, Any]:
        return answers.embeddings_answer(transcript)

    try:
        return await _embed(request, asked, render)
    except ModelNotFound:
        if not server_of(request).settings.on_demand:
            raise
        raise ModelNotFound(f'model "{asked.model}" not found, try pulling it first', param="model") from None


async def _embed(
    request: Request, asked: GenerateCall, render: Callable[[Transcript | None, Moment], dict[str, Any]]
) -> Answer | Response:
    if asked.call is not None:
        style = AnswerStyle(whole=lambda transcripts, moment: render(transcripts[0], moment), whole_media_type=_JSON)
        return await answer(request, asked.call, style)
    server = server_of(request)
    headers = ignored_headers(server, asked.ignored)
    plan = server.plan(await server.resolve(asked.model, caller_of(request)))
    await unless_client_leaves(request.receive, load_only(server, plan, read_wishes(request, asked.keep_alive_seconds)))
    return _json(render(None, Moment(now=time.time(), total_seconds=0.0, load_seconds=0.0)), headers)


def _head(entry: ModelEntry) -> dict[str, Any]:
    name = entry.name.display
    return {"name": name, "model": name, "size": entry.files.size_bytes, "digest": entry.files.digest}


def _details(entry: ModelEntry) -> dict[str, Any]:
    files = entry.files
    return {
        "parent_model": entry.base.display if entry.base is not None else "",
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
        Route("/api/embed", embed, methods=["POST"]),
        Route("/api/embeddings", embeddings, methods=["POST"]),
        Route("/api/status", status),
        Route("/api/me", no_account, methods=["POST"]),
        Route("/api/signout", no_account, methods=["POST"]),
        Route("/api/user/keys/{key}", no_account, methods=["DELETE"]),
        Route("/api/experimental/web_search", no_cloud, methods=["POST"]),
        Route("/api/experimental/web_fetch", no_cloud, methods=["POST"]),
        Route("/api/experimental/model-recommendations", recommendations),
    ]
