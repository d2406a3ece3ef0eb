"""Measure and write docs/benchmarks.md: ``python -m tests.bench`` (`make bench`)."""

from __future__ import annotations

import json
import os
import platform
import selectors
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil

from tests.bench.bare import PROMPT
from tests.support.fakes import fake_config
from tests.support.router import RouterProcess, running_router
from tests.tiny_models.random_model import make_random_model

DOCUMENT = Path(__file__).parents[2] / "docs" / "benchmarks.md"
MODELS = {"random-8mb": 8_000_000, "random-64mb": 64_000_000}
# Tokens per stream, by the number of streams: rounds of about a second on two cores.
TOKENS = {"random-8mb": {1: 96, 4: 64, 16: 32}, "random-64mb": {1: 12, 4: 8, 16: 4}}
ROUNDS = 16


def http_round(router: RouterProcess, model: str, streams: int, tokens: int) -> tuple[int, float]:
    """Tokens and seconds of some streams at once, by a client that costs next to nothing."""
    parts = urlsplit(router.url)
    selector = selectors.DefaultSelector()
    tails: dict[socket.socket, bytes] = {}
    requests = []
    for number in range(streams):
        body = json.dumps(
            {"model": model, "messages": [{"role": "user", "content": PROMPT.format(number)}],
             "options": {"temperature": 0, "num_predict": tokens}}
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
    with running_router(home, "--models-dir", str(folder), "--standby-workers", "0") as router:
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


def first_token(home: Path) -> dict[str, float]:
    """Warm: from sending the request to the first text on the wire, less what the worker says it took itself."""
    added = []
    with running_router(home) as router:
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
    with running_router(home) as router:
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


def write(rows: list[dict[str, Any]], first: dict[str, float], died: dict[str, float], idle: dict[str, float]) -> None:
    versions = ", ".join(f"{name} {version(name)}" for name in ("mlx", "mlx-lm", "pyzmq", "starlette", "uvicorn"))
    memory = psutil.virtual_memory().total / 2**30
    lines = [
        "# Benchmarks",
        "",
        "Written by `make bench`; every ratio was taken in one run on one machine.",
        "",
        f"- Date: {time.strftime('%Y-%m-%d')}",
        f"- Machine: {platform.system()} {platform.machine()}, {os.cpu_count()} cores, {memory:.0f} GiB, CPU back end "
        "of MLX; not measured on Apple silicon",
        f"- Versions: Python {platform.python_version()}, {versions}",
        "",
        "## Decoding through HTTP over the bare batch generator",
        "",
        "Tokens per second of all streams together, `/api/chat` streamed, greedy, random bfloat16 models. The floor is",
        "a loop over `mlx_lm.generate.BatchGenerator` with the same model, prompts and batch sizes",
        f"(`tests/bench/bare.py`). {ROUNDS} short rounds of each, taken alternately; the ratio is that of all tokens",
        "over all seconds, the range holds the middle half of the rounds' own ratios.",
        "",
        "| model | streams | bare tokens/s | HTTP tokens/s | ratio | middle half |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {r['model']} | {r['streams']} | {r['floor']:.1f} | {r['http']:.1f} | **{r['ratio']:.3f}** | "
        f"{r['range'][0]:.3f} to {r['range'][1]:.3f} |"
        for r in rows
    ]
    lines += [
        "",
        "## The router itself",
        "",
        "| what | figure | limit |",
        "|---|---|---|",
        f"| added time to first token, warm, p50 | {first['p50']:.2f} ms | 2 ms |",
        f"| added time to first token, warm, p99 | {first['p99']:.2f} ms | 8 ms |",
        f"| kill -9 of a worker to the client's error, median of 20 | {died['p50']:.1f} ms | 100 ms |",
        f"| the same, worst of 20 | {died['max']:.1f} ms | 100 ms |",
        f"| start of the command to the first answer, median of 5 | {idle['start_s']:.2f} s | 0.8 s |",
        f"| resident memory of the router | {idle['rss_mb']:.0f} MB | 80 MB |",
        f"| CPU of the idle router over 20 s | {idle['cpu_percent']:.2f} % | about 0 % |",
        "",
    ]
    DOCUMENT.parent.mkdir(exist_ok=True)
    DOCUMENT.write_text("\n".join(lines), encoding="utf-8")
    print(DOCUMENT.read_text(encoding="utf-8"))


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        homes = iter(range(10))

        def in_new_home(measure: Callable[[Path], Any]) -> Any:
            home = Path(scratch) / f"home{next(homes)}"
            home.mkdir()
            return measure(home)

        idle = in_new_home(footprint)
        died = in_new_home(crash)
        first = in_new_home(first_token)
        print(idle, died, first, flush=True)
        folder = Path(scratch) / "models"
        for seed, (name, size) in enumerate(MODELS.items()):
            make_random_model(folder / name, size_bytes=size, seed=seed)
        rows = in_new_home(lambda home: throughput(folder, home))
    write(rows, first, died, idle)


if __name__ == "__main__":
    main()
