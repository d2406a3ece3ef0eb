"""The rule for each field of each body: honoured, ignored, or refused; docs/fields.md is rendered from these.

Honoured is what the body's struct has. What is in neither list is a name that nobody here knows: ignored as well, as
the APIs do it, because clients send new fields every month. Whatever is ignored is told in a response header.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from msgspec import Struct

from mlx_router_server.dialects.body import structs_inside
from mlx_router_shared.errors import InvalidRequest, UnsupportedCapability

__all__ = ["FieldRules", "shown_in_header"]

_LONGEST_HEADER: Final = 1000
_MOST_NAMES: Final = 100
_MOST_ITEMS: Final = 10_000
"""Objects in one list of a body: turns of a conversation, parts of a turn, tools."""


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
    inside: Mapping[str, type[Struct] | frozenset[str]] = field(default_factory=dict)
    """Allowed names of nested objects, by path: ``messages[]`` is each item of ``messages``. The structs of the body
    are known without an entry; any other object without one is not checked."""

    def check(self, data: Mapping[str, Any]) -> tuple[str, ...]:
        """Return the names that are ignored, at every depth; raises ``UnsupportedCapability`` for one that is refused.
        An empty field (null, "", [], {}) is neither, and false does not ask for what is refused or ignored by name."""
        ignored: dict[str, None] = {}
        for name, value in data.items():
            if _is_empty(value) or (value is False and (name in self.refused or name in self.ignored)):
                continue
            if name in self.refused:
                raise UnsupportedCapability(self.refused[name], param=name)
            if name not in self.honoured:
                ignored[name] = None
                if len(ignored) >= _MOST_NAMES:
                    break
            else:
                self._check_inside(value, name, structs_inside(self.body).get(name), ignored)
        return tuple(ignored)

    def _check_inside(self, value: Any, path: str, kind: type[Struct] | None, ignored: dict[str, None]) -> None:
        if isinstance(value, list):
            if len(value) > _MOST_ITEMS and isinstance(value[0], dict):
                raise InvalidRequest(f"{path} holds more than {_MOST_ITEMS} items", param=path)
            for item in value:
                self._check_inside(item, f"{path}[]", kind, ignored)
            return
        known = self.inside.get(path, kind)
        if not isinstance(value, dict) or known is None:
            return
        names, inner = (
            (known, {}) if isinstance(known, frozenset) else (known.__struct_encode_fields__, structs_inside(known))
        )
        for name, item in value.items():
            if name in names:
                self._check_inside(item, f"{path}.{name}", inner.get(name), ignored)
            elif not _is_empty(item) and len(ignored) < _MOST_NAMES:
                ignored[f"{path}.{name}"] = None

    @property
    def honoured(self) -> tuple[str, ...]:
        return self.body.__struct_encode_fields__


def _is_empty(value: Any) -> bool:
    return value is None or (isinstance(value, str | list | dict) and not value)
