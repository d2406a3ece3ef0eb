"""From the canonical messages to what chat templates take.

Templates expect dictionaries in OpenAI's shape; which turns they take, and the style of their calls, are traits of the
template (``template_traits``, ``conversation``).
"""

from __future__ import annotations

import hashlib
import json
from itertools import pairwise
from typing import Any, Final

from msgspec.structs import replace

from mlx_router_shared.generation import Message, Role, Tool, ToolCall
from mlx_router_worker.text.template_traits import CallStyle, TemplateTraits

__all__ = ["droppable", "template_messages", "template_tools", "tools_as_text", "without"]

ALL_TRAITS: Final = TemplateTraits()
ANY_STYLE: Final = CallStyle()
_SHORT_ID: Final = 9


def template_messages(messages: list[Message], traits: TemplateTraits = ALL_TRAITS, style: CallStyle = ANY_STYLE,
                      ) -> list[dict[str, Any]]:  # fmt: skip
    """Messages as dictionaries; a tool result without a name or an id gets those of the call it answers."""
    out: list[dict[str, Any]] = []
    open_calls: list[ToolCall] = []  # not answered yet, in order
    made = 0
    for message in messages:
        content: Any = message.content
        if traits.typed_content:
            content = [{"type": "text", "text": content}]
        entry: dict[str, Any] = {"role": message.role.value, "content": content}
        if message.reasoning:
            entry["reasoning_content"] = message.reasoning
        if message.tool_calls:
            open_calls = []
            entry["tool_calls"] = []
            for call in message.tool_calls:
                made += 1
                known = replace(call, id=call.id or f"call_{made}")
                open_calls.append(known)
                entry["tool_calls"].append(_template_call(known, style))
        if message.role is Role.TOOL:
            answered = _take_call(open_calls, message)
            name = message.tool_name or (answered.name if answered is not None else None)
            call_id = message.tool_call_id or (answered.id if answered is not None else None)
            if name:
                entry["name"] = name
            if call_id:
                entry["tool_call_id"] = _short_id(call_id) if style.short_ids else call_id
        out.append(entry)
    return out


def _template_call(call: ToolCall, style: CallStyle) -> dict[str, Any]:
    arguments = call.arguments or "{}"
    return {
        "id": _short_id(call.id) if style.short_ids else call.id,
        "type": "function",
        "function": {"name": call.name, "arguments": arguments if style.text_arguments else _as_object(arguments)},
    }


def _short_id(call_id: str) -> str:
    """Nine letters and digits, the same for the same id."""
    if len(call_id) == _SHORT_ID and call_id.isascii() and call_id.isalnum():
        return call_id
    return hashlib.sha256(call_id.encode()).hexdigest()[:_SHORT_ID]


def _take_call(open_calls: list[ToolCall], result: Message) -> ToolCall | None:
    """The call with the result's id, else the next unanswered one of its name, else the next: some clients send
    neither."""
    same = [call for call in open_calls if result.tool_call_id and call.id == result.tool_call_id]
    same = same or [call for call in open_calls if result.tool_name and call.name == result.tool_name] or open_calls
    if not same:
        return None
    answered = same[0]
    open_calls.remove(answered)
    return answered


def _as_object(arguments: str) -> Any:
    try:
        return json.loads(arguments)
    except ValueError:
        return arguments  # passed on as text: a template can show it, a 500 would help nobody


def template_tools(tools: list[Tool]) -> list[dict[str, Any]]:
    """Tools in OpenAI's shape."""
    return [
        {
            "type": "function",
            "function": {
                "name": tool.name,
                "description": tool.description,
                "parameters": json.loads(tool.parameters),
            },
        }
        for tool in tools
    ]


def tools_as_text(tools: list[dict[str, Any]]) -> str:
    """A description of the tools for models whose template has no place for them."""
    lines = [json.dumps(tool["function"], ensure_ascii=False) for tool in tools]
    return (
        "You may call these tools, each described by a JSON object:\n" + "\n".join(lines) + "\n"
        'To call one, answer with <tool_call>{"name": ..., "arguments": {...}}</tool_call>.'
    )


def droppable(messages: list[Message]) -> list[list[int]]:
    """The parts of a conversation that may be left out, oldest first, each as the numbers of its turns.

    First the exchanges, each from a turn of the user (or a greeting) to the next; then, of the last exchange, all but
    the last of the user's turns that begin it, and the calls with their results. So neither the last turn of the user
    nor a system turn is left out, no result stands without its call, and what is left begins with a user.
    """
    starts = [at for at in range(len(messages)) if _begins_exchange(messages, at)]
    parts = [
        [at for at in range(start, following) if messages[at].role is not Role.SYSTEM]
        for start, following in pairwise(starts)
    ]
    at = starts[-1] + 1 if starts else len(messages)
    users = [starts[-1]] if starts and messages[starts[-1]].role is Role.USER else []
    for number in range(at, len(messages) if users else at):
        if messages[number].role not in (Role.USER, Role.SYSTEM):
            break
        if messages[number].role is Role.USER:
            users.append(number)
    parts += [[number] for number in users[:-1]]
    while at < len(messages):
        end = at + 1
        while end < len(messages) and messages[end].role is Role.TOOL:
            end += 1
        if messages[at].tool_calls and end < len(messages):
            parts.append(list(range(at, end)))
        at = end
    return parts


def _begins_exchange(messages: list[Message], at: int) -> bool:
    """Whether an exchange begins here: a user turn that follows no other user turn, or a leading greeting."""
    before = next((m for m in reversed(messages[:at]) if m.role is not Role.SYSTEM), None)
    if messages[at].role is Role.USER:
        return before is None or before.role is not Role.USER
    return before is None and messages[at].role is not Role.SYSTEM


def without(messages: list[Message], parts: list[list[int]]) -> list[Message]:
    """The conversation without some of its parts."""
    left_out = {at for part in parts for at in part}
    return [message for at, message in enumerate(messages) if at not in left_out]
