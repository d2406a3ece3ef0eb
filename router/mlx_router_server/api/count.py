"""Counting the tokens of a prompt: by the model's own template and tokenizer, without its weights or a turn."""

from __future__ import annotations

from typing import NamedTuple

from starlette.requests import Request

from mlx_router_server.api.answer import admit, ignored_headers
from mlx_router_server.api.disconnect import unless_client_leaves
from mlx_router_server.api.server import server_of
from mlx_router_server.dialects.call import Call
from mlx_router_shared.generation import CountRequest, GenerationRequest

__all__ = ["CountedPrompt", "count_tokens"]


class CountedPrompt(NamedTuple):
    """The length of a prompt in tokens, its text, and the headers of an answer about it."""

    tokens: int
    text: str
    headers: dict[str, str]


async def count_tokens(request: Request, call: Call) -> CountedPrompt:
    """Count the prompt of a call. Loads no model, waits for none."""
    entry, call = await admit(request, call)
    (asked,) = call.requests
    assert isinstance(asked, GenerationRequest)
    counting = server_of(request).supervisor.count(
        entry.files.engine, CountRequest(path=str(entry.path.absolute()), request=asked)
    )
    counted = await unless_client_leaves(request.receive, counting)
    return CountedPrompt(counted.tokens, counted.text, ignored_headers(server_of(request), call.ignored))
