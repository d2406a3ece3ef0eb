"""``python -m tests.soak.day --loads 3000``: a day's loads and idles, without the waiting between them.

A scripted clock: each hour a few models are asked, some at once, and left alone until they are gone. At the end the
router must hold what it held after the first hour: memory, files, tasks; and a person must be able to read its log.
"""

from __future__ import annotations

import argparse
import collections
import re
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil

from tests.support.fakes import write_fake
from tests.support.http import call
from tests.support.router import RouterProcess, running_router, wait_until, write_config

_NAMES = ("mail", "code", "notes", "search", "voice", "demo")
_TOGETHER = 3


def _figures(router: RouterProcess) -> dict[str, float]:
    process = psutil.Process(router.pid)
    found = call(router, "GET", "/metrics").body.decode()
    lag = dict(re.findall(r"^mlx_router_loop_lag_seconds_(sum|count) (\S+)", found, re.MULTILINE))
    return {
        "memory_mb": process.memory_info().rss / 1e6, "files": process.num_fds(), "threads": process.num_threads(),
        "children": len(process.children(recursive=True)),
        "loop_lag_ms": 1000 * float(lag["sum"]) / max(float(lag["count"]), 1),
    }  # fmt: skip


def _hour(router: RouterProcess, number: int, pool: ThreadPoolExecutor) -> int:
    """A few models at once, then until all of them have left for being idle. Returns how many were loaded."""
    names = [_NAMES[(number + step) % len(_NAMES)] for step in range(_TOGETHER)]
    for answer in [pool.submit(router.generate, name, keep_alive="0.05s") for name in names]:
        assert answer.result(30)["done"]
    wait_until(lambda: all(model["state"] == "unloaded" for model in router.status()["models"]), "all have left")
    return len(names)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--loads", type=int, default=3000)
    wanted = parser.parse_args().loads
    with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor(_TOGETHER) as pool:
        home = Path(scratch)
        models: dict[str, dict[str, Any]] = {
            name: {"path": str(write_fake(home / name, tokens=3, load_seconds=0.0))}
            for name in _NAMES
            if name != "demo"
        }
        config = write_config(home, models, standby_workers=1)
        with running_router(home, "--config", str(config), "--log-file", str(home / "log"), standby=True) as router:
            loads = hours = 0
            while loads < wanted // 10:  # until caches and pools have their size
                loads, hours = loads + _hour(router, hours, pool), hours + 1
            first, began = _figures(router), time.monotonic()
            while loads < wanted:
                loads, hours = loads + _hour(router, hours, pool), hours + 1
            last = _figures(router)
            seconds = time.monotonic() - began
            counted = sum(model["loads"] for model in router.status()["models"] if model["name"] == model["runs_as"])
        lines = (home / "log").read_text().splitlines()
    kinds = collections.Counter(match[1] for line in lines if (match := re.search(r" event=(\w+)", line)))
    print(f"{loads} loads in {hours} hours of the script, {seconds:.0f} s since the first measurement")
    for name, value in last.items():
        print(f"  {name}: {first[name]:.1f} -> {value:.1f}")
    print(f"  log: {len(lines)} lines in the last file, {len(lines) and max(map(len, lines))} characters the longest:")
    print("    " + ", ".join(f"{kind} {count}" for kind, count in kinds.most_common()))
    wrong = [
        text
        for text, bad in (
            ("its loads are not those that were asked for", counted != loads),
            ("its memory grew", last["memory_mb"] > first["memory_mb"] * 1.05 + 2),
            ("files stay open", last["files"] > first["files"] + 2),
            ("threads stay", last["threads"] > first["threads"] + 2),
            ("processes stay", last["children"] > 2),
            ("a line of the log has no event", sum(kinds.values()) != len(lines)),
            ("an error was logged", any(" ERROR " in line for line in lines)),
        )
        if bad
    ]
    print("\n".join(wrong) or "all promises held")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
