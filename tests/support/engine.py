"""An engine of text in this process, played to the end of its requests."""

from __future__ import annotations

import json
from typing import Any, Final

from mlx_router_shared.generation import Event, GenerationRequest, Message, Request, Role, Sampling, TextDelta
from mlx_router_worker.engines.text import TextEngine

__all__ = ["SCHEMA", "play", "request", "submit", "text_of"]

SCHEMA: Final = json.dumps(
    {"type": "object", "properties": {
        "name": {"type": "string"}, "age": {"type": "integer"}, "tags": {"type": "array", "items": {"type": "string"}},
        "kind": {"enum": ["a", "b"]}}, "required": ["name", "age", "tags", "kind"], "additionalProperties": False}
)  # fmt: skip


def request(schema: str | None, seed: int, tokens: int, *, thinking: bool | None = None) -> GenerationRequest:
    """At temperature 1, so that a model that knows nothing says anything."""
    return GenerationRequest(
        messages=[Message(role=Role.USER, content="go")], schema=schema, thinking=thinking, max_tokens=tokens,
        sampling=Sampling(temperature=1.0, seed=seed),
    )  # fmt: skip


def submit(engine: Any, request_id: str, request: Request) -> list[Event]:
    """Prepare a request and hand it in, as the compute loop does."""
    first: list[Event] = engine.submit(request_id, engine.prepare(request))
    return first


def play(engine: TextEngine, requests: dict[str, GenerationRequest]) -> dict[str, list[Event]]:
    """All events of each request."""
    out = {name: submit(engine, name, asked) for name, asked in requests.items()}
    while engine.streams:
        for stream in engine.step():
            out[stream.request_id] += stream.events
    return out


def text_of(events: list[Event]) -> str:
    return "".join(event.text for event in events if isinstance(event, TextDelta))
