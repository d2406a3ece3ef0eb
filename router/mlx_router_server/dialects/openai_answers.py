"""OpenAI's answers: SSE streams, whole objects, errors, and the list of models."""

from __future__ import annotations

from typing import Any, Final, Literal

import msgspec

from mlx_router_server.dialects.call import Moment, Transcript
from mlx_router_server.dialects.statuses import status_of
from mlx_router_shared.errors import ErrorCode, MlxRouterError
from mlx_router_shared.generation import (
    Event,
    Finish,
    FinishReason,
    Logprobs,
    ReasoningDelta,
    TextDelta,
    TokenLogprob,
    ToolCallDone,
    Usage,
)

__all__ = ["OpenAIStream", "error_body", "render_answer"]

Kind = Literal["chat", "completion"]

_FINGERPRINT: Final = "fp_mlx_router"
_OBJECTS: Final = {"chat": ("chat.completion", "chat.completion.chunk"), "completion": ("text_completion",) * 2}
_REASONS: Final = {
    FinishReason.STOP: "stop",
    FinishReason.LENGTH: "length",
    FinishReason.CONTEXT: "length",
    FinishReason.TOOL_CALLS: "tool_calls",
}
_TYPES: Final = {400: "invalid_request_error", 404: "not_found_error"}
_CODES: Final = {
    ErrorCode.INVALID_REQUEST: "invalid_value",
    ErrorCode.UNSUPPORTED_CAPABILITY: "unsupported_parameter",
    ErrorCode.OVERLOADED: "server_is_overloaded",
}


def error_body(error: MlxRouterError) -> dict[str, Any]:
    """The object under ``error`` that SDKs read message, type, param and code from."""
    return {
        "error": {
            "message": error.message,
            "type": _TYPES.get(status_of(error), "api_error"),
            "param": error.param,
            "code": _CODES.get(error.code, error.code.value),
        }
    }


def render_answer(kind: Kind, answer_id: str, model: str, transcript: Transcript, moment: Moment) -> dict[str, Any]:
    """The answer of a request that was not streamed."""
    choice: dict[str, Any] = {"index": 0, "logprobs": None, "finish_reason": _REASONS[transcript.finish.reason]}
    if kind == "chat":
        message: dict[str, Any] = {"role": "assistant", "content": transcript.text, "refusal": None}
        if transcript.reasoning:
            message["reasoning_content"] = message["reasoning"] = transcript.reasoning
        if transcript.tool_calls:
            message["content"] = transcript.text or None
            message["tool_calls"] = [_call(call) for call in transcript.tool_calls]
        choice["message"] = message
    else:
        choice["text"] = transcript.text
    if transcript.logprobs:
        choice["logprobs"] = {"content": [_logprob(token) for token in transcript.logprobs], "refusal": None}
    return {
        "id": answer_id,
        "object": _OBJECTS[kind][0],
        "created": int(moment.now),
        "model": model,
        "system_fingerprint": _FINGERPRINT,
        "choices": [choice],
        "usage": _usage(transcript.usage),
    }


class OpenAIStream:
    """Server-sent events: a role chunk, deltas, one chunk with the reason, usage if asked for, ``[DONE]``."""

    media_type = "text/event-stream; charset=utf-8"

    def __init__(self, kind: Kind, answer_id: str, model: str, *, include_usage: bool) -> None:
        self._kind: Kind = kind
        self._id = answer_id
        self._model = model
        self._include_usage = include_usage
        self._created = 0
        self._usage = Usage(prompt_tokens=0, completion_tokens=0)

    def start(self, moment: Moment) -> bytes:
        self._created = int(moment.now)
        return self._chunk({"role": "assistant", "content": ""}) if self._kind == "chat" else b""

    def keep_alive(self, moment: Moment) -> bytes:
        """A comment, which every reader of server-sent events passes over."""
        return b": waiting\n\n"

    def on(self, event: Event, moment: Moment) -> bytes:
        match event:
            case TextDelta():
                return self._chunk({"content": event.text}) if self._kind == "chat" else self._text(event.text)
            case ReasoningDelta():
                return self._chunk({"reasoning_content": event.text, "reasoning": event.text})
            case ToolCallDone():
                return self._chunk({"tool_calls": [_call(event)]})
            case Logprobs():
                content = {"content": [_logprob(token) for token in event.tokens], "refusal": None}
                return self._chunk({}, logprobs=content)
            case Usage():
                self._usage = event
            case Finish():
                reason = _REASONS[event.reason]
                last = self._chunk({}, reason=reason) if self._kind == "chat" else self._text("", reason)
                if self._include_usage:
                    last += self._frame([], usage=_usage(self._usage))
                return last + b"data: [DONE]\n\n"
            case _:
                pass  # Started has no frame here; a failure is given to fail()
        return b""

    def fail(self, error: MlxRouterError) -> bytes:
        return b"data: " + msgspec.json.encode(error_body(error)) + b"\n\n"

    def _chunk(self, delta: dict[str, Any], *, reason: str | None = None, logprobs: Any = None) -> bytes:
        return self._frame([{"index": 0, "delta": delta, "logprobs": logprobs, "finish_reason": reason}])

    def _text(self, text: str, reason: str | None = None) -> bytes:
        return self._frame([{"index": 0, "text": text, "logprobs": None, "finish_reason": reason}])

    def _frame(self, choices: list[dict[str, Any]], **more: Any) -> bytes:
        frame = {
            "id": self._id,
            "object": _OBJECTS[self._kind][1],
            "created": self._created,
            "model": self._model,
            "system_fingerprint": _FINGERPRINT,
            "choices": choices,
            **more,
        }
        return b"data: " + msgspec.json.encode(frame) + b"\n\n"


def _call(call: ToolCallDone) -> dict[str, Any]:
    function = {"name": call.name, "arguments": call.arguments}
    return {"index": call.index, "id": call.id, "type": "function", "function": function}


def _usage(usage: Usage) -> dict[str, Any]:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
        "completion_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
    }


def _logprob(token: TokenLogprob) -> dict[str, Any]:
    return {**_bare(token), "top_logprobs": [_bare(other) for other in token.top]}


def _bare(token: TokenLogprob) -> dict[str, Any]:
    return {"token": token.token, "logprob": token.logprob, "bytes": list(token.data)}
