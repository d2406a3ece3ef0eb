"""What every dialect makes of a request, and what a renderer needs to know while it answers."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple, Protocol

from mlx_router_shared.errors import MlxRouterError
from mlx_router_shared.generation import (
    ContextTokens,
    Event,
    Finish,
    FinishReason,
    PromptEcho,
    ReasoningDelta,
    Request,
    Scores,
    Started,
    TextDelta,
    TokenLogprob,
    ToolCallDone,
    Usage,
    Vectors,
)
from mlx_router_shared.generation import Logprobs as LogprobsEvent

__all__ = ["Call", "Moment", "Need", "Needs", "StreamRenderer", "Transcript", "total_usage"]


class Needs(StrEnum):
    """What a request needs a model to be able to do; the values are the catalogue's capabilities."""

    COMPLETION = "completion"
    TOOLS = "tools"
    THINKING = "thinking"
    INSERT = "insert"
    VISION = "vision"
    EMBEDDING = "embedding"
    RERANK = "rerank"


class Need(NamedTuple):
    """How to refuse a model that cannot do it: a sentence in which ``{name}`` and ``{full}`` are the name as sent and
    in full, and the field at fault."""

    sentence: str
    param: str = "model"


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """A request that was understood. Nothing of it has touched a model yet."""

    model: str
    """As the client wrote it; echoed in answers."""
    requests: tuple[Request, ...]
    """One for each choice of the answer, in their order; nearly always one."""
    stream: bool = False
    keep_alive_seconds: float | None = None
    needs: dict[Needs, Need] = field(default_factory=dict)
    """The first that is missing is told."""
    choices_per_prompt: int = 1
    include_usage: bool = False
    ignored: tuple[str, ...] = ()
    """Fields of the request that change nothing here; told in a header, and refused where the operator is strict."""


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

    def keep_alive(self, moment: Moment, note: str = "") -> bytes:
        """A sign of life that clients of this API pass over; ``note`` is for people who look at the bytes."""

    def on(self, event: Event, moment: Moment, choice: int = 0) -> bytes:
        """One event of one choice; ``Finish`` ends that choice, ``Failure`` never comes here."""

    def end(self, moment: Moment) -> bytes:
        """What goes out once every choice has ended."""

    def fail(self, error: MlxRouterError) -> bytes:
        """The API's visible error in mid-stream; nothing follows it."""


@dataclass(slots=True)
class Transcript:
    """All events of one choice put together."""

    text: str = ""
    reasoning: str = ""
    tool_calls: list[ToolCallDone] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    echo: PromptEcho | None = None
    context: list[int] | None = None
    vectors: list[bytes] = field(default_factory=list)
    dimensions: int = 0
    scores: list[float] = field(default_factory=list)
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
            case PromptEcho():
                self.echo = event
            case ContextTokens():
                self.context = event.tokens
            case Vectors():
                self.dimensions = event.dimensions
                size = 4 * event.dimensions
                self.vectors += [event.data[at : at + size] for at in range(0, len(event.data), size)]
            case Scores():
                self.scores = event.scores
            case Usage():
                self.usage = event
            case Finish():
                self.finish = event
            case Started():
                self.dropped_messages = event.dropped_messages
            case _:
                pass  # a failure ends the answer before it is put together; pieces of calls come whole as well


def total_usage(usages: list[Usage], choices_per_prompt: int) -> Usage:
    """Of a whole request: each prompt counts once, however many answers it got, and so does what was kept of it."""
    return Usage(
        prompt_tokens=sum(usage.prompt_tokens for usage in usages) // max(choices_per_prompt, 1),
        completion_tokens=sum(usage.completion_tokens for usage in usages),
        cached_tokens=sum(usage.cached_tokens for usage in usages[:: max(choices_per_prompt, 1)]),
        reasoning_tokens=sum(usage.reasoning_tokens for usage in usages),
    )
