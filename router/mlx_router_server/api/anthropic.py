"""Anthropic's routes."""

from __future__ import annotations

import secrets

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from mlx_router_server.api.answer import Answer, AnswerStyle, answer
from mlx_router_server.api.body import parse_body
from mlx_router_server.api.count import count_tokens
from mlx_router_server.dialects import anthropic_answers as answers
from mlx_router_server.dialects.anthropic_requests import parse_count, parse_messages

__all__ = ["routes"]


async def messages(request: Request) -> Answer:
    asked = await parse_body(request, parse_messages)
    call = asked.call
    answer_id = "msg_" + secrets.token_hex(12)
    style = AnswerStyle(
        whole=lambda transcripts, moment: answers.render_answer(
            answer_id, call.model, transcripts[0], show_thinking=asked.show_thinking
        ),
        stream=lambda: answers.AnthropicStream(answer_id, call.model, show_thinking=asked.show_thinking),
        thinking="thinking" if asked.names_thinking else "",
        effort="output_config.effort",
    )
    return await answer(request, call, style)


async def count(request: Request) -> Response:
    """Clients ask for many at once and do not expect to wait."""
    counted = await count_tokens(request, await parse_body(request, parse_count))
    body = msgspec.json.encode({"input_tokens": counted.tokens})
    return Response(body, headers=counted.headers, media_type="application/json")


def routes() -> list[BaseRoute]:
    return [
        Route("/v1/messages", messages, methods=["POST"]),
        Route("/v1/messages/count_tokens", count, methods=["POST"]),
    ]
