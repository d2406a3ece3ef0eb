"""What every dialect makes of a request, and what a renderer needs to know while it answers."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol

from mlx_router_shared.errors import MlxRouterError
from mlx_router_shared.generation import (
    Event,
    Finish,
    FinishReason,
    GenerationRequest,
    ReasoningDelta,
    Started,
    TextDelta,
    TokenLogprob,
    ToolCallDone,
    Usage,
)
from mlx_router_shared.generation import Logprobs as LogprobsEvent

__all__ = ["Call", "Moment", "Needs", "StreamRenderer", "Transcript"]


class Needs(StrEnum):
    """What a request needs a model to be able to do; the values are the catalogue's capabilities."""

    COMPLETION = "completion"
    TOOLS = "tools"
    THINKING = "thinking"


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """A request that was understood. Nothing of it has touched a model yet."""

    model: str
    """As the client wrote it; echoed in answers."""
    request: GenerationRequest
    stream: bool
    keep_alive_seconds: float | None = None
    needs: dict[Needs, str] = field(default_factory=dict)
    """With the sentence to refuse by, in which ``{name}`` and ``{full}`` are the name as sent and in full."""
    most_tool_calls: int | None = None
    include_usage: bool = False
    ignored: tuple[str, ...] = ()
    """Fields of the request that have no meaning here, for the log."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Moment:
    """The clock, handed in."""

    now: float
    """Wall clock, seconds since 1970."""
    total_seconds: float
    """Since the request came in."""
    load_seconds: float
    """Of these, until the model was ready for it."""


class StreamRenderer(Protocol):
    """Turns the events of one answer into the bytes of one stream."""

    media_type: str

    def start(self, moment: Moment) -> bytes:
        """What goes out before the first event; may be empty."""

    def keep_alive(self, moment: Moment) -> bytes:
        """A sign of life that clients of this API pass over."""

    def on(self, event: Event, moment: Moment) -> bytes:
        """One event; ``Finish`` gives the terminal frames, ``Failure`` never comes here."""

    def fail(self, error: MlxRouterError) -> bytes:
        """The API's visible error in mid-stream; nothing follows it."""


@dataclass(slots=True)
class Transcript:
    """All events of one answer put together."""

    text: str = ""
    reasoning: str = ""
    tool_calls: list[ToolCallDone] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    usage: Usage = field(default_factory=lambda: Usage(prompt_tokens=0, completion_tokens=0))
    finish: Finish = field(default_factory=lambda: Finish(reason=FinishReason.STOP))
    dropped_messages: int = 0

    def add(self, event: Event) -> None:
        match event:
            case TextDelta():
                self.text += event.text
            case ReasoningDelta():
                self.reasoning += event.text
            case ToolCallDone():
                self.tool_calls.append(event)
            case LogprobsEvent():
                self.logprobs += event.tokens
            case Usage():
                self.usage = event
            case Finish():
                self.finish = event
            case Started():
                self.dropped_messages = event.dropped_messages
            case _:
                pass  # a failure ends the answer before it is put together
