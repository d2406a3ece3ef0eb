"""The canonical generation request and the closed set of events that answer it.

The three HTTP dialects translate to and from these; the worker knows nothing else. JSON that belongs to somebody else
(tool schemas, tool arguments) travels as JSON text, so that the order of its keys and the width of its numbers stay
what they were. ``None`` always means "not said by the client".
"""

from __future__ import annotations

from enum import StrEnum

from msgspec import Struct, field

__all__ = [
    "Event",
    "Failure",
    "Finish",
    "FinishReason",
    "GenerationRequest",
    "Message",
    "ReasoningDelta",
    "Role",
    "Sampling",
    "Started",
    "StreamEvents",
    "TextDelta",
    "TokenLogprob",
    "Logprobs",
    "Tool",
    "ToolCall",
    "ToolCallDelta",
    "Usage",
]


class Role(StrEnum):
    """Who speaks; templates know these four."""

    SYSTEM = "system"
    USER = "user"
    ASSISTANT = "assistant"
    TOOL = "tool"


class ToolCall(Struct, frozen=True, kw_only=True):
    """A call that the assistant made in an earlier turn; ``arguments`` is JSON text as it was written."""

    name: str
    arguments: str = "{}"
    id: str = ""


class Message(Struct, frozen=True, kw_only=True):
    """One turn of a conversation."""

    role: Role
    content: str = ""
    reasoning: str | None = None
    tool_calls: list[ToolCall] = field(default_factory=list)
    tool_call_id: str | None = None
    tool_name: str | None = None


class Tool(Struct, frozen=True, kw_only=True):
    """A function that the model may call; ``parameters`` is the text of a JSON schema."""

    name: str
    description: str = ""
    parameters: str = '{"type":"object","properties":{}}'


class Sampling(Struct, frozen=True, kw_only=True):
    """How the next token is drawn. Order: top_k, temperature, top_p, min_p, draw.

    ``temperature`` 0 is greedy; ``top_k`` 0 and ``top_p`` 1 are off; ``repeat_penalty`` 1 is off; the three penalties
    look at the last ``repeat_last_n`` tokens of prompt and answer (-1: all of the context, 0: off).
    """

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repeat_penalty: float | None = None
    repeat_last_n: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    seed: int | None = None
    logit_bias: dict[int, float] = field(default_factory=dict)


class GenerationRequest(Struct, frozen=True, kw_only=True):
    """What a worker needs to answer: either ``messages`` (chat) or ``prompt`` (text as it is).

    ``sampling`` holds what the client said, ``sampling_defaults`` what its API promises when nobody says anything;
    the model's own generation_config stands between the two. ``max_tokens`` and ``context_tokens`` are upper bounds;
    without them the model's context is the bound.
    """

    messages: list[Message] = field(default_factory=list)
    prompt: str | None = None
    prompt_tokens: list[int] = field(default_factory=list)
    """The prompt as token ids of this model; excludes ``prompt``."""
    tools: list[Tool] = field(default_factory=list)
    thinking: bool | None = None
    thinking_effort: str | None = None
    sampling: Sampling = field(default_factory=Sampling)
    sampling_defaults: Sampling = field(default_factory=Sampling)
    max_tokens: int | None = None
    context_tokens: int | None = None
    stop: list[str] = field(default_factory=list)
    truncate: bool = False
    """Drop the oldest turns that are not system turns until the prompt fits, instead of refusing."""
    top_logprobs: int | None = None
    """None: no log probabilities; n >= 0: those of the tokens drawn and of the n best."""


class Started(Struct, frozen=True, kw_only=True, tag="started"):
    """The request was accepted and its prompt is about to be read; nothing can be refused from here on."""

    prompt_tokens: int
    dropped_messages: int = 0
    """Turns left out because the request allowed truncation."""


class TextDelta(Struct, frozen=True, kw_only=True, tag="text"):
    """A piece of the answer; never cut inside a character."""

    text: str


class ReasoningDelta(Struct, frozen=True, kw_only=True, tag="reasoning"):
    """A piece of the thinking that precedes the answer."""

    text: str


class ToolCallDelta(Struct, frozen=True, kw_only=True, tag="tool_call"):
    """One whole call; ``arguments`` is the text of a JSON object."""

    index: int
    id: str
    name: str
    arguments: str


class TokenLogprob(Struct, frozen=True, kw_only=True):
    """A token with the natural logarithm of its probability; ``data`` is its UTF-8, maybe part of a character."""

    token: str
    data: bytes
    logprob: float
    top: list[TokenLogprob] = field(default_factory=list)


class Logprobs(Struct, frozen=True, kw_only=True, tag="logprobs"):
    """Log probabilities of the tokens of the text that went before, in order."""

    tokens: list[TokenLogprob]


class Usage(Struct, frozen=True, kw_only=True, tag="usage"):
    """Counts in tokens and times in seconds, once, right before ``Finish``."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0
    reasoning_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0


class FinishReason(StrEnum):
    """Why a generation ended."""

    STOP = "stop"
    """The model ended its turn, or a stop string was met."""
    LENGTH = "length"
    """The token budget of the request is used up."""
    CONTEXT = "context"
    """The context is full."""
    TOOL_CALLS = "tool_calls"
    """The turn ended with at least one tool call."""


class Finish(Struct, frozen=True, kw_only=True, tag="finish"):
    """The last event of a generation that went well."""

    reason: FinishReason
    stop_string: str | None = None


class Failure(Struct, frozen=True, kw_only=True, tag="failure"):
    """The last event of a generation that did not; ``code`` is an ``ErrorCode``."""

    code: str
    message: str
    param: str | None = None


Event = Started | TextDelta | ReasoningDelta | ToolCallDelta | Logprobs | Usage | Finish | Failure


class StreamEvents(Struct, frozen=True, kw_only=True):
    """What one engine step yielded for one request."""

    request_id: str
    events: list[Event]
