"""Decoding through HTTP over the bare batch generator, in alternating rounds."""

from __future__ import annotations

import json
import selectors
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

from tests.bench.bare import PROMPT
from tests.support.router import RouterProcess, running_router

__all__ = ["ROUNDS", "WITHOUT_REUSE", "http_round", "throughput"]

# Tokens per stream, by the number of streams: rounds of about a second on two cores.
TOKENS: Final = {"random-8mb": {1: 96, 4: 64, 16: 32}, "random-64mb": {1: 12, 4: 8, 16: 4}}
ROUNDS: Final = 16
WITHOUT_REUSE: Final = ("--standby-workers", "0", "--prefix-cache-memory", "0")
"""Arguments of a router for measurements in which prompts are repeated and shall be processed each time."""


def http_round(
    router: RouterProcess, model: str, streams: int, tokens: int, options: dict[str, Any] | None = None
) -> tuple[int, float]:
    """Tokens and seconds of some streams at once, greedy unless ``options`` say otherwise, by a client that costs next
    to nothing."""
    options = {"temperature": 0} if options is None else options
    parts = urlsplit(router.url)
    selector = selectors.DefaultSelector()
    tails: dict[socket.socket, bytes] = {}
    requests = []
    for number in range(streams):
        body = json.dumps(
            {"model": model, "messages": [{"role": "user", "content": PROMPT.format(number)}],
             "options": {**options, "num_predict": tokens}}
        ).encode()  # fmt: skip
        head = f"POST /api/chat HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n"
        connection = socket.create_connection((parts.hostname, parts.port))
        requests.append((connection, head.encode() + body))
    started = time.perf_counter()
    for connection, data in requests:
        connection.sendall(data)
        connection.setblocking(False)
        selector.register(connection, selectors.EVENT_READ)
        tails[connection] = b""
    made = 0
    while tails:
        for key, _ in selector.select():
            connection = key.fileobj  # type: ignore[assignment]  # only sockets are registered
            if data := connection.recv(65536):
                tails[connection] = (tails[connection] + data)[-2000:]
            else:
                selector.unregister(connection)
                last = tails.pop(connection).rsplit(b"\n{", 1)[1].split(b"\n", 1)[0]
                made += json.loads(b"{" + last)["eval_count"]
                connection.close()
    return made, time.perf_counter() - started


def throughput(folder: Path, home: Path) -> list[dict[str, Any]]:
    """Short rounds of the floor and of HTTP, alternately, so that a busy machine slows both alike."""
    rows = []
    with running_router(home, *WITHOUT_REUSE, "--models-dir", str(folder)) as router:
        for model, tokens_of in TOKENS.items():
            command = [sys.executable, "-m", "tests.bench.bare", str(folder / model)]
            with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as bare:
                for streams, tokens in tokens_of.items():
                    rows.append(_compare(router, bare, model, streams, tokens))
                    print(rows[-1], flush=True)
                bare.communicate()
    return rows


def _compare(
    router: RouterProcess, bare: subprocess.Popen[str], model: str, streams: int, tokens: int
) -> dict[str, Any]:
    assert bare.stdin is not None
    assert bare.stdout is not None
    floor, ours = [], []
    for _ in range(ROUNDS + 1):
        print(streams, tokens, file=bare.stdin, flush=True)
        made, seconds = bare.stdout.readline().split()
        floor.append((int(made), float(seconds)))
        ours.append(http_round(router, model, streams, tokens))
    del floor[0], ours[0]  # the first round warms up
    assert sum(made for made, _ in floor) == sum(made for made, _ in ours), "not the same work"
    rates = [sum(made for made, _ in rounds) / sum(seconds for _, seconds in rounds) for rounds in (floor, ours)]
    ratios = sorted(mine[0] / mine[1] / (its[0] / its[1]) for mine, its in zip(ours, floor, strict=True))
    quarter = len(ratios) // 4
    return {"model": model, "streams": streams, "floor": rates[0], "http": rates[1], "ratio": rates[1] / rates[0],
            "range": (ratios[quarter], ratios[-quarter - 1])}  # fmt: skip
