"""Kinds of values that a setting can have: from what a file, a variable or a flag says to what the program uses.

Each raises ``ValueError`` (or ``InvalidRequest``, for durations) with a few words about what is wrong.
"""

from __future__ import annotations

import ipaddress
import math
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from mlx_router_server.dialects.options import parse_options
from mlx_router_server.durations import parse_duration

__all__ = [
    "boolean",
    "duration",
    "file",
    "host",
    "integer",
    "names",
    "one_of",
    "options",
    "path",
    "paths",
    "port",
    "schema_of",
    "seconds",
    "shown",
    "size",
    "text",
]

_LABEL: Final = r"[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?"
_HOST_NAME: Final = re.compile(rf"{_LABEL}(\.{_LABEL})*\.?", re.IGNORECASE | re.ASCII)
_MOST_SECONDS: Final = 1000 * 365 * 86400.0
_SIZE: Final = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?", re.IGNORECASE)


def duration(value: object) -> float:
    if isinstance(value, str) and re.fullmatch(r"-?\d+(\.\d+)?", value.strip()):
        value = float(value)  # OLLAMA_KEEP_ALIVE=300 is fine, although keep_alive "300" in a request is not
    if value != value:
        raise ValueError("not a number")
    return parse_duration(value)


def size(value: object) -> int:
    """``"12GB"``, ``"12GiB"``, ``12000000000``."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    match = _SIZE.fullmatch(str(value).strip())
    if match is None:
        raise ValueError("not a size such as 12GB")
    power = " KMGT".index(match[2].upper() or " ")
    return int(float(match[1]) * (1024 if match[3] else 1000) ** power)


def boolean(value: object) -> bool:
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and value.strip().lower() in ("1", "t", "true", "yes", "on"):
        return True
    if isinstance(value, str) and value.strip().lower() in ("0", "f", "false", "no", "off", ""):
        return False
    raise ValueError("not true or false")


def integer(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise ValueError("not a whole number")
    number = int(value)
    if number < 0:
        raise ValueError("negative")
    return number


def seconds(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError("not a number of seconds")
    number = float(value)
    if not number >= 0:
        raise ValueError("negative")
    if number > _MOST_SECONDS:
        raise ValueError("longer than a thousand years; 0 is no limit where there can be none")
    return number


def share(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError("not a number")
    number = float(value)
    if not 0 < number < 1:
        raise ValueError("not between 0 and 1")
    return number


def milliseconds(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError("not a number of milliseconds")
    number = float(value)
    if not 1 <= number <= 60_000:
        raise ValueError("not between 1 and 60000")
    return number


def port(value: object) -> int:
    number = integer(value)
    if number > 65535:
        raise ValueError("not a port")
    return number


def text(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError("not text")
    return value


def host(value: object) -> str:
    """A host name or an IP address, without a port; an IPv6 address may have brackets. Empty is every address."""
    name = text(value).strip()
    bare = name[1:-1] if name.startswith("[") and name.endswith("]") else name
    if not bare or _HOST_NAME.fullmatch(bare):
        return bare
    try:
        ipaddress.ip_address(bare)
    except ValueError:
        raise ValueError("neither a host name nor an IP address") from None
    return bare


def one_of(*choices: str) -> Callable[[object], str]:
    def parse(value: object) -> str:
        if value not in choices:
            raise ValueError(f"not one of {', '.join(choice or 'nothing' for choice in choices)}")
        return str(value)

    parse.__dict__["choices"] = choices
    return parse


def path(value: object) -> Path:
    name = text(value)
    if "\0" in name:
        raise ValueError("holds a NUL character")
    try:
        return Path(name).expanduser().absolute()
    except RuntimeError:
        raise ValueError("there is no such user") from None


def file(value: object) -> str:
    """A path as it is written, or nothing."""
    if text(value):
        path(value)
    return text(value)


def options(value: object) -> dict[str, Any]:
    """A table of options as requests have them."""
    if not isinstance(value, dict):
        raise ValueError("not a table")
    parse_options(value)
    return value


def paths(value: object) -> tuple[Path, ...]:
    """A list in the file; in the environment separated like PATH."""
    if isinstance(value, str):
        value = [part for part in value.split(os.pathsep) if part]
    if not isinstance(value, list | tuple):
        raise ValueError("not a list of folders")
    return tuple(path(part) for part in value)


def names(value: object) -> tuple[str, ...]:
    """A list in the file; in the environment separated by commas."""
    if isinstance(value, str):
        value = [part.strip() for part in value.split(",") if part.strip()]
    if not isinstance(value, list | tuple):
        raise ValueError("not a list")
    return tuple(text(part) for part in value)


# ----------------------------------------------------------------------------------------------- the way back


def shown(value: Any, *, secret: bool = False) -> Any:
    """A value as a file would have it; for ever is -1."""
    if secret:
        return ["****" for _ in value]
    if isinstance(value, float):
        return -1 if math.isinf(value) else int(value) if value == int(value) else value
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, tuple):
        return [shown(part) for part in value]
    return value


_TEXTS: Final = {"type": "array", "items": {"type": "string"}}
_SCHEMAS: Final[dict[Callable[[object], Any], dict[str, Any]]] = {
    boolean: {"type": "boolean"},
    duration: {"type": ["number", "string"]},
    file: {"type": "string"},
    host: {"type": "string"},
    integer: {"type": "integer", "minimum": 0},
    names: _TEXTS,
    options: {"type": "object"},
    path: {"type": "string"},
    paths: _TEXTS,
    port: {"type": "integer", "minimum": 0, "maximum": 65535},
    seconds: {"type": "number", "minimum": 0},
    share: {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1},
    milliseconds: {"type": "number", "minimum": 1, "maximum": 60_000},
    size: {"type": ["integer", "string"], "minimum": 0},
    text: {"type": "string"},
}


def schema_of(kind: Callable[[object], Any]) -> dict[str, Any]:
    """What a file may say, as a JSON schema."""
    if choices := getattr(kind, "choices", None):
        return {"type": "string", "enum": list(choices)}
    return dict(_SCHEMAS[kind])
