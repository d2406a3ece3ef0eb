"""Ollama's routes about which models there are."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
from collections.abc import AsyncGenerator
from contextlib import aclosing
from pathlib import Path
from typing import Any, Final

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route
from starlette.types import Receive, Scope, Send

from mlx_router_server.api.answer import ignored_headers, refuse_ignored
from mlx_router_server.api.body import body_parts, parse_body
from mlx_router_server.api.disconnect import ClientLeft, unless_client_leaves
from mlx_router_server.api.errors import error_response
from mlx_router_server.api.server import caller_of, server_of
from mlx_router_server.catalogue.names import ModelName, parse_name
from mlx_router_server.catalogue.overlay import Overlay, Turn
from mlx_router_server.catalogue.store import Store
from mlx_router_server.dialects.body import ndjson_line
from mlx_router_server.dialects.ollama_management import (
    parse_copy,
    parse_create,
    parse_delete,
    parse_pull,
    parse_push,
    status_line,
)
from mlx_router_server.dialects.statuses import for_the_public
from mlx_router_server.management.creating import Creation, Creator, Quantization
from mlx_router_server.management.models import Models
from mlx_router_server.management.removing import Remover
from mlx_router_server.management.storage import storage_faults
from mlx_router_shared.errors import (
    Forbidden,
    InsufficientStorage,
    InvalidRequest,
    MlxRouterError,
    ModelNotFound,
    UnsupportedCapability,
)
from mlx_router_shared.jobs import JobDone, JobEvent, JobStatus

__all__ = ["routes"]

log = logging.getLogger(__name__)

_JSON: Final = "application/json"
_NDJSON: Final = "application/x-ndjson"
_RESERVE_BYTES: Final = 512 * 2**20


def _models(request: Request) -> Models:
    models = server_of(request).models
    if models is None:
        raise UnsupportedCapability("this server has no home folder, and so nowhere to keep models")
    return models


class Progress:
    """The answer to something that takes its time: a line for each step, or one object at the end.

    Closing the connection ends the work, unless somebody else wants it as well.
    """

    def __init__(
        self, models: Models, work: AsyncGenerator[JobEvent, None], *, lines: bool, headers: dict[str, str]
    ) -> None:
        self._models = models
        self._work = work
        self._lines = lines
        self._headers = headers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await unless_client_leaves(receive, self._answer(scope, receive, send))
        except ClientLeft:
            pass

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        begun = False
        try:
            with self._models.working(), storage_faults():
                async with aclosing(self._work) as events:
                    async for event in events:
                        if self._lines:
                            if not begun:
                                begun = True
                                await send(self._head(_NDJSON))
                            await send(_part(status_line(event)))
            if self._lines:
                await send({"type": "http.response.body", "body": b"", "more_body": False})
            else:
                response = Response(msgspec.json.encode({"status": "success"}), headers=self._headers, media_type=_JSON)
                await response(scope, receive, send)
        except MlxRouterError as error:
            if begun:
                await send({**_part({"error": for_the_public(error).message}), "more_body": False})
            else:
                await error_response(scope, error)(scope, receive, send)

    def _head(self, media_type: str) -> dict[str, Any]:
        raw = [(name.encode(), value.encode()) for name, value in self._headers.items()]
        headers = [(b"content-type", media_type.encode()), (b"cache-control", b"no-cache"), *raw]
        return {"type": "http.response.start", "status": 200, "headers": headers}


def _part(line: dict[str, Any]) -> dict[str, Any]:
    return {"type": "http.response.body", "body": ndjson_line(line), "more_body": True}


def _names(request: Request, name: ModelName) -> tuple[str, ...]:
    """What a key's list may call a model that need not be here: by its name, or by the repository it stands for."""
    repository = server_of(request).catalogue.repository(name)
    return (*name.spellings, *((repository,) if repository is not None else ()))


def _check_may_make(request: Request, names: tuple[str, ...]) -> None:
    """A key with a list of models neither fetches, makes nor replaces one beyond it. Raises ``Forbidden``."""
    if not caller_of(request).may_use(names):
        raise Forbidden(f"this key is for other models than {names[0]!r}")


async def pull(request: Request) -> Progress:
    asked, lines, ignored = await parse_body(request, parse_pull)
    headers = ignored_headers(server_of(request), ignored)
    name = parse_name(asked)
    _check_may_make(request, _names(request, name))
    models = _models(request)
    await server_of(request).catalogue.wait_ready()
    work = models.pull(name)
    return Progress(models, _begun(work) if lines else work, lines=lines, headers=headers)


async def _begun(work: AsyncGenerator[JobEvent, None]) -> AsyncGenerator[JobEvent, None]:
    """Ollama's clients expect that a stream begins before the manifest is found missing."""
    first = JobStatus(text="pulling manifest")
    yield first
    async with aclosing(work) as events:
        async for event in events:
            if event != first:
                yield event


async def create(request: Request) -> Progress:
    asked = await parse_body(request, parse_create)
    headers = ignored_headers(server_of(request), asked.ignored)
    name = parse_name(asked.model)
    _check_may_make(request, name.spellings)
    catalogue = server_of(request).catalogue
    await catalogue.wait_ready()
    if asked.base:
        base = parse_name(asked.base)
        entry = catalogue.find(base)
        if not caller_of(request).may_use(entry.names if entry is not None else _names(request, base)):
            raise ModelNotFound(f"model '{asked.base}' not found, or not allowed with this key", param="from")
    creation = Creation(
        name=name,
        base=asked.base,
        files=asked.files,
        adapter=asked.adapters,
        overlay=Overlay(
            system=asked.system,
            template=asked.template,
            parameters=asked.parameters,
            messages=[Turn(role=role, content=content) for role, content in asked.messages],
            license=asked.license,
        ),
        quantization=Quantization(bits=asked.quantization[0], group_size=asked.quantization[1],
                                  mode=asked.quantization[2]) if asked.quantization else None,
    )  # fmt: skip
    models = _models(request)
    work = Creator(models).create(creation)
    try:
        with storage_faults():
            first = await anext(work)  # an error at the start becomes the status of the response
    except StopAsyncIteration:
        first = JobDone()
    return Progress(models, _after(first, work), lines=asked.stream, headers=headers)


async def _after(first: JobEvent, work: AsyncGenerator[JobEvent, None]) -> AsyncGenerator[JobEvent, None]:
    async with aclosing(work) as events:
        yield first
        async for event in events:
            yield event


async def copy(request: Request) -> Response:
    source, destination, ignored = await parse_body(request, parse_copy)
    headers = ignored_headers(server_of(request), ignored)
    _name(source, f'source "{source}" is invalid')
    target = _name(destination, f'destination "{destination}" is invalid')
    _check_may_make(request, target.spellings)
    models = _models(request)
    try:
        entry = await server_of(request).resolve(source, caller_of(request), by_operator=True)  # it loads nothing
    except ModelNotFound:
        raise ModelNotFound(f'model "{source}" not found', param="source") from None
    with storage_faults():
        await models.copy(entry, target)
    return Response(status_code=200, headers=headers)


async def delete(request: Request) -> Response:
    asked, force, ignored = await parse_body(request, parse_delete)
    headers = ignored_headers(server_of(request), ignored)
    name = _name(asked, f'name "{asked}" is invalid')
    models, server = _models(request), server_of(request)
    await server.catalogue.wait_ready()
    entry = server.catalogue.find_exactly(name)
    if entry is None or not caller_of(request).may_use(entry.names):
        raise ModelNotFound(f"model '{asked}' not found", param="model")
    with storage_faults():
        freed = await Remover(models).remove(entry, force=force)
    if all(other.runner != entry.runner for other in server.catalogue.entries()):
        server.supervisor.unload(entry.runner, "deleted")
    return Response(status_code=200, headers={**headers, "x-freed-bytes": str(freed)})


def _name(text: str, complaint: str) -> ModelName:
    try:
        return parse_name(text)
    except InvalidRequest:
        raise InvalidRequest(complaint) from None


async def push(request: Request) -> Response:
    asked, ignored = await parse_body(request, parse_push)
    refuse_ignored(server_of(request), ignored)
    parse_name(asked)
    raise UnsupportedCapability(
        "this server does not push models: `hf upload` puts a folder on the Hugging Face hub", param="model"
    )


async def probe_blob(request: Request) -> Response:
    path = _models(request).store.blob_path(request.path_params["digest"])
    there = await asyncio.to_thread(path.is_file)
    return Response(status_code=200 if there else 404)


async def put_blob(request: Request) -> Response:
    """The bytes of one file, whose hash is its name."""
    digest = request.path_params["digest"]
    store = _models(request).store
    with storage_faults():
        await asyncio.to_thread(store.make_folders)
        return await _put_blob(request, store, digest)


async def _put_blob(request: Request, store: Store, digest: str) -> Response:
    path = store.blob_path(digest)
    if await asyncio.to_thread(path.is_file):
        return Response(status_code=200)
    announced = request.headers.get("content-length", "")
    room = await asyncio.to_thread(store.free_bytes) - _RESERVE_BYTES
    if announced.isdigit() and int(announced) > room:
        raise InsufficientStorage(f"not enough disk space for {announced} bytes")
    upload = path.with_name(f".upload-{os.urandom(8).hex()}")
    try:
        found = await _receive(request, upload, room)
        if found != path.name.removeprefix("sha256-"):
            raise InvalidRequest(f'digest mismatch, expected "{digest}", got "sha256:{found}"')
        await asyncio.to_thread(upload.replace, path)
    finally:
        await asyncio.to_thread(upload.unlink, True)
    return Response(status_code=201)


async def _receive(request: Request, file: Path, room: int) -> str:
    """Write what comes; returns its SHA-256 in hex. Hashing and writing happen in a thread."""
    digest = hashlib.sha256()
    size = 0
    stream = await asyncio.to_thread(file.open, "wb")

    def take(data: bytes) -> None:
        digest.update(data)
        stream.write(data)

    try:
        pending = bytearray()
        async with aclosing(body_parts(request)) as parts:
            async for part in parts:
                size += len(part)
                if size > room:
                    raise InsufficientStorage("not enough disk space")
                pending += part
                if len(pending) >= 2**20:
                    await asyncio.to_thread(take, bytes(pending))
                    pending.clear()
        await asyncio.to_thread(take, bytes(pending))
    finally:
        await asyncio.to_thread(stream.close)
    return digest.hexdigest()


def routes() -> list[BaseRoute]:
    return [
        Route("/api/pull", pull, methods=["POST"]),
        Route("/api/push", push, methods=["POST"]),
        Route("/api/create", create, methods=["POST"]),
        Route("/api/copy", copy, methods=["POST"]),
        Route("/api/delete", delete, methods=["DELETE"]),
        Route("/api/blobs/{digest}", probe_blob, methods=["HEAD"]),
        Route("/api/blobs/{digest}", put_blob, methods=["POST"]),
    ]
