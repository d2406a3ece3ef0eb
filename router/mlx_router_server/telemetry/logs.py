"""Log lines: an event name and key=value pairs, one line each, to standard error; or the same as JSON."""

from __future__ import annotations

import ast
import json
import logging
import re
import sys
from datetime import UTC, datetime
from typing import Final

__all__ = ["configure_logs", "one_line", "quiet_uvicorn"]


def one_line(text: str) -> str:
    """What is not printable as Python writes it: whoever chose the text cannot begin a line, move a cursor, or turn the
    direction of what follows."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


class _OneLine(logging.Formatter):
    """Line breaks would let a request write log lines of its own, and escapes move the cursor of a terminal."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802  # the standard library's name
        return one_line(super().formatMessage(record))


class _Json(logging.Formatter):
    """One object a line: time, level, and the pairs of the message under their own names."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
        }
        message = record.getMessage()
        pairs = _PAIR.findall(message) if message.startswith("event=") else []
        if pairs:
            line.update((name, _unquoted(value)) for name, value in pairs if name not in line)
        else:
            line["message"] = message
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=True)


_PAIR: Final = re.compile(r"""(\w+)=('(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*"|\S*)""")


def _unquoted(value: str) -> str:
    """What a value was before %r quoted it."""
    if value[:1] in ("'", '"'):
        try:
            text = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            return value
        return str(text)
    return value


def configure_logs(level: str, form: str = "text") -> None:
    """``form`` is ``text`` or ``json``."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Json() if form == "json" else _OneLine("%(asctime)s %(levelname)s %(message)s"))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)


def quiet_uvicorn() -> None:
    """One line per request of ours says more than uvicorn's own."""
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
