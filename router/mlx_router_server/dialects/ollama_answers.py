"""Ollama's answers: NDJSON streams, whole objects, errors, and the shapes of the model lists."""

from __future__ import annotations

import json
import math
from datetime import UTC, datetime
from typing import Any, Final, Literal

from mlx_router_server.dialects.body import ndjson_line
from mlx_router_server.dialects.call import Moment, Transcript
from mlx_router_server.dialects.vectors import as_json
from mlx_router_shared.errors import MlxRouterError
from mlx_router_shared.generation import (
    ContextTokens,
    Event,
    Finish,
    FinishReason,
    Logprobs,
    ReasoningDelta,
    Started,
    TextDelta,
    TokenLogprob,
    ToolCallDone,
    Usage,
)

__all__ = [
    "OllamaStream",
    "embed_answer",
    "embeddings_answer",
    "error_body",
    "forever_from",
    "human_count",
    "load_answer",
    "local_time",
    "render_answer",
    "rendered_prompt",
    "utc_time",
]

Kind = Literal["chat", "generate"]

_FOR_EVER_SECONDS: Final = 292 * 365.25 * 86400  # what Ollama's clients know as "Forever"
_NANOSECONDS: Final = 1_000_000_000


def utc_time(seconds: float) -> str:
    """``created_at``: RFC 3339 in UTC, ending in Z."""
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")


def local_time(seconds: float) -> str:
    """``modified_at`` and ``expires_at``: RFC 3339 with the server's own offset."""
    return datetime.fromtimestamp(seconds, UTC).astimezone().isoformat(timespec="microseconds")


def forever_from(now: float) -> float:
    """A time so far away that clients print it as for ever."""
    return now + _FOR_EVER_SECONDS


def human_count(count: int) -> str:
    """``8.0B``, ``427K``: numbers of parameters as Ollama prints them."""
    for size, unit in ((10**12, "T"), (10**9, "B"), (10**6, "M"), (10**3, "K")):
        if count >= size:
            value = count / size
            return (
                f"{value:.1f}{unit}" if unit in "TB" else f"{value:.2f}{unit}" if value < 10 else f"{value:.0f}{unit}"
            )
    return str(count)


def error_body(error: MlxRouterError) -> dict[str, Any]:
    """Always one object with a string."""
    return {"error": error.message}


def load_answer(kind: Kind, model: str, now: float, reason: Literal["load", "unload"]) -> dict[str, Any]:
    """The answer to a request that only loads or unloads."""
    content: dict[str, Any] = {"message": {"role": "assistant", "content": ""}} if kind == "chat" else {"response": ""}
    return {"model": model, "created_at": utc_time(now), **content, "done": True, "done_reason": reason}


def rendered_prompt(kind: Kind, model: str, now: float, prompt: str, images: int) -> dict[str, Any]:
    """The answer to ``_debug_render_only``."""
    content: dict[str, Any] = {"message": {"role": "assistant", "content": ""}} if kind == "chat" else {"response": ""}
    debug: dict[str, Any] = {"rendered_template": prompt, **({"image_count": images} if images else {})}
    return {"model": model, "created_at": utc_time(now), **content, "done": False, "_debug_info": debug}


def embed_answer(model: str, transcript: Transcript | None, moment: Moment) -> dict[str, Any]:
    """The answer of /api/embed; None where there was nothing to embed."""
    answer: dict[str, Any] = {"model": model, "embeddings": [as_json(vector) for vector in _vectors(transcript)]}
    if transcript is not None:
        answer["total_duration"] = _nanoseconds(moment.total_seconds)
        answer["load_duration"] = _nanoseconds(moment.load_seconds)
        answer["prompt_eval_count"] = transcript.usage.prompt_tokens
    return answer


def embeddings_answer(transcript: Transcript | None) -> dict[str, Any]:
    """The answer of the older /api/embeddings."""
    vectors = _vectors(transcript)
    return {"embedding": as_json(vectors[0]) if vectors else []}


def _vectors(transcript: Transcript | None) -> list[bytes]:
    return transcript.vectors if transcript is not None else []


def render_answer(kind: Kind, model: str, transcript: Transcript, moment: Moment) -> dict[str, Any]:
    """The answer of a request that was not streamed."""
    answer = _object(kind, model, moment, transcript.text, transcript.reasoning, transcript.tool_calls)
    if transcript.logprobs:
        answer["logprobs"] = [_logprob(token) for token in transcript.logprobs]
    _end(answer, transcript.finish, transcript.usage, moment, transcript.dropped_messages, transcript.context)
    return answer


class OllamaStream:
    """One JSON object per line; the last has ``done`` true and the metrics."""

    media_type = "application/x-ndjson"

    def __init__(self, kind: Kind, model: str) -> None:
        self._kind: Kind = kind
        self._model = model
        self._usage = Usage(prompt_tokens=0, completion_tokens=0)
        self._dropped = 0
        self._context: list[int] | None = None

    def start(self, moment: Moment) -> bytes:
        return b""

    def keep_alive(self, moment: Moment, note: str = "") -> bytes:
        """A whole object without text: blank lines break Ollama's Python client."""
        line = _object(self._kind, self._model, moment, "", "", [])
        return self._line({**line, "status": note} if note else line)

    def on(self, event: Event, moment: Moment, choice: int = 0) -> bytes:
        match event:
            case TextDelta():
                return self._line(_object(self._kind, self._model, moment, event.text, "", []))
            case ReasoningDelta():
                return self._line(_object(self._kind, self._model, moment, "", event.text, []))
            case ToolCallDone():
                return self._line(_object(self._kind, self._model, moment, "", "", [event]))
            case Logprobs():
                answer = _object(self._kind, self._model, moment, "", "", [])
                return self._line({**answer, "logprobs": [_logprob(token) for token in event.tokens]})
            case Usage():
                self._usage = event
            case ContextTokens():
                self._context = event.tokens
            case Started():
                self._dropped = event.dropped_messages
            case Finish():
                answer = _object(self._kind, self._model, moment, "", "", [])
                _end(answer, event, self._usage, moment, self._dropped, self._context)
                return self._line(answer)
            case _:
                pass  # a failure is given to fail()
        return b""

    def end(self, moment: Moment) -> bytes:
        return b""  # the object with done true was it

    def fail(self, error: MlxRouterError) -> bytes:
        return self._line(error_body(error))

    @staticmethod
    def _line(answer: dict[str, Any]) -> bytes:
        return ndjson_line(answer)


def _object(
    kind: Kind, model: str, moment: Moment, text: str, thinking: str, calls: list[ToolCallDone]
) -> dict[str, Any]:
    answer: dict[str, Any] = {"model": model, "created_at": utc_time(moment.now)}
    if kind == "chat":
        message: dict[str, Any] = {"role": "assistant", "content": text}
        if thinking:
            message["thinking"] = thinking
        if calls:
            message["tool_calls"] = [_call(call) for call in calls]
        answer["message"] = message
    else:
        answer["response"] = text
        if thinking:
            answer["thinking"] = thinking
        if calls:
            answer["tool_calls"] = [_call(call) for call in calls]
    answer["done"] = False
    return answer


def _call(call: ToolCallDone) -> dict[str, Any]:
    function = {"index": call.index, "name": call.name, "arguments": json.loads(call.arguments)}
    return {"id": call.id, "function": function}


def _logprob(token: TokenLogprob) -> dict[str, Any]:
    entry: dict[str, Any] = {"token": token.token, "logprob": token.logprob, "bytes": list(token.data)}
    if token.top:
        entry["top_logprobs"] = [_logprob(other) for other in token.top]
    return entry


def _end(
    answer: dict[str, Any], finish: Finish, usage: Usage, moment: Moment, dropped: int, context: list[int] | None
) -> None:
    length = finish.reason in (FinishReason.LENGTH, FinishReason.CONTEXT)
    answer["done"] = True
    answer["done_reason"] = "length" if length else "stop"
    if context is not None:
        answer["context"] = context
    metrics = {
        "total_duration": _nanoseconds(moment.total_seconds),
        "load_duration": _nanoseconds(moment.load_seconds),
        "prompt_eval_count": usage.prompt_tokens,
        "prompt_eval_duration": _nanoseconds(usage.prefill_seconds),
        "eval_count": usage.completion_tokens,
        "eval_duration": _nanoseconds(usage.decode_seconds),
    }
    answer.update({name: value for name, value in metrics.items() if value})
    if dropped:
        answer["truncated_messages"] = dropped  # ours: truncation is not silent here


def _nanoseconds(seconds: float) -> int:
    return 0 if math.isnan(seconds) else int(seconds * _NANOSECONDS)
