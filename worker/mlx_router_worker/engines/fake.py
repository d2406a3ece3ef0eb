"""A scripted engine: the same worker process, with no mlx in it.

Shipped, because it makes every way in which a worker can go wrong available at will: to the project's tests, to demos
and to anyone who wants to see what their clients do then. The script is ``fake.json`` in the model's folder.
"""

from __future__ import annotations

import array
import hashlib
import os
import secrets
import signal
import sys
import time
from collections.abc import Callable
from itertools import takewhile
from pathlib import Path
from typing import Any

import msgspec

from mlx_router_shared.errors import ContextLengthExceeded, LoadFailed
from mlx_router_shared.generation import (
    Counted,
    CountRequest,
    EmbeddingRequest,
    Event,
    Finish,
    FinishReason,
    GenerationRequest,
    ReasoningDelta,
    Request,
    RerankRequest,
    Role,
    Scores,
    Started,
    StreamEvents,
    TextDelta,
    ToolCallDone,
    Usage,
    Vectors,
)
from mlx_router_shared.protocol import Load, ModelFacts, SetLimits
from mlx_router_worker.engine import EngineReading, Report

__all__ = ["FakeEngine", "FakeScript"]

_PAGE = 4096
_BLINK_SECONDS = 0.002


class FakeCall(msgspec.Struct, frozen=True, kw_only=True):
    """A tool call by script."""

    name: str
    arguments: dict[str, Any] = {}


class FakeScript(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the engine does. Points of time: ``load``, ``warm_up``, ``ready``, ``generate``, ``shutdown``."""

    load_seconds: float = 0.0
    burn: bool = False
    """Keep a core busy while loading."""
    memory_bytes: int = 0
    """Really allocated and touched, so that it is seen from outside and must come back."""
    tokens_per_second: float = 0.0
    """Of each stream; 0 is as fast as it goes."""
    prefill_seconds: float = 0.0
    """Between a request and its first token."""
    tokens: int = 16
    """Length of an answer, unless the request wants fewer."""
    context_tokens: int = 4096
    warm_up_seconds: float = 0.0
    fail_warm_up: str = ""
    """The reason that the warm-up raises."""
    fail_load: str = ""
    """The reason that a load fails with."""
    crash_at: str = ""
    exit_status: int = 9
    hang_at: str = ""
    """Stop doing anything, for ever; the socket thread goes on."""
    at_token: int = 3
    """Where in an answer ``generate`` is, counted from 1."""
    ignore_shutdown: bool = False
    ignore_term: bool = False
    """Together with ``ignore_shutdown`` only KILL ends the process."""
    garbage_at: str = ""
    """Send bytes that are no message."""
    text: str = ""
    """The answer; ``{result}`` in it is what a tool gave back. Empty: numbered words, ``tokens`` of them."""
    thinking: str = ""
    """What is thought before, where thinking is wanted."""
    calls: list[FakeCall] = []
    """Made, the first that is offered, unless the last message is a result already."""
    dimensions: int = 8
    """Of the vectors that an embedding gets; they depend on the text alone."""
    capabilities: list[str] = []
    """For the catalogue; empty: all."""


class _Stream:
    __slots__ = ("call", "due", "made", "pieces", "prompt_tokens", "request_id", "started", "wanted")

    def __init__(
        self, request_id: str, prompt_tokens: int, wanted: int, first_at: float, pieces: list[Event], call: bool
    ) -> None:
        self.request_id = request_id
        self.pieces = pieces
        """What the answer is made of, if not of numbered words."""
        self.call = call
        self.prompt_tokens = prompt_tokens
        self.wanted = wanted
        self.made = 0
        self.started = time.monotonic()
        self.due = first_at


class FakeEngine:
    """Implements ``Engine``; the words of an answer are ``<model>-<n>``, so that a mix-up shows."""

    def __init__(self, send_bytes: Callable[[bytes], None]) -> None:
        self._send_bytes = send_bytes
        self._script = FakeScript()
        self._model = ""
        self._memory = bytearray()
        self._streams: dict[str, _Stream] = {}
        self._tokens_total = 0

    def load(self, load: Load, report: Report) -> ModelFacts:
        started = time.monotonic()
        try:
            text = (Path(load.path) / "fake.json").read_bytes()
            self._script = script = msgspec.json.decode(text, type=FakeScript)
        except (OSError, msgspec.DecodeError) as error:
            raise LoadFailed(f"the script of the fake engine cannot be read: {error}") from None
        self._model = load.model
        self._misbehave("load")
        if script.memory_bytes:
            self._memory = bytearray(script.memory_bytes)
            for at in range(0, script.memory_bytes, _PAGE):
                self._memory[at] = 1
        end = started + script.load_seconds
        while (now := time.monotonic()) < end:
            report("weights", 1 - (end - now) / script.load_seconds)
            if not script.burn:
                time.sleep(min(0.05, end - now))
        if script.fail_load:
            raise LoadFailed(script.fail_load)
        return ModelFacts(
            context_tokens=min(script.context_tokens, load.context_tokens or script.context_tokens),
            has_chat_template=True,
            has_thinking=False,
            has_tools=True,
            weights_bytes=script.memory_bytes,
            memory_bytes=script.memory_bytes,
            weights_seconds=time.monotonic() - started,
            warm_up_seconds=0.0,
        )

    def warm_up(self) -> None:
        time.sleep(self._script.warm_up_seconds)
        self._misbehave("warm_up")
        if self._script.fail_warm_up:
            raise RuntimeError(self._script.fail_warm_up)
        self._misbehave("ready")

    def set_limits(self, limits: SetLimits) -> None:
        print(
            f"fake engine: limits memory={limits.memory_limit_bytes} cache={limits.cache_limit_bytes} "
            f"wired={limits.wired_limit_bytes} trim={limits.trim}",
            file=sys.stderr, flush=True,
        )  # fmt: skip

    def prepare(self, request: Request) -> Request:
        return request

    def submit(self, request_id: str, request: Request) -> list[Event]:
        match request:
            case CountRequest():
                return [Counted(tokens=_words(request.request), text=""), Finish(reason=FinishReason.STOP)]
            case EmbeddingRequest():
                texts = request.texts + [str(tokens) for tokens in request.tokens]
                return [Started(prompt_tokens=len(texts)), *self._embed(texts)]
            case RerankRequest():
                wanted = set(request.query.split())
                scores = [float(len(wanted & set(text.split()))) for text in request.documents]
                usage = Usage(prompt_tokens=len(scores), completion_tokens=0)
                return [Scores(scores=scores), usage, Finish(reason=FinishReason.STOP)]
            case GenerationRequest():
                return self._generate(request_id, request)

    def _embed(self, texts: list[str]) -> list[Event]:
        data = b""
        for text in texts:
            digest = hashlib.shake_256(text.encode()).digest(self._script.dimensions)
            values = [byte - 127.5 for byte in digest]
            length = sum(value * value for value in values) ** 0.5
            data += array.array("f", [value / length for value in values]).tobytes()
        usage = Usage(prompt_tokens=len(texts), completion_tokens=0)
        return [Vectors(dimensions=self._script.dimensions, data=data), usage, Finish(reason=FinishReason.STOP)]

    def _generate(self, request_id: str, request: GenerationRequest) -> list[Event]:
        prompt_tokens = _words(request)
        limit = self._script.context_tokens
        if prompt_tokens >= limit:
            raise ContextLengthExceeded(
                f"input length ({prompt_tokens} tokens) exceeds the model's maximum context length ({limit} tokens)",
                tokens=prompt_tokens,
                limit=limit,
            )
        pieces = self._pieces(request)
        length = len(pieces) or self._script.tokens
        wanted = min(length, request.max_tokens or length, limit - prompt_tokens)
        call = any(isinstance(piece, ToolCallDone) for piece in pieces)
        first_at = time.monotonic() + self._script.prefill_seconds
        self._streams[request_id] = _Stream(request_id, prompt_tokens, wanted, first_at, pieces, call)
        return [Started(prompt_tokens=prompt_tokens)]

    def _pieces(self, request: GenerationRequest) -> list[Event]:
        script = self._script
        # Pictures of a result follow it in a turn of the user.
        latest = list(takewhile(lambda message: message.role is not Role.ASSISTANT, reversed(request.messages)))
        results = [message.content for message in latest if message.role is Role.TOOL]
        offered = request.forced_tools or [tool.name for tool in request.tools if not results]
        calls = [call for call in script.calls if call.name in offered]
        if request.forced_tools and not calls:
            calls = [FakeCall(name=request.forced_tools[0])]
        out: list[Event] = []
        if script.thinking and request.thinking is not False:
            out += [ReasoningDelta(text=word + " ") for word in script.thinking.split()]
        if calls:
            call_id = "call_" + secrets.token_hex(12)
            arguments = msgspec.json.encode(calls[0].arguments).decode()
            return [*out, ToolCallDone(index=0, id=call_id, name=calls[0].name, arguments=arguments)]
        if script.text:
            text = script.text.replace("{result}", results[0] if results else "")
            return out + [TextDelta(text=part) for part in text.replace(" ", " \0").split("\0")]
        return out

    def cancel(self, request_id: str) -> None:
        self._streams.pop(request_id, None)

    @property
    def streams(self) -> int:
        return len(self._streams)

    def step(self) -> list[StreamEvents]:
        now = time.monotonic()
        soonest = min(stream.due for stream in self._streams.values())
        if soonest > now:
            time.sleep(min(soonest - now, _BLINK_SECONDS))  # short, so that a cancel is taken soon
            return []
        out = []
        for stream in [s for s in self._streams.values() if s.due <= now]:
            stream.made += 1
            self._tokens_total += 1
            if stream.made == self._script.at_token:
                self._misbehave("generate")
            if self._script.tokens_per_second:
                stream.due += 1 / self._script.tokens_per_second
            word = TextDelta(text=f"{self._model}-{stream.made} ")
            events: list[Event] = [stream.pieces[stream.made - 1] if stream.pieces else word]
            if stream.made >= stream.wanted:
                del self._streams[stream.request_id]
                whole = stream.wanted == (len(stream.pieces) or self._script.tokens)
                reason = FinishReason.TOOL_CALLS if stream.call else FinishReason.STOP
                reason = reason if whole else FinishReason.LENGTH
                events += [
                    Usage(
                        prompt_tokens=stream.prompt_tokens,
                        completion_tokens=stream.made,
                        prefill_seconds=0.0,
                        decode_seconds=now - stream.started,
                    ),
                    Finish(reason=reason),
                ]
            out.append(StreamEvents(request_id=stream.request_id, events=events))
        return out

    def rest(self) -> None:
        pass

    def reading(self) -> EngineReading:
        size = len(self._memory)
        return EngineReading(memory_bytes=size, peak_bytes=size, tokens_total=self._tokens_total)

    def close(self) -> None:
        self._misbehave("shutdown")
        if self._script.ignore_shutdown and self._script.ignore_term:
            os.kill(os.getpid(), signal.SIGSTOP)  # deaf to everything but KILL
        while self._script.ignore_shutdown:
            time.sleep(3600)
        self._memory = bytearray()

    def _misbehave(self, point: str) -> None:
        if self._script.garbage_at == point:
            self._send_bytes(b"\xc1this is not a message")
        if self._script.crash_at == point:
            print(f"fake engine: crashing at {point}, as its script says", file=sys.stderr, flush=True)
            os._exit(self._script.exit_status)
        while self._script.hang_at == point:
            time.sleep(3600)


def _words(request: GenerationRequest) -> int:
    """Its length, in the tokens of a model whose tokens are words."""
    words = sum(len(message.content.split()) for message in request.messages)
    return words + len((request.prompt or "").split()) + len(request.prompt_tokens) or 1
