"""A real router process, started as a user starts it, with a deadline on every wait."""

from __future__ import annotations

import json
import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from mlx_router_server.cli.client import Client

__all__ = ["DEADLINE", "RouterProcess", "running_router", "still_alive", "wait_until", "write_config"]

DEADLINE = 30.0


def wait_until(condition: Callable[[], Any], what: str, seconds: float = DEADLINE) -> Any:
    """Ask again and again, for things of other processes that no event tells; the value of ``condition`` when true."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        if time.monotonic() > end:
            raise AssertionError(f"not within {seconds} s: {what}")
        time.sleep(0.01)
    return value


def still_alive(processes: list[psutil.Process]) -> list[psutil.Process]:
    """Those that hold anything yet; a zombie does not, its parent (init, for orphans) has only not looked."""
    alive = []
    for process in processes:
        try:
            if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                alive.append(process)
        except psutil.NoSuchProcess:
            continue
    return alive


class RouterProcess:
    """``mlx-router start`` in a process of its own, on a port that the system chooses."""

    def __init__(
        self,
        home: Path,
        arguments: list[str],
        *,
        cwd: Path | None = None,
        python: list[str] | None = None,
        variables: dict[str, str] | None = None,
        standby: bool = False,
    ) -> None:
        """``standby``: leave it to the settings whether a standby worker is kept, which costs two seconds of a core."""
        if not standby and "--standby-workers" not in arguments:
            arguments = [*arguments, "--standby-workers", "0"]
        environment = {
            name: value for name, value in os.environ.items() if not name.startswith(("MLX_ROUTER", "OLLAMA"))
        }
        environment.update(MLX_ROUTER_HOME=str(home), HF_HOME=str(home / "hf"))
        environment.pop("PYTHONDONTWRITEBYTECODE", None)
        environment.update(variables or {})
        command = [*(python or [sys.executable, "-P"]), "-m", "mlx_router_server", "start", "--port", "0", *arguments]
        self.process = subprocess.Popen(
            command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, env=environment, cwd=cwd or home, text=True
        )
        self.lines: list[str] = []
        self.is_read = threading.Event()
        """Cleared by a test that does not read what the router writes."""
        self.is_read.set()
        self._new_lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self.url = re.sub(r".* listens on ", "", self.wait_line(r" listens on http")).strip()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.is_read.wait()
            self.lines.append(line.rstrip())
            self._new_lines.put(line.rstrip())
        self._new_lines.put(None)

    def wait_line(self, pattern: str, seconds: float = DEADLINE) -> str:
        """The next line of its log, not read by an earlier call, that the pattern is found in."""
        end = time.monotonic() + seconds
        while True:
            try:
                line = self._new_lines.get(timeout=max(end - time.monotonic(), 0.001))
            except queue.Empty:
                raise AssertionError(f"no line {pattern!r} within {seconds} s; log:\n{self.log}") from None
            if line is None:
                raise AssertionError(f"the router ended without a line {pattern!r}; log:\n{self.log}")
            if re.search(pattern, line):
                return line

    @property
    def log(self) -> str:
        return "\n".join(self.lines[-60:])

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def client(self) -> Client:
        return Client(self.url)

    def status(self) -> dict[str, Any]:
        data: dict[str, Any] = self.client.get("/admin/status")
        return data

    def model(self, name: str) -> dict[str, Any]:
        """One entry of /admin/status."""
        found = [model for model in self.status()["models"] if model["name"] == f"{name}:latest"]
        assert len(found) == 1, f"{name} is listed {len(found)} times"
        entry: dict[str, Any] = found[0]
        return entry

    def wait_state(self, name: str, *states: str, seconds: float = DEADLINE) -> dict[str, Any]:
        def reached() -> dict[str, Any] | None:
            entry = self.model(name)
            return entry if entry["state"] in states else None

        entry: dict[str, Any] = wait_until(reached, f"{name} in {states}", seconds)
        return entry

    def wait_eviction(self, name: str) -> dict[str, Any]:
        """The one eviction that the last load of a model was for, once it is over: the two may overlap."""
        (eviction,) = wait_until(lambda: self.model(name)["last_swap"]["evictions"], f"the eviction for {name} is over")
        found: dict[str, Any] = eviction
        return found

    def children(self) -> list[psutil.Process]:
        return psutil.Process(self.pid).children(recursive=True)

    def generate(self, model: str, **body: Any) -> dict[str, Any]:
        """One whole answer of /api/generate."""
        answer: dict[str, Any] = self.client.post(
            "/api/generate", {"model": model, "prompt": "go", "stream": False, **body}
        )
        return answer

    def stop(self) -> int:
        """Ask it to leave, and see that nothing of it is left. Returns the exit status."""
        if self.process.poll() is None:
            children = self.children()
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(DEADLINE)
            except subprocess.TimeoutExpired:
                self.process.kill()
                raise AssertionError(f"the router did not end; log:\n{self.log}") from None
            alive = still_alive(children)
            assert not alive, f"left behind: {alive}; log:\n{self.log}"
        self._reader.join(DEADLINE)
        assert self.process.stderr is not None
        self.process.stderr.close()
        return self.process.returncode


@contextmanager
def running_router(home: Path, *arguments: str, **more: Any) -> Iterator[RouterProcess]:
    """A router that is stopped, and checked for remains, when the block ends."""
    router = RouterProcess(home, list(arguments), **more)
    try:
        yield router
    except BaseException:
        traceback.print_exc()  # before a stop that may fail as well
        print(f"log of the router:\n{router.log}", file=sys.stderr)
        raise
    finally:
        router.stop()


def write_config(folder: Path, models: dict[str, dict[str, Any]], **settings: Any) -> Path:
    """A configuration file with these models; values have to be what JSON and TOML write alike."""
    lines = [f"{name} = {json.dumps(value)}" for name, value in settings.items()]
    for name, table in models.items():
        lines.append(f'[models."{name}"]')
        lines += [f"{key} = {json.dumps(value)}" for key, value in table.items()]
    path = folder / "config.toml"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path
