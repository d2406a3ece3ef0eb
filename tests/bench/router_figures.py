"""What the router itself costs: added time to a first token, a crash to the client, its start, its footprint at rest."""

from __future__ import annotations

import http.client
import os
import signal
import statistics
import time
from pathlib import Path
from urllib.parse import urlsplit

import psutil

from tests.support.fakes import fake_config
from tests.support.router import running_router
from tests.unit.test_catalogue import write_model

__all__ = ["crash", "first_token", "footprint", "listing"]


def first_token(home: Path) -> dict[str, float]:
    """Warm: from sending the request to the first text on the wire, less what the worker says it took itself."""
    added = []
    with running_router(home, standby=True) as router:
        for _ in range(320):
            started = time.perf_counter()
            stream = router.client.stream("/api/generate", {"model": "demo", "prompt": "Hello!"})
            next(stream)
            seen = time.perf_counter() - started
            last = list(stream)[-1]
            added.append((seen - last["prompt_eval_duration"] / 1e9) * 1000)
    added = sorted(added[20:])
    return {"p50": statistics.median(added), "p99": added[int(len(added) * 0.99) - 1]}


def crash(home: Path) -> dict[str, float]:
    """From kill -9 of the worker to the error in the client's hands."""
    took = []
    script = {"tokens": 100_000, "tokens_per_second": 50}
    with running_router(home, *fake_config(home, {"a": script})) as router:
        for _ in range(20):
            stream = router.client.stream("/api/generate", {"model": "a", "prompt": "go"})
            next(stream)
            os.kill(router.model("a")["pid"], signal.SIGKILL)
            killed = time.perf_counter()
            try:
                for _ in stream:
                    pass
            except Exception as error:
                assert "unexpectedly stopped" in str(error)  # noqa: PT017  # a benchmark, not a test
            took.append((time.perf_counter() - killed) * 1000)
            # A good request in between: otherwise the model would be left alone for growing times.
            router.generate("a", options={"num_predict": 1})
    return {"p50": statistics.median(took), "max": max(took)}


def footprint(home: Path) -> dict[str, float]:
    """Start to the first answer, and what an idle router costs."""
    starts = []
    for _ in range(5):
        started = time.perf_counter()
        with running_router(home, "--standby-workers", "0") as router:
            router.client.get("/health")
            starts.append(time.perf_counter() - started)
    with running_router(home, standby=True) as router:
        router.generate("demo")
        process = psutil.Process(router.pid)
        time.sleep(3)  # the standby worker is being replaced
        before = process.cpu_times()
        time.sleep(20)
        after = process.cpu_times()
        cpu = (after.user + after.system - before.user - before.system) / 20
        return {
            "start_s": statistics.median(starts),
            "rss_mb": process.memory_info().rss / 1e6,
            "cpu_percent": cpu * 100,
        }


def listing(home: Path) -> dict[str, float]:
    """Lists of 500 models, each asked for a thousand times on one connection."""
    for number in range(500):
        write_model(home / "models" / f"org{number % 20}" / f"model{number}")
    found: dict[str, float] = {}
    with running_router(home, "--models-dir", str(home / "models"), standby=True) as router:
        for name, path in (("tags", "/api/tags"), ("models", "/v1/models")):
            connection = http.client.HTTPConnection(urlsplit(router.url).netloc)
            took = []
            for _ in range(1000):
                started = time.perf_counter()
                connection.request("GET", path)
                assert len(connection.getresponse().read()) > 50_000
                took.append((time.perf_counter() - started) * 1000)
            connection.close()
            took.sort()
            found |= {f"{name}_p50": took[500], f"{name}_p99": took[989]}
    return found
