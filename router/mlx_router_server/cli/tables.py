"""Tables and words for people, and JSON for programs."""

from __future__ import annotations

import json
import shutil
import sys
import time
from datetime import datetime
from typing import Any, Final

__all__ = ["ago", "human_size", "print_json", "print_table", "until"]

_GAP: Final = "    "
_LEAST: Final = 8


def print_json(data: Any) -> int:
    print(json.dumps(data, indent=2, ensure_ascii=False))
    return 0


def print_table(head: list[str], rows: list[list[str]]) -> None:
    """Columns as wide as their widest cell, no trailing blanks. On a terminal that is too narrow the widest columns are
    cut; what is written to a file or a pipe is whole."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    if sys.stdout.isatty():
        room = shutil.get_terminal_size().columns - len(_GAP) * (len(head) - 1)
        while sum(widths) > room and max(widths) > _LEAST:
            widest = widths.index(max(widths))
            widths[widest] = max(_LEAST, widths[widest] - (sum(widths) - room))
    for row in [head, *rows]:
        cells = [_cut(cell, width).ljust(width) for cell, width in zip(row, widths, strict=True)]
        print(_GAP.join(cells).rstrip())


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"


def human_size(size: int) -> str:
    """Decimal units as Ollama prints them: ``4.7 GB``, ``815 MB``."""
    value, unit = float(size), "B"
    for larger in ("KB", "MB", "GB", "TB"):
        if value < 1000:
            break
        value, unit = value / 1000, larger
    return f"{value:.1f} {unit}" if value < 10 and unit != "B" else f"{int(value)} {unit}"


def ago(timestamp: str) -> str:
    """``3 weeks ago`` for an RFC 3339 time."""
    return f"{_words(time.time() - datetime.fromisoformat(timestamp).timestamp())} ago"


def until(seconds: float | None) -> str:
    """``4 minutes from now``; -1 is for ever, None that no time is set."""
    if seconds is None:
        return "-"
    return "Forever" if seconds < 0 else f"{_words(seconds)} from now"


def _words(seconds: float) -> str:
    for unit, size in (("week", 604800), ("day", 86400), ("hour", 3600), ("minute", 60)):
        if seconds >= 2 * size or (unit == "minute" and seconds >= size):
            count = int(seconds // size)
            return f"{count} {unit}{'s' if count > 1 else ''}"
    return f"{max(int(seconds), 0)} seconds"
