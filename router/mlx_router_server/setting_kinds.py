"""Kinds of values that a setting can have: from what a file, a variable or a flag says to what the program uses.

Each raises ``ValueError`` (or ``InvalidRequest``, for durations) with a few words about what is wrong.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Final

from mlx_router_server.durations import parse_duration

__all__ = ["boolean", "duration", "integer", "names", "one_of", "paths", "port", "seconds", "size", "text"]

_SIZE: Final = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?", re.IGNORECASE)


def duration(value: object) -> float:
    if isinstance(value, str) and re.fullmatch(r"-?\d+(\.\d+)?", value.strip()):
        value = float(value)  # OLLAMA_KEEP_ALIVE=300 is fine, although keep_alive "300" in a request is not
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


def one_of(*choices: str) -> Callable[[object], str]:
    def parse(value: object) -> str:
        if value not in choices:
            raise ValueError(f"not one of {', '.join(choices)}")
        return str(value)

    return parse


def paths(value: object) -> tuple[Path, ...]:
    """A list in the file; in the environment separated like PATH."""
    if isinstance(value, str):
        value = [part for part in value.split(os.pathsep) if part]
    if not isinstance(value, list | tuple):
        raise ValueError("not a list of folders")
    return tuple(Path(str(part)).expanduser().absolute() for part in value)


def names(value: object) -> tuple[str, ...]:
    """A list in the file; in the environment separated by commas."""
    if isinstance(value, str):
        value = [part.strip() for part in value.split(",") if part.strip()]
    if not isinstance(value, list | tuple):
        raise ValueError("not a list")
    return tuple(text(part) for part in value)
