"""Count the words of a conversation that are missing from its prompt."""

from __future__ import annotations

import json
import re
from contextlib import suppress
from itertools import islice
from typing import Any, Final

from mlx_router_shared.generation import Message

__all__ = ["count_lost_words"]

_WORD: Final = re.compile(r"[^\W_]{3,}")
"""Escaping for JSON or HTML leaves these as they are."""
_THOUGHT: Final = "think>"
"""Marks content with earlier reasoning, which templates drop on purpose."""
_MOST_SEARCHED: Final = 50
"""Words that are searched for in the prompt as parts of longer ones; more than that are not looked up."""


def count_lost_words(prompt: str, messages: list[Message]) -> int:
    """How many different words of the messages, and of the strings in the arguments of their calls, are missing, up to
    ``_MOST_SEARCHED``. Takes time in proportion to the lengths of both."""
    if _stand_in_order(prompt, messages):
        return 0
    words: set[str] = set()
    for message in messages:
        if _THOUGHT not in message.content:
            words.update(_WORD.findall(message.content))
        for call in message.tool_calls:
            for text in _strings(call.arguments):
                words.update(_WORD.findall(text))
    words.difference_update(_WORD.findall(prompt))
    return sum(word not in prompt for word in islice(words, _MOST_SEARCHED))


def _stand_in_order(prompt: str, messages: list[Message]) -> bool:
    """Whether a prompt has all messages as they are, one behind the other: the usual case, and one pass."""
    position = 0
    for message in messages:
        content = "" if _THOUGHT in message.content else message.content.strip()
        position = prompt.find(content, position)
        if position < 0:
            return False
        position += len(content)
        for call in message.tool_calls:
            if any(prompt.find(text, position) < 0 for text in _strings(call.arguments)):
                return False
    return True


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
