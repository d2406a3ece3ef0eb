"""Where a call ends whose arguments stand between tags: an end marker inside an argument is a part of it."""

from __future__ import annotations

from typing import Final

__all__ = ["end_of_call", "is_in_value"]

_VALUES: Final = (
    ("<arg_value>", "</arg_value>"),  # GLM
    ("<longcat_arg_value>", "</longcat_arg_value>"),
    ("<parameter=", "</parameter>"),  # Qwen3-Coder
    ("<parameter name=", "</parameter>"),  # MiniMax
    ("<atem:parameter", "</atem:parameter>"),
)
_ENDS: Final = ("</function>", "</invoke>", "</atem:invoke>")
"""What closes a call whose last value was left open."""


def is_in_value(body: str) -> bool:
    """Whether the text of a call ends inside an argument."""
    if body.rstrip().endswith(_ENDS):
        return False
    return any(body.count(start) > body.count(end) for start, end in _VALUES)


def end_of_call(body: str, marker: str) -> int:
    """The place of the first end marker that is in no argument; -1 if there is none."""
    at = body.find(marker)
    while at >= 0 and is_in_value(body[:at]):
        at = body.find(marker, at + len(marker))
    return at
