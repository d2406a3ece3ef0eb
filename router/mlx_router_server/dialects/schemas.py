"""JSON schemas that answers have to satisfy: checked before a model is touched."""

from __future__ import annotations

from typing import Any, Final

import msgspec

from mlx_router_shared.errors import InvalidRequest

__all__ = ["ANY_OBJECT", "schema_text"]

ANY_OBJECT: Final = '{"type":"object"}'


def schema_text(schema: dict[str, Any], param: str) -> str:
    """The schema as text; raises ``InvalidRequest`` that names what the grammar library cannot enforce."""
    from llguidance import LLMatcher  # only where it is needed: most requests have no schema

    text = msgspec.json.encode(schema).decode()
    problem = LLMatcher.validate_grammar(LLMatcher.grammar_from_json_schema(text))
    if problem:
        raise InvalidRequest(f"this JSON schema cannot be enforced: {problem}", param=param)
    return text
