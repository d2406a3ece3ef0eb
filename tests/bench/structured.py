"""What a grammar costs a token, and whether it holds: in the engine itself, because that is where it happens."""

from __future__ import annotations

import json
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from mlx_router_shared.protocol import Load
from mlx_router_worker.engines.text import TextEngine
from tests.support.engine import SCHEMA, play, request, submit, text_of
from tests.tiny_models.random_model import make_random_model

__all__ = ["structured"]

_VOCABULARY: Final = 32_768
_BYTES: Final = 96_000_000
_STREAMS: Final = 8
_TOKENS: Final = 24
_ROUNDS: Final = 5
_TEXT_BYTES: Final = 12_000_000


def _texts() -> Iterator[str]:
    """Enough text for a large vocabulary, on every machine: the standard library."""
    size = 0
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).rglob("*.py")):
        text = path.read_text(encoding="utf-8", errors="replace")
        size += len(text)
        if size > _TEXT_BYTES:
            return
        yield text


def _ms_per_token(engine: TextEngine, schema: str | None, streams: int, seed: int) -> float:
    """Of decoding alone: from the moment in which every stream has begun."""
    for number in range(streams):
        submit(engine, str(number), request(schema, seed + number, _TOKENS, thinking=False))
    begun: set[str] = set()
    while len(begun) < streams:
        begun |= {stream.request_id for stream in engine.step()}
    before, started = engine.reading().tokens_total, time.perf_counter()
    while engine.streams:
        engine.step()
    return (time.perf_counter() - started) / (engine.reading().tokens_total - before) * 1000


def _valid(engine: TextEngine, rounds: int, held: int, free: int) -> int:
    good = 0
    for number in range(rounds):
        requests = {f"h{n}": request(SCHEMA, 1000 * number + n, 120, thinking=False) for n in range(held)}
        requests |= {f"f{n}": request(None, n, 60, thinking=False) for n in range(free)}
        for name, events in play(engine, requests).items():
            if name.startswith("h"):
                text = text_of(events)
                try:
                    good += set(json.loads(text)) == {"name", "age", "tags", "kind"}
                except ValueError:
                    print("not JSON:", text)
    return good


def structured(home: Path) -> dict[str, Any]:
    """Alternating rounds of answers that are free and held; and how many of a hundred hold."""
    folder = home / "model"
    make_random_model(folder, size_bytes=_BYTES, vocabulary=_VOCABULARY, more_texts=_texts())
    engine = TextEngine(lambda data: None)
    facts = engine.load(
        Load(model="structured", path=str(folder), context_tokens=0, parallel=32), lambda stage, fraction: None
    )
    started = time.perf_counter()
    play(engine, {"first": request(SCHEMA, 0, 2)})
    build = time.perf_counter() - started
    times: dict[tuple[int, bool], list[float]] = {}
    for number in range(_ROUNDS + 1):
        for streams in (_STREAMS, 1):
            for held in (False, True):
                took = _ms_per_token(engine, SCHEMA if held else None, streams, number * 100)
                if number:  # the first round warms up
                    times.setdefault((streams, held), []).append(took)
    middle = {key: sorted(values)[len(values) // 2] for key, values in times.items()}
    small = home / "small"
    make_random_model(small, size_bytes=4_000_000)
    weak = TextEngine(lambda data: None)
    weak.load(Load(model="weak", path=str(small), context_tokens=0, parallel=32), lambda stage, fraction: None)
    return {
        "megabytes": facts.weights_bytes / 1e6,
        "vocabulary": _VOCABULARY,
        "streams": _STREAMS,
        "build_s": build,
        "free_ms": middle[_STREAMS, False],
        "held_ms": middle[_STREAMS, True],
        "cost": middle[_STREAMS, True] / middle[_STREAMS, False] - 1,
        "free_1_ms": middle[1, False],
        "held_1_ms": middle[1, True],
        "cost_1": middle[1, True] / middle[1, False] - 1,
        "valid_alone": _valid(weak, 100, 1, 0),
        "valid_mixed": _valid(weak, 10, 10, 6),
    }
