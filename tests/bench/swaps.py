"""Swaps: alternating small and large models against mlx_lm.server doing the same in one process; A B A B at once."""

from __future__ import annotations

import http.client
import json
import socket
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

import psutil

from mlx_router_server.workers.memory import process_bytes
from tests.bench.bare import PROMPT
from tests.support.router import running_router, wait_until

__all__ = ["alternate", "alternating_calls"]

_MESSAGES: Final = [{"role": "user", "content": PROMPT.format(0)}]


def _first_delta(port: int, model: str) -> float:
    """Seconds from the request to the first piece of text, over OpenAI's API, which both speak."""
    body = {"model": model, "messages": _MESSAGES, "stream": True, "max_tokens": 2, "temperature": 0}
    started = time.perf_counter()
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
    response = connection.getresponse()
    assert response.status == 200, response.read()
    seconds = 0.0
    for line in response:
        if line.startswith(b"data: {") and not seconds:
            choices = json.loads(line[6:])["choices"]
            if choices and (choices[0]["delta"].get("content") or choices[0]["delta"].get("reasoning")):
                seconds = time.perf_counter() - started
    connection.close()
    return seconds or time.perf_counter() - started


def _tree_bytes(pid: int) -> int:
    process = psutil.Process(pid)
    return sum(process_bytes(found.pid) for found in [process, *process.children(recursive=True)])


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _answers(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex(("127.0.0.1", port)) == 0


def alternate(folder: Path, home: Path, small: str, large: str, times: int) -> dict[str, Any]:
    """Both servers take each swap one after the other; medians by model, and memory once the small one is back."""
    port = _free_port()
    command = [sys.executable, "-m", "mlx_lm.server", "--host", "127.0.0.1", "--port", str(port),
               "--model", str(folder / small), "--log-level", "ERROR"]  # fmt: skip
    ours: dict[str, list[float]] = {small: [], large: []}
    theirs: dict[str, list[float]] = {small: [], large: []}
    arguments = ["--models-dir", str(folder), "--max-loaded-models", "1"]
    with (
        running_router(home, *arguments) as router,
        subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as peer,
    ):
        try:
            wait_until(lambda: _answers(port), "mlx_lm.server listens", 60)
            for number in range(2 * times + 2):
                model = (large, small)[number % 2]
                name, mine, its = model, ours[model], theirs[model]
                its.append(_first_delta(port, str(folder / model)))
                wait_until(lambda: len(router.status()["router"]["standby_pids"]) == 1, "the standby is ready")
                mine.append(_first_delta(int(router.url.rpartition(":")[2]), name))
                print(name, f"ours {mine[-1]:.3f} s, mlx_lm.server {its[-1]:.3f} s", flush=True)
            for rounds in (*ours.values(), *theirs.values()):
                del rounds[0]
            memory = {"ours": _tree_bytes(router.pid), "theirs": _tree_bytes(peer.pid)}
            standby = sum(process_bytes(pid) for pid in router.status()["router"]["standby_pids"])
            incidents = router.status()["router"]["kill_incidents"]
        finally:
            peer.terminate()
            peer.wait(20)
    both = {
        who: sum(statistics.median(rounds[model]) for model in (small, large))
        for who, rounds in (("ours", ours), ("theirs", theirs))
    }
    return {
        "times": times, "small": small, "large": large,
        "ours": {model: statistics.median(ours[model]) for model in ours},
        "theirs": {model: statistics.median(theirs[model]) for model in theirs},
        "ratio": both["ours"] / both["theirs"], "memory": memory, "standby": standby, "kills": incidents,
    }  # fmt: skip


def alternating_calls(folder: Path, home: Path, models: tuple[str, str], calls: int) -> dict[str, float]:
    """A B A B … all at once, with room for one: loads, and the longest wait for an answer."""
    arguments = ["--models-dir", str(folder), "--max-loaded-models", "1"]
    with running_router(home, *arguments) as router, ThreadPoolExecutor(calls) as pool:

        def one(number: int) -> float:
            started = time.perf_counter()
            router.generate(models[number % 2], options={"temperature": 0, "num_predict": 8})
            return time.perf_counter() - started

        waits = list(pool.map(one, range(calls)))
        loads = sum(router.model(model)["loads"] for model in models)
    return {"calls": calls, "loads": loads, "longest": max(waits)}
