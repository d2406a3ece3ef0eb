"""Ollama's bodies that generate: /api/chat and /api/generate."""

from __future__ import annotations

from typing import Any, Final

import msgspec
from msgspec import Struct, field

from mlx_router_server.dialects.body import Int64, convert, read_object
from mlx_router_server.dialects.call import Call, Need, Needs
from mlx_router_server.dialects.fields import FieldRules
from mlx_router_server.dialects.go_template import render_prompt
from mlx_router_server.dialects.images import image_from_base64
from mlx_router_server.dialects.options import OLLAMA_DEFAULTS, Options, parse_options
from mlx_router_server.dialects.schemas import ANY_OBJECT, AnswerSchema, answer_schema
from mlx_router_server.dialects.tools import TOOL_BODY, read_tools
from mlx_router_server.durations import parse_duration
from mlx_router_shared.errors import InvalidRequest
from mlx_router_shared.generation import GenerationRequest, Message, Role, ToolCall

__all__ = [
    "CHAT_FIELDS",
    "GENERATE_FIELDS",
    "GenerateCall",
    "parse_chat",
    "parse_generate",
    "read_keep_alive",
]

_EFFORTS: Final = ("low", "medium", "high", "max")
_NO_SHIFT: Final = "MLX has no context shift: a full context ends an answer with done_reason length"
_THINKS_NOT: Final = '"{name}" does not support thinking'


class _Function(Struct, kw_only=True):
    name: str
    arguments: dict[str, Any] | str = field(default_factory=dict)
    index: int = 0


class _Call(Struct, kw_only=True):
    function: _Function
    id: str = ""
    type: str = "function"


class _Message(Struct, kw_only=True):
    role: str
    content: str = ""
    thinking: str = ""
    images: list[str] = field(default_factory=list)
    tool_calls: list[_Call] = field(default_factory=list)
    tool_name: str = ""
    tool_call_id: str = ""


class _Common(Struct, kw_only=True):
    model: str = ""
    stream: bool = True
    format: Any = None
    keep_alive: Any = None
    options: dict[str, Any] = field(default_factory=dict)
    think: Any = None
    truncate: bool = True
    logprobs: bool = False
    top_logprobs: Int64 = 0
    debug_render_only: bool = field(name="_debug_render_only", default=False)


class _ChatBody(_Common, kw_only=True):
    messages: list[dict[str, Any]] = field(default_factory=list)
    tools: list[dict[str, Any]] = field(default_factory=list)


class _GenerateBody(_Common, kw_only=True):
    prompt: str = ""
    suffix: str = ""
    system: str | None = None
    template: str = ""
    context: list[Int64] = field(default_factory=list)
    raw: bool = False
    images: list[str] = field(default_factory=list)


_NOTES: Final = {
    "format": '"json" or a JSON schema, enforced by a grammar; thinking before it stays free',
    "options": "see the list of options; unknown ones are ignored",
    "think": "true, false, or low, medium, high, max, which templates with levels get",
    "truncate": "drops the oldest turns that are not system turns; told as truncated_messages in the last object",
    "keep_alive": "also by the header X-Keep-Alive",
    "_debug_render_only": "answers with the prompt instead of generating; loads no model",
}
CHAT_FIELDS: Final = FieldRules(
    route="POST /api/chat",
    body=_ChatBody,
    ignored={"shift": _NO_SHIFT, "tool_choice": "Ollama has none; /v1/chat/completions honours it"},
    notes=_NOTES,
    inside={"messages[]": _Message, "tools[]": TOOL_BODY},
)
GENERATE_FIELDS: Final = FieldRules(
    route="POST /api/generate",
    body=_GenerateBody,
    ignored={"shift": _NO_SHIFT},
    notes={
        **_NOTES,
        "suffix": "for models whose vocabulary has tokens for filling in",
        "template": "Go template text: fields, if, range, eq, ne, and, or, not",
        "context": "token ids of an earlier answer, put before the prompt",
    },
)


class GenerateCall(Struct, frozen=True, kw_only=True):
    """A call of Ollama's; without ``call`` it only loads or, with keep_alive 0, unloads."""

    model: str
    keep_alive_seconds: float | None
    call: Call | None
    ignored: tuple[str, ...] = ()
    """Of a call that only loads; ``call`` has those of any other."""
    render_only: bool = False


def parse_chat(body: bytes) -> GenerateCall:
    """Raises ``InvalidRequest``; nothing was looked up yet."""
    data = read_object(body, fold_case=True)
    chat = convert(data, _ChatBody)
    ignored = list(CHAT_FIELDS.check(data))
    _check_common(chat)
    keep_alive = read_keep_alive(chat.keep_alive)
    if not chat.messages:
        return _load_call(chat, keep_alive, ignored)
    messages = _messages(chat.messages)
    tools = read_tools(chat.tools, ignored)
    needs = {Needs.COMPLETION: Need('"{name}" does not support chat')}
    if tools:
        needs[Needs.TOOLS] = Need("{full} does not support tools")
    if any(message.images for message in messages):
        at = next(number for number, message in enumerate(messages) if message.images)
        needs[Needs.VISION] = Need("{full} does not support images", f"messages[{at}].images")
    last = messages[-1]
    continued = last.role is Role.ASSISTANT and not last.tool_calls
    return _generate_call(chat, keep_alive, needs, ignored, messages=messages, tools=tools, continue_final=continued)


def parse_generate(body: bytes) -> GenerateCall:
    """Raises ``InvalidRequest``; nothing was looked up yet."""
    data = read_object(body, fold_case=True)
    generate = convert(data, _GenerateBody)
    ignored = list(GENERATE_FIELDS.check(data))
    _check_common(generate)
    keep_alive = read_keep_alive(generate.keep_alive)
    images = [image_from_base64(text, "images") for text in generate.images]
    if not generate.prompt:
        return _load_call(generate, keep_alive, ignored)
    if generate.raw and (generate.template or generate.system or generate.context):
        raise InvalidRequest("raw mode does not support template, system, or context")
    needs = {Needs.COMPLETION: Need('"{name}" does not support generate')}
    if generate.suffix:
        needs[Needs.INSERT] = Need("{full} does not support insert", "suffix")
    if images:
        needs[Needs.VISION] = Need("{full} does not support images", "images")
        if generate.suffix or generate.template or generate.raw:
            raise InvalidRequest("images need the model's own template", param="images")
    more: dict[str, Any] = {"prefix_tokens": generate.context, "wants_context": not generate.raw}
    if generate.suffix:
        more |= {"prompt": generate.prompt, "suffix": generate.suffix}
    elif generate.template:
        more["prompt"] = render_prompt(generate.template, generate.system or "", generate.prompt)
    elif generate.raw:
        more["prompt"] = generate.prompt
    else:
        system = [Message(role=Role.SYSTEM, content=generate.system)] if generate.system else []
        more["messages"] = [*system, Message(role=Role.USER, content=generate.prompt, images=images)]
    return _generate_call(generate, keep_alive, needs, ignored, **more)


def _load_call(body: _Common, keep_alive: float | None, ignored: list[str]) -> GenerateCall:
    """A call that only loads; what is wrong in it is refused all the same."""
    options = parse_options(body.options)
    _thinking(body.think)
    _schema(body.format)
    return GenerateCall(
        model=body.model,
        keep_alive_seconds=keep_alive,
        call=None,
        ignored=(*ignored, *_option_names(options)),
    )


def _generate_call(
    body: _Common, keep_alive: float | None, needs: dict[Needs, Need], ignored: list[str], **more: Any
) -> GenerateCall:
    options = parse_options(body.options)
    thinking, effort = _thinking(body.think)
    if thinking:
        needs[Needs.THINKING] = Need(_THINKS_NOT, "think")
    schema = _schema(body.format)
    request = GenerationRequest(
        sampling=options.sampling,
        sampling_defaults=OLLAMA_DEFAULTS,
        max_tokens=options.max_tokens,
        context_tokens=options.context_tokens,
        stop=options.stop,
        truncate=body.truncate,
        thinking=thinking,
        thinking_effort=effort,
        schema=schema.text if schema is not None else None,
        top_logprobs=body.top_logprobs if body.logprobs else None,
        **more,
    )
    call = Call(
        model=body.model, requests=(request,), stream=body.stream, keep_alive_seconds=keep_alive, needs=needs,
        ignored=(*ignored, *_option_names(options), *(schema.ignored if schema is not None else ())),
    )  # fmt: skip
    return GenerateCall(model=body.model, keep_alive_seconds=keep_alive, call=call, render_only=body.debug_render_only)


def _option_names(options: Options) -> tuple[str, ...]:
    return tuple(f"options.{name}" for name in options.ignored)


def read_keep_alive(value: Any) -> float | None:
    return None if value is None else parse_duration(value)


def _check_common(body: _Common) -> None:
    if not 0 <= body.top_logprobs <= 20:
        raise InvalidRequest("top_logprobs must be between 0 and 20", param="top_logprobs")


def _schema(form: Any) -> AnswerSchema | None:
    if form in (None, ""):
        return None
    if form == "json":
        return ANY_OBJECT
    if isinstance(form, dict):
        return answer_schema(form, "format")
    text = msgspec.json.encode(form).decode()
    raise InvalidRequest(f'invalid format: {text!r}; expected "json" or a valid JSON Schema object', param="format")


def _thinking(think: Any) -> tuple[bool | None, str | None]:
    """Whether to think, and how hard; None leaves it to the model."""
    if think is None or think == "" or isinstance(think, bool):
        return (think if isinstance(think, bool) else None), None
    if isinstance(think, str):
        if think in _EFFORTS:
            return True, think
        raise InvalidRequest(
            f'invalid think value: "{think}" (must be "high", "medium", "low", "max", true, or false)', param="think"
        )
    raise InvalidRequest('think must be a boolean or string ("high", "medium", "low", "max", true, or false)',
                         param="think")  # fmt: skip


def _messages(items: list[dict[str, Any]]) -> list[Message]:
    messages = []
    for number, item in enumerate(items):
        message = convert(item, _Message, f"messages[{number}].")
        role = message.role.lower()
        messages.append(
            Message(
                role=Role(role) if role in set(Role) else Role.USER,
                content=message.content,
                images=[image_from_base64(text, f"messages[{number}].images") for text in message.images],
                reasoning=message.thinking or None,
                tool_calls=[
                    ToolCall(
                        id=call.id,
                        name=call.function.name,
                        arguments=call.function.arguments
                        if isinstance(call.function.arguments, str)
                        else msgspec.json.encode(call.function.arguments).decode(),
                    )
                    for call in message.tool_calls
                ],
                tool_name=message.tool_name or None,
                tool_call_id=message.tool_call_id or None,
            )
        )
    return messages
