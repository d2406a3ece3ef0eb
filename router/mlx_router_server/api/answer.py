"""The one path of every inference request: lease, generate, render, and give everything back.

An ASGI application of its own, so that acquiring and releasing happen inside one coroutine that the server awaits:
there is no moment between a lease and the code that returns it. The client is watched all along; when it leaves, the
wait ends, the worker is told to stop, and the lease is back.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Final

import msgspec
from starlette.requests import Request
from starlette.types import Receive, Scope, Send

from mlx_router_server.api.disconnect import ClientLeft, unless_client_leaves
from mlx_router_server.api.download import Download, allowed_download
from mlx_router_server.api.errors import error_response
from mlx_router_server.api.figures import AnswerFigures
from mlx_router_server.api.heartbeat import Heartbeat, beating
from mlx_router_server.api.meter import note_model
from mlx_router_server.api.overlay import apply_overlay
from mlx_router_server.api.server import Server, caller_of, server_of
from mlx_router_server.api.wishes import read_wishes
from mlx_router_server.catalogue.entry import ModelEntry
from mlx_router_server.dialects.call import Call, Moment, StreamRenderer, Transcript
from mlx_router_server.dialects.fields import shown_in_header
from mlx_router_server.dialects.statuses import for_the_public
from mlx_router_server.workers.handle import WorkerLeft
from mlx_router_server.workers.lease import Lease
from mlx_router_server.workers.plan import LoadPlan, Wishes
from mlx_router_shared.errors import InvalidRequest, MlxRouterError, ModelNotFound
from mlx_router_shared.generation import Event, Failure, Finish, GenerationRequest, Started, error_of
from mlx_router_shared.generation import Request as CanonicalRequest

__all__ = ["Answer", "AnswerStyle", "admit", "answer", "ignored_headers", "load_only", "refuse_ignored"]

log = logging.getLogger(__name__)

_MOST_DISPATCHES: Final = 3
_LARGE_BYTES: Final = 256 * 2**10  # of vectors; writing more than that as text takes milliseconds


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerStyle:
    """How one API answers one request."""

    whole: Callable[[list[Transcript], Moment], dict[str, Any]]
    stream: Callable[[], StreamRenderer] | None = None
    """None: it is never streamed."""
    whole_media_type: str = "application/json"
    on_end: Callable[[list[Transcript]], None] | None = None
    """Called once everything is known, before the client is told of the end."""
    thinking: str = "reasoning_effort"
    """This API's field that turns thinking on or off; empty if the request does not have it."""
    effort: str = "reasoning_effort"
    """This API's field for the effort of thinking."""


async def load_only(server: Server, plan: LoadPlan, wishes: Wishes) -> float:
    """Have a model loaded and use it for nothing. Returns the seconds that took."""
    async with server.door.acquire(plan, wishes) as lease:
        return lease.waited_seconds


async def admit(request: Request, call: Call) -> tuple[ModelEntry, Call]:
    """The model that a call is for, if it may be asked that, and the call as that model has it. Raises before a model
    is touched."""
    server = server_of(request)
    refuse_ignored(server, call.ignored)
    if not call.model.strip() and not server.settings.default_model:
        raise InvalidRequest("model is required", param="model")
    entry = await server.resolve(call.model, caller_of(request))
    server.check_capabilities(entry, call.model, call.needs)
    return entry, apply_overlay(call, entry.overlay)


def refuse_ignored(server: Server, ignored: tuple[str, ...]) -> None:
    """Raise ``InvalidRequest`` for fields that change nothing, where the operator wants that."""
    if server.settings.strict and ignored:
        names = ", ".join(ignored)
        raise InvalidRequest(f"this server ignores {names}, and its operator wants that refused", param=ignored[0])


def ignored_headers(server: Server, ignored: tuple[str, ...]) -> dict[str, str]:
    """Return the header ``X-Ignored-Fields``; raise ``InvalidRequest`` if ``strict`` is set."""
    refuse_ignored(server, ignored)
    return {"x-ignored-fields": shown_in_header(ignored)} if ignored else {}


async def answer(request: Request, call: Call, style: AnswerStyle) -> Answer:
    """What every inference handler returns."""
    server = server_of(request)
    wishes = read_wishes(request, call.keep_alive_seconds)
    try:
        entry, admitted = await admit(request, call)
    except ModelNotFound:
        absent = allowed_download(server, call.model, caller_of(request))
        if absent is None:
            raise
        return Answer(server, call, wishes, style, Download(server, absent, lambda: admit(request, call)))
    plan = server.plan(entry)
    note_model(request.scope, plan.spec.name)
    return Answer(server, admitted, wishes, style, plan)


class Answer:
    """The response to one call; the clock starts when it is made."""

    def __init__(
        self, server: Server, call: Call, wishes: Wishes, style: AnswerStyle, plan: LoadPlan | Download
    ) -> None:
        self._server = server
        self._planned = plan
        self._call = call
        self._wishes = wishes
        self._style = style
        self._received = time.monotonic()
        self._loaded = self._received
        self._begun = False
        self._unsupported: tuple[str, ...] = ()
        self._has_output = False
        """Whether the client has been sent something that came from a worker's computation."""
        self._started: set[int] = set()
        """Choices whose ``Started`` a stream has rendered; after another dispatch it comes again."""
        self._heartbeat = Heartbeat()
        self._figures = AnswerFigures()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await unless_client_leaves(receive, self._answer(scope, receive, send))
        except ClientLeft:
            pass  # said in the log already; there is nobody else to tell

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        request_id = scope.get("state", {}).get("request_id", "")
        renderer = self._style.stream() if self._call.stream and self._style.stream is not None else None
        if self._call.ignored:
            log.info("event=ignored_fields request=%s names=%r", request_id, shown_in_header(self._call.ignored))
        outcome = "internal"  # unless something better is known: an exception that nobody expected is a defect
        happenings = self._server.supervisor.happenings
        happenings.tell("request", request=request_id, model=self._name, stream=self._call.stream)
        try:
            if renderer is None:
                await self._with_lease(request_id, lambda lease: self._send_whole(lease, send))
            else:
                await self._send_stream(renderer, request_id, send)
            outcome = "ok"
        except asyncio.CancelledError:
            outcome = "client_left"
            raise
        except MlxRouterError as error:
            outcome = error.code.value
            if renderer is not None and self._begun:
                data = renderer.fail(for_the_public(error))
                await send({"type": "http.response.body", "body": data, "more_body": False})
            else:
                await error_response(scope, error)(scope, receive, send)
        except Exception:
            if renderer is None or not self._begun:
                raise
            log.exception("event=internal_error request=%s", request_id)
            data = renderer.fail(for_the_public(MlxRouterError("internal server error")))
            await send({"type": "http.response.body", "body": data, "more_body": False})
        finally:
            log.info(
                "event=request request=%s model=%r stream=%s outcome=%s seconds=%.3f load_seconds=%.3f",
                request_id,
                self._name,
                self._call.stream,
                outcome,
                self._seconds(),
                self._loaded - self._received,
            )
            happenings.tell(
                "request_ended", request=request_id, model=self._name, known=isinstance(self._planned, LoadPlan),
                outcome=outcome, seconds=round(self._seconds(), 3),
                load_seconds=round(self._loaded - self._received, 3), **self._figures.as_dict(self._received),
            )  # fmt: skip

    async def _with_lease(self, label: str, use: Callable[[Lease], Awaitable[None]]) -> None:
        """Use a lease; once more with a fresh one if the worker stopped before anything was sent to the client."""
        plan = await self._plan()
        for dispatch in range(1, _MOST_DISPATCHES + 1):
            try:
                async with self._server.door.acquire(plan, self._wishes, label=label) as lease:
                    self._begin_lease(lease)
                    await use(lease)
                break
            except WorkerLeft:
                if self._has_output or dispatch == _MOST_DISPATCHES:
                    raise
            log.info("event=dispatched_again request=%s model=%r", label, self._name)

    def _begin_lease(self, lease: Lease) -> None:
        self._loaded = time.monotonic()
        self._figures = AnswerFigures(waited_seconds=lease.waited_seconds)

    @property
    def _name(self) -> str:
        return self._planned.spec.name if isinstance(self._planned, LoadPlan) else self._call.model

    async def _plan(self) -> LoadPlan:
        """How the model is loaded; an absent one is fetched first, and only then it is known what it can be asked."""
        if isinstance(self._planned, Download):
            entry, self._call = await self._planned.run(self._wishes.deadline_seconds)
            self._planned = self._server.plan(entry)
        return self._planned

    async def _send_whole(self, lease: Lease, send: Send) -> None:
        transcripts = [Transcript() for _ in self._call.requests]
        async with aclosing(self._events(lease)) as batches:
            async for choice, events in batches:
                self._note_unsupported(events)
                for event in events:
                    transcripts[choice].add(event)
        if sum(len(vector) for transcript in transcripts for vector in transcript.vectors) > _LARGE_BYTES:
            whole = await asyncio.to_thread(self._style.whole, transcripts, self._moment())
        else:
            whole = self._style.whole(transcripts, self._moment())
        body = msgspec.json.encode(whole)
        if self._style.on_end is not None:
            self._style.on_end(transcripts)
        headers = [(b"content-length", str(len(body)).encode())]
        await send(self._head(self._style.whole_media_type, headers))
        await send({"type": "http.response.body", "body": body, "more_body": False})

    async def _send_stream(self, renderer: StreamRenderer, request_id: str, send: Send) -> None:
        """The wait for the model is part of the stream: it may need signs of life."""

        async def beat() -> None:
            moment = self._moment()
            await self._begin(renderer, moment, send)
            note = self._planned.note if isinstance(self._planned, Download) else ""
            await self._send_part(renderer.keep_alive(moment, note), moment, send)

        transcripts = [Transcript() for _ in self._call.requests]

        async def use(lease: Lease) -> None:
            async with aclosing(self._events(lease)) as batches:
                async for choice, events in batches:
                    self._note_unsupported(events)
                    if isinstance(events[0], Started):
                        if choice in self._started:
                            events = events[1:]
                        self._started.add(choice)
                    if not events:
                        continue
                    self._has_output |= any(not isinstance(event, Started) for event in events)
                    moment = self._moment()
                    await self._begin(renderer, moment, send)
                    data = b"".join(renderer.on(event, moment, choice) for event in events)
                    if self._style.on_end is not None:
                        for event in events:
                            transcripts[choice].add(event)
                        if isinstance(events[-1], Finish):
                            self._style.on_end(transcripts)
                    await self._send_part(data, moment, send)

        async with beating(self._heartbeat, self._server.settings.heartbeat_seconds, beat):
            await self._with_lease(request_id, use)
        await send({"type": "http.response.body", "body": renderer.end(self._moment()), "more_body": False})

    async def _begin(self, renderer: StreamRenderer, moment: Moment, send: Send) -> None:
        """The status line and what the API sends before the first event, once."""
        if self._begun:
            return
        self._begun = True
        first = renderer.start(moment)
        await send(self._head(renderer.media_type, [(b"cache-control", b"no-cache")]))
        await self._send_part(first, moment, send)

    def _note_unsupported(self, events: list[Event]) -> None:
        """Fields that the worker could not follow are named in the header, if that is not sent yet."""
        names = {"thinking": self._style.thinking, "thinking_effort": self._style.effort}
        for event in events:
            if isinstance(event, Started) and event.unsupported:
                self._unsupported = tuple(dict.fromkeys(names[name] for name in event.unsupported if names[name]))

    def _head(self, media_type: str, headers: list[tuple[bytes, bytes]]) -> dict[str, Any]:
        if ignored := (*self._call.ignored, *self._unsupported):
            headers = [*headers, (b"x-ignored-fields", shown_in_header(ignored).encode())]
        return {
            "type": "http.response.start",
            "status": 200,
            "headers": [(b"content-type", media_type.encode()), *headers],
        }

    async def _send_part(self, data: bytes, moment: Moment, send: Send) -> None:
        if data:
            self._heartbeat.sent(self._received + moment.total_seconds)
            await send({"type": "http.response.body", "body": data, "more_body": True})

    # ------------------------------------------------------------------- events

    async def _events(self, lease: Lease) -> AsyncGenerator[tuple[int, list[Event]], None]:
        """What the worker tells, with the number of the choice it is about."""
        if len(self._call.requests) > 1:
            async with aclosing(self._events_of_many(lease)) as batches:
                async for choice, events in batches:
                    self._figures.note(events)
                    yield choice, events
            return
        async with aclosing(self._events_of_one(lease, self._call.requests[0])) as single:
            async for events in single:
                self._figures.note(events)
                yield 0, events

    async def _events_of_one(self, lease: Lease, request: CanonicalRequest) -> AsyncGenerator[list[Event], None]:
        """A failure is raised after what came before it."""
        if isinstance(request, GenerationRequest):
            wishes = self._wishes
            request = msgspec.structs.replace(
                request, priority=wishes.priority, cache_scope=wishes.cache_scope, cache_prompt=wishes.cache_prompt
            )
        async with aclosing(lease.generate(request)) as batches:
            async for events in batches:
                failure = events[-1] if events and isinstance(events[-1], Failure) else None
                if failure is None:
                    yield events
                    continue
                if events[:-1]:
                    yield events[:-1]
                raise error_of(failure)

    async def _events_of_many(self, lease: Lease) -> AsyncGenerator[tuple[int, list[Event]], None]:
        """Side by side in one batch of the worker; the first failure ends them all."""
        queue: asyncio.Queue[tuple[int, list[Event] | Exception | None]] = asyncio.Queue(len(self._call.requests))

        async def pump(choice: int, request: CanonicalRequest) -> None:
            try:
                async with aclosing(self._events_of_one(lease, request)) as batches:
                    async for events in batches:
                        await queue.put((choice, events))
            except Exception as error:
                await queue.put((choice, error))
            else:
                await queue.put((choice, None))

        pumps = [asyncio.create_task(pump(*item), name="choice") for item in enumerate(self._call.requests)]
        unfinished = len(pumps)
        try:
            while unfinished:
                choice, told = await queue.get()
                if isinstance(told, Exception):
                    raise told
                if told is None:
                    unfinished -= 1
                else:
                    yield choice, told
        finally:
            for task in pumps:
                task.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)

    def _seconds(self) -> float:
        return time.monotonic() - self._received

    def _moment(self) -> Moment:
        return Moment(now=time.time(), total_seconds=self._seconds(), load_seconds=self._loaded - self._received)
