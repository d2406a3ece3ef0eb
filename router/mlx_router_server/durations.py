"""Durations as Ollama's clients write them."""

from __future__ import annotations

import math
import re
from typing import Final

from mlx_router_shared.errors import InvalidRequest

__all__ = ["parse_duration"]

_UNITS: Final = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
_FOR_EVER: Final = 1e15  # seconds; longer than any clock here counts
_PART: Final = re.compile(r"(\d+(?:\.\d*)?|\.\d+)([a-zµ]+)?")


def parse_duration(value: object) -> float:
    """Seconds, as Ollama reads keep_alive: a number, or a Go duration like ``1h30m``; negative: for ever (infinite).

    Raises ``InvalidRequest`` with Ollama's sentences.
    """
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        kind = {"bool": "bool", "list": "[]interface {}", "dict": "map[string]interface {}"}.get(type(value).__name__)
        raise InvalidRequest(f"Unsupported type: '{kind or type(value).__name__}'", param="keep_alive")
    if isinstance(value, int | float):
        return float(value) if 0 <= value < _FOR_EVER else math.inf
    text = value.strip()
    sign, rest = (text[0], text[1:]) if text[:1] in ("-", "+") else ("", text)
    if rest == "0":
        return 0.0
    seconds, at = 0.0, 0
    while at < len(rest):
        match = _PART.match(rest, at)
        if match is None:
            raise InvalidRequest(f'time: invalid duration "{value}"', param="keep_alive")
        if match[2] is None:
            raise InvalidRequest(f'time: missing unit in duration "{value}"', param="keep_alive")
        if match[2] not in _UNITS:
            raise InvalidRequest(f'time: unknown unit "{match[2]}" in duration "{value}"', param="keep_alive")
        seconds += float(match[1]) * _UNITS[match[2]]
        at = match.end()
    if not rest:
        raise InvalidRequest(f'time: invalid duration "{value}"', param="keep_alive")
    return math.inf if sign == "-" else seconds
