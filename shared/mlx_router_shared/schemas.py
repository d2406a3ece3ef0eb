"""JSON schemas as libraries write them, made enforceable: what the grammar library cannot hold and what only narrows a
value is taken out and named. What changes the shape of a value stays in, and is refused by name when it is compiled.

Schemas come from pydantic, zod and the like, which add patterns with look-around, formats of their own and annotations
that no grammar knows.
"""

from __future__ import annotations

import json
from functools import lru_cache
from typing import Any, Final, NamedTuple

__all__ = ["MOST_SCHEMA_BYTES", "Enforceable", "enforceable_schema"]

MOST_SCHEMA_BYTES: Final = 128 * 2**10
"""The time that a schema takes to compile grows with the square of its size: this is about half a second."""

_NARROWING: Final = ("uniqueItems", "propertyNames", "minContains", "maxContains", "contentSchema")
"""Keywords that llguidance does not have and that accept fewer of the values of the same shape."""
_MAPS: Final = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
_SCHEMAS: Final = ("items", "additionalItems", "additionalProperties", "contains", "not", "if", "then", "else",
                   "unevaluatedItems", "unevaluatedProperties")  # fmt: skip
_LISTS: Final = ("allOf", "anyOf", "oneOf", "prefixItems", "items")


class Enforceable(NamedTuple):
    """A schema, the paths of the constraints that were taken out of it, and why the rest cannot be enforced, or ""."""

    schema: Any
    dropped: tuple[str, ...]
    problem: str


def enforceable_schema(schema: Any) -> Enforceable:
    """Return the schema without the constraints that cannot be enforced and only narrow a value. Raises
    ``RecursionError`` for one that is nested too deeply."""
    dropped: list[str] = []
    cleaned = _cleaned(schema, "", dropped, exclusive=True)
    problem = _problem(cleaned)
    if "oneOf" in problem:
        # That no other alternative fits as well narrows the value too.
        dropped = []
        cleaned = _cleaned(schema, "", dropped, exclusive=False)
        problem = _problem(cleaned)
    return Enforceable(cleaned, tuple(dict.fromkeys(dropped)), problem)


def _cleaned(node: Any, at: str, dropped: list[str], *, exclusive: bool) -> Any:
    """``exclusive``: leave ``oneOf`` as it is; otherwise it becomes ``anyOf``."""
    if not isinstance(node, dict):
        return node
    out: dict[str, Any] = {}
    for key, value in node.items():
        path = f"{at}.{key}" if at else key
        if _is_unenforceable(key, value):
            dropped.append(path)
        elif key in _MAPS and isinstance(value, dict):
            out[key] = {name: _cleaned(inner, f"{path}.{name}", dropped, exclusive=exclusive)
                        for name, inner in value.items()}  # fmt: skip
        elif key in _LISTS and isinstance(value, list):
            name = key
            if key == "oneOf" and not exclusive and "anyOf" not in node:
                name = "anyOf"
                dropped.append(path)
            out[name] = [_cleaned(inner, f"{path}[{number}]", dropped, exclusive=exclusive)
                         for number, inner in enumerate(value)]  # fmt: skip
        elif key in _SCHEMAS:
            out[key] = _cleaned(value, path, dropped, exclusive=exclusive)
        else:
            out[key] = value
    return out


def _is_unenforceable(key: str, value: Any) -> bool:
    if key in _NARROWING:
        return value not in (False, None)
    if key == "format":  # a format is an annotation, by the standard
        return isinstance(value, str) and not _is_known_format(value)
    return key == "pattern" and isinstance(value, str) and not _is_usable_pattern(value)


def _problem(schema: Any) -> str:
    from llguidance import LLMatcher  # only where it is needed: most requests have no schema

    return str(LLMatcher.validate_grammar(LLMatcher.grammar_from_json_schema(json.dumps(schema))))


@lru_cache(maxsize=256)
def _is_known_format(name: str) -> bool:
    return not _problem({"type": "string", "format": name})


@lru_cache(maxsize=256)
def _is_usable_pattern(pattern: str) -> bool:
    return not _problem({"type": "string", "pattern": pattern})
