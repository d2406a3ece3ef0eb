"""Cold loads over their floor, how soon readiness is seen, and what a load costs a model that is loaded already."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil

from tests.bench.bare import SHORT_PROMPT
from tests.bench.idle import wait_idle
from tests.support.router import RouterProcess, running_router, wait_until

__all__ = ["cold_loads", "first_text", "readiness", "resident_latency"]


def first_text(router: RouterProcess, model: str) -> float:
    """Seconds from the request to the first token at the client."""
    started = time.perf_counter()
    body = {"model": model, "prompt": SHORT_PROMPT, "raw": True, "options": {"temperature": 0, "num_predict": 1}}
    stream = router.client.stream("/api/generate", body)
    for part in stream:
        if part["response"] or part["done"]:
            break
    seconds = time.perf_counter() - started
    for _ in stream:
        pass
    return seconds


def _floor(path: Path) -> float:
    command = [sys.executable, "-m", "tests.bench.bare_load"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        print(path, file=process.stdin, flush=True)
        return float(process.stdout.readline())


def _rested(router: RouterProcess, model: str, waiting: int = 1) -> None:
    router.client.post(f"/admin/models/{model}/unload")
    wait_until(lambda: len(router.status()["router"]["standby_pids"]) >= waiting, "a worker waits")
    wait_idle(router.pid)


def cold_loads(folder: Path, home: Path, rounds: dict[str, int]) -> list[dict[str, Any]]:
    """Floor and ours alternately, for each way to obtain a worker; medians."""
    rows = []
    for source in ("fork", "standby", "spawn"):
        with running_router(home, "--models-dir", str(folder), "--worker-source", source, standby=True) as router:
            for model, times in rounds.items():
                floor, ours = [], []
                for _ in range(times + 1):
                    # Before each of them: the start of a standby worker would cost whoever comes next.
                    _rested(router, model, 0 if source == "spawn" else 1)
                    floor.append(_floor(folder / model))
                    ours.append(first_text(router, model))
                    assert router.model(model)["last_swap"]["source"] == source
                del floor[0], ours[0]  # the first round brings the files into memory
                swap = router.model(model)["last_swap"]
                rows.append(
                    {"model": model, "source": source, "floor": statistics.median(floor), "ours": statistics.median(ours),
                     "ratio": statistics.median(ours) / statistics.median(floor), "rounds": times,
                     "stages": json.dumps({k: v for k, v in swap.items() if k.endswith("_seconds")})}
                )  # fmt: skip
                print(rows[-1], flush=True)
    return rows


def readiness(folder: Path, home: Path, model: str, times: int) -> dict[str, Any]:
    """From the worker's word that it is ready to the router's knowing it, milliseconds: at rest, and while another
    model answers all the time."""
    found: dict[str, Any] = {"times": times}
    with running_router(home, "--models-dir", str(folder), standby=True) as router, ThreadPoolExecutor(1) as pool:
        found["rest"] = _readiness(router, model, times)
        enough = threading.Event()

        def keep_busy() -> None:
            while not enough.is_set():
                router.generate("demo", prompt="Tell me a long story.")

        busy = pool.submit(keep_busy)
        found["busy"] = _readiness(router, model, times)
        enough.set()
        busy.result()
    return found


def _readiness(router: RouterProcess, model: str, times: int) -> dict[str, float]:
    seen = []
    for _ in range(times):
        router.client.post(f"/admin/models/{model}/load")
        seen.append(router.model(model)["last_swap"]["ready_seen_seconds"] * 1000)
        router.client.post(f"/admin/models/{model}/unload")
    seen.sort()
    return {"p50": statistics.median(seen), "p99": seen[min(int(len(seen) * 0.99), len(seen) - 1)]}


def resident_latency(folder: Path, home: Path, resident: str, loaded: str, loads: int) -> dict[str, float]:
    """Short requests to one model: alone, while another is being loaded, and beside a program that does nothing but keep
    one core busy, which shows what the share of the cores alone is worth."""
    shares = []
    alone, beside, burnt = [], [], []
    with running_router(home, "--models-dir", str(folder), standby=True) as router, ThreadPoolExecutor(1) as pool:

        def once() -> float:
            started = time.perf_counter()
            router.generate(resident, options={"temperature": 0, "num_predict": 8})
            return time.perf_counter() - started

        once()
        for _ in range(loads):
            _rested(router, loaded)
            alone += [once() for _ in range(10)]
            (standby,) = router.status()["router"]["standby_pids"]
            before = psutil.Process(standby).cpu_times()  # it becomes the loading worker
            loading = pool.submit(router.client.post, f"/admin/models/{loaded}/load")
            began = time.perf_counter()
            during: list[float] = []
            while not loading.done():
                during.append(once())
            beside += during[:-1] or during  # the last one outlived the load
            after = psutil.Process(standby).cpu_times()
            used = after.user + after.system - before.user - before.system
            shares.append(used / (time.perf_counter() - began))
            with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as burner:
                burnt += [once() for _ in range(10)]
                burner.kill()
    return {
        "alone_ms": statistics.median(alone) * 1000, "beside_ms": statistics.median(beside) * 1000,
        "ratio": statistics.median(beside) / statistics.median(alone), "samples": len(beside),
        "burnt": statistics.median(burnt) / statistics.median(alone),
        "cores": statistics.median(shares),
    }  # fmt: skip
