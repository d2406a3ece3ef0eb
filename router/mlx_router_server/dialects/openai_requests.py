"""OpenAI's /v1/chat/completions: messages in, the canonical request out."""

from __future__ import annotations

from typing import Any, Final

import msgspec
from msgspec import Struct, field

from mlx_router_server.dialects.body import Int64, convert, read_object
from mlx_router_server.dialects.call import Call, Need, Needs
from mlx_router_server.dialects.fields import FieldRules
from mlx_router_server.dialects.openai_choices import (
    FIELD_NOTES,
    IGNORED_FIELDS,
    ChoicesFields,
    canonical_request,
    choices_call,
)
from mlx_router_server.dialects.openai_common import (
    IMAGE_NAMES,
    PART_NAMES,
    TOOL_CHOICE_NAMES,
    check_ranges,
    limit_of,
    read_effort,
    read_part,
    tool_use,
)
from mlx_router_server.dialects.options import parse_options
from mlx_router_server.dialects.schemas import ANY_OBJECT, AnswerSchema, answer_schema
from mlx_router_server.dialects.tools import TOOL_BODY, read_tools
from mlx_router_shared.errors import InvalidRequest, UnsupportedCapability
from mlx_router_shared.generation import (
    Message,
    Role,
    ToolCall,
)

__all__ = [
    "CHAT_FIELDS",
    "parse_chat_completion",
    "read_response_format",
]

_ROLES: Final = {
    "system": Role.SYSTEM,
    "developer": Role.SYSTEM,
    "user": Role.USER,
    "assistant": Role.ASSISTANT,
    "tool": Role.TOOL,
    "function": Role.TOOL,
}


class _ChatBody(ChoicesFields, kw_only=True):
    messages: list[dict[str, Any]] = field(default_factory=list)
    max_completion_tokens: Int64 | None = None
    tools: list[dict[str, Any]] = field(default_factory=list)
    tool_choice: Any = None
    parallel_tool_calls: bool = True
    response_format: dict[str, Any] = field(default_factory=dict)
    logprobs: bool = False
    top_logprobs: Int64 | None = None
    reasoning_effort: str | None = None
    reasoning: dict[str, Any] = field(default_factory=dict)
    thinking: dict[str, Any] = field(default_factory=dict)
    enable_thinking: bool | None = None
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    modalities: list[str] = field(default_factory=list)


class _Function(Struct, kw_only=True):
    name: str
    arguments: str = ""


class _ToolCall(Struct, kw_only=True):
    function: _Function
    id: str = ""
    type: str = "function"
    index: int = 0


class _Message(Struct, kw_only=True):
    role: str
    content: str | list[dict[str, Any]] | None = None
    name: str = ""
    tool_calls: list[_ToolCall] = field(default_factory=list)
    tool_call_id: str = ""
    reasoning_content: str = ""
    reasoning: str = ""


_RESERVED_ARGUMENTS: Final = frozenset(
    {
        "messages", "conversation", "tools", "documents", "tokenize", "chat_template", "add_generation_prompt",
        "continue_final_message", "padding", "truncation", "max_length", "return_tensors", "return_dict",
        "return_assistant_tokens_mask", "tokenizer_kwargs", "template_kwargs",
    }
)  # fmt: skip
"""What the server itself says to a chat template."""
_OWN_TEMPLATE_ARGUMENTS: Final = _RESERVED_ARGUMENTS | {"enable_thinking"}
CHAT_FIELDS: Final = FieldRules(
    route="POST /v1/chat/completions",
    body=_ChatBody,
    ignored=IGNORED_FIELDS,
    refused={
        "functions": "functions are long deprecated: use tools",
        "function_call": "function_call is long deprecated: use tool_choice",
        "audio": "this server answers in text only",
        "web_search_options": "this server does not search the web",
    },
    notes={
        **FIELD_NOTES,
        "response_format": "json_object and json_schema are enforced by a grammar, strict or not",
        "tool_choice": "required, named and allowed_tools are enforced by a grammar: exactly one call",
        "tools": "with strict the arguments are enforced, for families that write calls in JSON",
        "reasoning_effort": "none turns thinking off; models that cannot think answer without",
        "max_tokens": "max_completion_tokens wins",
        "messages": "images as data URLs, for models with vision",
        "chat_template_kwargs": "handed to the model's chat template; enable_thinking as the field of that name",
    },
    inside={
        "messages[]": _Message,
        "messages[].content[]": PART_NAMES,
        "messages[].content[].image_url": IMAGE_NAMES,
        "tools[]": TOOL_BODY,
        "response_format": frozenset({"type", "json_schema", "schema"}),
        "response_format.json_schema": frozenset({"name", "description", "schema", "strict"}),
        "reasoning": frozenset({"effort"}),
        "thinking": frozenset({"type"}),
        **TOOL_CHOICE_NAMES,
    },
)


def parse_chat_completion(body: bytes) -> Call:
    """Raises ``InvalidRequest`` with ``param``; nothing was looked up yet."""
    data = read_object(body, empty="EOF")
    chat = convert(data, _ChatBody)
    ignored = list(CHAT_FIELDS.check(data))
    if not chat.messages:
        raise InvalidRequest("[] is too short - 'messages'", param="messages")
    check_ranges(chat)
    _check_logprobs(chat)
    if any(kind != "text" for kind in chat.modalities):
        raise UnsupportedCapability("this server answers in text only", param="modalities")
    use = tool_use(read_tools(chat.tools, ignored), chat.tool_choice)
    options = parse_options(chat.options)
    thinking, effort = _thinking(chat, ignored)
    needs = {Needs.COMPLETION: Need('"{name}" does not support chat')}
    if use.offered:
        needs[Needs.TOOLS] = Need("{full} does not support tools")
    messages = []
    for number, item in enumerate(chat.messages):
        message, image_at = _message(number, item, ignored)
        if image_at:
            needs.setdefault(Needs.VISION, Need("{full} does not support images", image_at))
        messages.append(message)
    schema = read_response_format(chat.response_format, "response_format")
    if schema is not None:
        ignored += ["response_format"] if use.forced else schema.ignored
    schema = None if use.forced else schema  # a call that is forced leaves no room for another form
    template_arguments = {k: v for k, v in chat.chat_template_kwargs.items() if k not in _OWN_TEMPLATE_ARGUMENTS}
    ignored += [f"chat_template_kwargs.{name}" for name in chat.chat_template_kwargs if name in _RESERVED_ARGUMENTS]
    request = canonical_request(
        chat,
        options,
        messages=messages,
        tools=use.offered,
        forced_tools=use.forced,
        max_tool_calls=None if chat.parallel_tool_calls else 1,
        incremental_tools=chat.stream,
        thinking=thinking,
        thinking_effort=effort,
        template_arguments=msgspec.json.encode(template_arguments).decode() if template_arguments else "",
        schema=schema.text if schema is not None else None,
        max_tokens=limit_of(chat.max_completion_tokens, chat.max_tokens, options.max_tokens),
        top_logprobs=(chat.top_logprobs or 0) if chat.logprobs else None,
    )
    return choices_call(chat, [request], needs, options, ignored)


def _check_logprobs(chat: _ChatBody) -> None:
    if chat.top_logprobs is not None:
        if not 0 <= chat.top_logprobs <= 20:
            raise InvalidRequest("top_logprobs must be between 0 and 20", param="top_logprobs")
        if not chat.logprobs:
            raise InvalidRequest("top_logprobs needs logprobs to be true", param="top_logprobs")


def read_response_format(form: dict[str, Any], param: str) -> AnswerSchema | None:
    """The schema that the answer has to satisfy. Chat nests it under ``json_schema``, responses have it beside
    ``type``, and llama.cpp's clients have it beside the type ``json_object`` too."""
    kind = form.get("type") or ("json_schema" if "json_schema" in form else "text")
    if kind == "text":
        if form.get("schema") or form.get("json_schema"):
            raise InvalidRequest("a schema needs the type json_schema", param=f"{param}.type")
        return None
    if kind not in ("json_object", "json_schema"):
        raise InvalidRequest(f"unknown format {kind!r}: text, json_object or json_schema", param=f"{param}.type")
    inner = form.get("json_schema", form)
    if not isinstance(inner, dict):
        raise InvalidRequest("json_schema must be an object", param=f"{param}.json_schema")
    schema = inner.get("schema")
    if schema is None:
        return ANY_OBJECT
    if not isinstance(schema, dict):
        raise InvalidRequest("the schema has to be an object", param=f"{param}.json_schema.schema")
    return answer_schema(schema, param)


def _thinking(chat: _ChatBody, ignored: list[str]) -> tuple[bool | None, str | None]:
    """Whether to think, and how hard; the most specific field wins."""
    effort = chat.reasoning_effort or chat.reasoning.get("effort")
    if effort is not None:
        return read_effort(effort, "reasoning_effort")
    said = chat.enable_thinking
    switch = chat.chat_template_kwargs.get("enable_thinking")
    if switch is not None and not isinstance(switch, bool):
        raise InvalidRequest("enable_thinking must be true or false", param="chat_template_kwargs.enable_thinking")
    said = switch if said is None else said
    kind = chat.thinking.get("type")
    if said is None and kind in ("enabled", "disabled"):
        return kind == "enabled", None
    if kind not in (None, "enabled", "disabled"):
        ignored.append("thinking.type")
    return said, None


def _message(number: int, item: dict[str, Any], ignored: list[str]) -> tuple[Message, str]:
    """A message, and where in it the first image is, if one is. ``name`` is reported as ignored: chat
    templates have no field for it."""
    at = f"messages[{number}]"
    message = convert(item, _Message, f"{at}.")
    if message.role not in _ROLES:
        raise InvalidRequest(f"unknown role {message.role!r}", param=f"{at}.role")
    if message.content is None and not message.tool_calls and message.role != "assistant":
        raise InvalidRequest("invalid message content type: <nil>", param=f"{at}.content")
    parts: list[str | bytes] = []
    if isinstance(message.content, list):
        parts = [read_part(part, f"{at}.content[{n}]") for n, part in enumerate(message.content)]
    elif message.content:
        parts = [message.content]
    image_at = next((f"{at}.content[{n}]" for n, part in enumerate(parts) if isinstance(part, bytes)), "")
    role = _ROLES[message.role]
    if message.name and role is not Role.TOOL:
        ignored.append(f"{at}.name")
    return (
        Message(
            role=role,
            content="".join(part for part in parts if isinstance(part, str)),
            images=[part for part in parts if isinstance(part, bytes)],
            reasoning=message.reasoning_content or message.reasoning or None,
            tool_calls=[
                ToolCall(id=call.id, name=call.function.name, arguments=call.function.arguments or "{}")
                for call in message.tool_calls
            ],
            tool_call_id=message.tool_call_id or None,
            tool_name=message.name or None if role is Role.TOOL else None,
        ),
        image_at,
    )
