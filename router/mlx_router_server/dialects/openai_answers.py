"""OpenAI's answers: SSE streams, whole objects, embeddings, errors."""

from __future__ import annotations

import base64
from typing import Any, Final, Literal

import msgspec

from mlx_router_server.dialects.call import Moment, Transcript, total_usage
from mlx_router_server.dialects.statuses import status_of
from mlx_router_server.dialects.vectors import as_json
from mlx_router_shared.errors import ErrorCode, MlxRouterError
from mlx_router_shared.generation import (
    Event,
    Finish,
    FinishReason,
    Logprobs,
    PromptEcho,
    ReasoningDelta,
    TextDelta,
    TokenLogprob,
    ToolCallArguments,
    ToolCallDone,
    ToolCallStarted,
    Usage,
)

__all__ = ["OpenAIStream", "embeddings_answer", "error_body", "logprob_entry", "render_answer", "rerank_answer"]

Kind = Literal["chat", "completion"]

_FINGERPRINT: Final = "fp_mlx_router"
_OBJECTS: Final = {"chat": ("chat.completion", "chat.completion.chunk"), "completion": ("text_completion",) * 2}
_REASONS: Final = {
    FinishReason.STOP: "stop",
    FinishReason.LENGTH: "length",
    FinishReason.CONTEXT: "length",
    FinishReason.TOOL_CALLS: "tool_calls",
}
_TYPES: Final = {
    400: "invalid_request_error",
    401: "invalid_request_error",
    403: "permission_error",
    404: "not_found_error",
}
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


def render_answer(
    kind: Kind, answer_id: str, model: str, transcripts: list[Transcript], choices_per_prompt: int, moment: Moment
) -> dict[str, Any]:
    """The answer of a request that was not streamed, one choice for each transcript."""
    render = _chat_choice if kind == "chat" else _text_choice
    usage = total_usage([transcript.usage for transcript in transcripts], choices_per_prompt)
    return {
        "id": answer_id,
        "object": _OBJECTS[kind][0],
        "created": int(moment.now),
        "model": model,
        "system_fingerprint": _FINGERPRINT,
        "choices": [render(number, transcript) for number, transcript in enumerate(transcripts)],
        "usage": _usage(usage),
    }


def _chat_choice(number: int, transcript: Transcript) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": transcript.text, "refusal": None}
    if transcript.reasoning:
        message["reasoning_content"] = message["reasoning"] = transcript.reasoning
    if transcript.tool_calls:
        message["content"] = transcript.text or None
        message["tool_calls"] = [_call(call) for call in transcript.tool_calls]
    logprobs = None
    if transcript.logprobs:
        logprobs = {"content": [logprob_entry(token) for token in transcript.logprobs], "refusal": None}
    reason = _REASONS[transcript.finish.reason]
    return {"index": number, "message": message, "logprobs": logprobs, "finish_reason": reason}


def _text_choice(number: int, transcript: Transcript) -> dict[str, Any]:
    echo = transcript.echo
    tokens = [*(echo.tokens if echo is not None else []), *transcript.logprobs]
    return {
        "index": number,
        "text": (echo.text if echo is not None else "") + transcript.text,
        "logprobs": _legacy_logprobs(tokens, 0) if tokens else None,
        "finish_reason": _REASONS[transcript.finish.reason],
    }


def embeddings_answer(model: str, transcripts: list[Transcript], *, as_base64: bool) -> dict[str, Any]:
    """Vectors in the order of the inputs, as numbers or as base64 of little-endian float32."""
    vectors = [vector for transcript in transcripts for vector in transcript.vectors]
    tokens = sum(transcript.usage.prompt_tokens for transcript in transcripts)
    return {
        "object": "list",
        "data": [
            {
                "object": "embedding",
                "index": number,
                "embedding": base64.b64encode(vector).decode() if as_base64 else as_json(vector),
            }
            for number, vector in enumerate(vectors)
        ],
        "model": model,
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
    }


def rerank_answer(
    model: str, answer_id: str, documents: list[str], transcript: Transcript, *, top_n: int, with_documents: bool
) -> dict[str, Any]:
    """The best documents first, in the shape that Jina and Cohere share."""
    order = sorted(range(len(documents)), key=lambda number: -transcript.scores[number])[:top_n]
    results: list[dict[str, Any]] = []
    for number in order:
        results.append({"index": number, "relevance_score": transcript.scores[number]})
        if with_documents:
            results[-1]["document"] = {"text": documents[number]}
    tokens = transcript.usage.prompt_tokens
    return {
        "id": answer_id,
        "object": "list",
        "model": model,
        "results": results,
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
    }


class OpenAIStream:
    """Server-sent events: role chunks, deltas, one chunk with the reason per choice, usage if asked for, ``[DONE]``."""

    media_type = "text/event-stream; charset=utf-8"

    def __init__(
        self, kind: Kind, answer_id: str, model: str, *, include_usage: bool, choices: int, choices_per_prompt: int
    ) -> None:
        self._kind: Kind = kind
        self._id = answer_id
        self._model = model
        self._include_usage = include_usage
        self._choices = choices
        self._choices_per_prompt = choices_per_prompt
        self._created = 0
        self._usages: list[Usage] = []
        self._begun: set[tuple[int, int]] = set()
        """Calls (choice, index) that were told while they were written."""
        self._text_lengths = [0] * choices

    def start(self, moment: Moment) -> bytes:
        self._created = int(moment.now)
        if self._kind == "completion":
            return b""
        return b"".join(self._chunk(n, {"role": "assistant", "content": ""}) for n in range(self._choices))

    def keep_alive(self, moment: Moment, note: str = "") -> bytes:
        """A comment, which every reader of server-sent events passes over."""
        return f": {note or 'waiting'}\n\n".encode()

    def on(self, event: Event, moment: Moment, choice: int = 0) -> bytes:
        match event:
            case TextDelta() if self._kind == "chat":
                return self._chunk(choice, {"content": event.text})
            case TextDelta():
                return self._text(choice, event.text)
            case ReasoningDelta():
                return self._chunk(choice, {"reasoning_content": event.text, "reasoning": event.text})
            case ToolCallStarted():
                self._begun.add((choice, event.index))
                function = {"name": event.name, "arguments": ""}
                head = {"index": event.index, "id": event.id, "type": "function", "function": function}
                return self._chunk(choice, {"tool_calls": [head]})
            case ToolCallArguments():
                piece = {"index": event.index, "function": {"arguments": event.text}}
                return self._chunk(choice, {"tool_calls": [piece]})
            case ToolCallDone() if (choice, event.index) not in self._begun:
                return self._chunk(choice, {"tool_calls": [_call(event)]})
            case PromptEcho():
                return self._text(choice, event.text, tokens=event.tokens)
            case Logprobs() if self._kind == "chat":
                content = {"content": [logprob_entry(token) for token in event.tokens], "refusal": None}
                return self._chunk(choice, {}, logprobs=content)
            case Logprobs():
                return self._text(choice, "", tokens=event.tokens)
            case Usage():
                self._usages.append(event)
            case Finish():
                reason = _REASONS[event.reason]
                if self._kind == "chat":
                    return self._chunk(choice, {}, reason=reason)
                return self._text(choice, "", reason)
            case _:
                pass  # Started has no frame here; a failure is given to fail()
        return b""

    def end(self, moment: Moment) -> bytes:
        usage = _usage(total_usage(self._usages, self._choices_per_prompt))
        last = self._frame([], usage=usage) if self._include_usage else b""
        return last + b"data: [DONE]\n\n"

    def fail(self, error: MlxRouterError) -> bytes:
        return b"data: " + msgspec.json.encode(error_body(error)) + b"\n\n"

    def _chunk(self, choice: int, delta: dict[str, Any], *, reason: str | None = None, logprobs: Any = None) -> bytes:
        return self._frame([{"index": choice, "delta": delta, "logprobs": logprobs, "finish_reason": reason}])

    def _text(
        self, choice: int, text: str, reason: str | None = None, tokens: list[TokenLogprob] | None = None
    ) -> bytes:
        logprobs = None
        if tokens:
            logprobs = _legacy_logprobs(tokens, self._text_lengths[choice])
            self._text_lengths[choice] += sum(len(token.token) for token in tokens)
        return self._frame([{"index": choice, "text": text, "logprobs": logprobs, "finish_reason": reason}])

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


def logprob_entry(token: TokenLogprob) -> dict[str, Any]:
    """A token with its best alternatives, as chat completions and responses have it."""
    return {**_bare(token), "top_logprobs": [_bare(other) for other in token.top]}


def _bare(token: TokenLogprob) -> dict[str, Any]:
    return {"token": token.token, "logprob": token.logprob, "bytes": list(token.data)}


def _legacy_logprobs(tokens: list[TokenLogprob], offset: int) -> dict[str, Any]:
    """Parallel lists, as /v1/completions has them; the token itself is among the alternatives, however unlikely."""
    offsets = []
    for token in tokens:
        offsets.append(offset)
        offset += len(token.token)
    tops = [
        None if token.logprob is None else {**{t.token: t.logprob for t in token.top}, token.token: token.logprob}
        for token in tokens
    ]
    return {
        "tokens": [token.token for token in tokens],
        "token_logprobs": [token.logprob for token in tokens],
        "top_logprobs": tops if any(token.top for token in tokens) else None,
        "text_offset": offsets,
    }
