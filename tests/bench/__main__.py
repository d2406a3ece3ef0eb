"""Measure and write docs/benchmarks.md: ``python -m tests.bench`` (`make bench`); with names of parts, only
these are measured and printed."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from tests.bench.contention import beside, equal_prompts, long_row, sampling
from tests.bench.imports import imports
from tests.bench.loads import cold_loads, readiness, resident_latency
from tests.bench.report import machine_lines, sections, write_report
from tests.bench.router_figures import crash, first_token, footprint, listing
from tests.bench.structured import structured
from tests.bench.swaps import alternate, alternating_calls, back_to_back
from tests.bench.throughput import throughput
from tests.bench.watching import watching
from tests.tiny_models.random_model import make_random_model

_MODELS: Final = {
    "random-8mb": 8_000_000, "other-8mb": 8_000_000, "random-64mb": 64_000_000, "random-1gb": 1_000_000_000,
    "other-1gb": 1_000_000_000,
}  # fmt: skip


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "models"
        for seed, (name, size) in enumerate(_MODELS.items()):
            make_random_model(folder / name, size_bytes=size, seed=seed)
        small, other, middle, large, other_large = _MODELS
        parts: dict[str, Callable[[Path], Any]] = {
            "footprint": footprint,
            "crash": crash,
            "listing": listing,
            "watching": watching,
            "first_token": first_token,
            "readiness": lambda home: readiness(folder, home, small, 100),
            "imports": lambda home: imports(),
            "cold_loads": lambda home: cold_loads(folder, home, {small: 9, middle: 9, large: 7}),
            "resident": lambda home: resident_latency(folder, home, small, large, 12),
            "alternate": lambda home: alternate(folder, home, small, large, 20),
            "back_to_back": lambda home: back_to_back(folder, home, [(small, other), (large, other_large)], 10),
            "calls": lambda home: alternating_calls(folder, home, (small, other), 40),
            "beside": lambda home: beside(folder, home, small),
            "long_row": lambda home: long_row(folder, home, small),
            "equal_prompts": lambda home: equal_prompts(folder, home, small),
            "sampling": sampling,
            "structured": lambda home: structured(home),
            "throughput": lambda home: throughput(folder, home),
        }
        wanted = sys.argv[1:] or list(parts)
        found: dict[str, Any] = {}
        for name in wanted:
            home = Path(scratch) / f"home-{name}"
            home.mkdir()
            found[name] = parts[name](home)
            print(name, json.dumps(found[name]), flush=True)
    if not sys.argv[1:]:
        write_report(found)
    else:
        print("\n".join([*machine_lines(), "", *sections(found)]))


if __name__ == "__main__":
    main()
