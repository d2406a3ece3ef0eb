"""The one path of every inference request: lease, generate, render, and give everything back.

An ASGI application of its own, so that acquiring and releasing happen inside one coroutine that the server awaits:
there is no moment between a lease and the code that returns it. The client is watched all along; when it leaves, the
wait ends, the worker is told to stop, and the lease is back.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import msgspec
from starlette.types import Receive, Scope, Send

from mlx_router_server.api.disconnect import ClientLeft, unless_client_leaves
from mlx_router_server.api.heartbeat import Heartbeat, beating
from mlx_router_server.api.server import Server
from mlx_router_server.dialects.call import Call, Moment, StreamRenderer, Transcript
from mlx_router_server.dialects.statuses import for_the_public, retry_after, status_of
from mlx_router_server.workers.lease import Lease
from mlx_router_server.workers.plan import LoadPlan, Wishes
from mlx_router_shared.errors import EngineFailed, MlxRouterError, error_from_code
from mlx_router_shared.generation import Event, Failure, ToolCallDone

__all__ = ["Answer", "AnswerStyle", "load_only"]

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerStyle:
    """How one API answers one request."""

    whole: Callable[[Transcript, Moment], dict[str, Any]]
    stream: Callable[[], StreamRenderer]
    error: Callable[[MlxRouterError], dict[str, Any]]
    whole_media_type: str = "application/json"


async def load_only(server: Server, plan: LoadPlan, wishes: Wishes) -> float:
    """Have a model loaded and use it for nothing. Returns the seconds that took."""
    async with server.door.acquire(plan, wishes) as lease:
        return lease.waited_seconds


class Answer:
    """The response to one call; the clock starts when it is made."""

    def __init__(self, server: Server, plan: LoadPlan, call: Call, wishes: Wishes, style: AnswerStyle) -> None:
        self._server = server
        self._plan = plan
        self._call = call
        self._wishes = wishes
        self._style = style
        self._received = time.monotonic()
        self._loaded = self._received
        self._begun = False
        self._heartbeat = Heartbeat()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request_id = scope.get("state", {}).get("request_id", "")
        try:
            await unless_client_leaves(receive, self._answer(send, request_id))
        except ClientLeft:
            pass  # said in the log already; there is nobody else to tell

    async def _answer(self, send: Send, request_id: str) -> None:
        renderer = self._style.stream() if self._call.stream else None
        if self._call.ignored:
            log.info("event=options_without_meaning request=%s names=%r", request_id, ",".join(self._call.ignored))
        outcome = "ok"
        happenings = self._server.supervisor.happenings
        happenings.tell("request", request=request_id, model=self._plan.spec.name, stream=self._call.stream)
        try:
            if renderer is None:
                async with self._server.door.acquire(self._plan, self._wishes, label=request_id) as lease:
                    self._loaded = time.monotonic()
                    await self._send_whole(lease, send)
            else:
                await self._send_stream(renderer, request_id, send)
        except asyncio.CancelledError:
            outcome = "client_left"
            raise
        except MlxRouterError as error:
            outcome = error.code.value
            await self._send_error(error, renderer, send)
        finally:
            log.info(
                "event=request request=%s model=%r stream=%s outcome=%s seconds=%.3f load_seconds=%.3f",
                request_id,
                self._plan.spec.name,
                self._call.stream,
                outcome,
                self._seconds(),
                self._loaded - self._received,
            )
            happenings.tell(
                "request_ended", request=request_id, model=self._plan.spec.name, outcome=outcome,
                seconds=round(self._seconds(), 3), load_seconds=round(self._loaded - self._received, 3),
            )  # fmt: skip

    async def _send_whole(self, lease: Lease, send: Send) -> None:
        transcript = Transcript()
        async with aclosing(self._events(lease)) as batches:
            async for events in batches:
                for event in events:
                    transcript.add(event)
        body = msgspec.json.encode(self._style.whole(transcript, self._moment()))
        await self._send_json(200, body, self._style.whole_media_type, {}, send)

    async def _send_stream(self, renderer: StreamRenderer, request_id: str, send: Send) -> None:
        """The wait for the model is part of the stream: it may need signs of life."""

        async def beat() -> None:
            moment = self._moment()
            await self._begin(renderer, moment, send)
            await self._send_part(renderer.keep_alive(moment), moment, send)

        async with (
            beating(self._heartbeat, self._server.settings.heartbeat_seconds, beat),
            self._server.door.acquire(self._plan, self._wishes, label=request_id) as lease,
        ):
            self._loaded = time.monotonic()
            async with aclosing(self._events(lease)) as batches:
                async for events in batches:
                    moment = self._moment()
                    await self._begin(renderer, moment, send)
                    data = b"".join(renderer.on(event, moment) for event in events)
                    await self._send_part(data, moment, send)
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _begin(self, renderer: StreamRenderer, moment: Moment, send: Send) -> None:
        """The status line and what the API sends before the first event, once."""
        if self._begun:
            return
        self._begun = True
        headers = [(b"content-type", renderer.media_type.encode()), (b"cache-control", b"no-cache")]
        first = renderer.start(moment)
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await self._send_part(first, moment, send)

    async def _send_part(self, data: bytes, moment: Moment, send: Send) -> None:
        if data:
            self._heartbeat.sent(self._received + moment.total_seconds)
            await send({"type": "http.response.body", "body": data, "more_body": True})

    async def _events(self, lease: Lease) -> AsyncGenerator[list[Event], None]:
        """The events of the worker; a failure is raised after what came before it."""
        most_calls = self._call.most_tool_calls
        async with aclosing(lease.generate(self._call.request)) as batches:
            async for batch in batches:
                events = batch
                if most_calls is not None:
                    events = [e for e in batch if not (isinstance(e, ToolCallDone) and e.index >= most_calls)]
                failure = events[-1] if events and isinstance(events[-1], Failure) else None
                if failure is None:
                    yield events
                    continue
                if events[:-1]:
                    yield events[:-1]
                error = error_from_code(failure.code, failure.message)
                if type(error) is MlxRouterError:
                    error = EngineFailed(failure.message)
                error.param = failure.param
                raise error

    async def _send_error(self, error: MlxRouterError, renderer: StreamRenderer | None, send: Send) -> None:
        error = for_the_public(error)
        if renderer is not None and self._begun:
            await send({"type": "http.response.body", "body": renderer.fail(error), "more_body": False})
            return
        wait = retry_after(error)
        headers = {"retry-after": str(wait)} if wait is not None else {}
        body = msgspec.json.encode(self._style.error(error))
        await self._send_json(status_of(error), body, "application/json", headers, send)

    @staticmethod
    async def _send_json(status: int, body: bytes, media_type: str, headers: dict[str, str], send: Send) -> None:
        fields = {"content-type": media_type, "content-length": str(len(body)), **headers}
        raw = [(name.encode(), value.encode()) for name, value in fields.items()]
        await send({"type": "http.response.start", "status": status, "headers": raw})
        await send({"type": "http.response.body", "body": body, "more_body": False})

    def _seconds(self) -> float:
        return time.monotonic() - self._received

    def _moment(self) -> Moment:
        return Moment(now=time.time(), total_seconds=self._seconds(), load_seconds=self._loaded - self._received)
