"""Ollama's Modelfile: from text to what /api/create takes. Pure; paths are read by who calls it."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from typing import Any, Final

__all__ = ["Modelfile", "ModelfileError", "parse_modelfile"]

_INSTRUCTION: Final = re.compile(r"\s*([A-Za-z]+)(?:\s+(.*))?", re.DOTALL)
_QUOTES: Final = '"""'
_LISTS: Final = frozenset({"stop"})
_IGNORED: Final = frozenset({"requires", "renderer", "parser"})


class ModelfileError(Exception):
    """What is wrong, and in which line."""


@dataclass(slots=True)
class Modelfile:
    """What a file says; ``base`` is a name or a path."""

    base: str = ""
    adapter: str = ""
    template: str = ""
    system: str = ""
    parameters: dict[str, Any] = field(default_factory=dict)
    messages: list[dict[str, str]] = field(default_factory=list)
    license: list[str] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)

    def body(self) -> dict[str, Any]:
        """The fields of /api/create, but for where the weights are."""
        said = {"template": self.template, "system": self.system, "parameters": self.parameters,
                "messages": self.messages, "license": self.license}  # fmt: skip
        return {name: value for name, value in said.items() if value}


def parse_modelfile(text: str) -> Modelfile:
    """Raises ``ModelfileError``."""
    found = Modelfile()
    lines = text.splitlines()
    at = 0
    while at < len(lines):
        number, line = at + 1, lines[at]
        at += 1
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        match = _INSTRUCTION.fullmatch(line)
        if match is None:
            raise ModelfileError(f"line {number}: not an instruction: {line.strip()[:60]!r}")
        value = (match[2] or "").strip()
        if _QUOTES in value:
            value, at = _quoted(value, lines, at, number)
        elif len(value) >= 2 and value[0] == value[-1] == '"' and match[1].lower() != "parameter":
            value = value[1:-1]
        _take(found, match[1].lower(), value, number)
    if not found.base:
        raise ModelfileError("no FROM line: a model is made from another one, or from a folder")
    return found


def _quoted(value: str, lines: list[str], at: int, number: int) -> tuple[str, int]:
    """Text between triple quotes, which may go over lines; what is before them (a role, a name) stays in front."""
    head, _, rest = value.partition(_QUOTES)
    parts = [rest]
    while _QUOTES not in parts[-1]:
        if at >= len(lines):
            raise ModelfileError(f'line {number}: """ is never closed')
        parts.append(lines[at])
        at += 1
    last, _, after = parts[-1].partition(_QUOTES)
    if after.strip():
        raise ModelfileError(f'line {at}: there is text after the closing """')
    parts[-1] = last
    return head + "\n".join(parts), at


def _take(found: Modelfile, word: str, value: str, number: int) -> None:
    if not value:
        raise ModelfileError(f"line {number}: {word.upper()} says nothing")
    match word:
        case "from":
            if found.base:
                raise ModelfileError(f"line {number}: a second FROM")
            found.base = value
        case "adapter":
            if found.adapter:
                raise ModelfileError(f"line {number}: only one adapter is currently supported")
            found.adapter = value
        case "template":
            found.template = value
        case "system":
            found.system = value
        case "license":
            found.license.append(value)
        case "parameter":
            name, _, said = value.partition(" ")
            if not said.strip():
                raise ModelfileError(f"line {number}: PARAMETER {name} has no value")
            if name in _LISTS:
                found.parameters.setdefault(name, []).append(_text(said.strip()))
            else:
                found.parameters[name] = _value(said.strip())
        case "message":
            role, _, said = value.partition(" ")
            if role.lower() not in ("system", "user", "assistant"):
                raise ModelfileError(f"line {number}: the role of a MESSAGE is system, user or assistant")
            found.messages.append({"role": role.lower(), "content": said.strip(" ")})
        case "draft":
            raise ModelfileError(f"line {number}: a draft model is said in the configuration, as draft_model")
        case _ if word in _IGNORED:
            found.ignored.append(word.upper())
        case _:
            raise ModelfileError(f"line {number}: there is no instruction {word.upper()}")


def _text(value: str) -> str:
    return value[1:-1] if len(value) >= 2 and value[0] == value[-1] == '"' else value


def _value(value: str) -> Any:
    """A number or a truth value where it is one, else text."""
    try:
        number = json.loads(value)
    except ValueError:
        return value
    return number if isinstance(number, int | float | str) else value
