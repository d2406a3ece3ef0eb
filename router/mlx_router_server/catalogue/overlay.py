"""What a created model says on top of the weights that it is made from: prompt, options, template, example turns.

Pure data. It is applied to a request before a worker hears of it, so that any number of such models share one worker.
"""

from __future__ import annotations

import hashlib
from typing import Any

import msgspec
from msgspec import Struct, field

__all__ = ["NOTHING", "Overlay", "Turn", "modelfile_of"]


class Turn(Struct, frozen=True, kw_only=True):
    """One message that precedes every conversation."""

    role: str
    content: str = ""


class Overlay(Struct, frozen=True, kw_only=True):
    """Empty values say nothing."""

    system: str = ""
    template: str = ""
    """A Go template, as Ollama's models have them, instead of the model's own."""
    parameters: dict[str, Any] = field(default_factory=dict)
    messages: list[Turn] = field(default_factory=list)
    license: list[str] = field(default_factory=list)

    def over(self, other: Overlay) -> Overlay:
        """This one on top of another: what is said here counts; parameters are merged one by one."""
        return Overlay(
            system=self.system or other.system,
            template=self.template or other.template,
            parameters={**other.parameters, **self.parameters},
            messages=self.messages or other.messages,
            license=self.license or other.license,
        )

    def digest_over(self, base: str) -> str:
        """The digest of a base and this on top; that of the base when nothing is said."""
        if self == NOTHING:
            return base
        return hashlib.sha256(base.encode() + b"\0" + msgspec.json.encode(self, order="sorted")).hexdigest()


NOTHING = Overlay()


def modelfile_of(base: str, overlay: Overlay, adapter: str = "") -> str:
    """The Modelfile that would make such a model."""
    lines = [f"FROM {base}"]
    if adapter:
        lines.append(f"ADAPTER {adapter}")
    if overlay.template:
        lines.append(f"TEMPLATE {_quoted(overlay.template)}")
    if overlay.system:
        lines.append(f"SYSTEM {_quoted(overlay.system)}")
    for name, value in overlay.parameters.items():
        lines += [f"PARAMETER {name} {_value(one)}" for one in (value if isinstance(value, list) else [value])]
    lines += [f"MESSAGE {turn.role} {_quoted(turn.content)}" for turn in overlay.messages]
    lines += [f"LICENSE {_quoted(text)}" for text in overlay.license]
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    return f'"""{text}"""'


def _value(value: Any) -> str:
    return msgspec.json.encode(value).decode()
