"""JSON schemas as libraries write them, made enforceable: what the grammar library cannot hold and what only narrows a
value is taken out and named. What changes the shape of a value stays in, and is refused by name when it is compiled.

Schemas come from pydantic, zod and the like, which add patterns with look-around, formats of their own and annotations
that no grammar knows.
"""

from __future__ import annotations

import json
from functools import lru_cache
from typing import Any, Final, NamedTuple
from urllib.parse import quote, unquote

__all__ = ["MOST_SCHEMA_BYTES", "Enforceable", "enforceable_schema"]

MOST_SCHEMA_BYTES: Final = 128 * 2**10
"""The time that a schema takes to compile grows with the square of its size: this is about half a second."""

_NARROWING: Final = ("uniqueItems", "propertyNames", "minContains", "maxContains", "contentSchema")
"""Keywords that llguidance does not have and that accept fewer of the values of the same shape."""
_NARROWING_VALUES: Final = frozenset(
    {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf", "minLength", "maxLength", "pattern",
     "format", "minItems", "maxItems", "minProperties", "maxProperties", "contentEncoding", "contentMediaType"}
)  # fmt: skip
"""Keywords that llguidance has, and does not have for every value: bounds of 64 bits, lengths that are null."""
_MAY_BE_NULL: Final = ("const", "default", "examples")
"""Keywords that say something by null; libraries write it for others that they have no value for."""
_LARGEST_EXACT: Final = 2**53
_PLAIN_IN_REFERENCES: Final = "#/~:@!$&'()*+,;=?.-_"
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
    tries = [_Cleaner()]
    cleaned, problem = tries[0].clean(schema)
    if "oneOf" in problem:
        # That no other alternative fits as well narrows the value too.
        tries.append(_Cleaner(exclusive=False))
        cleaned, problem = tries[-1].clean(schema)
    if problem:
        tries.append(_Cleaner(exclusive="oneOf" not in problem and len(tries) == 1, bare=True))
        bare, bare_problem = tries[-1].clean(schema)
        if bare_problem:
            del tries[-1]
        else:
            cleaned, problem = bare, ""
    return Enforceable(cleaned, tuple(dict.fromkeys(tries[-1].dropped)), problem)


class _Cleaner:
    """Takes out of a schema what cannot be enforced, and keeps the paths of it in ``dropped``."""

    def __init__(self, *, exclusive: bool = True, bare: bool = False) -> None:
        """``exclusive``: leave ``oneOf`` as it is; otherwise it becomes ``anyOf``. ``bare``: take out all keywords that
        only narrow a value, where they cannot be enforced together."""
        self.dropped: list[str] = []
        self._exclusive = exclusive
        self._bare = bare

    def clean(self, schema: Any) -> tuple[Any, str]:
        """Return the schema that is left, and why it cannot be enforced either, or ""."""
        cleaned = self._cleaned(schema, "")
        return cleaned, _problem(cleaned)

    def _cleaned(self, node: Any, at: str) -> Any:
        if not isinstance(node, dict):
            return node
        out: dict[str, Any] = {}
        bare = self._bare and bool(_problem(_shallow(node)))
        for key, value in node.items():
            path = f"{at}.{key}" if at else key
            if (value is None and key not in _MAY_BE_NULL) or (key in _NARROWING and value is False):
                continue  # it says nothing
            if key == "$ref" and isinstance(value, str):
                out[key] = quote(unquote(value), safe=_PLAIN_IN_REFERENCES)
                continue
            if _is_unenforceable(key, value) or (bare and key in _NARROWING_VALUES and not isinstance(value, dict)):
                self.dropped.append(path)
            elif key in _MAPS and isinstance(value, dict):
                out[key] = {name: self._cleaned(inner, f"{path}.{name}") for name, inner in value.items()}
            elif key in _LISTS and isinstance(value, list):
                name = key
                if key == "oneOf" and not self._exclusive and "anyOf" not in node:
                    name = "anyOf"
                    self.dropped.append(path)
                out[name] = [self._cleaned(inner, f"{path}[{number}]") for number, inner in enumerate(value)]
            elif key in _SCHEMAS:
                out[key] = self._cleaned(value, path)
            elif key != "$schema":
                out[key] = value
        return out


def _shallow(node: dict[str, Any]) -> dict[str, Any]:
    """What a schema says of its value itself, and not of the values inside."""
    plain = {key: value for key, value in node.items() if key in _NARROWING_VALUES or key in ("type", "required")}
    properties = node.get("properties")
    return plain | ({"properties": dict.fromkeys(properties, True)} if isinstance(properties, dict) else {})


def _is_unenforceable(key: str, value: Any) -> bool:
    if key in _NARROWING or ((key in _NARROWING_VALUES or key in ("const", "enum")) and _has_inexact(value)):
        return True
    if key == "format":  # a format is an annotation, by the standard
        return isinstance(value, str) and not _is_known_format(value)
    return key == "pattern" and isinstance(value, str) and not _is_usable_pattern(value)


def _has_inexact(value: Any) -> bool:
    """Whether a whole number in a value is beyond those that llguidance holds exactly."""
    if isinstance(value, list):
        return any(_has_inexact(item) for item in value)
    if isinstance(value, dict):
        return any(_has_inexact(item) for item in value.values())
    return isinstance(value, int) and abs(value) > _LARGEST_EXACT


def _problem(schema: Any) -> str:
    from llguidance import LLMatcher  # only where it is needed: most requests have no schema

    return str(LLMatcher.validate_grammar(LLMatcher.grammar_from_json_schema(json.dumps(schema))))


@lru_cache(maxsize=256)
def _is_known_format(name: str) -> bool:
    return not _problem({"type": "string", "format": name})


@lru_cache(maxsize=256)
def _is_usable_pattern(pattern: str) -> bool:
    return not _problem({"type": "string", "pattern": pattern})
