"""The canonical requests and the closed set of events that answer them.

The three HTTP dialects translate to and from these; the worker knows nothing else. JSON that belongs to somebody else
(tool schemas, tool arguments) travels as JSON text, so that the order of its keys and the width of its numbers stay
what they were. ``None`` always means "not said by the client".
"""

from __future__ import annotations

from enum import StrEnum

from msgspec import Struct, field

from mlx_router_shared.errors import ContextLengthExceeded, EngineFailed, MlxRouterError, error_from_code

__all__ = [
    "ContextTokens",
    "CountRequest",
    "Counted",
    "EmbeddingRequest",
    "Event",
    "Failure",
    "Finish",
    "FinishReason",
    "GenerationRequest",
    "Logprobs",
    "Message",
    "PromptEcho",
    "ReasoningDelta",
    "Request",
    "RerankRequest",
    "Role",
    "Sampling",
    "Scores",
    "Started",
    "StreamEvents",
    "TextDelta",
    "TokenLogprob",
    "Tool",
    "ToolCall",
    "ToolCallArguments",
    "ToolCallDone",
    "ToolCallStarted",
    "Usage",
    "Vectors",
    "error_of",
    "failure_of",
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
    images: list[bytes] = field(default_factory=list)
    """Files as they came (PNG, JPEG, WebP, GIF), shown before the text."""
    reasoning: str | None = None
    tool_calls: list[ToolCall] = field(default_factory=list)
    tool_call_id: str | None = None
    tool_name: str | None = None


class Tool(Struct, frozen=True, kw_only=True):
    """A function that the model may call; ``parameters`` is the text of a JSON schema."""

    name: str
    description: str = ""
    parameters: str = '{"type":"object","properties":{}}'
    strict: bool = False
    """Its arguments have to satisfy the schema, also where the model would stray from it."""


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


class GenerationRequest(Struct, frozen=True, kw_only=True, tag="generate"):
    """What a worker needs to answer: either ``messages`` (chat) or ``prompt`` (text as it is).

    ``sampling`` holds what the client said, ``sampling_defaults`` what its API promises when nobody says anything;
    the model's own generation_config stands between the two. ``max_tokens`` and ``context_tokens`` are upper bounds;
    without them the model's context is the bound.
    """

    messages: list[Message] = field(default_factory=list)
    continue_final: bool = False
    """The last message is the assistant's and is continued, instead of answered."""
    prompt: str | None = None
    prompt_tokens: list[int] = field(default_factory=list)
    """The prompt as token ids of this model; excludes ``prompt``."""
    suffix: str | None = None
    """What follows the hole that the answer fills; ``prompt`` is what precedes it."""
    prefix_tokens: list[int] = field(default_factory=list)
    """Token ids of an earlier exchange, put before a chat's prompt."""
    tools: list[Tool] = field(default_factory=list)
    forced_tools: list[str] = field(default_factory=list)
    """Exactly one of these has to be called, and nothing else may be said; empty: as the model likes."""
    max_tool_calls: int | None = None
    """The answer ends after so many calls."""
    incremental_tools: bool = False
    """Tell calls while they are written, where the model's format allows it."""
    thinking: bool | None = None
    thinking_effort: str | None = None
    max_thinking_tokens: int | None = None
    """Thinking that goes on for longer is ended."""
    template_arguments: str = ""
    """The text of a JSON object whose members the chat template gets, beside those that the server sets."""
    schema: str | None = None
    """The text of a JSON schema that the answer, not the thinking before it, has to satisfy."""
    sampling: Sampling = field(default_factory=Sampling)
    sampling_defaults: Sampling = field(default_factory=Sampling)
    max_tokens: int | None = None
    context_tokens: int | None = None
    stop: list[str] = field(default_factory=list)
    truncate: bool = False
    """Drop the oldest turns that are not system turns until the prompt fits, instead of refusing."""
    top_logprobs: int | None = None
    """None: no log probabilities; n >= 0: those of the tokens drawn and of the n best."""
    echo: bool = False
    """Begin with the prompt, and with its log probabilities if those are wanted."""
    priority: int = 0
    """Prompts of a higher one are processed first."""
    cache_prompt: bool = True
    """Whether the state of prompt and answer may be kept for requests that begin alike, and such a state be used."""
    cache_scope: str = ""
    """Only requests with the same scope share kept states."""
    wants_context: bool = False
    """Tell all token ids at the end, so that they can be sent back as ``prefix_tokens``."""


class EmbeddingRequest(Struct, frozen=True, kw_only=True, tag="embed"):
    """Texts, or token ids of this model, to be turned into one vector each; one of the two lists is empty."""

    texts: list[str] = field(default_factory=list)
    tokens: list[list[int]] = field(default_factory=list)
    truncate: bool = True
    """Cut what is longer than the context, instead of refusing it."""
    dimensions: int | None = None
    """Keep so many of the first components and normalise again."""
    normalize: bool | None = None
    """Unit length or not; None: as the model's own files say."""


class RerankRequest(Struct, frozen=True, kw_only=True, tag="rerank"):
    """How well each document answers the query."""

    query: str
    documents: list[str]


class CountRequest(Struct, frozen=True, kw_only=True, tag="count"):
    """How many tokens the prompt of this request has, for a worker without weights; nothing is generated."""

    path: str
    """The model's folder."""
    request: GenerationRequest


Request = GenerationRequest | EmbeddingRequest | RerankRequest | CountRequest


class Started(Struct, frozen=True, kw_only=True, tag="started"):
    """The request was accepted and its prompt is about to be read; nothing can be refused from here on."""

    prompt_tokens: int
    dropped_messages: int = 0
    """Turns left out because the request allowed truncation."""
    unsupported: tuple[str, ...] = ()
    """Fields of the request, by their names here, that this model's chat template has no means to follow."""


class TextDelta(Struct, frozen=True, kw_only=True, tag="text"):
    """A piece of the answer; never cut inside a character."""

    text: str


class ReasoningDelta(Struct, frozen=True, kw_only=True, tag="reasoning"):
    """A piece of the thinking that precedes the answer."""

    text: str


class ToolCallStarted(Struct, frozen=True, kw_only=True, tag="tool_call_started"):
    """A call whose arguments are being written; only when ``incremental_tools`` was asked for."""

    index: int
    id: str
    name: str


class ToolCallArguments(Struct, frozen=True, kw_only=True, tag="tool_call_arguments"):
    """A piece of the JSON text of a started call's arguments."""

    index: int
    text: str


class ToolCallDone(Struct, frozen=True, kw_only=True, tag="tool_call"):
    """One whole call; ``arguments`` is the text of a JSON object, the pieces that were told before included."""

    index: int
    id: str
    name: str
    arguments: str


class TokenLogprob(Struct, frozen=True, kw_only=True):
    """A token with the natural logarithm of its probability; ``data`` is its UTF-8, maybe part of a character."""

    token: str
    data: bytes
    logprob: float | None
    """None for the first token of a prompt, which nothing predicts."""
    top: list[TokenLogprob] = field(default_factory=list)


class Logprobs(Struct, frozen=True, kw_only=True, tag="logprobs"):
    """Log probabilities of the tokens of the text that went before, in order."""

    tokens: list[TokenLogprob]


class PromptEcho(Struct, frozen=True, kw_only=True, tag="prompt_echo"):
    """The prompt as text, and its tokens if log probabilities were asked for."""

    text: str
    tokens: list[TokenLogprob] = field(default_factory=list)


class ContextTokens(Struct, frozen=True, kw_only=True, tag="context"):
    """All token ids of prompt and answer, once, before ``Finish``."""

    tokens: list[int]


class Vectors(Struct, frozen=True, kw_only=True, tag="vectors"):
    """Some of the vectors of an embedding request, in the order of its inputs, which come in order."""

    dimensions: int
    data: bytes
    """Little-endian float32, one vector after the other."""


class Scores(Struct, frozen=True, kw_only=True, tag="scores"):
    """The relevance of each document, in their order; larger is better."""

    scores: list[float]


class Counted(Struct, frozen=True, kw_only=True, tag="counted"):
    """The answer to a ``CountRequest``: the length of the prompt, and the prompt as the model would see it."""

    tokens: int
    text: str


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
    tokens: int = 0
    """With ``context_length_exceeded``: how long the prompt is, and how long it may be."""
    limit: int = 0


Event = (
    Started
    | TextDelta
    | ReasoningDelta
    | ToolCallStarted
    | ToolCallArguments
    | ToolCallDone
    | Logprobs
    | PromptEcho
    | ContextTokens
    | Vectors
    | Scores
    | Counted
    | Usage
    | Finish
    | Failure
)


def failure_of(error: MlxRouterError) -> Failure:
    """What crosses the wire of an error; ``error_of`` makes it one again."""
    return Failure(
        code=error.code, message=error.message, param=error.param,
        tokens=getattr(error, "tokens", 0), limit=getattr(error, "limit", 0),
    )  # fmt: skip


def error_of(failure: Failure) -> MlxRouterError:
    """The exception that a failure tells of; a code from a newer peer becomes ``EngineFailed``."""
    error = error_from_code(failure.code, failure.message)
    if type(error) is MlxRouterError:
        error = EngineFailed(failure.message)
    if isinstance(error, ContextLengthExceeded):
        error.tokens, error.limit = failure.tokens, failure.limit
    error.param = failure.param
    return error


class StreamEvents(Struct, frozen=True, kw_only=True):
    """What one engine step yielded for one request."""

    request_id: str
    events: list[Event]
