"""A tool call in JSON while it is being written: its name, then its arguments piece by piece."""

from __future__ import annotations

import json
import re
from typing import Final

__all__ = ["PartialCall"]

_HEAD: Final = re.compile(r'\s*\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"arguments"\s*:\s*(?=\{)')


class PartialCall:
    """Reads ``{"name": …, "arguments": {…}}``. A call of any other shape is never begun, and read whole at its end."""

    def __init__(self) -> None:
        self._text = ""
        self._at = 0
        """Up to where the text was looked at, once the arguments have begun."""
        self._begin = 0
        self._depth = 0
        self._in_string = False
        self._escaped = False
        self.name: str | None = None
        """Known from the moment in which the arguments begin."""
        self.complete = False

    @property
    def arguments(self) -> str:
        """The text of the arguments as far as it is written; a JSON object once ``complete``."""
        return self._text[self._begin : self._at] if self.name is not None else ""

    def feed(self, text: str) -> str:
        """Take a piece; returns what it adds to the arguments."""
        self._text += text
        if self.name is None:
            head = _HEAD.match(self._text)
            if head is None:
                return ""
            self.name = json.loads(head[1])
            self._begin = self._at = head.end()
        before = self._at
        while self._at < len(self._text) and not self.complete:
            self._look(self._text[self._at])
            self._at += 1
        return self._text[before : self._at]

    def _look(self, character: str) -> None:
        if self._escaped:
            self._escaped = False
        elif self._in_string:
            self._escaped = character == "\\"
            self._in_string = character != '"'
        elif character == '"':
            self._in_string = True
        elif character in "{[":
            self._depth += 1
        elif character in "}]":
            self._depth -= 1
            self.complete = self._depth == 0
