"""What a created or configured model says, put under what a request says."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import msgspec

from mlx_router_server.catalogue.overlay import NOTHING, Overlay
from mlx_router_server.dialects.call import Call
from mlx_router_server.dialects.go_template import render_template
from mlx_router_server.dialects.options import parse_options
from mlx_router_shared.generation import GenerationRequest, Message, Request, Role

__all__ = ["apply_overlay"]


def apply_overlay(call: Call, overlay: Overlay) -> Call:
    """The call as the worker shall have it. What the request says counts; what it does not say, the model does.

    The system prompt is put first only where the request has none; example turns come after it. Text that is not to be
    wrapped in a template (``raw``, token ids, a hole to fill) stays what it is.
    """
    if overlay == NOTHING:
        return call
    return replace(call, requests=tuple(_apply(request, overlay) for request in call.requests))


def _apply(request: Request, overlay: Overlay) -> Request:
    if not isinstance(request, GenerationRequest):
        return request
    options = parse_options(overlay.parameters)
    theirs = {name: value for name, value in msgspec.structs.asdict(request.sampling).items() if value is not None}
    ours = {name: value for name, value in msgspec.structs.asdict(options.sampling).items() if value is not None}
    request = msgspec.structs.replace(
        request,
        sampling=type(request.sampling)(**{**ours, **theirs, "logit_bias": request.sampling.logit_bias}),
        max_tokens=request.max_tokens if request.max_tokens is not None else options.max_tokens,
        context_tokens=request.context_tokens if request.context_tokens is not None else options.context_tokens,
        stop=request.stop or options.stop,
    )
    if not request.messages:
        return request
    messages = _with_turns(request, overlay)
    if overlay.template and not request.tools:
        return msgspec.structs.replace(request, messages=[], prompt=_render(overlay.template, messages))
    return msgspec.structs.replace(request, messages=messages)


def _with_turns(request: GenerationRequest, overlay: Overlay) -> list[Message]:
    messages = list(request.messages)
    head = []
    if messages[0].role is Role.SYSTEM:
        head.append(messages.pop(0))
    elif overlay.system:
        head.append(Message(role=Role.SYSTEM, content=overlay.system))
    if not request.prefix_tokens:  # an earlier answer that is gone on from has them already
        head += [Message(role=Role(turn.role), content=turn.content) for turn in overlay.messages]
    return head + messages


def _render(template: str, messages: list[Message]) -> str:
    """By the names that Ollama's templates know; ``Prompt`` is the last thing that the user said."""
    values: dict[str, Any] = {
        "System": "\n\n".join(message.content for message in messages if message.role is Role.SYSTEM),
        "Prompt": next((message.content for message in reversed(messages) if message.role is Role.USER), ""),
        "Response": "",
        "Suffix": "",
        "Tools": [],
        "Messages": [{"Role": message.role.value, "Content": message.content} for message in messages],
    }
    return render_template(template, values)
