"""JSON schemas that answers have to satisfy: checked before a model is touched."""

from __future__ import annotations

from typing import Any, Final, NamedTuple

import msgspec

from mlx_router_shared.errors import InvalidRequest
from mlx_router_shared.schemas import enforceable_schema

__all__ = ["ANY_OBJECT", "AnswerSchema", "answer_schema", "check_strict_tool"]

_LONGEST: Final = 128 * 2**10
"""Bytes. The time that a schema takes to compile grows with the square of its size: this is about half a second."""


class AnswerSchema(NamedTuple):
    """The text of a schema, and the constraints of it that are not enforced, as names of ignored fields."""

    text: str
    ignored: tuple[str, ...] = ()


ANY_OBJECT: Final = AnswerSchema('{"type":"object"}')


def answer_schema(schema: dict[str, Any], param: str) -> AnswerSchema:
    """Return what can be enforced of a schema. Raises ``InvalidRequest`` that names what cannot be left out."""
    from llguidance import LLMatcher  # only where it is needed: most requests have no schema

    if len(msgspec.json.encode(schema)) > _LONGEST:
        raise InvalidRequest(f"the JSON schema is longer than {_LONGEST} bytes", param=param)
    try:
        cleaned, dropped = enforceable_schema(schema)
    except RecursionError:
        raise InvalidRequest("the JSON schema is nested too deeply", param=param) from None
    text = msgspec.json.encode(cleaned).decode()
    problem = LLMatcher.validate_grammar(LLMatcher.grammar_from_json_schema(text))
    if problem:
        raise InvalidRequest(f"this JSON schema cannot be enforced: {problem}", param=param)
    return AnswerSchema(text, tuple(f"{param}.{path}" for path in dropped))


def check_strict_tool(parameters: dict[str, Any], param: str) -> tuple[str, ...]:
    """Return the constraints of a strict tool's parameters that are not enforced. Raises ``InvalidRequest``."""
    return answer_schema(parameters, param).ignored
