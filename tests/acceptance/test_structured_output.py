"""A model that knows nothing is held to a schema, a hundred times alone and a hundred times in shared batches."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mlx_router_shared.generation import Event, Finish, GenerationRequest, Message, Role, Sampling, TextDelta
from mlx_router_shared.protocol import Load
from mlx_router_worker.mlx_engine import MlxEngine

_SCHEMA = json.dumps(
    {"type": "object", "properties": {
        "name": {"type": "string"}, "age": {"type": "integer"}, "tags": {"type": "array", "items": {"type": "string"}},
        "kind": {"enum": ["a", "b"]}}, "required": ["name", "age", "tags", "kind"], "additionalProperties": False}
)  # fmt: skip


def _request(schema: str | None, seed: int) -> GenerationRequest:
    """Thinking is left to the model, which begins a block at times and never ends one."""
    return GenerationRequest(
        messages=[Message(role=Role.USER, content="go")], schema=schema, max_tokens=120,
        sampling=Sampling(temperature=1.0, seed=seed),
    )  # fmt: skip


def _play(engine: MlxEngine, requests: dict[str, GenerationRequest]) -> dict[str, list[Event]]:
    out = {name: engine.submit(name, request) for name, request in requests.items()}
    while engine.streams:
        for stream in engine.step():
            out[stream.request_id] += stream.events
    return out


def _check(events: list[Event]) -> None:
    value = json.loads("".join(event.text for event in events if isinstance(event, TextDelta)))
    assert set(value) == {"name", "age", "tags", "kind"}
    assert value["kind"] in ("a", "b")
    assert all(isinstance(tag, str) for tag in value["tags"])


@pytest.mark.slow
def test_a_hundred_of_a_hundred_alone_and_in_batches_of_sixteen(models_dir: Path) -> None:
    engine = MlxEngine(lambda data: None)
    load = Load(model="small", path=str(models_dir / "small"), context_tokens=0, parallel=16)
    engine.load(load, lambda stage, fraction: None)
    for seed in range(100):
        _check(_play(engine, {"r": _request(_SCHEMA, seed)})["r"])
    for batch in range(10):
        requests = {f"held-{n}": _request(_SCHEMA, 1000 * batch + n) for n in range(10)}
        requests |= {f"free-{n}": _request(None, n) for n in range(6)}
        played = _play(engine, requests)
        free = {"".join(e.text for e in played[f"free-{n}"] if isinstance(e, TextDelta)) for n in range(6)}
        assert len(free) == 6, "the free ones go their own ways"
        for name, events in played.items():
            assert isinstance(events[-1], Finish)
            if name.startswith("held"):
                _check(events)
    engine.close()
