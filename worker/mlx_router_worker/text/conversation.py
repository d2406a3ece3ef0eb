"""The form of a conversation that a chat template takes and shows completely.

``conversation_forms`` gives the form that fits the template's traits, and behind it more cautious ones for templates
that raise or leave something out nevertheless. Nothing that the client sent is left out of any of them.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from typing import Any, Final

from msgspec.structs import replace

from mlx_router_shared.generation import Message, Role, ToolCall
from mlx_router_worker.text.template_traits import CallStyle, TemplateTraits

__all__ = ["conversation_forms", "merge_system", "merge_turns"]

_CAUTIOUS: Final[tuple[dict[str, Any], ...]] = (
    {"system_anywhere": False, "consecutive_turns": False},
    {"system_anywhere": False, "consecutive_turns": False, "calls": CallStyle(short_ids=True, one_at_a_time=True)},
    {
        "system_first": False, "system_anywhere": False, "consecutive_turns": False, "assistant_first": False,
        "calls": None, "empty_answers": False,
    },
)  # fmt: skip
"""What is assumed beside what the template was found to take, where that raises or drops text."""
_OPENING: Final = "(The assistant begins.)"
"""What a user says before a greeting, where the assistant may not begin."""


def conversation_forms(messages: list[Message], traits: TemplateTraits) -> Iterator[tuple[list[Message], CallStyle]]:
    """Yield the forms to try, the best first, with the style of their calls."""
    seen: list[tuple[list[Message], CallStyle]] = []
    for candidate in (traits, *(dataclasses.replace(traits, **less) for less in _CAUTIOUS)):
        form = _shaped(messages, candidate), candidate.calls or CallStyle()
        if form not in seen:
            seen.append(form)
            yield form


def _shaped(messages: list[Message], traits: TemplateTraits) -> list[Message]:
    if traits.calls is None:
        messages = [_as_text(message) for message in messages]
    else:
        if not traits.text_beside_calls:
            messages = _with_text_apart(messages, traits)
        if traits.calls.one_at_a_time:
            messages = _one_call_a_turn(messages)
    if not traits.empty_answers:
        messages = [message for message in messages if not _is_empty_answer(message)]
    if not traits.system_anywhere:
        messages = merge_system(messages)
    if not traits.results_apart:
        messages = _results_behind_calls(messages)
    has_user = any(message.role is Role.USER for message in messages)
    if not traits.system_first or not (has_user or traits.system_alone):
        messages = _fold_system(merge_system(messages))
    if not traits.consecutive_turns:
        messages = merge_turns(messages)
    if not traits.assistant_first:
        messages = _user_first(messages)
    return messages


def _is_empty_answer(message: Message) -> bool:
    return message.role is Role.ASSISTANT and not (message.content or message.tool_calls or message.images)


def merge_system(messages: list[Message]) -> list[Message]:
    """One system turn at the front with the text of all."""
    system = [message.content for message in messages if message.role is Role.SYSTEM]
    merged = [Message(role=Role.SYSTEM, content="\n\n".join(system))] if system else []
    return merged + [message for message in messages if message.role is not Role.SYSTEM]


def _fold_system(messages: list[Message]) -> list[Message]:
    """The text of a leading system turn at the beginning of the first turn of the user."""
    if not messages or messages[0].role is not Role.SYSTEM:
        return messages
    text, rest = messages[0].content, list(messages[1:])
    at = next((number for number, message in enumerate(rest) if message.role is Role.USER), None)
    if at is None or any(message.role is not Role.ASSISTANT or message.tool_calls for message in rest[:at]):
        return [Message(role=Role.USER, content=text), *rest]
    rest[at] = replace(rest[at], content=f"{text}\n\n{rest[at].content}" if rest[at].content else text)
    return rest


def merge_turns(messages: list[Message]) -> list[Message]:
    """No two turns in a row from the same speaker; tool results and turns with calls stay as they are."""
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


def _user_first(messages: list[Message]) -> list[Message]:
    """A turn of the user before a greeting, behind a leading system turn."""
    start = 1 if messages and messages[0].role is Role.SYSTEM else 0
    if len(messages) > start and messages[start].role is Role.ASSISTANT:
        return [*messages[:start], Message(role=Role.USER, content=_OPENING), *messages[start:]]
    return messages


def _one_call_a_turn(messages: list[Message]) -> list[Message]:
    """Each call in a turn of its own, followed by its result."""
    out: list[Message] = []
    at = 0
    while at < len(messages):
        message = messages[at]
        at += 1
        if len(message.tool_calls) < 2:
            out.append(message)
            continue
        results = []
        while at < len(messages) and messages[at].role is Role.TOOL:
            results.append(messages[at])
            at += 1
        for number, call in enumerate(message.tool_calls):
            first = number == 0
            out.append(
                replace(
                    message,
                    content=message.content if first else "",
                    reasoning=message.reasoning if first else None,
                    images=message.images if first else [],
                    tool_calls=[call],
                )
            )
            answer = next((r for r in results if r.tool_call_id == call.id and call.id), None)
            answer = answer or next((r for r in results if not r.tool_call_id), None)
            if answer is not None:
                results = [result for result in results if result is not answer]
                out.append(answer)
        out += results
    return out


def _results_behind_calls(messages: list[Message]) -> list[Message]:
    """Turn results that do not follow a turn with calls into turns of the user."""
    out: list[Message] = []
    behind_calls = False
    for message in messages:
        if message.role is not Role.TOOL:
            behind_calls = bool(message.tool_calls)
        out.append(message if message.role is not Role.TOOL or behind_calls else _as_text(message))
    return out


def _with_text_apart(messages: list[Message], traits: TemplateTraits) -> list[Message]:
    """The text of a turn that also has calls in a turn before it; where turns have to alternate, such calls and their
    results become text."""
    out: list[Message] = []
    as_text = False
    for message in messages:
        if message.role is not Role.TOOL:
            as_text = bool(message.tool_calls and message.content) and not traits.consecutive_turns
        if as_text:
            out.append(_as_text(message))
        elif message.tool_calls and message.content:
            out.append(replace(message, tool_calls=[]))
            out.append(replace(message, content="", reasoning=None, images=[]))
        else:
            out.append(message)
    return out


def _as_text(message: Message) -> Message:
    """A turn without calls, or a result as a turn of the user."""
    if message.role is Role.TOOL:
        name = f" of {message.tool_name}" if message.tool_name else ""
        return Message(role=Role.USER, content=f"Result{name}:\n{message.content}", images=message.images)
    if not message.tool_calls:
        return message
    parts = [message.content] if message.content else []
    parts += [_written(call) for call in message.tool_calls]
    return replace(message, content="\n".join(parts), tool_calls=[])


def _written(call: ToolCall) -> str:
    return f'<tool_call>\n{{"name": {json.dumps(call.name)}, "arguments": {call.arguments or "{}"}}}\n</tool_call>'
