"""Anthropic's bodies: /v1/messages and /v1/messages/count_tokens."""

from __future__ import annotations

from typing import Any, Final, NamedTuple

import msgspec
from msgspec import Struct, field

from mlx_router_server.dialects.anthropic_blocks import conversation
from mlx_router_server.dialects.body import Int64, convert, read_object
from mlx_router_server.dialects.call import Call, Need, Needs
from mlx_router_server.dialects.fields import FieldRules
from mlx_router_server.dialects.openai_common import ToolUse
from mlx_router_server.dialects.options import checked_stops, parse_options
from mlx_router_server.dialects.schemas import AnswerSchema, StrictTools, answer_schema
from mlx_router_server.durations import parse_duration
from mlx_router_shared.errors import InvalidRequest, UnsupportedCapability
from mlx_router_shared.generation import GenerationRequest, Role, Sampling, Tool

__all__ = ["COUNT_FIELDS", "MESSAGE_FIELDS", "MessagesCall", "parse_count", "parse_messages"]

_DEFAULTS: Final = Sampling(temperature=1.0)
_THINKING: Final = ("enabled", "disabled", "adaptive", "between_tools")
_EFFORTS: Final = {"low": "low", "medium": "medium", "high": "high", "xhigh": "max", "max": "max"}
# What a hosted service runs itself; here nobody does, so the model is not told of it.
_SERVER_TOOLS: Final = (
    "web_search", "web_fetch", "code_execution", "tool_search", "computer", "browser", "mcp_toolset",
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
_BLOCK_NAMES: Final = frozenset(
    {
        "type", "text", "source", "id", "name", "input", "tool_use_id", "content", "is_error", "thinking", "signature",
        "data", "title",
    }
)  # fmt: skip
_INSIDE: Final[dict[str, type[Struct] | frozenset[str]]] = {
    "messages[]": frozenset({"role", "content"}),
    "messages[].content[]": _BLOCK_NAMES,
    "messages[].content[].content[]": _BLOCK_NAMES,
    "system[]": frozenset({"type", "text"}),
    "tools[]": _Tool,
    "tool_choice": frozenset({"type", "name", "disable_parallel_tool_use"}),
    "thinking": frozenset({"type", "budget_tokens", "display"}),
    "output_config": frozenset({"effort", "format"}),
}
MESSAGE_FIELDS: Final = FieldRules(
    route="POST /v1/messages",
    body=_MessagesBody,
    ignored=_IGNORED,
    refused={"mcp_servers": "this server talks to no MCP servers"},
    notes=_NOTES,
    inside=_INSIDE,
)
COUNT_FIELDS: Final = FieldRules(
    route="POST /v1/messages/count_tokens",
    body=_CountBody,
    notes={"messages": "images are not counted: how many tokens one takes is known only where the model is loaded"},
    ignored={**_IGNORED, **dict.fromkeys(("max_tokens", "stream", "temperature"), "does not change the prompt")},
    refused={"mcp_servers": "this server talks to no MCP servers"},
    inside=_INSIDE,
)


class MessagesCall(NamedTuple):
    """A request, and whether thinking is shown in its answer or only said to have happened."""

    call: Call
    show_thinking: bool
    names_thinking: bool
    """Whether the request says anything about thinking; it is off if not."""


def parse_messages(body: bytes) -> MessagesCall:
    """Raises ``InvalidRequest``; nothing was looked up yet."""
    data = read_object(body)
    asked = convert(data, _MessagesBody)
    ignored = list(MESSAGE_FIELDS.check(data))
    if "model" not in data:
        raise InvalidRequest("model is required", param="model")
    if asked.max_tokens is None or asked.max_tokens < 0:
        raise InvalidRequest("max_tokens is required and must be positive", param="max_tokens")
    _check_ranges(asked)
    options = parse_options(asked.options)
    said = options.sampling
    prompt, needs = _prompt(asked, ignored)
    schema = _schema(asked)
    if schema is not None:
        ignored += ["output_config.format"] if prompt["forced_tools"] else schema.ignored
    schema = None if prompt["forced_tools"] else schema  # a call that is forced leaves no room for another form
    prompt["max_tool_calls"] = 1 if asked.tool_choice.get("disable_parallel_tool_use") else None
    request = GenerationRequest(
        **prompt,
        incremental_tools=asked.stream,
        max_thinking_tokens=_budget(asked.thinking),
        schema=schema.text if schema is not None else None,
        max_tokens=asked.max_tokens,
        context_tokens=options.context_tokens,
        stop=checked_stops(asked.stop_sequences, "stop_sequences") or options.stop,
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
        ignored=(*ignored, *(f"options.{name}" for name in options.ignored)),
    )
    return MessagesCall(call, asked.thinking.get("display") != "omitted", bool(asked.thinking))


def parse_count(body: bytes) -> Call:
    """The prompt alone; raises ``InvalidRequest``."""
    data = read_object(body)
    asked = convert(data, _CountBody)
    ignored = list(COUNT_FIELDS.check(data))
    if "model" not in data:
        raise InvalidRequest("model is required", param="model")
    prompt, needs = _prompt(asked, ignored)
    return Call(model=asked.model, requests=(GenerationRequest(**prompt),), needs=needs, ignored=tuple(ignored))


def _prompt(asked: _CountBody, ignored: list[str]) -> tuple[dict[str, Any], dict[Needs, Need]]:
    """The fields of the canonical request that make the prompt, and what they need."""
    if not asked.messages:
        raise InvalidRequest("messages is required", param="messages")
    use = _tool_use(_tools(asked.tools, ignored), asked.tool_choice)
    messages = conversation(asked.system, asked.messages)
    needs = {Needs.COMPLETION: Need('"{name}" does not support chat')}
    if use.offered:
        needs[Needs.TOOLS] = Need("{full} does not support tools", "tools")
    if any(message.images for message in messages):
        # Claude Code knows these words: it then goes on without the picture, instead of giving up.
        needs[Needs.VISION] = Need("Could not process image: {full} does not support images", "messages")
    last = messages[-1]
    kind = asked.thinking.get("type") or "disabled"
    if kind not in _THINKING:
        raise InvalidRequest(f"thinking.type must be one of {', '.join(_THINKING)}", param="thinking.type")
    thinking = kind != "disabled"
    effort = asked.output_config.get("effort")
    if effort and (not isinstance(effort, str) or effort not in _EFFORTS):
        raise InvalidRequest(f"output_config.effort must be one of {', '.join(_EFFORTS)}", param="output_config.effort")
    if effort and not thinking:
        ignored.append("output_config.effort")
    return {
        "messages": messages,
        "continue_final": last.role is Role.ASSISTANT and not last.tool_calls,
        "tools": use.offered,
        "forced_tools": use.forced,
        "thinking": thinking,
        "thinking_effort": _EFFORTS[effort] if thinking and effort else None,
    }, needs


def _check_ranges(asked: _MessagesBody) -> None:
    # A top_p of -1 says "off"; the worker's normalise() gives it that meaning.
    for name, value, low, high in (("temperature", asked.temperature, 0, 2), ("top_p", asked.top_p, -1, 1)):
        if value is not None and not low <= value <= high:
            raise InvalidRequest(f"{name} must be between 0 and {high}, not {value:g}", param=name)


def _budget(thinking: dict[str, Any]) -> int | None:
    budget = thinking.get("budget_tokens")
    if budget is None:
        return None
    if not isinstance(budget, int) or isinstance(budget, bool) or not 1 <= budget < 2**63:
        raise InvalidRequest("thinking.budget_tokens must be a whole number above 0", param="thinking.budget_tokens")
    return budget


def _schema(asked: _MessagesBody) -> AnswerSchema | None:
    form = asked.output_config.get("format") or asked.output_format
    if not form:
        return None
    if not isinstance(form, dict) or form.get("type") != "json_schema" or not isinstance(form.get("schema"), dict):
        raise InvalidRequest("output_config.format has to be a json_schema with a schema", param="output_config.format")
    return answer_schema(form["schema"], "output_config.format.schema")


# ---------------------------------------------------------------------------------------------------- tools


def _tools(items: list[dict[str, Any]], ignored: list[str]) -> list[Tool]:
    tools = []
    strict_tools = StrictTools()
    for number, item in enumerate(items):
        tool = convert(item, _Tool, f"tools.{number}.")
        if tool.type.startswith(_SERVER_TOOLS) or tool.defer_loading:
            ignored.append(f"tools[{number}]")
            continue
        if tool.type != "custom":
            raise UnsupportedCapability(f"tools of type {tool.type!r} are not supported", param=f"tools.{number}.type")
        if not tool.name:
            raise InvalidRequest(f"tools.{number}.name is required", param=f"tools.{number}.name")
        schema = tool.input_schema or {"type": "object", "properties": {}}
        if tool.strict:
            ignored += strict_tools.check(schema, f"tools.{number}.input_schema")
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
