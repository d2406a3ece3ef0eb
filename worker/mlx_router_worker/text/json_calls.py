"""Tool calls in JSON as models write them, read in one way whether they are streamed or not.

Models put raw line breaks and tabs into strings, escape what needs no escape (``\\d``, ``C:\\dir``), close one brace
too many, leave a comma behind the last item and write ``007`` or Python's ``True`` and ``'text'``. The text is
repaired character by character while it arrives, so that a client that gets a call in pieces gets the same JSON as one
that gets it whole.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Final, NamedTuple

__all__ = ["JsonCallReader", "ReadCall", "calls_in", "plain_json", "read_json", "repairing", "with_objects"]

_HEAD: Final = re.compile(
    r'[\s,;\[\]}]*\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)'
)
_SHORT_ESCAPES: Final = {"\n": "\\n", "\r": "\\r", "\t": "\\t", "\b": "\\b", "\f": "\\f"}
_WORDS: Final = {
    "True": "true", "False": "false", "None": "null", "NaN": "null", "Infinity": "null", "-Infinity": "null"
}  # fmt: skip
_NUMBER_CHARACTERS: Final = frozenset("0123456789+-.")
_ODD_NUMBER: Final = re.compile(r"([+-]?)0*+([0-9]*+)(?:\.([0-9]*+))?([eE][+-]?[0-9]+)?")
_BETWEEN_CALLS: Final = " \t\r\n,;[]}"
_HIGH: Final = re.compile(r"\\u[dD][89abAB][0-9a-fA-F]{2}")
_LOW: Final = re.compile(r"\\u[dD][c-fC-F][0-9a-fA-F]{2}")
_REPLACEMENT: Final = "\\ufffd"


class _Repair:
    """Turns what is nearly JSON into JSON, a character at a time."""

    def __init__(self) -> None:
        self.depth = 0
        self.in_string = False
        self._quote = '"'
        """Which quotation mark ends the string."""
        self._escaped = False
        self._unicode: str | None = None
        """The hexadecimal digits of an escape that is being written."""
        self._word = ""
        self._comma = ""
        """A comma and the white space behind it, held back until something else than a closing bracket follows."""
        self._before = ""
        """The last character outside of strings that is no white space."""
        self._high = ""
        """The first half of a surrogate pair, held back until the second half follows."""

    def take(self, character: str) -> str:
        """The text that one more character adds; empty while it is not decided."""
        text = self._take(character)
        if not text:
            return ""
        high, self._high = self._high, ""
        if _HIGH.fullmatch(text):
            self._high = text
            return _REPLACEMENT if high else ""
        if _LOW.fullmatch(text):
            return high + text if high else _REPLACEMENT
        return _REPLACEMENT + text if high else text

    def _take(self, character: str) -> str:
        if self._unicode is not None:
            return self._take_unicode(character)
        if self._escaped:
            self._escaped = False
            if character == "u":
                self._unicode = ""
                return ""
            if character == "'":
                return character
            return f"\\{character}" if character in '"\\/bfnrt' else "\\\\" + self._in_string(character)
        if self.in_string:
            return self._in_string(character)
        return self._outside(character)

    def _take_unicode(self, character: str) -> str:
        assert self._unicode is not None
        if character in "0123456789abcdefABCDEF":
            self._unicode += character
            if len(self._unicode) < 4:
                return ""
            text, self._unicode = f"\\u{self._unicode}", None
            return text
        text, self._unicode = f"\\\\u{self._unicode}", None  # it was no escape
        return text + self._in_string(character)

    def _in_string(self, character: str) -> str:
        if character == "\\":
            self._escaped = True
            return ""
        if character == self._quote:
            self.in_string = False
            return '"'
        if character == '"':
            return '\\"'
        if character < " ":
            return _SHORT_ESCAPES.get(character, f"\\u{ord(character):04x}")
        return character

    def _outside(self, character: str) -> str:
        before = self._before
        if not character.isspace():
            self._before = character
        if character.isalpha() or character in _NUMBER_CHARACTERS:
            self._word += character
            return ""
        word, self._word = _plain_word(self._word), ""
        if self._comma and not word and character.isspace():
            self._comma += character
            return ""
        comma, self._comma = self._comma, ""
        if character == ",":
            self._comma = ","
            return comma + word
        if character == '"' or (character == "'" and self.depth > 0 and before in "{[,:"):
            self.in_string = True
            self._quote, character = character, '"'
        elif character in "{[":
            self.depth += 1
        elif character in "}]":
            self.depth = max(self.depth - 1, 0)  # one too many closes nothing
            comma = "" if not word else comma
        return comma + word + character


def _plain_word(word: str) -> str:
    """A word or number that stands in no string, as JSON writes it."""
    match = _ODD_NUMBER.fullmatch(word)
    if match is None or not (match[2] or match[3] or "0" in word):
        return _WORDS.get(word, word)
    sign, whole, fraction, exponent = match.groups()
    number = f"{sign.strip('+')}{whole or 0}{f'.{fraction or 0}' if fraction is not None else ''}{exponent or ''}"
    is_finite = not (exponent or fraction is not None) or math.isfinite(float(number))
    return number if is_finite else "null"


class ReadCall(NamedTuple):
    """A call, or a piece of one; ``done`` with its last piece."""

    name: str
    begins: bool
    more: str
    """What is added to the text of the arguments."""
    done: bool
    arguments: str
    """All of the arguments so far; a JSON object once ``done``."""


class JsonCallReader:
    """Reads ``{"name": …, "arguments": {…}}``, one or several, in pieces.

    Calls whose members stand in another order, or whose arguments are JSON text, are read once they are whole.
    """

    def __init__(self) -> None:
        self._repair = _Repair()
        self._text = ""
        """Repaired, from the beginning of the call that is awaited or being read."""
        self._name: str | None = None
        self._outer = 0
        """The depth around the call."""
        self._fresh = False
        self._no_calls = ""
        """Objects that are no calls."""
        self._raw = ""
        """As the model wrote it, since the last call was whole."""
        self._tail: int | None = None
        """The depth around the last call, whose own last members may still follow."""
        self._started = False
        """Text other than separators has been read since the last call."""

    @property
    def begun(self) -> bool:
        """A call has been begun and is not complete."""
        return self._name is not None

    @property
    def in_string(self) -> bool:
        """The text ends inside a string: what looks like the end of a call is part of it."""
        return self._repair.in_string

    @property
    def is_balanced(self) -> bool:
        """Every bracket has been closed."""
        return self._repair.depth == 0

    @property
    def rest(self) -> str:
        """What has been read and is no whole call, as the model wrote it."""
        return self._no_calls + self._raw.strip(_BETWEEN_CALLS)

    def feed(self, text: str) -> tuple[list[ReadCall], str]:
        """Take a piece. Returns the calls or pieces of calls in it, and what follows the last closing bracket."""
        calls: list[ReadCall] = []
        pending = ""
        for at, character in enumerate(text):
            depth = self._repair.depth
            added = self._repair.take(character)
            self._text += added
            if self._tail is None:
                self._raw += character
            elif self._repair.depth <= self._tail:
                self._tail, self._text, self._started, added = None, "", False, ""
            if not self._started and added.strip(_BETWEEN_CALLS):
                self._started = True
                self._outer = depth
            if self._name is None and added.endswith("}") and self._repair.depth == self._outer:
                calls += self._whole_calls()
            elif self._name is None:
                self._name = _name_of(self._text) if added.endswith("{") else None
                if self._name is not None:
                    self._fresh = True
                    self._text = pending = "{"
                    self._tail = None
            else:
                pending += added
                if self._repair.depth == self._outer + 1 and not self._repair.in_string:
                    calls.append(self._piece(pending, done=True))
                    pending, self._name, self._text, self._raw, self._started = "", None, "", "", False
                    self._tail = self._outer
            if depth > 0 and self._repair.depth == 0:
                return calls, text[at + 1 :]
        if self._name is not None and pending:
            calls.append(self._piece(pending, done=False))
        return calls, ""

    def _whole_calls(self) -> list[ReadCall]:
        """The call in the object that has just been closed, if it is one."""
        text, self._text, self._started = self._text.lstrip(_BETWEEN_CALLS), "", False
        try:
            found = calls_in(json.loads(text))
        except (ValueError, RecursionError):
            found = []
        if text and not found:
            self._no_calls += self._raw
        self._raw = ""
        return [ReadCall(name, True, arguments, True, arguments) for name, arguments, _ in found]

    def _piece(self, more: str, *, done: bool) -> ReadCall:
        assert self._name is not None
        fresh, self._fresh = self._fresh, False
        return ReadCall(self._name, fresh, more, done, self._text)


def _name_of(text: str) -> str | None:
    """The name in the beginning of a call up to the bracket that opens its arguments; None if it is no such text."""
    match = _HEAD.match(text)
    return str(json.loads(match[1])) if match is not None and match.end() == len(text) - 1 else None


def calls_in(parsed: Any) -> list[tuple[str, str, str]]:
    """Name, arguments as JSON text and the model's own id of each call in a parsed value. Raises ``ValueError`` for
    what is no call."""
    calls = []
    for call in parsed if isinstance(parsed, list) else [parsed]:
        if not isinstance(call, dict) or not isinstance(call.get("name"), str):
            raise ValueError("no name")
        arguments = call.get("arguments", call.get("parameters")) or {}
        if isinstance(arguments, str):
            arguments = read_json(arguments)
        if not isinstance(arguments, dict):
            raise ValueError("the arguments are no object")
        call_id = call.get("id")
        name = json.loads(plain_json(call["name"]))
        calls.append((name, plain_json(arguments), call_id if isinstance(call_id, str) and call_id.isascii() else ""))
    if not calls:
        raise ValueError("no call")
    return calls


def with_objects(parsed: Any, tools: list[dict[str, Any]]) -> Any:
    """Parse string arguments for which the tool's schema asks for an object or array: a family's parser leaves them as
    text where they are only nearly JSON. ``tools`` are in OpenAI's shape."""
    schemas = {tool["function"]["name"]: tool["function"]["parameters"] for tool in tools}
    for call in parsed if isinstance(parsed, list) else [parsed]:
        arguments = call.get("arguments") if isinstance(call, dict) else None
        if not isinstance(arguments, dict) or not isinstance(schema := schemas.get(call.get("name")), dict):
            continue
        properties = schema.get("properties")
        for name, value in arguments.items():
            wanted = properties.get(name) if isinstance(properties, dict) else None
            kinds = wanted.get("type") if isinstance(wanted, dict) else None
            kinds = kinds if isinstance(kinds, list) else [kinds]
            is_wanted = "string" not in kinds and ("object" in kinds or "array" in kinds)
            if isinstance(value, str) and is_wanted and value.strip()[:1] in ("{", "["):
                with suppress(ValueError, RecursionError):
                    arguments[name] = read_json(value)
    return parsed


def repairing(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    """Return a parser that tries again with repaired JSON where ``parse`` raises; for families whose calls are JSON
    behind a name."""

    def parse_repaired(text: str) -> Any:
        try:
            return parse(text)
        except Exception:  # the parsers raise what they like
            return parse(_repaired(text))

    return parse_repaired


def _repaired(text: str) -> str:
    """Return the text with near-JSON in it repaired."""
    repair = _Repair()
    out = ""
    for character in text.strip() + "\n":
        is_extra = character in "}]" and repair.depth == 0 and not repair.in_string
        out += "" if is_extra else repair.take(character)
    return out


def read_json(text: str) -> Any:
    """The JSON value that a text begins with, repaired; raises ``ValueError``. What follows it is left out, and
    brackets that are still open at the end are not closed."""
    repair = _Repair()
    out = ""
    for character in text.strip():
        out += repair.take(character)
        if repair.depth == 0 and not repair.in_string and out and out[-1] in "}]":
            break
    return json.loads(out)


def plain_json(value: Any) -> str:
    """Return the JSON text of a value that another parser has read.

    What JSON and UTF-8 do not have is replaced: a lone half of a surrogate pair by U+FFFD, a number that is not finite
    by null.
    """
    return json.dumps(_plain(value), ensure_ascii=False, allow_nan=False)


def _plain(value: Any) -> Any:
    if isinstance(value, str):
        return value.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {_plain(str(name)): _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
