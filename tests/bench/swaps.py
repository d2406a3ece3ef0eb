"""Swaps against mlx_lm.server doing the same in one process: with pauses, back to back; A B A B at once."""

from __future__ import annotations

import http.client
import json
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.bench.bare import SHORT_PROMPT
from tests.bench.idle import wait_idle
from tests.bench.memory import tree_bytes
from tests.support.router import running_router, wait_until

__all__ = ["alternate", "alternating_calls", "back_to_back"]


def _first_text(port: int, model: str, number: int) -> float:
    """Seconds from the request to the first piece of text, over OpenAI's API, which both speak.

    The prompt is short, because reading one takes a CPU longer than the swap, and new each time, because mlx_lm.server
    keeps what it has read of a prompt beyond a swap.
    """
    body = {"model": model, "prompt": f"{number} {SHORT_PROMPT}", "stream": True, "max_tokens": 2, "temperature": 0}
    started = time.perf_counter()
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
    response = connection.getresponse()
    assert response.status == 200, response.read()
    seconds = 0.0
    for line in response:
        if line.startswith(b"data: {") and not seconds:
            choices = json.loads(line[6:])["choices"]
            if choices and (choices[0].get("text") or choices[0].get("finish_reason")):
                seconds = time.perf_counter() - started
    connection.close()
    return seconds or time.perf_counter() - started


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _answers(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex(("127.0.0.1", port)) == 0


def alternate(folder: Path, home: Path, small: str, large: str, times: int) -> dict[str, Any]:
    """Each server has the machine for itself, in blocks ours, theirs, theirs, ours, as people would run one of them.

    Medians by model, and the memory of the process tree at the end of a block, when the small model is back.
    """
    ours: dict[str, list[float]] = {small: [], large: []}
    theirs: dict[str, list[float]] = {small: [], large: []}
    found: dict[str, Any] = {"times": times, "small": small, "large": large}
    half = times // 2
    _our_block(folder, home, ours, half, found)
    _their_block(folder, theirs, half, found)
    _their_block(folder, theirs, times - half, found)
    _our_block(folder, home, ours, times - half, found)
    both = [sum(statistics.median(rounds[model]) for model in (small, large)) for rounds in (ours, theirs)]
    found["ours"] = {model: statistics.median(rounds) for model, rounds in ours.items()}
    found["theirs"] = {model: statistics.median(rounds) for model, rounds in theirs.items()}
    found["ratio"] = both[0] / both[1]
    return found


def _our_block(folder: Path, home: Path, rounds: dict[str, list[float]], times: int, found: dict[str, Any]) -> None:
    arguments = ["--models-dir", str(folder), "--max-loaded-models", "1"]
    with running_router(home, *arguments, standby=True) as router:

        def rested() -> None:
            wait_until(lambda: len(router.status()["router"]["standby_pids"]) == 1, "the standby is ready")

        port = int(router.url.rpartition(":")[2])
        _swap_back_and_forth(port, {name: name for name in rounds}, rounds, times, router.pid, rested)
        rested()
        found["our_memory"] = tree_bytes(router.pid)


def _their_block(folder: Path, rounds: dict[str, list[float]], times: int, found: dict[str, Any]) -> None:
    with _peer(folder, next(iter(rounds))) as (port, pid):
        names = {name: str(folder / name) for name in rounds}
        _swap_back_and_forth(port, names, rounds, times, pid, lambda: None)
        found["their_memory"] = tree_bytes(pid)


@contextmanager
def _peer(folder: Path, first: str) -> Iterator[tuple[int, int]]:
    """A running mlx_lm.server: its port and its pid."""
    port = _free_port()
    command = [sys.executable, "-m", "mlx_lm.server", "--host", "127.0.0.1", "--port", str(port),
               "--model", str(folder / first), "--log-level", "ERROR"]  # fmt: skip
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as peer:
        try:
            wait_until(lambda: _answers(port), "mlx_lm.server listens", 60)
            yield port, peer.pid
        finally:
            peer.terminate()
            peer.wait(20)


def _swap_back_and_forth(
    port: int, names: dict[str, str], rounds: dict[str, list[float]], times: int, pid: int, rested: Callable[[], None]
) -> None:
    """To the large model and back to the small one; the first time there and back is not counted."""
    small, large = names
    for number in range(2 * times + 2):
        model = (large, small)[number % 2]
        rested()
        wait_idle(pid)  # what it still does after an answer would be counted with the next swap
        seconds = _first_text(port, names[model], number)
        print(model, f"{seconds:.3f} s", flush=True)
        if number >= 2:
            rounds[model].append(seconds)


def back_to_back(folder: Path, home: Path, pairs: list[tuple[str, str]], swaps: int) -> list[dict[str, Any]]:
    """Requests that follow each other at once, each for the model of a pair that is not loaded, with room for one.

    Each server has the machine for itself, in blocks ours, theirs, theirs, ours. Medians of seconds from the request to
    the end of an answer of one token; the first two swaps of a block are not counted. Ours once with memory for both,
    where one loads while the other exits, and once with a budget that holds one of them only.
    """
    rows = []
    for pair in pairs:
        both: list[float] = []
        one: list[float] = []
        theirs: list[float] = []
        budget = _budget_for_one(folder, home, pair)
        for is_ours in (True, False, False, True):
            if is_ours:
                both += _our_swaps_at_once(folder, home, pair, swaps)
                one += _our_swaps_at_once(folder, home, pair, swaps, "--memory-budget", str(budget))
            else:
                with _peer(folder, pair[0]) as (port, _):
                    theirs += _swaps_at_once(port, (str(folder / pair[0]), str(folder / pair[1])), swaps)
        for memory, ours in (("both", both), ("one", one)):
            row = {"models": pair, "memory_for": memory, "swaps": len(ours), "ours": statistics.median(ours),
                   "worst": max(ours), "theirs": statistics.median(theirs), "their_worst": max(theirs),
                   "ratio": statistics.median(ours) / statistics.median(theirs)}  # fmt: skip
            rows.append(row)
            print(row, flush=True)
    return rows


def _budget_for_one(folder: Path, home: Path, pair: tuple[str, str]) -> int:
    with running_router(home, "--models-dir", str(folder)) as router:
        for name in pair:
            router.client.post(f"/admin/models/{name}/load")
        return int(max(router.model(name)["reserved_bytes"] for name in pair) * 1.5)


def _our_swaps_at_once(folder: Path, home: Path, pair: tuple[str, str], swaps: int, *arguments: str) -> list[float]:
    arguments = ("--models-dir", str(folder), "--max-loaded-models", "1", *arguments)
    with running_router(home, *arguments, standby=True) as router:
        wait_until(lambda: router.status()["router"]["standby_pids"], "it is ready for loads")
        took = _swaps_at_once(int(router.url.rpartition(":")[2]), pair, swaps)
        status = router.status()["router"]
        assert (status["kill_incidents"], status["stranded_incidents"]) == (0, 0)
    return took


def _swaps_at_once(port: int, pair: tuple[str, str], swaps: int) -> list[float]:
    took = []
    for number in range(swaps // 2 + 2):
        body = {"model": pair[number % 2], "prompt": f"{number} {SHORT_PROMPT}", "max_tokens": 1, "temperature": 0}
        started = time.perf_counter()
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
        connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        assert response.status == 200, response.read()
        response.read()
        took.append(time.perf_counter() - started)
        connection.close()
    return took[2:]


def alternating_calls(folder: Path, home: Path, models: tuple[str, str], calls: int) -> dict[str, float]:
    """A B A B … all at once, with room for one: loads, and the longest wait for an answer."""
    arguments = ["--models-dir", str(folder), "--max-loaded-models", "1"]
    with running_router(home, *arguments, standby=True) as router, ThreadPoolExecutor(calls) as pool:

        def one(number: int) -> float:
            started = time.perf_counter()
            router.generate(models[number % 2], options={"temperature": 0, "num_predict": 8})
            return time.perf_counter() - started

        waits = list(pool.map(one, range(calls)))
        loads = sum(router.model(model)["loads"] for model in models)
    return {"calls": calls, "loads": loads, "longest": max(waits)}
