"""Log lines: an event name and key=value pairs, one line each, to standard error or a file; or the same as JSON.

The last of them stay in memory, for those who ask the router for its log.
"""

from __future__ import annotations

import ast
import asyncio
import io
import json
import logging
import logging.handlers
import os
import queue
import re
import select
import sys
import threading
from contextlib import suppress
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final, TextIO

from mlx_router_server.files import expanded
from mlx_router_server.telemetry.ring import Ring

__all__ = ["LogLine", "LogRing", "configure_logs", "CURRENT_REQUEST", "one_line", "quiet_uvicorn"]

_FILE_BYTES: Final = 10 * 2**20
_FILES: Final = 5
_KEPT: Final = 2000
_WAITING: Final = 4096
_FLUSH_SECONDS: Final = 1.0
_LONGEST: Final = 8192  # characters of one line; whoever causes a line shall not fill a disk by it

CURRENT_REQUEST: Final[ContextVar[str]] = ContextVar("request", default="")
"""The id of the request that is being dealt with; every line that is logged meanwhile names it."""


def one_line(text: str) -> str:
    """What is not printable as Python writes it: whoever chose the text cannot begin a line, move a cursor, or turn the
    direction of what follows."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


def _message(record: logging.LogRecord) -> str:
    """With the id of the request that it belongs to."""
    text = record.getMessage()
    request = CURRENT_REQUEST.get()
    if request and " request=" not in text:
        text = f"{text} request={request}"
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"


class _OneLine(logging.Formatter):
    """Line breaks would let a request write log lines of its own, and escapes move the cursor of a terminal."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802  # the standard library's name
        record.message = _message(record)
        return one_line(super().formatMessage(record))


class _Json(logging.Formatter):
    """One object a line: time, level, and the pairs of the message under their own names."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
        }
        message = _message(record)
        pairs = _pairs(message)
        if pairs:
            line.update((name, value) for name, value in pairs.items() if name not in line)
        else:
            line["message"] = message
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=True)


_PAIR: Final = re.compile(r"""(\w+)=('(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*"|\S*)""")


def _pairs(message: str) -> dict[str, str]:
    if not message.startswith("event="):
        return {}
    found: dict[str, str] = {}
    for name, value in _PAIR.findall(message):
        found.setdefault(name, _unquoted(value))
    return found


def _unquoted(value: str) -> str:
    """What a value was before %r quoted it."""
    if value[:1] in ("'", '"'):
        try:
            text = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            return value
        return str(text)
    return value


class _Console(logging.Handler):
    """Writes to standard error in a thread of its own: a terminal that was stopped with ctrl-S, or a pipe that nobody
    reads, must not stop the router. So many lines wait at most; those beyond are counted and left out."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__()
        self._stream = stream
        self._lines: queue.Queue[str | None] = queue.Queue(_WAITING)
        self._dropped = 0
        self._counting = threading.Lock()
        self._thread = threading.Thread(target=self._write_all, name="log", daemon=True)
        self._thread.start()

    def emit(self, record: logging.LogRecord) -> None:
        try:
            line = self.format(record) + "\n"  # here, where the request is known that it belongs to
        except Exception:
            self.handleError(record)
            return
        try:
            self._lines.put_nowait(line)
        except queue.Full:
            with self._counting:
                self._dropped += 1

    def flush(self) -> None:
        """Wait a bounded time until everything is written."""
        with self._lines.all_tasks_done:
            self._lines.all_tasks_done.wait_for(lambda: not self._lines.unfinished_tasks, _FLUSH_SECONDS)

    def close(self) -> None:
        self.flush()
        with suppress(queue.Full):  # then it hangs in a write, and ends with the process
            self._lines.put_nowait(None)
        super().close()

    def _write_all(self) -> None:
        while (line := self._lines.get()) is not None:
            with self._counting:
                dropped, self._dropped = self._dropped, 0
            if dropped:
                text = f"event=log_lines_dropped count={dropped}"
                note = logging.LogRecord(__name__, logging.WARNING, "", 0, text, None, None)
                line = f"{self.format(note)}\n{line}"
            with suppress(OSError, ValueError):  # closed: nobody will read it
                self._write(line)
            self._lines.task_done()

    def _write(self, text: str) -> None:
        """Past Python's buffer: at the end of the process nothing must wait for the lock of a write that hangs."""
        try:
            descriptor = self._stream.fileno()
        except (AttributeError, io.UnsupportedOperation):
            self._stream.write(text)
            return
        data = text.encode(errors="backslashreplace")
        while data:
            try:
                data = data[os.write(descriptor, data) :]
            except BlockingIOError:  # another process that shares it has set it to non-blocking
                select.select([], [descriptor], [])


class _File(logging.handlers.RotatingFileHandler):
    """A class of our own, so that it is known again when the settings are read again."""


def configure_logs(level: str, form: str = "text", file: str = "") -> None:
    """``form`` is ``text`` or ``json``; ``file`` takes the place of standard error, and is renamed to FILE.1 when it is
    10 MB long, FILE.1 to FILE.2 and so on, up to five. Raises ``OSError`` when it cannot be written; then nothing has
    changed."""
    handler: logging.Handler
    if file:
        path = expanded(file)
        path.parent.mkdir(parents=True, exist_ok=True)
        handler = _File(path, maxBytes=_FILE_BYTES, backupCount=_FILES, encoding="utf-8")
    else:
        handler = _Console(sys.stderr)
    handler.setFormatter(_Json() if form == "json" else _OneLine("%(asctime)s %(levelname)s %(message)s"))
    root = logging.getLogger()
    for old in root.handlers[:]:
        if isinstance(old, _Console | _File):
            root.removeHandler(old)
            old.close()
    root.addHandler(handler)
    root.setLevel(level.upper())


def quiet_uvicorn() -> None:
    """One line per request of ours says more than uvicorn's own."""
    logging.getLogger("uvicorn").setLevel(logging.WARNING)


@dataclass(frozen=True, slots=True, kw_only=True)
class LogLine:
    """One line of the log as readers of ``/admin/logs`` get it."""

    at: float
    """Wall clock, seconds since 1970."""
    level: str
    text: str

    def is_about(self, models: frozenset[str]) -> bool:
        """Whether it names one of them, as what it is about or as what wrote it."""
        pairs = _pairs(self.text)
        return pairs.get("model") in models or pairs.get("worker") in models


class LogRing(logging.Handler):
    """Belongs to one running application; takes lines from any thread."""

    def __init__(self) -> None:
        super().__init__()
        self._loop = asyncio.get_running_loop()
        self.ring: Ring[LogLine] = Ring(_KEPT)
        self._plain = _OneLine("%(message)s")

    def emit(self, record: logging.LogRecord) -> None:
        line = LogLine(at=record.created, level=record.levelname.lower(), text=self._plain.format(record))
        try:
            running = asyncio.get_running_loop()
        except RuntimeError:
            running = None
        if running is self._loop:
            self.ring.add(line)
        elif not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self.ring.add, line)
