"""Tool definitions in the shape that Ollama's /api/chat and OpenAI's /v1/chat/completions share."""

from __future__ import annotations

from typing import Any, Final

import msgspec
from msgspec import Struct, field

from mlx_router_server.dialects.body import convert
from mlx_router_server.dialects.schemas import StrictTools
from mlx_router_shared.errors import InvalidRequest
from mlx_router_shared.generation import Tool

__all__ = ["TOOL_BODY", "read_tools"]


class _ToolFunction(Struct, kw_only=True):
    name: str
    description: str = ""
    parameters: dict[str, Any] = field(default_factory=dict)
    strict: bool = False


class _Tool(Struct, kw_only=True):
    function: _ToolFunction
    type: str = "function"


TOOL_BODY: Final = _Tool


def read_tools(items: list[dict[str, Any]], ignored: list[str]) -> list[Tool]:
    """Read the tools of a request. Constraints of strict ones that are not enforced are added to ``ignored``."""
    tools = []
    strict_tools = StrictTools()
    for number, item in enumerate(items):
        tool = convert(item, _Tool, f"tools[{number}].")
        if tool.type != "function":
            raise InvalidRequest(f"tools of type {tool.type!r} are not supported", param=f"tools[{number}].type")
        parameters = tool.function.parameters or {"type": "object", "properties": {}}
        if tool.function.strict:
            ignored += strict_tools.check(parameters, f"tools[{number}].function.parameters")
        tools.append(
            Tool(
                name=tool.function.name,
                description=tool.function.description,
                parameters=msgspec.json.encode(parameters).decode(),
                strict=tool.function.strict,
            )
        )
    return tools
