"""JSON schemas that answers have to satisfy: checked before a model is touched."""

from __future__ import annotations

from typing import Any, Final, NamedTuple

import msgspec

from mlx_router_shared.errors import InvalidRequest
from mlx_router_shared.schemas import MOST_SCHEMA_BYTES, enforceable_schema

__all__ = ["ANY_OBJECT", "AnswerSchema", "StrictTools", "answer_schema"]


class AnswerSchema(NamedTuple):
    """The text of a schema, and the constraints of it that are not enforced, as names of ignored fields."""

    text: str
    ignored: tuple[str, ...] = ()


ANY_OBJECT: Final = AnswerSchema('{"type":"object"}')


def answer_schema(schema: dict[str, Any], param: str) -> AnswerSchema:
    """Return what can be enforced of a schema. Raises ``InvalidRequest`` that names what cannot be left out."""
    if len(msgspec.json.encode(schema)) > MOST_SCHEMA_BYTES:
        raise InvalidRequest(f"the JSON schema is longer than {MOST_SCHEMA_BYTES} bytes", param=param)
    try:
        cleaned, dropped, problem = enforceable_schema(schema)
    except RecursionError:
        raise InvalidRequest("the JSON schema is nested too deeply", param=param) from None
    if problem:
        raise InvalidRequest(f"this JSON schema cannot be enforced: {problem}", param=param)
    return AnswerSchema(msgspec.json.encode(cleaned).decode(), tuple(f"{param}.{path}" for path in dropped))


class StrictTools:
    """Checks the parameters of the strict tools of one request, whose schemas are bounded together."""

    def __init__(self) -> None:
        self._bytes = 0

    def check(self, parameters: dict[str, Any], param: str) -> tuple[str, ...]:
        """Return the constraints that are not enforced. Raises ``InvalidRequest``."""
        kinds = parameters.get("type") or "object"
        if "object" not in (kinds if isinstance(kinds, list) else [kinds]):
            raise InvalidRequest("the parameters of a tool must be of type object", param=f"{param}.type")
        self._bytes += len(msgspec.json.encode(parameters))
        if self._bytes > MOST_SCHEMA_BYTES:
            raise InvalidRequest(
                f"the JSON schemas of the strict tools are longer than {MOST_SCHEMA_BYTES} bytes together", param=param
            )
        return answer_schema(parameters, param).ignored
