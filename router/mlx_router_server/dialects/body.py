"""From bytes to a typed body: what all dialects do in the same way.

The Content-Type is not looked at (curl and litellm send none or a wrong one), explicit nulls equal absence, unknown
fields are ignored, a wrong type is refused with the path of the field.
"""

from __future__ import annotations

import re
from functools import cache
from typing import Annotated, Any, Final, TypeVar, get_args

import msgspec

from mlx_router_shared.errors import InvalidRequest

__all__ = ["Int64", "convert", "ndjson_line", "read_object", "structs_inside", "without_nulls"]

Int64 = Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]
"""A whole number that fits the wire; JSON knows no limits."""

_SURROGATES: Final = re.compile(
    rb"\\\\"  # an escaped backslash, so that what follows it is no escape
    rb"|\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}"  # a pair
    rb"|(\\u[dD][89a-fA-F][0-9a-fA-F]{2})"  # half of one
)
_LINE_ENDS: Final = tuple((chr(code).encode(), b"\\u%04x" % code) for code in (0x85, 0x2028, 0x2029))
_PATH: Final = re.compile(r" - at `\$\.?(.*?)`$")
_Body = TypeVar("_Body")


def read_object(body: bytes, *, empty: str = "missing request body", fold_case: bool = False) -> dict[str, Any]:
    """The JSON object of a request without its nulls. ``fold_case`` makes names lower case, as Go's decoder does."""
    if not body.strip():
        raise InvalidRequest(empty)
    try:
        data = _decode(body)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"the body is not JSON: {error}") from None
    if not isinstance(data, dict):
        raise InvalidRequest(f"the body has to be a JSON object, not {_json_type(data)}")
    data = without_nulls(data)
    return {name.lower(): value for name, value in data.items()} if fold_case else data


def _decode(body: bytes) -> Any:
    """Decode JSON. As in Go's decoder, halves of surrogate pairs and invalid UTF-8 become U+FFFD: JavaScript programs
    cut emoji in halves, and Windows' curl sends Latin-1."""
    if b"\\u" in body:
        body = _SURROGATES.sub(lambda match: b"\\ufffd" if match[1] else match[0], body)
    try:
        return msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError):
        repaired = body.decode("utf-8", "replace").encode()
        if repaired == body:
            raise
        return msgspec.json.decode(repaired)


def ndjson_line(value: Any) -> bytes:
    """A line of NDJSON. As in Go's encoder, the characters at which Python's ``str.splitlines`` splits are escaped."""
    line = msgspec.json.encode(value)
    for raw, escaped in _LINE_ENDS:
        if raw in line:
            line = line.replace(raw, escaped)
    return line + b"\n"


def without_nulls(data: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in data.items() if value is not None}


def convert(data: Any, kind: type[_Body], prefix: str = "") -> _Body:
    """Check types, explicit nulls being absence at every depth that ``kind`` describes; raises ``InvalidRequest`` that
    names the field."""
    try:
        return msgspec.convert(_present(data, kind), kind)
    except RecursionError:
        raise InvalidRequest("the body is nested too deeply", param=prefix.rstrip(".") or None) from None
    except msgspec.ValidationError as error:
        text = str(error)
        match = _PATH.search(text)
        path = prefix + (match[1] if match else "")
        sentence = text[: match.start()] if match else text
        raise InvalidRequest(
            f"{sentence.replace('`', '')}{f' for {path}' if path else ''}", param=path or None
        ) from None


def _present(data: Any, kind: type) -> Any:
    """Without the nulls of what is described by structs; an object that anything may stand in (a JSON schema, the
    arguments of a call) keeps its own."""
    if isinstance(data, list):
        return [_present(item, kind) for item in data]
    if not isinstance(data, dict):
        return data
    inner = structs_inside(kind)
    return {
        name: _present(value, inner[name]) if name in inner else value
        for name, value in data.items()
        if value is not None
    }


@cache
def structs_inside(kind: type) -> dict[str, type]:
    """The structs that a struct's fields hold, alone or in lists, by the fields' names."""
    found: dict[str, type] = {}
    for said in msgspec.structs.fields(kind):
        types = [said.type]
        while types:
            one = types.pop()
            types += get_args(one)
            if isinstance(one, type) and issubclass(one, msgspec.Struct):
                found[said.encode_name] = one
    return found


def _json_type(value: object) -> str:
    names = {list: "an array", str: "a string", bool: "a boolean", int: "a number", float: "a number"}
    return names.get(type(value), "null")
