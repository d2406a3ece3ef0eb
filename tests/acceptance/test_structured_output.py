"""A model that knows nothing is held to a schema, a hundred times alone and a hundred times in shared batches."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mlx_router_shared.generation import Event, Finish
from mlx_router_shared.protocol import Load
from mlx_router_worker.engines.text import TextEngine
from tests.support.engine import SCHEMA, play, request, text_of


def _check(events: list[Event]) -> None:
    value = json.loads(text_of(events))
    assert set(value) == {"name", "age", "tags", "kind"}
    assert value["kind"] in ("a", "b")
    assert all(isinstance(tag, str) for tag in value["tags"])


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_hundred_of_a_hundred_alone_and_in_batches_of_sixteen(models_dir: Path) -> None:
    engine = TextEngine(lambda data: None)
    load = Load(model="small", path=str(models_dir / "small"), context_tokens=0, parallel=16)
    engine.load(load, lambda stage, fraction: None)
    for seed in range(100):
        _check(play(engine, {"r": request(SCHEMA, seed, 120)})["r"])
    for batch in range(10):
        requests = {f"held-{n}": request(SCHEMA, 1000 * batch + n, 120) for n in range(10)}
        requests |= {f"free-{n}": request(None, n, 120) for n in range(6)}
        played = play(engine, requests)
        free = {text_of(played[f"free-{n}"]) for n in range(6)}
        assert len(free) == 6, "the free ones go their own ways"
        for name, events in played.items():
            assert isinstance(events[-1], Finish)
            if name.startswith("held"):
                _check(events)
    engine.close()
