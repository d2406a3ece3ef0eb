"""Ollama's bodies: /api/chat, /api/generate, /api/show."""

from __future__ import annotations

import base64
import binascii
from typing import Any, Final

import msgspec
from msgspec import Struct, field

from mlx_router_server.dialects.body import convert, read_object, without_nulls
from mlx_router_server.dialects.call import Call, Needs
from mlx_router_server.dialects.options import OLLAMA_DEFAULTS, Options, parse_options
from mlx_router_server.durations import parse_duration
from mlx_router_shared.errors import InvalidRequest, UnsupportedCapability
from mlx_router_shared.generation import GenerationRequest, Message, Role, Tool, ToolCall

__all__ = ["GenerateCall", "parse_chat", "parse_generate", "parse_show", "read_tools"]

_EFFORTS: Final = ("low", "medium", "high", "max")


class _Function(Struct, kw_only=True):
    name: str
    arguments: dict[str, Any] | str = field(default_factory=dict)


class _Call(Struct, kw_only=True):
    function: _Function
    id: str = ""


class _Message(Struct, kw_only=True):
    role: str
    content: str = ""
    thinking: str = ""
    images: list[str] = field(default_factory=list)
    tool_calls: list[_Call] = field(default_factory=list)
    tool_name: str = ""
    tool_call_id: str = ""


class _ToolFunction(Struct, kw_only=True):
    name: str
    description: str = ""
    parameters: dict[str, Any] = field(default_factory=dict)


class _Tool(Struct, kw_only=True):
    function: _ToolFunction
    type: str = "function"


class _Common(Struct, kw_only=True):
    model: str = ""
    stream: bool = True
    format: Any = None
    keep_alive: Any = None
    options: dict[str, Any] = field(default_factory=dict)
    think: Any = None
    truncate: bool = True
    shift: bool = True  # type-checked only: MLX has no context shift, and a full context ends with "length"
    logprobs: bool = False
    top_logprobs: int = 0
    _debug_render_only: bool = False


class _ChatBody(_Common, kw_only=True):
    messages: list[dict[str, Any]] = field(default_factory=list)
    tools: list[dict[str, Any]] = field(default_factory=list)


class _GenerateBody(_Common, kw_only=True):
    prompt: str = ""
    suffix: str = ""
    system: str | None = None
    template: str = ""
    context: list[int] = field(default_factory=list)
    raw: bool = False
    images: list[str] = field(default_factory=list)


class _ShowBody(Struct, kw_only=True):
    model: str = ""
    name: str = ""
    verbose: bool = False


class GenerateCall(Struct, frozen=True, kw_only=True):
    """A chat or generate call; without ``call`` it only loads or, with keep_alive 0, unloads."""

    model: str
    keep_alive_seconds: float | None
    call: Call | None


def parse_chat(body: bytes) -> GenerateCall:
    """Raises ``InvalidRequest``; nothing was looked up yet."""
    data = read_object(body, fold_case=True)
    chat = convert(data, _ChatBody)
    _check_common(chat)
    keep_alive = None if chat.keep_alive is None else parse_duration(chat.keep_alive)
    if not chat.messages:
        return GenerateCall(model=chat.model, keep_alive_seconds=keep_alive, call=None)
    options = parse_options(chat.options)
    thinking, effort = _thinking(chat.think)
    tools = read_tools(chat.tools)
    needs = {Needs.COMPLETION: '"{name}" does not support chat'}
    if tools:
        needs[Needs.TOOLS] = "{full} does not support tools"
    if thinking:
        needs[Needs.THINKING] = '"{name}" does not support thinking'
    request = _request(
        chat, options, messages=_messages(chat.messages), tools=tools, thinking=thinking, thinking_effort=effort
    )
    call = Call(
        model=chat.model, request=request, stream=chat.stream, keep_alive_seconds=keep_alive, needs=needs,
        ignored=options.ignored,
    )  # fmt: skip
    return GenerateCall(model=chat.model, keep_alive_seconds=keep_alive, call=call)


def parse_generate(body: bytes) -> GenerateCall:
    """Raises ``InvalidRequest``; nothing was looked up yet."""
    generate = convert(read_object(body, fold_case=True), _GenerateBody)
    _check_common(generate)
    keep_alive = None if generate.keep_alive is None else parse_duration(generate.keep_alive)
    _check_images(generate.images, "images")
    if not generate.prompt:
        return GenerateCall(model=generate.model, keep_alive_seconds=keep_alive, call=None)
    if generate.raw and (generate.template or generate.system or generate.context):
        raise InvalidRequest("raw mode does not support template, system, or context")
    if generate.template:
        raise UnsupportedCapability("this server does not support template: models bring their own", param="template")
    if generate.context:
        raise UnsupportedCapability("this server does not support context: use /api/chat", param="context")
    needs = {Needs.COMPLETION: '"{name}" does not support generate'}
    if generate.suffix:
        raise UnsupportedCapability(f"{generate.model} does not support insert", param="suffix")
    options = parse_options(generate.options)
    thinking, effort = _thinking(generate.think)
    if thinking:
        needs[Needs.THINKING] = '"{name}" does not support thinking'
    prompt, messages = None, []
    if generate.raw:
        prompt = generate.prompt
    else:
        if generate.system:
            messages.append(Message(role=Role.SYSTEM, content=generate.system))
        messages.append(Message(role=Role.USER, content=generate.prompt))
    request = _request(generate, options, messages=messages, prompt=prompt, thinking=thinking, thinking_effort=effort)
    call = Call(
        model=generate.model, request=request, stream=generate.stream, keep_alive_seconds=keep_alive, needs=needs,
        ignored=options.ignored,
    )  # fmt: skip
    return GenerateCall(model=generate.model, keep_alive_seconds=keep_alive, call=call)


def parse_show(body: bytes) -> tuple[str, bool]:
    """The name that is asked for, and whether tensors are wanted."""
    show = convert(read_object(body, fold_case=True), _ShowBody)
    name = show.model or show.name
    if not name.strip():
        raise InvalidRequest("model is required", param="model")
    return name, show.verbose


def _request(body: _Common, options: Options, **more: Any) -> GenerationRequest:
    return GenerationRequest(
        sampling=options.sampling,
        sampling_defaults=OLLAMA_DEFAULTS,
        max_tokens=options.max_tokens,
        context_tokens=options.context_tokens,
        stop=options.stop,
        truncate=body.truncate,
        top_logprobs=body.top_logprobs if body.logprobs else None,
        **more,
    )


def _check_common(body: _Common) -> None:
    if not 0 <= body.top_logprobs <= 20:
        raise InvalidRequest("top_logprobs must be between 0 and 20", param="top_logprobs")
    if body.format not in (None, ""):
        if body.format != "json" and not isinstance(body.format, dict):
            text = msgspec.json.encode(body.format).decode()
            raise InvalidRequest(
                f'invalid format: {text!r}; expected "json" or a valid JSON Schema object', param="format"
            )
        raise UnsupportedCapability("this release does not support format", param="format")
    if body._debug_render_only:
        raise UnsupportedCapability("this release does not support _debug_render_only", param="_debug_render_only")


def _thinking(think: Any) -> tuple[bool | None, str | None]:
    """Whether to think, and how hard; None leaves it to the model."""
    if think is None or isinstance(think, bool):
        return think, None
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
        message = convert(without_nulls(item), _Message, f"messages[{number}].")
        _check_images(message.images, f"messages[{number}].images")
        role = message.role.lower()
        messages.append(
            Message(
                role=Role(role) if role in set(Role) else Role.USER,
                content=message.content,
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


def read_tools(items: list[dict[str, Any]]) -> list[Tool]:
    """Tool definitions in the shape that Ollama and chat completions share."""
    tools = []
    for number, item in enumerate(items):
        tool = convert(without_nulls(item), _Tool, f"tools[{number}].")
        if tool.type != "function":
            raise InvalidRequest(f"tools of type {tool.type!r} are not supported", param=f"tools[{number}].type")
        parameters = tool.function.parameters or {"type": "object", "properties": {}}
        tools.append(
            Tool(
                name=tool.function.name,
                description=tool.function.description,
                parameters=msgspec.json.encode(parameters).decode(),
            )
        )
    return tools


def _check_images(images: list[str], param: str) -> None:
    for image in images:
        try:
            base64.b64decode(image, validate=True)
        except (binascii.Error, ValueError):
            raise InvalidRequest("illegal base64 data in an image", param=param) from None
    if images:
        raise UnsupportedCapability("this model does not support images", param=param)
