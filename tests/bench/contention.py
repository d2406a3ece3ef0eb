"""Requests beside each other: a long prompt beside running answers, long rows beside short ones, prompts at once."""

from __future__ import annotations

import http.client
import json
import statistics
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

from tests.bench.throughput import WITHOUT_REUSE, http_round
from tests.support.router import RouterProcess, running_router
from tests.tiny_models.random_model import make_random_model
from tests.tiny_models.tokenizer import VOCABULARY

__all__ = ["beside", "equal_prompts", "long_row", "sampling"]

_STREAMS: Final = 4
_ALONE_SECONDS: Final = 4.0
_WORDS_OF_5000: Final = 1660
_WORDS_OF_6000: Final = 1990
_SHORT_ROWS: Final = 7
_QWEN_VOCABULARY: Final = 151_936


@dataclass(slots=True)
class _Arrivals:
    """When the parts of one answer arrived, by ``time.perf_counter``."""

    times: list[float] = field(default_factory=list)


def _answer(url: str, model: str, prompt: str, tokens: int, arrivals: _Arrivals, stop: threading.Event | None) -> None:
    """Read one streamed answer to its end or until ``stop``."""
    parts = urlsplit(url)
    assert parts.hostname is not None
    connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=300)
    body = {"model": model, "prompt": prompt, "raw": True, "options": {"temperature": 0, "num_predict": tokens}}
    try:
        connection.request("POST", "/api/generate", json.dumps(body))
        for line in connection.getresponse():
            part = json.loads(line)
            if part["response"] or part["done"]:  # other lines are signs of life
                arrivals.times.append(time.perf_counter())
            if stop is not None and stop.is_set():
                return
    finally:
        connection.close()


@contextmanager
def _running(router: RouterProcess, model: str, count: int) -> Iterator[list[_Arrivals]]:
    """Short prompts with long answers in the background; one that ends is followed by the next."""
    stop = threading.Event()
    arrivals = [_Arrivals() for _ in range(count)]

    def keep_on(number: int) -> None:
        turn = 0
        while not stop.is_set():
            turn += 1
            _answer(router.url, model, f"word {number} {turn} go on", 20_000, arrivals[number], stop)

    threads = [threading.Thread(target=keep_on, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    try:
        while any(len(arrival.times) < 5 for arrival in arrivals):
            time.sleep(0.01)
        yield arrivals
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def _first_token_seconds(router: RouterProcess, model: str, prompt: str, tokens: int = 1) -> float:
    arrivals = _Arrivals()
    started = time.perf_counter()
    _answer(router.url, model, prompt, tokens, arrivals, None)
    return arrivals.times[0] - started


def _rate(arrivals: list[_Arrivals], begin: float, end: float) -> float:
    """Parts per second of all answers together."""
    return sum(begin <= at < end for arrival in arrivals for at in arrival.times) / (end - begin)


def _longest_gap(arrivals: list[_Arrivals], begin: float, end: float) -> float:
    """The longest time without a part in any answer, in seconds."""
    gaps = []
    for arrival in arrivals:
        inside = [begin, *(at for at in arrival.times if begin <= at < end), end]
        gaps.append(max(after - before for before, after in pairwise(inside)))
    return max(gaps)


def beside(folder: Path, home: Path, model: str, rounds: int = 2) -> dict[str, Any]:
    """A prompt of 5,000 tokens beside four running answers."""
    rows = []
    with running_router(home, *WITHOUT_REUSE, "--models-dir", str(folder)) as router:
        router.generate(model, prompt="word", options={"num_predict": 1})
        for turn in range(rounds):
            alone = _first_token_seconds(router, model, f"{turn} alone " + "word " * _WORDS_OF_5000)
            with _running(router, model, _STREAMS) as arrivals:
                started = time.perf_counter()
                time.sleep(_ALONE_SECONDS)
                middle = time.perf_counter()
                first = _first_token_seconds(router, model, f"{turn} beside " + "word " * _WORDS_OF_5000)
                end = middle + first
                time.sleep(_ALONE_SECONDS)
                # Before and after, because each step takes longer as the answers get longer.
                without = (_rate(arrivals, started, middle) + _rate(arrivals, end, time.perf_counter())) / 2
                rows.append({
                    "kept": _rate(arrivals, middle, end) / without,
                    "rate": without / _STREAMS,
                    "gap": _longest_gap(arrivals, middle, end),
                    "alone": alone,
                    "first_token": first / alone,
                })  # fmt: skip
            print(rows[-1], flush=True)
    return {name: statistics.median(row[name] for row in rows) for name in rows[0]} | {
        "longest_gap": max(row["gap"] for row in rows)
    }


def long_row(folder: Path, home: Path, model: str, rounds: int = 2) -> dict[str, Any]:
    """Seven short rows alone, and beside one whose prompt has 6,000 tokens."""
    rows = []
    with running_router(home, *WITHOUT_REUSE, "--models-dir", str(folder)) as router:
        router.generate(model, prompt="word", options={"num_predict": 1})
        for turn in range(rounds):
            with _running(router, model, _SHORT_ROWS) as arrivals:
                stop, long = threading.Event(), _Arrivals()
                thread = threading.Thread(
                    target=_answer,
                    args=(router.url, model, f"{turn} " + "word " * _WORDS_OF_6000, 20_000, long, stop),
                )
                thread.start()
                while len(long.times) < 3:
                    time.sleep(0.01)
                begin = time.perf_counter()
                time.sleep(_ALONE_SECONDS)
                end = time.perf_counter()
                stop.set()
                thread.join()
                resumed = time.perf_counter()
                time.sleep(_ALONE_SECONDS)
                # After it and not before, because each step takes longer as the answers get longer.
                without = _rate(arrivals, resumed, time.perf_counter())
                rows.append({
                    "kept": _rate(arrivals, begin, end) / without,
                    "rate": without / _SHORT_ROWS,
                    "long_rate": _rate([long], begin, end),
                })  # fmt: skip
            print(rows[-1], flush=True)
    return {name: statistics.median(row[name] for row in rows) for name in rows[0]}


def equal_prompts(folder: Path, home: Path, model: str, rounds: int = 2) -> dict[str, Any]:
    """Eight prompts of equal length at once."""
    rows = []
    with running_router(home, *WITHOUT_REUSE, "--models-dir", str(folder)) as router:
        router.generate(model, prompt="word", options={"num_predict": 1})
        for turn in range(rounds):
            seconds = [0.0] * 8

            def ask(number: int, turn: int = turn, seconds: list[float] = seconds) -> None:
                seconds[number] = _first_token_seconds(router, model, f"{turn} {number} " + "word " * 660)

            threads = [threading.Thread(target=ask, args=(number,)) for number in range(8)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            rows.append({"last": max(seconds), "mean": statistics.mean(seconds) / max(seconds)})
            print(rows[-1], flush=True)
    return {name: statistics.median(row[name] for row in rows) for name in rows[0]}


def sampling(home: Path, rounds: int = 5) -> list[dict[str, Any]]:
    """Ollama's default sampling over greedy, with a vocabulary of 152k, in alternating rounds."""
    folder = home / "models"
    make_random_model(folder / "wide", size_bytes=4_000_000, padding=_QWEN_VOCABULARY - VOCABULARY)
    rows = []
    with running_router(home, *WITHOUT_REUSE, "--models-dir", str(folder)) as router:
        for streams, tokens in ((1, 24), (4, 12), (16, 6)):
            rates: dict[str, list[float]] = {"greedy": [], "default": []}
            for number in range(rounds + 1):
                for name, options in (("greedy", {"temperature": 0}), ("default", {})):
                    made, seconds = http_round(router, "wide", streams, tokens, options)
                    if number:  # the first round warms up
                        rates[name].append(made / seconds)
            greedy, default = (statistics.median(rates[name]) for name in rates)
            rows.append({"streams": streams, "greedy": greedy, "default": default, "ratio": default / greedy})
            print(rows[-1], flush=True)
    return rows
