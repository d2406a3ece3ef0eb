"""What of a conversation is missing from its prompt."""

from __future__ import annotations

import json
import re
from contextlib import suppress
from typing import Any, Final

from mlx_router_shared.generation import Message

__all__ = ["count_lost_words"]

_WORD: Final = re.compile(r"[A-Za-z0-9]{3,}")
"""Escaping for JSON or HTML leaves these as they are."""
_THOUGHT: Final = "think>"
"""Templates leave out on purpose what an assistant thought in an earlier turn."""


def count_lost_words(prompt: str, messages: list[Message]) -> int:
    """How many different words of the messages, and of the strings in the arguments of their calls, are missing."""
    texts = [message.content.strip() for message in messages if _THOUGHT not in message.content]
    texts += [text for message in messages for call in message.tool_calls for text in _strings(call.arguments)]
    missing = [text for text in texts if text not in prompt]
    if not missing:
        return 0
    shown = set(_WORD.findall(prompt))
    words = {word for text in missing for word in _WORD.findall(text)} - shown
    return sum(word not in prompt for word in words)


def _strings(arguments: str) -> list[str]:
    """The strings in a JSON text; numbers and words such as ``null`` may be written otherwise."""
    found: list[str] = []
    values: list[Any] = []
    with suppress(ValueError, RecursionError):
        values.append(json.loads(arguments))
    while values:
        value = values.pop()
        if isinstance(value, str):
            found.append(value)
        elif isinstance(value, list | dict):
            values += value.values() if isinstance(value, dict) else value
    return found
