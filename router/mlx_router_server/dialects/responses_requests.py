"""OpenAI's /v1/responses: items in, the canonical request out."""

from __future__ import annotations

import base64
import binascii
from typing import Any, Final

import msgspec
from msgspec import Struct, field

from mlx_router_server.dialects.body import Int64, convert, read_object, without_nulls
from mlx_router_server.dialects.call import Call, Need, Needs
from mlx_router_server.dialects.fields import FieldRules
from mlx_router_server.dialects.openai_common import (
    OPENAI_DEFAULTS,
    TOOL_CHOICE_NAMES,
    SamplingFields,
    check_ranges,
    limit_of,
    read_effort,
    read_part,
    sampling_of,
    tool_use,
)
from mlx_router_server.dialects.openai_requests import read_response_format
from mlx_router_server.dialects.options import parse_options
from mlx_router_server.dialects.schemas import StrictTools
from mlx_router_server.durations import parse_duration
from mlx_router_shared.errors import InvalidRequest, UnsupportedCapability
from mlx_router_shared.generation import GenerationRequest, Message, Role, Tool, ToolCall

__all__ = ["RESPONSE_FIELDS", "ResponsesCall", "parse_responses"]

_ROLES: Final = {
    "system": Role.SYSTEM,
    "developer": Role.SYSTEM,
    "user": Role.USER,
    "assistant": Role.ASSISTANT,
}
# What hosted tools leave behind in a conversation: nothing a local model could use.
_DROPPED_ITEMS: Final = (
    "web_search_call", "file_search_call", "computer_call", "computer_call_output", "image_generation_call",
    "code_interpreter_call", "local_shell_call", "local_shell_call_output", "shell_call", "shell_call_output",
    "apply_patch_call", "apply_patch_call_output", "mcp_list_tools", "mcp_approval_request", "mcp_approval_response",
    "mcp_call", "compaction", "additional_tools", "tool_search_call", "tool_search_output",
)  # fmt: skip


class _Body(SamplingFields, kw_only=True):
    input: str | list[dict[str, Any]] = field(default_factory=list)
    instructions: str = ""
    max_output_tokens: Int64 | None = None
    top_logprobs: Int64 | None = None
    tools: list[dict[str, Any]] = field(default_factory=list)
    tool_choice: Any = None
    parallel_tool_calls: bool = True
    text: dict[str, Any] = field(default_factory=dict)
    reasoning: dict[str, Any] = field(default_factory=dict)
    include: list[str] = field(default_factory=list)
    store: bool = True
    previous_response_id: str = ""
    truncation: str = "disabled"
    metadata: dict[str, Any] = field(default_factory=dict)


class _Tool(Struct, kw_only=True):
    name: str
    description: str = ""
    parameters: dict[str, Any] = field(default_factory=dict)
    strict: bool = False


_INCLUDED: Final = ("reasoning.encrypted_content", "message.output_text.logprobs")
_HOSTED: Final = "accounting of a hosted service; nothing here depends on it"
RESPONSE_FIELDS: Final = FieldRules(
    route="POST /v1/responses",
    body=_Body,
    ignored={
        "user": _HOSTED,
        "safety_identifier": _HOSTED,
        "prompt_cache_key": "what was read of a prompt is not kept for the next request",
        "prompt_cache_retention": "as prompt_cache_key",
        "prompt_cache_options": "as prompt_cache_key",
        "service_tier": _HOSTED,
        "client_metadata": _HOSTED,
        "context_management": "the items are taken as they come",
        "max_tool_calls": "it counts calls that a hosted service makes itself",
        "moderation": _HOSTED,
        "stream_options": "there is no obfuscation to switch off",
    },
    refused={
        "conversation": "this server keeps no conversations: use previous_response_id",
        "prompt": "this server keeps no prompts",
        "background": "this server answers in the connection that asks: background is not supported",
    },
    notes={
        "input": "images as data URLs; items of hosted tools in a history are left out",
        "tools": "functions, and those of namespaces; types that a hosted service runs are left out",
        "tool_choice": "required, named and allowed_tools are enforced by a grammar: exactly one call",
        "text": "json_object and json_schema are enforced by a grammar",
        "store": "kept in memory, bounded in number, size and time; see responses_kept",
        "include": f"{' and '.join(_INCLUDED)}; others are named as ignored",
        "truncation": "auto drops the oldest turns",
        "metadata": "echoed",
        "keep_alive": "Ollama's field, also by the header X-Keep-Alive",
        "options": "Ollama's field; the API's own fields win over it",
    },
    inside={
        "text": frozenset({"format"}),
        "text.format": frozenset({"type", "name", "description", "schema", "strict", "json_schema"}),
        "reasoning": frozenset({"effort", "summary"}),
        "input[]": frozenset(
            {
                "type", "role", "content", "id", "status", "call_id", "name", "namespace", "arguments", "input",
                "output", "summary", "encrypted_content",
            }
        ),
        "input[].content[]": frozenset({"type", "text", "refusal", "image_url", "annotations", "logprobs"}),
        "tools[]": frozenset({"type", "name", "description", "parameters", "strict", "tools"}),
        "tools[].tools[]": frozenset({"type", "name", "description", "parameters", "strict"}),
        **TOOL_CHOICE_NAMES,
    },
)  # fmt: skip


class ResponsesCall(Struct, frozen=True, kw_only=True):
    """A request, and what its answer repeats of it."""

    call: Call
    """Without what went before, if ``previous_response_id`` names something."""
    instructions: str
    messages: list[Message]
    """Of the input alone."""
    items: list[dict[str, Any]]
    """The input as it was sent."""
    previous_response_id: str
    store: bool
    encrypted_reasoning: bool
    namespaces: dict[str, tuple[str, str]]
    """Names as the model knows them to namespace and member."""
    echoed: dict[str, Any]

    def after(self, history: list[Message]) -> Call:
        """The call with what went before between the instructions and the input."""
        (request,) = self.call.requests
        assert isinstance(request, GenerationRequest)
        system = [Message(role=Role.SYSTEM, content=self.instructions)] if self.instructions else []
        request = msgspec.structs.replace(request, messages=[*system, *history, *self.messages])
        return Call(
            model=self.call.model,
            requests=(request,),
            stream=self.call.stream,
            keep_alive_seconds=self.call.keep_alive_seconds,
            needs=self.call.needs,
            ignored=self.call.ignored,
        )


def parse_responses(body: bytes) -> ResponsesCall:
    """Raises ``InvalidRequest`` with ``param``; nothing was looked up yet."""
    data = read_object(body, empty="EOF")
    asked = convert(data, _Body)
    ignored = list(RESPONSE_FIELDS.check(data))
    check_ranges(asked)
    if asked.top_logprobs is not None and not 0 <= asked.top_logprobs <= 20:
        raise InvalidRequest("top_logprobs must be between 0 and 20", param="top_logprobs")
    if asked.truncation not in ("auto", "disabled"):
        raise InvalidRequest("truncation must be auto or disabled", param="truncation")
    if not asked.input and not asked.previous_response_id:
        raise InvalidRequest("input is required", param="input")
    ignored += [f"include[{number}]" for number, name in enumerate(asked.include) if name not in _INCLUDED]
    messages, image_at = _messages(asked.input, ignored)
    tools, namespaces = _tools(asked.tools, ignored)
    use = tool_use(tools, asked.tool_choice)
    effort = asked.reasoning.get("effort")
    if effort is not None and not isinstance(effort, str):
        raise InvalidRequest("reasoning.effort must be a string", param="reasoning.effort")
    thinking, level = read_effort(effort, "reasoning.effort")
    options = parse_options(asked.options)
    needs = {Needs.COMPLETION: Need('"{name}" does not support chat')}
    if use.offered:
        needs[Needs.TOOLS] = Need("{full} does not support tools")
    if image_at:
        needs[Needs.VISION] = Need("{full} does not support images", image_at)
    form = asked.text.get("format") or {}
    if not isinstance(form, dict):
        raise InvalidRequest("text.format must be an object", param="text.format")
    schema = read_response_format(form, "text.format")
    if schema is not None:
        ignored += ["text.format"] if use.forced else schema.ignored
    schema = None if use.forced else schema  # a call that is forced leaves no room for another form
    logprobs = asked.top_logprobs is not None or "message.output_text.logprobs" in asked.include
    request = GenerationRequest(
        sampling=sampling_of(asked, options),
        sampling_defaults=OPENAI_DEFAULTS,
        tools=use.offered,
        forced_tools=use.forced,
        max_tool_calls=None if asked.parallel_tool_calls else 1,
        incremental_tools=asked.stream,
        thinking=thinking,
        thinking_effort=level,
        schema=schema.text if schema is not None else None,
        max_tokens=limit_of(asked.max_output_tokens, options.max_tokens),
        context_tokens=limit_of(asked.num_ctx, options.context_tokens),
        stop=options.stop,
        truncate=asked.truncation == "auto",
        top_logprobs=(asked.top_logprobs or 0) if logprobs else None,
    )
    call = Call(
        model=asked.model,
        requests=(request,),
        stream=asked.stream,
        keep_alive_seconds=None if asked.keep_alive is None else parse_duration(asked.keep_alive),
        needs=needs,
        ignored=(*ignored, *(f"options.{name}" for name in options.ignored)),
    )
    return ResponsesCall(
        call=call,
        instructions=asked.instructions,
        messages=messages,
        items=asked.input if isinstance(asked.input, list) else _as_items(asked.input),
        previous_response_id=asked.previous_response_id,
        store=asked.store,
        encrypted_reasoning="reasoning.encrypted_content" in asked.include,
        namespaces=namespaces,
        echoed={
            "instructions": asked.instructions or None,
            "max_output_tokens": asked.max_output_tokens,
            "metadata": asked.metadata,
            "parallel_tool_calls": asked.parallel_tool_calls,
            "previous_response_id": asked.previous_response_id or None,
            "reasoning": {"effort": effort, "summary": asked.reasoning.get("summary")},
            "store": asked.store,
            "temperature": asked.temperature,
            "text": {"format": form or {"type": "text"}},
            "tool_choice": asked.tool_choice or "auto",
            "tools": asked.tools,
            "top_p": asked.top_p,
            "truncation": asked.truncation,
            "user": None,
        },
    )


# ------------------------------------------------------------------------------------------------------ input


def _as_items(text: str) -> list[dict[str, Any]]:
    content = [{"type": "input_text", "text": text}]
    return [{"type": "message", "role": "user", "content": content}] if text else []


def _messages(items: str | list[dict[str, Any]], ignored: list[str]) -> tuple[list[Message], str]:
    """The turns, and where the first image is. Reasoning and calls go into the assistant's turn they belong to."""
    if isinstance(items, str):
        return ([Message(role=Role.USER, content=items)] if items else []), ""
    out: list[Message] = []
    image_at = ""
    thought = ""
    for number, raw in enumerate(items):
        item, at = without_nulls(raw), f"input[{number}]"
        kind = item.get("type", "message" if "role" in item else None)
        if kind == "message":
            message, found = _message(item, at)
            image_at = image_at or found
            if message.role is Role.ASSISTANT and thought:
                message = msgspec.structs.replace(message, reasoning=thought)
                thought = ""
            out.append(message)
        elif kind in ("function_call", "custom_tool_call"):
            _add_call(out, item, at, thought)
            thought = ""
        elif kind in ("function_call_output", "custom_tool_call_output"):
            out.append(_output(item, at))
        elif kind == "reasoning":
            thought = _reasoning(item)
        elif kind == "item_reference":
            raise InvalidRequest(f"{at}: items are not kept by id: use previous_response_id", param=at)
        elif kind in _DROPPED_ITEMS:
            ignored.append(at)
        else:
            raise InvalidRequest(f"{at}: unknown input item type: {kind!r}", param=at)
    return out, image_at


def _message(item: dict[str, Any], at: str) -> tuple[Message, str]:
    role, content = item.get("role"), item.get("content", "")
    if not isinstance(role, str) or role not in _ROLES:
        raise InvalidRequest(f"{at}: unknown role {role!r}", param=f"{at}.role")
    parts: list[str | bytes] = [content] if isinstance(content, str) else []
    if isinstance(content, list):
        for number, part in enumerate(content):
            if not isinstance(part, dict):
                raise InvalidRequest("invalid message format", param=f"{at}.content[{number}]")
            parts.append(read_part(without_nulls(part), f"{at}.content[{number}]"))
    elif not isinstance(content, str):
        raise InvalidRequest("invalid message format", param=f"{at}.content")
    image_at = next((f"{at}.content[{n}]" for n, part in enumerate(parts) if isinstance(part, bytes)), "")
    texts = [part for part in parts if isinstance(part, str)]
    images = [part for part in parts if isinstance(part, bytes)]
    return Message(role=_ROLES[role], content="".join(texts), images=images), image_at


def _add_call(out: list[Message], item: dict[str, Any], at: str, thought: str) -> None:
    name, call_id = item.get("name"), item.get("call_id")
    arguments = item.get("arguments", item.get("input", "{}"))
    if not isinstance(name, str) or not isinstance(call_id, str) or not isinstance(arguments, str):
        raise InvalidRequest(f"{at}: a call needs call_id, name and arguments", param=at)
    if isinstance(item.get("namespace"), str):
        name = _in_namespace(item["namespace"], name)
    call = ToolCall(id=call_id, name=name, arguments=arguments or "{}")
    last = out[-1] if out else None
    if last is not None and last.role is Role.ASSISTANT and not thought:
        out[-1] = msgspec.structs.replace(last, tool_calls=[*last.tool_calls, call])
    else:
        out.append(Message(role=Role.ASSISTANT, tool_calls=[call], reasoning=thought or None))


def _output(item: dict[str, Any], at: str) -> Message:
    output = item.get("output", "")
    if isinstance(output, list):
        if not all(isinstance(part, dict) for part in output):
            raise InvalidRequest(f"{at}.output must be a string or a list of parts", param=f"{at}.output")
        parts = [read_part(part, f"{at}.output[{n}]") for n, part in enumerate(output)]
        if any(isinstance(part, bytes) for part in parts):
            raise UnsupportedCapability("images in the output of a tool are not supported", param=f"{at}.output")
        output = "".join(part for part in parts if isinstance(part, str))
    if not isinstance(output, str):
        raise InvalidRequest(f"{at}.output must be a string or a list of parts", param=f"{at}.output")
    return Message(role=Role.TOOL, content=output, tool_call_id=str(item.get("call_id", "")) or None)


def _reasoning(item: dict[str, Any]) -> str:
    """Thinking of an earlier turn; ours comes back as it was, somebody else's is passed over."""
    for name in ("content", "summary"):
        parts = item.get(name)
        texts = [str(p.get("text", "")) for p in parts if isinstance(p, dict)] if isinstance(parts, list) else []
        if any(texts):
            return "".join(texts)
    encrypted = item.get("encrypted_content")
    try:
        return base64.b64decode(encrypted, validate=True).decode() if isinstance(encrypted, str) else ""
    except (binascii.Error, ValueError):
        return ""


# ------------------------------------------------------------------------------------------------------ tools


def _in_namespace(namespace: str, name: str) -> str:
    return f"{namespace}__{name}"


def _tools(items: list[dict[str, Any]], ignored: list[str]) -> tuple[list[Tool], dict[str, tuple[str, str]]]:
    tools: list[Tool] = []
    namespaces: dict[str, tuple[str, str]] = {}
    strict_tools = StrictTools()
    for number, item in enumerate(items):
        kind, at = item.get("type"), f"tools[{number}]"
        if kind == "function":
            tools.append(_tool(item, at, strict_tools, ignored))
        elif kind == "namespace" and isinstance(item.get("tools"), list):
            for index, member in enumerate(item["tools"]):
                if isinstance(member, dict) and member.get("type", "function") == "function":
                    tool = _tool(member, at, strict_tools, ignored)
                    known_as = _in_namespace(str(item.get("name", "")), tool.name)
                    namespaces[known_as] = (str(item.get("name", "")), tool.name)
                    tools.append(msgspec.structs.replace(tool, name=known_as))
                else:
                    ignored.append(f"{at}.tools[{index}]")
        else:
            ignored.append(at)
    return tools, namespaces


def _tool(item: dict[str, Any], at: str, strict_tools: StrictTools, ignored: list[str]) -> Tool:
    tool = convert(item, _Tool, f"{at}.")
    parameters = tool.parameters or {"type": "object", "properties": {}}
    if tool.strict:
        ignored += strict_tools.check(parameters, f"{at}.parameters")
    return Tool(
        name=tool.name,
        description=tool.description,
        parameters=msgspec.json.encode(parameters).decode(),
        strict=tool.strict,
    )
