"""``python -m tests.soak --minutes 10 --seed 1``: six models with room for two, fake and real engines, and no mercy.

Clients ask, listen, leave and ask again; meanwhile workers are killed, hang, fail to load, are unloaded, pinned and
loaded, and the configuration is read again. At the end everything that was asked must have been answered or refused
with a reason, nobody may have waited beyond the bound, no answer may be another model's, and nothing may be left over.
Exits with 1 when one of these does not hold.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import json
import os
import random
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import psutil

from mlx_router_server.workers.memory import process_bytes
from tests.soak.client import Outcome, ask
from tests.support.fakes import write_fake
from tests.support.http import call
from tests.support.router import RouterProcess, running_router, wait_until, write_config
from tests.tiny_models.random_model import make_random_model

CLIENTS = 10
FAKES: dict[str, dict[str, Any]] = {
    "quick": {"tokens": 5, "load_seconds": 0.1},
    "slow": {"tokens": 40, "tokens_per_second": 60, "load_seconds": 0.8, "memory_bytes": 50_000_000},
    "flaky": {"tokens": 20, "tokens_per_second": 100, "load_seconds": 0.3},
    "stubborn": {"tokens": 5, "ignore_shutdown": True},
}
REAL = ("demo", "random")
MODELS = [*FAKES, *REAL]
QUEUE_SECONDS, STALL_SECONDS, STOP_SECONDS, LOAD_SECONDS, DRAIN_SECONDS, TURN_SECONDS = 20.0, 2.0, 1.0, 8.0, 6.0, 2.0
# A wait for room, the end of a worker that has to be made to leave, a load to its limit, an answer that hangs.
BOUND_SECONDS = QUEUE_SECONDS + LOAD_SECONDS + 2 * STALL_SECONDS + STOP_SECONDS + 10.0
SETTINGS: dict[str, Any] = {
    "standby_workers": 1, "max_loaded_models": 2, "max_queue": 16, "queue_timeout_seconds": QUEUE_SECONDS,
    "load_timeout_seconds": LOAD_SECONDS, "drain_timeout_seconds": DRAIN_SECONDS, "turn_seconds": TURN_SECONDS,
    "stall_timeout_seconds": STALL_SECONDS, "stop_timeout_seconds": STOP_SECONDS, "restore_on_failure": True,
    "heartbeat_seconds": 0.5, "keep_alive": "20s", "parallel": 4,
}  # fmt: skip


@dataclasses.dataclass
class Tally:
    """What came of all requests; clients add, the end reads."""

    lock: threading.Lock = dataclasses.field(default_factory=threading.Lock)
    counts: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    wrong: list[str] = dataclasses.field(default_factory=list)
    longest: float = 0.0

    def add(self, outcome: Outcome) -> None:
        with self.lock:
            self.counts[outcome.kind] += 1
            self.longest = max(self.longest, outcome.silent_seconds)
            if outcome.wrong:
                self.wrong.append(outcome.wrong)


def _clients(router: RouterProcess, tally: Tally, stop: threading.Event, seed: int) -> list[threading.Thread]:
    def client(number: int) -> None:
        dice = random.Random(f"{seed}-{number}")
        while not stop.is_set():
            tally.add(ask(router.url, dice.choice(MODELS), dice))
            stop.wait(dice.random() * 0.3)

    threads = [threading.Thread(target=client, args=(number,), daemon=True) for number in range(CLIENTS)]
    for thread in threads:
        thread.start()
    return threads


class Chaos:
    """Does one bad thing after the other; each of them is something that happens to people."""

    def __init__(self, router: RouterProcess, home: Path, dice: random.Random) -> None:
        self._router = router
        self._home = home
        self._dice = dice
        self.done: collections.Counter[str] = collections.Counter()

    def one(self) -> None:
        deeds = [self.kill_a_worker, self.hang, self.fail_a_load, self.unload, self.load, self.pin, self.reload,
                 self.kill_the_standby]  # fmt: skip
        deed = self._dice.choice([*deeds, self.kill_a_worker, self.hang])
        self.done[deed.__name__] += 1
        deed()

    def _loaded(self) -> list[int]:
        return [model["pid"] for model in self._router.status()["models"] if model["pid"]]

    def kill_a_worker(self) -> None:
        if pids := self._loaded():
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._dice.choice(pids), signal.SIGKILL)

    def kill_the_standby(self) -> None:
        for pid in self._router.status()["router"]["standby_pids"]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def hang(self) -> None:
        """The next worker of this model stops in the middle of its answers, and the one after does not."""
        self._script("flaky", hang_at="generate", at_token=self._dice.randint(1, 15))
        self._unload("flaky")

    def fail_a_load(self) -> None:
        way = self._dice.choice([{"fail_load": "the dice say no"}, {"crash_at": "load"}, {"hang_at": "load"}])
        self._script("flaky", **way)
        self._unload("flaky")

    def _script(self, model: str, **more: object) -> None:
        folder = self._home / "fakes" / model
        write_fake(folder, **{**FAKES[model], **more})
        threading.Timer(3.0, lambda: write_fake(folder, **FAKES[model])).start()

    def unload(self) -> None:
        self._unload(self._dice.choice(MODELS))

    def _unload(self, model: str) -> None:
        call(self._router, "POST", "/api/generate", {"model": model, "keep_alive": 0})

    def load(self) -> None:
        call(self._router, "POST", f"/admin/models/{self._dice.choice(MODELS)}/load", None, X_Deadline_Seconds="5")

    def pin(self) -> None:
        model = self._dice.choice(MODELS)
        call(self._router, "POST", f"/admin/models/{model}/pin")
        threading.Timer(2.0, lambda: call(self._router, "POST", f"/admin/models/{model}/unpin")).start()

    def reload(self) -> None:
        _write_config(self._home, turn_seconds=self._dice.choice([0.5, TURN_SECONDS]))
        self._router.process.send_signal(signal.SIGHUP)


def _write_config(home: Path, **more: object) -> Path:
    models = {name: {"path": str(home / "fakes" / name)} for name in FAKES}
    models["random"] = {"path": str(home / "real" / "random")}
    new = home / "next"
    new.mkdir(exist_ok=True)
    path = write_config(new, models, **{**SETTINGS, **more})
    os.replace(path, home / "config.toml")  # a reader sees the old file or the new one
    return home / "config.toml"


def _at_rest(router: RouterProcess) -> tuple[int, int]:
    """Everything unloaded, one standby: open files and own memory of the router."""
    for model in MODELS:
        call(router, "POST", f"/admin/models/{model}/unpin")

    def quiet() -> bool:
        for model in MODELS:
            call(router, "POST", f"/admin/models/{model}/unload")
        status = router.status()
        return (
            status["router"]["waiting"] == 0
            and status["router"]["reserved_bytes"] == 0
            and len(status["router"]["standby_pids"]) == 1
            and all(model["in_flight"] == model["queued"] == 0 and model["pid"] is None for model in status["models"])
        )

    wait_until(quiet, "everything is unloaded, nobody waits, nothing is leased or reserved", 60)
    process = psutil.Process(router.pid)
    wait_until(
        lambda: not [c for c in process.net_connections("tcp") if c.status in ("ESTABLISHED", "CLOSE_WAIT")],
        "its connections are closed",
    )
    return process.num_fds(), process_bytes(router.pid)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    options = parser.parse_args()
    print(f"seed {options.seed}, {options.minutes:g} minutes, {CLIENTS} clients, {', '.join(MODELS)}", flush=True)
    dice = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as scratch:
        home = Path(scratch)
        for name, script in FAKES.items():
            write_fake(home / "fakes" / name, **script)
        make_random_model(home / "real" / "random", size_bytes=4_000_000, seed=0)
        with running_router(home, "--config", str(_write_config(home)), standby=True) as router:
            problems = _run(router, home, dice, options.minutes, options.seed)
    print("\n".join(problems) or "all promises held")
    sys.exit(1 if problems else 0)


def _run(router: RouterProcess, home: Path, dice: random.Random, minutes: float, seed: int) -> list[str]:
    tally, stop = Tally(), threading.Event()
    for model in MODELS:  # every code path once, before memory is compared
        tally.add(ask(router.url, model, random.Random(model)))
    before = after = (0, 0)
    chaos = Chaos(router, home, dice)
    end = time.monotonic() + minutes * 60
    for part in range(2):  # the first part warms up, the second must not grow
        stop.clear()
        threads = _clients(router, tally, stop, seed + part)
        until = end - minutes * 60 * (0.75 if part == 0 else 0.0)
        while time.monotonic() < until:
            chaos.one()
            stop.wait(dice.uniform(0.3, 2.0))
            if router.process.poll() is not None:
                return [f"the router ended with {router.process.returncode}: {router.log}"]
        stop.set()
        for thread in threads:
            thread.join(BOUND_SECONDS + 10)
        stuck = sum(thread.is_alive() for thread in threads)
        if stuck:
            return [f"{stuck} clients still wait for an answer; {json.dumps(router.status()['router']['queue'])}"]
        after = _at_rest(router)
        if part == 0:
            before = after
    status = router.status()["router"]
    print(f"requests: {sum(tally.counts.values())}: {dict(tally.counts.most_common())}")
    print(f"chaos: {dict(chaos.done.most_common())}")
    print(f"longest wait of a request for a sign of life, an answer or a refusal: {tally.longest:.1f} s "
          f"(bound {BOUND_SECONDS:g} s)")  # fmt: skip
    print(f"files open in the router: {before[0]} -> {after[0]}; its memory: {before[1] / 1e6:.1f} -> "
          f"{after[1] / 1e6:.1f} MB; processes below it: {len(router.children())}; KILLs {status['kill_incidents']}, "
          f"stranded {status['stranded_incidents']}")  # fmt: skip
    problems = [f"wrong: {what}" for what in tally.wrong]
    if after[0] > before[0]:
        problems.append("descriptors have leaked")
    if after[1] - before[1] > 5_000_000:
        problems.append("the router has grown by more than 5 MB")
    if len(router.children()) != 1:
        problems.append(f"not only the standby is left: {router.children()}")
    if tally.longest > BOUND_SECONDS:
        problems.append("somebody waited beyond the bound")
    return problems


if __name__ == "__main__":
    main()
