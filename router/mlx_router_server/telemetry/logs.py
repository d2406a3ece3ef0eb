"""Log lines: an event name and key=value pairs, one line each, to standard error."""

from __future__ import annotations

import logging
import sys

__all__ = ["configure_logs"]


class _OneLine(logging.Formatter):
    """Line breaks inside a message would let a request write log lines of its own."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802  # the standard library's name
        return super().formatMessage(record).replace("\r", "\\r").replace("\n", "\\n")


def configure_logs(level: str) -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_OneLine("%(asctime)s %(levelname)s %(message)s"))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    # One line per request of ours says more than uvicorn's access log.
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
