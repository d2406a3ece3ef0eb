"""What it costs to be watched: scrapes beside a full load, and a hundred readers of events and log."""

from __future__ import annotations

import http.client
import json
import socket
import statistics
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import psutil

from tests.support.fakes import fake_config
from tests.support.router import RouterProcess, running_router

__all__ = ["watching"]

_STREAMS: Final = 16
_SECONDS: Final = 4.0
_ROUNDS: Final = 8
_READERS: Final = 100
_SCRAPES: Final = 200


def watching(home: Path) -> dict[str, float]:
    """Answers per second of 16 streams on 3 models, with a scrape a second and without, by turns, which differ by more
    than a scrape costs; so what one costs is measured by itself as well. Then the CPU of the router with 100 readers and
    without, while five answers a second are given."""
    scripts: dict[str, dict[str, Any]] = {name: {"tokens": 50} for name in "abc"}
    with running_router(home, *fake_config(home, scripts)) as router:
        for name in scripts:
            router.generate(name)
        rates: dict[bool, list[float]] = {True: [], False: []}
        for number in range(_ROUNDS):
            for scraped in (True, False) if number % 2 else (False, True):
                rates[scraped].append(_answers_per_second(router, scraped=scraped))
        process = psutil.Process(router.pid)
        before = process.cpu_times()
        size = [len(_get(router, "/metrics")) for _ in range(_SCRAPES)][-1]
        after = process.cpu_times()
        idle = _cpu(router)
        with _readers(router):
            watched = _cpu(router)
    return {
        "streams": _STREAMS, "free": statistics.median(rates[False]), "scraped": statistics.median(rates[True]),
        "ratio": sum(rates[True]) / sum(rates[False]), "scrape_bytes": size, "readers": _READERS,
        "scrape_seconds": (after.user + after.system - before.user - before.system) / _SCRAPES,
        "cpu_free": idle, "cpu_watched": watched,
    }  # fmt: skip


def _get(router: RouterProcess, path: str) -> bytes:
    connection = http.client.HTTPConnection(urlsplit(router.url).netloc)
    connection.request("GET", path)
    data = connection.getresponse().read()
    connection.close()
    return data


def _answers_per_second(router: RouterProcess, *, scraped: bool) -> float:
    end = time.monotonic() + _SECONDS
    done = threading.Event()

    def ask(worker: int) -> int:
        connection = http.client.HTTPConnection(urlsplit(router.url).netloc)
        answers = 0
        while time.monotonic() < end:
            body = {"model": "abc"[(worker + answers) % 3], "prompt": "go", "stream": True}
            connection.request("POST", "/api/generate", json.dumps(body))
            connection.getresponse().read()
            answers += 1
        connection.close()
        return answers

    def scrape() -> None:
        while not done.wait(1.0):
            _get(router, "/metrics")

    with ThreadPoolExecutor(_STREAMS + 1) as pool:
        scraping = pool.submit(scrape) if scraped else None
        began = time.monotonic()
        total = sum(pool.map(ask, range(_STREAMS)))
        seconds = time.monotonic() - began
        done.set()
        if scraping is not None:
            scraping.result()
    return total / seconds


@contextmanager
def _readers(router: RouterProcess) -> Iterator[None]:
    """Half of them of events, half of the log; they read what comes."""
    connections = []
    for number in range(_READERS):
        connection = http.client.HTTPConnection(urlsplit(router.url).netloc)
        connection.request("GET", "/admin/events" if number % 2 else "/admin/logs/stream")
        response = connection.getresponse()
        threading.Thread(target=_drain, args=(response,), daemon=True).start()
        connections.append(connection)
    yield
    for connection in connections:
        connection.sock.shutdown(socket.SHUT_RDWR)  # ends the reading; closing alone would wait for it
        connection.close()


def _drain(response: http.client.HTTPResponse) -> None:
    try:
        while response.readline():
            pass
    except (OSError, ValueError, AttributeError):
        return  # closed under its hands, as intended


def _cpu(router: RouterProcess) -> float:
    """Of the router alone, as a share of one core."""
    process = psutil.Process(router.pid)
    before, began = process.cpu_times(), time.monotonic()
    while time.monotonic() - began < 10:
        router.generate("a")
        time.sleep(0.2)
    after = process.cpu_times()
    return (after.user + after.system - before.user - before.system) / (time.monotonic() - began)
