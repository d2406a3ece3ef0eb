"""The rule for each field of each body: honoured, ignored, or refused; docs/fields.md is rendered from these.

Honoured is what the body's struct has. What is in neither list is a name that nobody here knows: ignored as well, as
the APIs do it, because clients send new fields every month. Whatever is ignored is told in a response header.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from msgspec import Struct

from mlx_router_shared.errors import UnsupportedCapability

__all__ = ["FieldRules", "shown_in_header"]

_LONGEST_HEADER: Final = 1000
_NOTHING: tuple[Any, ...] = (None, "", [], {}, False)


def shown_in_header(names: tuple[str, ...]) -> str:
    """Names of fields as a header's value. They come from a stranger: what is no visible ASCII character has no place
    in a header."""
    return "".join(char if "!" <= char <= "~" else "?" for char in ",".join(names)[:_LONGEST_HEADER])


@dataclass(frozen=True, slots=True, kw_only=True)
class FieldRules:
    """The fields of one route's body."""

    route: str
    body: type[Struct]
    ignored: Mapping[str, str] = field(default_factory=dict)
    """With the reason why ignoring it is right."""
    refused: Mapping[str, str] = field(default_factory=dict)
    """With the sentence of the refusal."""
    notes: Mapping[str, str] = field(default_factory=dict)
    """Of honoured fields: what is particular about it here."""

    def check(self, data: Mapping[str, Any]) -> tuple[str, ...]:
        """The names that are ignored; raises ``UnsupportedCapability`` for one that is refused. A field that says
        nothing (null, empty, false) is neither."""
        ignored = []
        for name, value in data.items():
            if value in _NOTHING:
                continue
            if name in self.refused:
                raise UnsupportedCapability(self.refused[name], param=name)
            if name not in self.honoured:
                ignored.append(name)
        return tuple(ignored)

    @property
    def honoured(self) -> tuple[str, ...]:
        return self.body.__struct_encode_fields__
