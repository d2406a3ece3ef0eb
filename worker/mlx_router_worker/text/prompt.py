"""From the canonical messages to what chat templates take.

Templates expect dictionaries in OpenAI's shape, but tool-call arguments as objects; many allow one system message
only, at the front. The plain form is tried first, the merged form when a template refuses it.
"""

from __future__ import annotations

import json
from typing import Any

from mlx_router_shared.generation import Message, Role, Tool

__all__ = ["droppable", "merge_system", "template_messages", "template_tools", "without"]


def template_messages(messages: list[Message]) -> list[dict[str, Any]]:
    """Messages as dictionaries; a tool result without a name gets that of the call it answers."""
    out: list[dict[str, Any]] = []
    open_calls: list[tuple[str, str]] = []  # (id, name) not answered yet, in order
    for message in messages:
        entry: dict[str, Any] = {"role": message.role.value, "content": message.content}
        if message.reasoning:
            entry["reasoning_content"] = message.reasoning
        if message.tool_calls:
            open_calls = [(call.id, call.name) for call in message.tool_calls]
            entry["tool_calls"] = [
                {
                    "id": call.id,
                    "type": "function",
                    "function": {"name": call.name, "arguments": _as_object(call.arguments)},
                }
                for call in message.tool_calls
            ]
        if message.role is Role.TOOL:
            name = message.tool_name or _take_call(open_calls, message.tool_call_id)
            if name:
                entry["name"] = name
            if message.tool_call_id:
                entry["tool_call_id"] = message.tool_call_id
        out.append(entry)
    return out


def _take_call(open_calls: list[tuple[str, str]], call_id: str | None) -> str | None:
    """The name of the call with this id, else of the next unanswered one: some clients send neither."""
    for at, (known, _) in enumerate(open_calls):
        if call_id and known == call_id:
            return open_calls.pop(at)[1]
    return open_calls.pop(0)[1] if open_calls else None


def _as_object(arguments: str) -> Any:
    try:
        return json.loads(arguments or "{}")
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


def merge_system(messages: list[Message]) -> list[Message]:
    """One system message at the front, and no two turns in a row from the same speaker (tool results excepted)."""
    system = [message.content for message in messages if message.role is Role.SYSTEM]
    merged = [Message(role=Role.SYSTEM, content="\n\n".join(system))] if system else []
    return merged + merge_turns([message for message in messages if message.role is not Role.SYSTEM])


def merge_turns(messages: list[Message]) -> list[Message]:
    """No two turns in a row from the same speaker, tool results and turns with calls excepted."""
    runs: list[list[Message]] = []
    for message in messages:
        last = runs[-1][-1] if runs else None
        plain = not message.tool_calls and message.role is not Role.TOOL
        if last is not None and plain and last.role is message.role and not last.tool_calls:
            runs[-1].append(message)
        else:
            runs.append([message])
    return [_joined(run) if len(run) > 1 else run[0] for run in runs]


def _joined(run: list[Message]) -> Message:
    return Message(
        role=run[0].role,
        content="\n\n".join(message.content for message in run),
        images=[image for message in run for image in message.images],
        reasoning="".join(message.reasoning or "" for message in run) or None,
    )


def droppable(messages: list[Message]) -> list[tuple[int, int]]:
    """Where the turns lie that may be left out, oldest first; neither a system turn nor the last turn is among them.

    A call and its results go together: a result without its call is refused by templates.
    """
    last = len(messages) - 1
    turns: list[tuple[int, int]] = []
    at = 0
    while at < last:
        end = at + 1
        if messages[at].role is not Role.SYSTEM:
            while end < last and messages[end].role is Role.TOOL:
                end += 1
            turns.append((at, end))
        at = end
    return turns


def without(messages: list[Message], turns: list[tuple[int, int]]) -> list[Message]:
    """The conversation without some of its turns."""
    kept: list[Message] = []
    at = 0
    for begin, end in turns:
        kept += messages[at:begin]
        at = end
    return kept + messages[at:]
