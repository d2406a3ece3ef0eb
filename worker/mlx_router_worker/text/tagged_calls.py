"""Find the end of a call whose arguments stand between tags; an end marker inside an argument does not end it."""

from __future__ import annotations

import re
from typing import Final

__all__ = ["end_of_call", "is_in_value"]

_VALUES: Final = {
    "<arg_value>": "</arg_value>",  # GLM
    "<longcat_arg_value>": "</longcat_arg_value>",
    "<parameter=": "</parameter>",  # Qwen3-Coder
    "<parameter name=": "</parameter>",  # MiniMax
    "<atem:parameter": "</atem:parameter>",
}
_TAG: Final = re.compile("|".join(re.escape(tag) for tag in {*_VALUES, *_VALUES.values()}))
_ENDS: Final = ("</function>", "</invoke>", "</atem:invoke>")
"""Tags that end a call even if its last argument was not closed."""


def is_in_value(body: str) -> bool:
    """Whether the text of a call ends inside an argument. A start tag inside an argument is text."""
    if body.rstrip().endswith(_ENDS):
        return False
    awaited = ""
    for match in _TAG.finditer(body):
        if not awaited:
            awaited = _VALUES.get(match[0], "")
        elif match[0] == awaited:
            awaited = ""
    return bool(awaited)


def end_of_call(body: str, marker: str, start: int = 0) -> int:
    """The place of the first end marker from ``start`` on that is in no argument; -1 if there is none."""
    at = body.find(marker, start)
    while at >= 0 and is_in_value(body[:at]):
        at = body.find(marker, at + len(marker))
    return at
