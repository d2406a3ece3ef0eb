"""Two hundred swaps between two models of about 1 GB: does all memory come back, each time and in the end?

The swaps follow each other at once. ``python -m tests.bench.many_swaps --swaps 200`` (`make bench-swaps`) writes
docs/benchmarks-swaps.md.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any, Final

import psutil

from mlx_router_server.workers.memory import machine_used_bytes
from tests.bench.memory import tree_bytes
from tests.bench.report import machine_lines
from tests.support.router import RouterProcess, running_router, wait_until
from tests.tiny_models.random_model import make_random_model

DOCUMENT: Final = Path(__file__).parents[2] / "docs" / "benchmarks-swaps.md"
_SIZE: Final = 1_000_000_000
_WARM_UP: Final = 5
_LOOK_EVERY: Final = 5


def _at_rest(router: RouterProcess) -> dict[str, int]:
    """What the router and its processes have when nothing is under way."""

    def rests() -> bool:
        status = router.status()
        states = sorted(model["state"] for model in status["models"])
        return len(status["router"]["standby_pids"]) == 1 and set(states) <= {"ready", "unloaded"}

    wait_until(rests, "it rests")
    process = psutil.Process(router.pid)
    return {"tree": tree_bytes(router.pid), "children": len(router.children()), "descriptors": process.num_fds(),
            "threads": process.num_threads()}  # fmt: skip


def _measure(folder: Path, home: Path, swaps: int) -> dict[str, Any]:
    names = ["one", "two"]
    evictions: list[dict[str, Any]] = []
    took: list[float] = []
    arguments = ["--models-dir", str(folder), "--max-loaded-models", "1"]
    with running_router(home, *arguments, standby=True) as router:
        trees: list[int] = []
        rests: list[dict[str, int]] = []
        for number in range(swaps + _WARM_UP):
            name = names[number % 2]
            started = time.perf_counter()
            router.generate(name, prompt="go", raw=True, options={"temperature": 0, "num_predict": 1})
            if number < _WARM_UP:  # until every code path has been taken
                continue
            took.append(time.perf_counter() - started)
            evicted = names[1 - number % 2]
            wait_until(lambda: router.model(evicted)["state"] == "unloaded", "the other one is gone")  # noqa: B023
            evictions.append(router.wait_eviction(name))
            if number % _LOOK_EVERY == 0:
                rests.append(_at_rest(router))
                trees.append(rests[-1]["tree"])
                print(number, rests[-1], flush=True)
        status = router.status()["router"]
    quarter = max(len(trees) // 4, 1)
    return {
        "swaps": swaps, "took": took, "evictions": evictions, "looks": len(trees), "rests": rests,
        "drift": statistics.median(trees[-quarter:]) / statistics.median(trees[:quarter]) - 1,
        "drift_of_least": min(trees[-quarter:]) / min(trees[:quarter]) - 1,
        "kills": status["kill_incidents"], "stranded": status["stranded_incidents"],
    }  # fmt: skip


def _write(found: dict[str, Any], used: int) -> None:
    shares = sorted(eviction["returned_bytes"] / eviction["held_bytes"] for eviction in found["evictions"])
    back = sorted(eviction["exit_seconds"] + eviction["reap_seconds"] + eviction["memory_back_seconds"]
                  for eviction in found["evictions"])  # fmt: skip
    enough = sum(share >= 0.99 for share in shares)
    lines = [
        "# Many swaps",
        "",
        "Written by `make bench-swaps`: two models of 1 GB with random weights take turns, with room for one, each",
        "request right after the one before.",
        "",
        *machine_lines(),
        "",
        "| what | figure | wanted |",
        "|---|---|---|",
        f"| swaps | {found['swaps']} | 200 |",
        f"| request to answer, median / worst | {statistics.median(found['took']):.2f} s / {max(found['took']):.2f} s | |",
        f"| from the word to leave until the memory is back, median / worst | {statistics.median(back):.3f} s / "
        f"{back[-1]:.3f} s | 2 s |",
        f"| share of what the process held that the machine got back, median / least | {statistics.median(shares):.2%} / "
        f"{shares[0]:.2%} | 99 % |",
        f"| swaps with at least 99 % back within 2 s, of {len(shares)} | {enough} | all |",
        f"| drift of the whole tree with one model loaded, shared pages counted once, last quarter over first of "
        f"{found['looks']} looks: of the medians; of the least (buffers of 10 MB come and go) | {found['drift']:+.3%}; "
        f"{found['drift_of_least']:+.3%} | 1 % |",
        f"| workers that had to be killed; memory not seen to be back | {found['kills']}; {found['stranded']} | 0; 0 |",
        *(
            f"| {what}, at the first look and at the last | {found['rests'][0][key]}; {found['rests'][-1][key]} | constant |"
            for what, key in (
                ("processes under the router", "children"),
                ("open files of the router", "descriptors"),
                ("threads of the router", "threads"),
            )
        ),
        f"| used memory of the machine, before and after all of it | {used / 1e6:+.0f} MB | noise |",
        "",
        "The machine's memory is read while other programs run on it: a share may be above 100 % or, by what they took",
        "meanwhile, below.",
        "",
    ]
    DOCUMENT.write_text("\n".join(lines), encoding="utf-8")
    print(DOCUMENT.read_text(encoding="utf-8"))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--swaps", type=int, default=200)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder, home = Path(scratch) / "models", Path(scratch) / "home"
        home.mkdir()
        for seed, name in enumerate(("one", "two")):
            make_random_model(folder / name, size_bytes=_SIZE, seed=seed)
        before = machine_used_bytes()
        found = _measure(folder, home, options.swaps)
        _write(found, machine_used_bytes() - before)


if __name__ == "__main__":
    main()
