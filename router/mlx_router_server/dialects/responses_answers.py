"""OpenAI's /v1/responses: the answer as items, whole or as a stream of their events."""

from __future__ import annotations

import base64
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

import msgspec

from mlx_router_server.dialects.call import Moment, Transcript
from mlx_router_server.dialects.openai_answers import logprob_entry
from mlx_router_server.dialects.responses_requests import ResponsesCall
from mlx_router_shared.errors import ErrorCode, MlxRouterError
from mlx_router_shared.generation import (
    Event,
    Finish,
    FinishReason,
    Logprobs,
    Message,
    ReasoningDelta,
    Role,
    TextDelta,
    ToolCall,
    ToolCallArguments,
    ToolCallDone,
    ToolCallStarted,
    Usage,
)

__all__ = ["ResponsesStream", "render_answer", "turn_of"]

MakeId = Callable[[str], str]
"""A new id with this prefix."""

_CODES: Final = {
    ErrorCode.CONTEXT_LENGTH_EXCEEDED: "context_length_exceeded",
    ErrorCode.INVALID_REQUEST: "invalid_prompt",
    ErrorCode.OVERLOADED: "rate_limit_exceeded",
}


def turn_of(transcript: Transcript) -> Message:
    """What the model said, as a turn of the conversation that may be gone on with."""
    return Message(
        role=Role.ASSISTANT,
        content=transcript.text,
        reasoning=transcript.reasoning or None,
        tool_calls=[ToolCall(id=c.id, name=c.name, arguments=c.arguments) for c in transcript.tool_calls],
    )


def render_answer(
    answer_id: str, asked: ResponsesCall, transcript: Transcript, moment: Moment, make_id: MakeId
) -> dict[str, Any]:
    """The answer of a request that was not streamed."""
    output: list[dict[str, Any]] = []
    if transcript.reasoning:
        output.append(_reasoning_item(make_id("rs_"), transcript.reasoning, asked))
    if transcript.text or not transcript.tool_calls:
        output.append(_message_item(make_id("msg_"), transcript.text, [logprob_entry(t) for t in transcript.logprobs]))
    output += [_call_item(make_id("fc_"), call.id, call.name, call.arguments, asked) for call in transcript.tool_calls]
    return _response(
        answer_id, asked, int(moment.now - moment.total_seconds), output, transcript.usage, transcript.finish
    )


def _response(
    answer_id: str, asked: ResponsesCall, created_at: int, output: list[dict[str, Any]], usage: Usage | None,
    finish: Finish | None, error: dict[str, Any] | None = None,
) -> dict[str, Any]:  # fmt: skip
    cut = finish is not None and finish.reason in (FinishReason.LENGTH, FinishReason.CONTEXT)
    status = "failed" if error else "in_progress" if finish is None else "incomplete" if cut else "completed"
    return {
        "id": answer_id,
        "object": "response",
        "created_at": created_at,
        "status": status,
        "error": error,
        "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
        "model": asked.call.model,
        "output": output,
        "usage": None if usage is None else _usage(usage),
        **asked.echoed,
    }


def _usage(usage: Usage) -> dict[str, Any]:
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }


def _message_item(item_id: str, text: str, logprobs: list[Any], status: str = "completed") -> dict[str, Any]:
    content = [_text_part(text, logprobs)] if status == "completed" else []
    return {"id": item_id, "type": "message", "status": status, "role": "assistant", "content": content}


def _text_part(text: str, logprobs: list[Any]) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}


def _reasoning_item(item_id: str, text: str, asked: ResponsesCall) -> dict[str, Any]:
    item: dict[str, Any] = {"id": item_id, "type": "reasoning", "summary": []}
    if text:
        item["summary"] = [{"type": "summary_text", "text": text}]
        if asked.encrypted_reasoning:
            item["encrypted_content"] = base64.b64encode(text.encode()).decode()
    return item


def _call_item(
    item_id: str, call_id: str, name: str, arguments: str, asked: ResponsesCall, status: str = "completed"
) -> dict[str, Any]:
    namespace, member = asked.namespaces.get(name, ("", name))
    item = {
        "id": item_id, "type": "function_call", "status": status, "call_id": call_id, "name": member,
        "arguments": arguments,
    }  # fmt: skip
    return {**item, "namespace": namespace} if namespace else item


@dataclass(slots=True)
class _Item:
    """The output item that is being written."""

    kind: str
    item_id: str
    text: str = ""
    logprobs: list[Any] = field(default_factory=list)
    call: tuple[str, str] = ("", "")
    """Its id and name."""


class ResponsesStream:
    """Numbered events: created, in progress, each item from added to done, and one terminal event."""

    media_type = "text/event-stream; charset=utf-8"

    def __init__(self, answer_id: str, asked: ResponsesCall, make_id: MakeId) -> None:
        self._make_id = make_id
        self._id = answer_id
        self._asked = asked
        self._created_at = 0
        self._number = 0
        self._output: list[dict[str, Any]] = []
        self._item: _Item | None = None
        self._usage: Usage | None = None
        self.final: dict[str, Any] | None = None
        """The whole response, once it has ended well."""

    def start(self, moment: Moment) -> bytes:
        self._created_at = int(moment.now - moment.total_seconds)
        begun = _response(self._id, self._asked, self._created_at, [], None, None)
        return self._frame("response.created", response=begun) + self._frame("response.in_progress", response=begun)

    def keep_alive(self, moment: Moment, note: str = "") -> bytes:
        """A comment, which every reader of server-sent events passes over."""
        return f": {note or 'waiting'}\n\n".encode()

    def on(self, event: Event, moment: Moment, choice: int = 0) -> bytes:
        match event:
            case TextDelta():
                return self._begin("message") + self._text("response.output_text.delta", event.text, logprobs=[])
            case ReasoningDelta():
                begun = self._begin("reasoning")
                return begun + self._text("response.reasoning_summary_text.delta", event.text)
            case Logprobs():
                if self._item is not None and self._item.kind == "message":
                    self._item.logprobs += [logprob_entry(token) for token in event.tokens]
            case ToolCallStarted():
                return self._begin_call(event.id, event.name)
            case ToolCallArguments():
                return self._text("response.function_call_arguments.delta", event.text)
            case ToolCallDone():
                return self._call(event)
            case Usage():
                self._usage = event
            case Finish():
                return self._finish(event)
            case _:
                pass  # what this API does not show; a failure is given to fail()
        return b""

    def end(self, moment: Moment) -> bytes:
        return b""  # the terminal event was it

    def fail(self, error: MlxRouterError) -> bytes:
        told = {"code": _CODES.get(error.code, "server_error"), "message": error.message}
        failed = _response(self._id, self._asked, self._created_at, self._output, self._usage, None, told)
        return self._frame("response.failed", response=failed)

    # ------------------------------------------------------------------ items

    def _begin(self, kind: str) -> bytes:
        if self._item is not None and self._item.kind == kind:
            return b""
        closed = self._close()
        item = self._item = _Item(kind, self._make_id("msg_" if kind == "message" else "rs_"))
        if kind == "message":
            added = self._frame(
                "response.output_item.added", output_index=len(self._output),
                item=_message_item(item.item_id, "", [], "in_progress"),
            )  # fmt: skip
            return closed + added + self._part("response.content_part.added", part=_text_part("", []))
        added = self._frame(
            "response.output_item.added", output_index=len(self._output),
            item=_reasoning_item(item.item_id, "", self._asked),
        )  # fmt: skip
        part = {"type": "summary_text", "text": ""}
        return closed + added + self._part("response.reasoning_summary_part.added", part=part)

    def _begin_call(self, call_id: str, name: str) -> bytes:
        closed = self._close()
        item = self._item = _Item("function_call", self._make_id("fc_"), call=(call_id, name))
        shown = _call_item(item.item_id, call_id, name, "", self._asked, "in_progress")
        return closed + self._frame("response.output_item.added", output_index=len(self._output), item=shown)

    def _call(self, call: ToolCallDone) -> bytes:
        if self._item is not None and self._item.kind == "function_call":  # it was told while it was written
            return self._close()
        begun = self._begin_call(call.id, call.name)
        return begun + self._text("response.function_call_arguments.delta", call.arguments) + self._close()

    def _text(self, event: str, text: str, **more: Any) -> bytes:
        assert self._item is not None
        self._item.text += text
        return self._part(event, delta=text, **more)

    def _close(self, status: str = "completed") -> bytes:
        item = self._item
        if item is None:
            return b""
        if item.kind == "message":
            part = _text_part(item.text, item.logprobs)
            out = self._part("response.output_text.done", text=item.text, logprobs=item.logprobs)
            out += self._part("response.content_part.done", part=part)
            done = {**_message_item(item.item_id, item.text, item.logprobs), "status": status}
        elif item.kind == "reasoning":
            out = self._part("response.reasoning_summary_text.done", text=item.text)
            out += self._part("response.reasoning_summary_part.done", part={"type": "summary_text", "text": item.text})
            done = _reasoning_item(item.item_id, item.text, self._asked)
        else:
            done = _call_item(item.item_id, *item.call, item.text, self._asked, status)
            out = self._part("response.function_call_arguments.done", arguments=item.text, name=done["name"])
        self._item = None
        out += self._frame("response.output_item.done", output_index=len(self._output), item=done)
        self._output.append(done)
        return out

    def _finish(self, finish: Finish) -> bytes:
        out = b""
        if self._item is None and not self._output:
            out = self._begin("message")  # clients expect a message, also an empty one
        cut = finish.reason in (FinishReason.LENGTH, FinishReason.CONTEXT)
        out += self._close("incomplete" if cut else "completed")
        whole = _response(self._id, self._asked, self._created_at, self._output, self._usage, finish)
        self.final = whole
        return out + self._frame(f"response.{whole['status']}", response=whole)

    def _part(self, event: str, **fields: Any) -> bytes:
        """An event of a part of the open item."""
        assert self._item is not None
        where: dict[str, Any] = {"item_id": self._item.item_id, "output_index": len(self._output)}
        if self._item.kind == "message":
            where["content_index"] = 0
        elif self._item.kind == "reasoning":
            where["summary_index"] = 0
        return self._frame(event, **where, **fields)

    def _frame(self, kind: str, **fields: Any) -> bytes:
        frame = {"type": kind, "sequence_number": self._number, **fields}
        self._number += 1
        return f"event: {kind}\ndata: ".encode() + msgspec.json.encode(frame) + b"\n\n"
