"""Anthropic's bodies: /v1/messages and /v1/messages/count_tokens."""

from __future__ import annotations

from typing import Any, Final, NamedTuple

import msgspec
from msgspec import Struct, field

from mlx_router_server.dialects.body import Int64, convert, read_object, without_nulls
from mlx_router_server.dialects.call import Call, Need, Needs
from mlx_router_server.dialects.fields import FieldRules
from mlx_router_server.dialects.images import image_from_base64
from mlx_router_server.dialects.openai_common import ToolUse
from mlx_router_server.dialects.options import parse_options
from mlx_router_server.dialects.schemas import schema_text
from mlx_router_server.durations import parse_duration
from mlx_router_shared.errors import InvalidRequest, UnsupportedCapability
from mlx_router_shared.generation import GenerationRequest, Message, Role, Sampling, Tool, ToolCall

__all__ = ["COUNT_FIELDS", "MESSAGE_FIELDS", "MessagesCall", "parse_count", "parse_messages"]

_DEFAULTS: Final = Sampling(temperature=1.0)
_EFFORTS: Final = {"low": "low", "medium": "medium", "high": "high", "xhigh": "max", "max": "max"}
_BILLING: Final = "x-anthropic-billing-header:"
# What a hosted service runs itself; here nobody does, so the model is not told of it.
_SERVER_TOOLS: Final = (
    "web_search", "web_fetch", "code_execution", "tool_search", "computer", "browser", "mcp_toolset",
)  # fmt: skip
_SERVER_BLOCKS: Final = (
    "server_tool_use", "web_search_tool_result", "web_fetch_tool_result", "code_execution_tool_result",
    "bash_code_execution_tool_result", "text_editor_code_execution_tool_result", "mcp_tool_use", "mcp_tool_result",
    "tool_search_tool_result", "container_upload", "redacted_thinking", "tool_reference", "compaction",
)  # fmt: skip


class _CountBody(Struct, kw_only=True):
    model: str = ""
    messages: list[dict[str, Any]] = field(default_factory=list)
    system: str | list[dict[str, Any]] = ""
    tools: list[dict[str, Any]] = field(default_factory=list)
    tool_choice: dict[str, Any] = field(default_factory=dict)
    thinking: dict[str, Any] = field(default_factory=dict)
    output_config: dict[str, Any] = field(default_factory=dict)
    output_format: dict[str, Any] = field(default_factory=dict)


class _MessagesBody(_CountBody, kw_only=True):
    max_tokens: Int64 | None = None
    stream: bool = False
    temperature: float | None = None
    top_p: float | None = None
    top_k: Int64 | None = None
    stop_sequences: list[str] = field(default_factory=list)
    keep_alive: Any = None
    options: dict[str, Any] = field(default_factory=dict)


class _Tool(Struct, kw_only=True):
    name: str = ""
    type: str = "custom"
    description: str = ""
    input_schema: dict[str, Any] = field(default_factory=dict)
    strict: bool = False
    defer_loading: bool = False


_HOSTED: Final = "accounting or placement of a hosted service"
_IGNORED: Final = {
    "metadata": _HOSTED,
    "service_tier": _HOSTED,
    "speed": _HOSTED,
    "inference_geo": _HOSTED,
    "container": _HOSTED,
    "context_management": "the client's messages are taken as they come",
    "cache_control": "what was read of a prompt is not kept for the next request",
    "diagnostics": _HOSTED,
    "user_profile_id": _HOSTED,
    "workspace_id": _HOSTED,
    "betas": "in the body it has no meaning",
}
_NOTES: Final = {
    "system": "a billing line of Claude Code, which differs from call to call, is left out",
    "messages": "system items anywhere; a final assistant message is continued; images as base64",
    "tools": "custom tools; those a hosted service would run are left out; with strict the input is enforced",
    "tool_choice": "any and tool are enforced by a grammar: exactly one call",
    "thinking": "off unless asked for; budget_tokens ends it; models that cannot think answer without",
    "output_config": "format json_schema is enforced by a grammar; effort goes to templates with levels",
    "temperature": "0 to 2, under every anthropic-version",
    "keep_alive": "Ollama's field, also by the header X-Keep-Alive",
    "options": "Ollama's field; the API's own fields win over it",
}
MESSAGE_FIELDS: Final = FieldRules(
    route="POST /v1/messages",
    body=_MessagesBody,
    ignored=_IGNORED,
    refused={"mcp_servers": "this server talks to no MCP servers"},
    notes=_NOTES,
)
COUNT_FIELDS: Final = FieldRules(
    route="POST /v1/messages/count_tokens",
    body=_CountBody,
    notes={"messages": "images are not counted: how many tokens one takes is known only where the model is loaded"},
    ignored={**_IGNORED, **dict.fromkeys(("max_tokens", "stream", "temperature"), "does not change the prompt")},
    refused={"mcp_servers": "this server talks to no MCP servers"},
)


class MessagesCall(NamedTuple):
    """A request, and whether thinking is shown in its answer or only said to have happened."""

    call: Call
    show_thinking: bool


def parse_messages(body: bytes) -> MessagesCall:
    """Raises ``InvalidRequest``; nothing was looked up yet."""
    data = read_object(body)
    asked = convert(data, _MessagesBody)
    ignored = MESSAGE_FIELDS.check(data)
    if "model" not in data:
        raise InvalidRequest("model is required", param="model")
    if asked.max_tokens is None or asked.max_tokens < 0:
        raise InvalidRequest("max_tokens is required and must be positive", param="max_tokens")
    _check_ranges(asked)
    options = parse_options(asked.options)
    said = options.sampling
    prompt, needs = _prompt(asked)
    prompt["max_tool_calls"] = 1 if asked.tool_choice.get("disable_parallel_tool_use") else None
    request = GenerationRequest(
        **prompt,
        incremental_tools=asked.stream,
        max_thinking_tokens=_budget(asked.thinking),
        schema=None if prompt["forced_tools"] else _schema(asked),
        max_tokens=asked.max_tokens,
        context_tokens=options.context_tokens,
        stop=[text for text in asked.stop_sequences if text] or options.stop,
        sampling=msgspec.structs.replace(
            said,
            temperature=said.temperature if asked.temperature is None else asked.temperature,
            top_p=said.top_p if asked.top_p is None else asked.top_p,
            top_k=said.top_k if asked.top_k is None else asked.top_k,
        ),
        sampling_defaults=_DEFAULTS,
    )
    call = Call(
        model=asked.model,
        requests=(request,),
        stream=asked.stream,
        keep_alive_seconds=None if asked.keep_alive is None else parse_duration(asked.keep_alive),
        needs=needs,
        ignored=ignored + tuple(f"options.{name}" for name in options.ignored),
    )
    return MessagesCall(call, asked.thinking.get("display") != "omitted")


def parse_count(body: bytes) -> Call:
    """The prompt alone; raises ``InvalidRequest``."""
    data = read_object(body)
    asked = convert(data, _CountBody)
    ignored = COUNT_FIELDS.check(data)
    if "model" not in data:
        raise InvalidRequest("model is required", param="model")
    prompt, needs = _prompt(asked)
    return Call(model=asked.model, requests=(GenerationRequest(**prompt),), needs=needs, ignored=ignored)


def _prompt(asked: _CountBody) -> tuple[dict[str, Any], dict[Needs, Need]]:
    """The fields of the canonical request that make the prompt, and what they need."""
    if not asked.messages:
        raise InvalidRequest("messages is required", param="messages")
    use = _tool_use(_tools(asked.tools), asked.tool_choice)
    messages = _system(asked.system)
    for number, item in enumerate(asked.messages):
        messages += _message(item, f"messages.{number}")
    messages = _merged(messages)
    needs = {Needs.COMPLETION: Need('"{name}" does not support chat')}
    if use.offered:
        needs[Needs.TOOLS] = Need("{full} does not support tools", "tools")
    if any(message.images for message in messages):
        # Claude Code knows these words: it then goes on without the picture, instead of giving up.
        needs[Needs.VISION] = Need("Could not process image: {full} does not support images", "messages")
    last = messages[-1]
    thinking = asked.thinking.get("type") in ("enabled", "adaptive", "between_tools")
    effort = asked.output_config.get("effort")
    return {
        "messages": messages,
        "continue_final": last.role is Role.ASSISTANT and not last.tool_calls,
        "tools": use.offered,
        "forced_tools": use.forced,
        "thinking": thinking,
        "thinking_effort": _EFFORTS.get(effort) if thinking and isinstance(effort, str) else None,
    }, needs


def _check_ranges(asked: _MessagesBody) -> None:
    for name, value, high in (("temperature", asked.temperature, 2), ("top_p", asked.top_p, 1)):
        if value is not None and not 0 <= value <= high:
            raise InvalidRequest(f"{name} must be between 0 and {high}, not {value:g}", param=name)
    if asked.top_k is not None and asked.top_k < 0:
        raise InvalidRequest("top_k must not be negative", param="top_k")


def _budget(thinking: dict[str, Any]) -> int | None:
    budget = thinking.get("budget_tokens")
    if budget is None:
        return None
    if not isinstance(budget, int) or isinstance(budget, bool) or budget < 1:
        raise InvalidRequest("thinking.budget_tokens must be a whole number above 0", param="thinking.budget_tokens")
    return budget


def _schema(asked: _MessagesBody) -> str | None:
    form = asked.output_config.get("format") or asked.output_format
    if not form:
        return None
    if not isinstance(form, dict) or form.get("type") != "json_schema" or not isinstance(form.get("schema"), dict):
        raise InvalidRequest("output_config.format has to be a json_schema with a schema", param="output_config.format")
    return schema_text(form["schema"], "output_config.format.schema")


def _system(system: str | list[dict[str, Any]]) -> list[Message]:
    if isinstance(system, str):
        texts = [system]
    else:
        texts = [_text(block, f"system.{number}") for number, block in enumerate(system)]
        if texts and texts[0].startswith(_BILLING):
            texts = texts[1:]
    text = "\n\n".join(part for part in texts if part)
    return [Message(role=Role.SYSTEM, content=text)] if text else []


def _text(block: dict[str, Any], at: str) -> str:
    text = block.get("text")
    if block.get("type") != "text" or not isinstance(text, str):
        raise InvalidRequest(f"{at}: only text blocks are possible here", param=at)
    return text


# ------------------------------------------------------------------------------------------------- messages


class _Turn(NamedTuple):
    """The blocks of one message, sorted."""

    texts: list[str]
    images: list[bytes]
    calls: list[ToolCall]
    results: list[Message]
    thoughts: list[str]


def _message(item: dict[str, Any], at: str) -> list[Message]:
    role, content = item.get("role"), item.get("content")
    if role not in ("user", "assistant", "system"):
        raise InvalidRequest(f"{at}.role: unknown role {role!r}", param=f"{at}.role")
    if isinstance(content, str):
        return [Message(role=Role(role), content=content)]
    if not isinstance(content, list) or not all(isinstance(block, dict) for block in content):
        raise InvalidRequest(f"{at}.content: has to be a string or a list of blocks", param=f"{at}.content")
    turn = _Turn([], [], [], [], [])
    for number, block in enumerate(content):
        _sort(without_nulls(block), f"{at}.content.{number}", turn)
    out = list(turn.results)
    if turn.texts or turn.images or turn.calls or not out:
        out.append(
            Message(
                role=Role(role),
                content="\n\n".join(turn.texts) if role == "system" else "".join(turn.texts),
                images=turn.images,
                reasoning="".join(turn.thoughts) or None,
                tool_calls=turn.calls,
            )
        )
    return out


def _sort(block: dict[str, Any], at: str, turn: _Turn) -> None:
    kind = block.get("type")
    if kind == "text":
        turn.texts.append(_text(block, at))
    elif kind == "image":
        turn.images.append(_image(block, at))
    elif kind == "tool_use":
        turn.calls.append(_call(block, at))
    elif kind == "tool_result":
        turn.results.append(_result(block, at, turn))
    elif kind == "thinking":
        turn.thoughts.append(str(block.get("thinking", "")))
    elif kind in ("document", "search_result"):
        turn.texts.append(_document(block, at))
    elif kind not in _SERVER_BLOCKS:
        raise InvalidRequest(f"{at}: unknown block type {kind!r}", param=at)


def _image(block: dict[str, Any], at: str) -> bytes:
    source = block.get("source")
    kind = source.get("type") if isinstance(source, dict) else None
    if not isinstance(source, dict) or kind != "base64" or not isinstance(source.get("data"), str):
        raise InvalidRequest(
            f"invalid image source type: {kind}. Only base64 images are supported.", param=f"{at}.source"
        )
    return image_from_base64(source["data"], f"{at}.source.data")


def _call(block: dict[str, Any], at: str) -> ToolCall:
    name, call_id, arguments = block.get("name"), block.get("id"), block.get("input", {})
    if not isinstance(name, str) or not isinstance(call_id, str):
        raise InvalidRequest(f"{at}: tool_use needs an id and a name", param=at)
    return ToolCall(id=call_id, name=name, arguments=msgspec.json.encode(arguments).decode())


def _result(block: dict[str, Any], at: str, turn: _Turn) -> Message:
    content = block.get("content", "")
    inner = _Turn([], [], [], [], [])
    if isinstance(content, list):
        for number, part in enumerate(content):
            if not isinstance(part, dict):
                raise InvalidRequest(f"{at}.content.{number}: has to be a block", param=f"{at}.content.{number}")
            _sort(without_nulls(part), f"{at}.content.{number}", inner)
    elif isinstance(content, str):
        inner.texts.append(content)
    text = "\n".join(inner.texts)
    turn.images.extend(inner.images)  # templates take images in user turns only
    if block.get("is_error") is True:
        text = f"Error: {text}" if text else "Error"
    return Message(role=Role.TOOL, content=text, tool_call_id=str(block.get("tool_use_id", "")) or None)


def _document(block: dict[str, Any], at: str) -> str:
    """Plain text of a document or a search result, under its title."""
    source = block.get("source")
    title = block.get("title")
    parts = [title] if isinstance(title, str) else []
    content = block.get("content") if block.get("type") == "search_result" else source
    if isinstance(content, dict) and content.get("type") == "text" and isinstance(content.get("data"), str):
        parts.append(content["data"])
    elif isinstance(content, dict) and content.get("type") == "content":
        content = content.get("content")
        parts.append(content if isinstance(content, str) else _texts(content, at))
    elif isinstance(content, list):
        parts.append(_texts(content, at))
    else:
        kind = content.get("type") if isinstance(content, dict) else None
        raise UnsupportedCapability(f"{at}: documents of source type {kind!r} are not supported", param=at)
    return "\n".join(parts)


def _texts(blocks: Any, at: str) -> str:
    if not isinstance(blocks, list) or not all(isinstance(block, dict) for block in blocks):
        raise InvalidRequest(f"{at}: has to be a list of blocks", param=at)
    return "\n".join(_text(block, f"{at}.content.{number}") for number, block in enumerate(blocks))


def _merged(messages: list[Message]) -> list[Message]:
    """Consecutive turns of user or assistant as one; calls, results and system turns stay as they are."""
    out: list[Message] = []
    for message in messages:
        last = out[-1] if out else None
        if (
            last is not None
            and last.role is message.role
            and message.role in (Role.USER, Role.ASSISTANT)
            and not last.tool_calls
        ):
            out[-1] = msgspec.structs.replace(
                message,
                content="\n\n".join(text for text in (last.content, message.content) if text),
                images=last.images + message.images,
                reasoning="".join(text for text in (last.reasoning, message.reasoning) if text) or None,
            )
        else:
            out.append(message)
    return out


# ---------------------------------------------------------------------------------------------------- tools


def _tools(items: list[dict[str, Any]]) -> list[Tool]:
    tools = []
    for number, item in enumerate(items):
        tool = convert(without_nulls(item), _Tool, f"tools.{number}.")
        if tool.type.startswith(_SERVER_TOOLS) or tool.defer_loading:
            continue
        if tool.type != "custom":
            raise UnsupportedCapability(f"tools of type {tool.type!r} are not supported", param=f"tools.{number}.type")
        if not tool.name:
            raise InvalidRequest(f"tools.{number}.name is required", param=f"tools.{number}.name")
        schema = tool.input_schema or {"type": "object", "properties": {}}
        if tool.strict:
            schema_text(schema, f"tools.{number}.input_schema")
        tools.append(
            Tool(
                name=tool.name,
                description=tool.description,
                parameters=msgspec.json.encode(schema).decode(),
                strict=tool.strict,
            )
        )
    return tools


def _tool_use(tools: list[Tool], choice: dict[str, Any]) -> ToolUse:
    kind = choice.get("type", "auto")
    known = [tool.name for tool in tools]
    if kind == "auto":
        return ToolUse(tools, [])
    if kind == "none":
        return ToolUse([], [])
    if kind not in ("any", "tool"):
        raise InvalidRequest(f"tool_choice.type must be auto, any, tool or none, not {kind!r}", param="tool_choice")
    if not tools:
        raise InvalidRequest("tool_choice needs tools", param="tool_choice")
    if kind == "any":
        return ToolUse(tools, known)
    if choice.get("name") not in known:
        raise InvalidRequest(f"tool_choice names {choice.get('name')!r}, which is not among the tools",
                             param="tool_choice.name")  # fmt: skip
    return ToolUse(tools, [choice["name"]])
