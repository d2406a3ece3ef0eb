"""JSON schemas as grammars: the answer's own, and those of the calls that a model may make."""

from __future__ import annotations

import json
from typing import Any, Final

from llguidance import LLMatcher

from mlx_router_shared.errors import InvalidRequest
from mlx_router_shared.generation import Tool
from mlx_router_shared.schemas import MOST_SCHEMA_BYTES, enforceable_schema

__all__ = ["answer_grammar", "call_grammar"]

# A weak model wanders off in white space between two tokens, where JSON allows any amount of it.
_WHITE_SPACE: Final = r" ?|\n {0,32}"


def answer_grammar(schema: str) -> str:
    """The grammar of a JSON text that satisfies the schema."""
    return LLMatcher.grammar_from_json_schema(schema, overrides={"whitespace_pattern": _WHITE_SPACE})


def call_grammar(tools: list[Tool]) -> str:
    """The grammar of ``{"name": …, "arguments": {…}}`` for one of these tools.

    Of a tool that is not strict, keywords that the grammar library does not know are passed over. Raises
    ``InvalidRequest`` for parameters that would take too long to compile.
    """
    if sum(len(tool.parameters) for tool in tools) > MOST_SCHEMA_BYTES:
        raise InvalidRequest(
            f"the parameters of the tools that may be called are longer than {MOST_SCHEMA_BYTES} bytes together, which "
            "is too much to enforce", param="tools",
        )  # fmt: skip
    lenient = not any(tool.strict for tool in tools)
    calls = [
        _call_schema(tool, "" if len(tools) == 1 else f"/anyOf/{number}", lenient=lenient)
        for number, tool in enumerate(tools)
    ]
    schema = calls[0] if len(calls) == 1 else {"anyOf": calls}
    return LLMatcher.grammar_from_json_schema(
        json.dumps(schema), overrides={"whitespace_pattern": _WHITE_SPACE, "lenient": lenient}
    )


def _call_schema(tool: Tool, at: str, *, lenient: bool) -> dict[str, Any]:
    """``lenient``: keywords that are not known are passed over when the grammar is compiled."""
    known, _, problem = enforceable_schema(json.loads(tool.parameters))
    if problem and not tool.strict and not (lenient and _compiles(known)):
        known = {}  # what is not strict must not make the call of another tool fail
    parameters = _rebased(known, f"#{at}/properties/arguments")
    kinds = parameters.get("type", "object") if isinstance(parameters, dict) else ""
    if "object" not in (kinds if isinstance(kinds, list) else [kinds]):
        parameters = {}
    return {
        "type": "object",
        "properties": {"name": {"const": tool.name}, "arguments": {**parameters, "type": "object"}},
        "required": ["name", "arguments"],
        "additionalProperties": False,
    }


def _compiles(schema: Any) -> bool:
    grammar = LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides={"lenient": True})
    return not LLMatcher.validate_grammar(grammar)


def _rebased(node: Any, root: str) -> Any:
    """References into a schema that is now a part of another one."""
    if isinstance(node, list):
        return [_rebased(item, root) for item in node]
    if not isinstance(node, dict):
        return node
    out = {name: _rebased(value, root) for name, value in node.items() if name not in ("$schema", "$id")}
    reference = node.get("$ref")
    if isinstance(reference, str) and reference.startswith("#"):
        out["$ref"] = root + reference[1:]
    return out
