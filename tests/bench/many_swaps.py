"""Two hundred swaps between two models of about 1 GB: does all memory come back, each time and in the end?

``python -m tests.bench.many_swaps --swaps 200`` (`make bench-swaps`) writes docs/benchmarks-swaps.md.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any, Final

import psutil

from mlx_router_server.workers.memory import machine_used_bytes, process_bytes
from tests.bench.report import machine_lines
from tests.support.router import RouterProcess, running_router, wait_until
from tests.tiny_models.random_model import make_random_model

DOCUMENT: Final = Path(__file__).parents[2] / "docs" / "benchmarks-swaps.md"
_SIZE: Final = 1_000_000_000


def _tree_bytes(router: RouterProcess) -> int:
    return sum(process_bytes(process.pid) for process in [psutil.Process(router.pid), *router.children()])


def _measure(folder: Path, home: Path, swaps: int) -> dict[str, Any]:
    names = ["one", "two"]
    evictions: list[dict[str, Any]] = []
    took: list[float] = []
    arguments = ["--models-dir", str(folder), "--max-loaded-models", "1"]
    with running_router(home, *arguments, standby=True) as router:
        trees: list[int] = []
        for number in range(swaps + 5):
            wait_until(lambda: len(router.status()["router"]["standby_pids"]) == 1, "the standby is ready")
            name = names[number % 2]
            started = time.perf_counter()
            router.generate(name, prompt="go", raw=True, options={"temperature": 0, "num_predict": 1})
            if number >= 5:  # until every code path has been taken
                took.append(time.perf_counter() - started)
                (eviction,) = router.model(name)["last_swap"]["evictions"]
                evictions.append(eviction)
                wait_until(lambda: len(router.status()["router"]["standby_pids"]) == 1, "the standby is ready")
                trees.append(_tree_bytes(router))
            if number % 20 == 0:
                print(number, f"tree {_tree_bytes(router) / 1e6:.1f} MB", flush=True)
        status = router.status()["router"]
        descriptors = psutil.Process(router.pid).num_fds()
        children = len(router.children())
    quarter = max(len(trees) // 4, 1)
    return {
        "swaps": swaps, "took": took, "evictions": evictions, "trees": trees,
        "drift": statistics.median(trees[-quarter:]) / statistics.median(trees[:quarter]) - 1,
        "kills": status["kill_incidents"], "stranded": status["stranded_incidents"],
        "router": status["memory_bytes"], "descriptors": descriptors, "children": children,
    }  # fmt: skip


def _write(found: dict[str, Any], used: int) -> None:
    shares = sorted(eviction["returned_bytes"] / eviction["held_bytes"] for eviction in found["evictions"])
    back = sorted(eviction["exit_seconds"] + eviction["reap_seconds"] + eviction["memory_back_seconds"]
                  for eviction in found["evictions"])  # fmt: skip
    enough = sum(share >= 0.99 for share in shares)
    lines = [
        "# Many swaps",
        "",
        "Written by `make bench-swaps`: two models of 1 GB with random weights take turns, with room for one.",
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
        f"| drift of the whole tree with one model loaded, last quarter over first | {found['drift']:+.3%} | 1 % |",
        f"| workers that had to be killed; memory not seen to be back | {found['kills']}; {found['stranded']} | 0; 0 |",
        f"| processes under the router at the end (model and standby); its open files | {found['children']}; "
        f"{found['descriptors']} | 2; constant |",
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
