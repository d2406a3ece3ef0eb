"""Anthropic's answers: messages, their stream of blocks, errors, and the list of models."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any, Final

import msgspec

from mlx_router_server.dialects.call import Moment, Transcript
from mlx_router_server.dialects.statuses import status_of
from mlx_router_shared.errors import ContextLengthExceeded, MlxRouterError, Unavailable
from mlx_router_shared.generation import (
    Event,
    Finish,
    FinishReason,
    ReasoningDelta,
    Started,
    TextDelta,
    ToolCallArguments,
    ToolCallDone,
    ToolCallStarted,
    Usage,
)

__all__ = ["AnthropicStream", "error_body", "model_entry", "render_answer", "rfc3339", "status_of_error"]

_REASONS: Final = {
    FinishReason.STOP: "end_turn",
    FinishReason.LENGTH: "max_tokens",
    FinishReason.CONTEXT: "model_context_window_exceeded",
    FinishReason.TOOL_CALLS: "tool_use",
}
_TYPES: Final = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    409: "conflict_error",
    413: "request_too_large",
    429: "rate_limit_error",
    500: "api_error",
    503: "overloaded_error",
    504: "timeout_error",
    529: "overloaded_error",
}
_OVERLOADED: Final = 529
# Opaque to clients, which send it back; nothing of it is checked.
_SIGNATURE: Final = "bWx4LXJvdXRlcg=="


def status_of_error(error: MlxRouterError, status: int) -> int:
    """This API's own status for "not now"; every other error has the usual one."""
    return _OVERLOADED if isinstance(error, Unavailable) else status


def error_body(error: MlxRouterError, status: int, request_id: str) -> dict[str, Any]:
    """``type`` and ``message`` are what SDKs and Claude Code act on."""
    message = error.message
    if isinstance(error, ContextLengthExceeded) and error.limit:
        message = f"prompt is too long: {error.tokens} tokens > {error.limit} maximum"
    kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "api_error")
    return {"type": "error", "error": {"type": kind, "message": message}, "request_id": request_id}


def rfc3339(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


def model_entry(name: str, modified_at: float, context_tokens: int) -> dict[str, Any]:
    """One model of /v1/models, with the keys of OpenAI's shape beside those of this one."""
    return {
        "type": "model",
        "id": name,
        "display_name": name,
        "created_at": rfc3339(modified_at),
        "max_input_tokens": context_tokens,
        "max_tokens": context_tokens,
    }


def render_answer(answer_id: str, model: str, transcript: Transcript, *, show_thinking: bool) -> dict[str, Any]:
    """The answer of a request that was not streamed."""
    content: list[dict[str, Any]] = []
    if transcript.reasoning:
        thinking = transcript.reasoning if show_thinking else ""
        content.append({"type": "thinking", "thinking": thinking, "signature": _SIGNATURE})
    if transcript.text:
        content.append({"type": "text", "text": transcript.text})
    for call in transcript.tool_calls:
        arguments = json.loads(call.arguments)
        content.append({"type": "tool_use", "id": _call_id(call.id), "name": call.name, "input": arguments})
    reason, stop = _stop(transcript.finish)
    return {
        "id": answer_id,
        "type": "message",
        "role": "assistant",
        "model": model,
        "content": content,
        "stop_reason": reason,
        "stop_sequence": stop,
        "usage": _usage(transcript.usage),
    }


def _stop(finish: Finish) -> tuple[str, str | None]:
    if finish.stop_string is not None:
        return "stop_sequence", finish.stop_string
    return _REASONS[finish.reason], None


def _usage(usage: Usage) -> dict[str, Any]:
    return {
        "input_tokens": usage.prompt_tokens - usage.cached_tokens,
        "output_tokens": usage.completion_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.cached_tokens,
    }


def _call_id(call_id: str) -> str:
    return "toolu_" + call_id.removeprefix("call_")


class AnthropicStream:
    """``message_start``, block after block, ``message_delta``, ``message_stop``; every frame names its event."""

    media_type = "text/event-stream; charset=utf-8"

    def __init__(self, answer_id: str, model: str, *, show_thinking: bool) -> None:
        self._id = answer_id
        self._model = model
        self._show_thinking = show_thinking
        self._index = -1
        self._open = ""
        """The kind of the block that is open; empty between blocks."""
        self._usage = Usage(prompt_tokens=0, completion_tokens=0)

    def start(self, moment: Moment) -> bytes:
        return b""  # message_start tells the length of the prompt, which is known with the first event

    def keep_alive(self, moment: Moment, note: str = "") -> bytes:
        return (f": {note}\n\n".encode() if note else b"") + _frame("ping")

    def on(self, event: Event, moment: Moment, choice: int = 0) -> bytes:
        match event:
            case Started():
                return self._message_start(event.prompt_tokens)
            case TextDelta():
                opened = self._begin("text", {"type": "text", "text": ""})
                return opened + self._delta({"type": "text_delta", "text": event.text})
            case ReasoningDelta():
                opened = self._begin("thinking", {"type": "thinking", "thinking": "", "signature": ""})
                if not self._show_thinking:
                    return opened
                return opened + self._delta({"type": "thinking_delta", "thinking": event.text})
            case ToolCallStarted():
                return self._begin_call(event.id, event.name)
            case ToolCallArguments():
                return self._delta({"type": "input_json_delta", "partial_json": event.text})
            case ToolCallDone():
                return self._call(event)
            case Usage():
                self._usage = event
            case Finish():
                return self._close() + self._message_end(event)
            case _:
                pass  # this API has no log probabilities; a failure is given to fail()
        return b""

    def end(self, moment: Moment) -> bytes:
        return b""  # message_stop was it

    def fail(self, error: MlxRouterError) -> bytes:
        body = error_body(error, status_of_error(error, status_of(error)), "")
        return _frame("error", error=body["error"])

    def _message_start(self, prompt_tokens: int) -> bytes:
        message: dict[str, Any] = {
            "id": self._id,
            "type": "message",
            "role": "assistant",
            "model": self._model,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": _usage(Usage(prompt_tokens=prompt_tokens, completion_tokens=0)),
        }
        return _frame("message_start", message=message)

    def _begin(self, kind: str, block: dict[str, Any]) -> bytes:
        if self._open == kind:
            return b""
        closed = self._close()
        self._index += 1
        self._open = kind
        return closed + _frame("content_block_start", index=self._index, content_block=block)

    def _begin_call(self, call_id: str, name: str) -> bytes:
        closed = self._close()
        block = {"type": "tool_use", "id": _call_id(call_id), "name": name, "input": {}}
        return closed + self._begin("tool_use", block)

    def _call(self, call: ToolCallDone) -> bytes:
        if self._open == "tool_use":  # it was told while it was written
            return self._close()
        begun = self._begin_call(call.id, call.name)
        return begun + self._delta({"type": "input_json_delta", "partial_json": call.arguments}) + self._close()

    def _close(self) -> bytes:
        if not self._open:
            return b""
        signed = b""
        if self._open == "thinking":
            signed = self._delta({"type": "signature_delta", "signature": _SIGNATURE})
        self._open = ""
        return signed + _frame("content_block_stop", index=self._index)

    def _delta(self, delta: dict[str, Any]) -> bytes:
        return _frame("content_block_delta", index=self._index, delta=delta)

    def _message_end(self, finish: Finish) -> bytes:
        reason, stop = _stop(finish)
        delta = {"stop_reason": reason, "stop_sequence": stop}
        return _frame("message_delta", delta=delta, usage=_usage(self._usage)) + _frame("message_stop")


def _frame(kind: str, **fields: Any) -> bytes:
    return f"event: {kind}\ndata: ".encode() + msgspec.json.encode({"type": kind, **fields}) + b"\n\n"
