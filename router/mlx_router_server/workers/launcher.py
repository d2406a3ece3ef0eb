"""Start worker processes and own their pipes.

A worker gets its own session (so its own process group), a minimal environment, and on standard input the one line
that names the endpoint and its token. The pipe stays open for as long as the router lives.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
from collections import deque
from contextlib import suppress
from typing import Final, Protocol

from mlx_router_shared.codec import encode_bootstrap
from mlx_router_shared.protocol import Bootstrap

__all__ = ["ChildProcess", "WorkerProcess", "launch", "spawn", "worker_environment"]

log = logging.getLogger(__name__)

_TAIL_LINES: Final = 40
_LINE_BYTES: Final = 4096
_TRACEBACK: Final = "Traceback (most recent call last):"
_TRACEBACK_LINES: Final = 60
_LAST_WORDS_SECONDS: Final = 0.5
_PASSED_ON: Final = frozenset(
    [
        "PATH",
        "HOME",
        "USER",
        "LOGNAME",
        "LANG",
        "TZ",
        "TMPDIR",
        "VIRTUAL_ENV",
        "PYTHONPATH",
        "PYTHONHOME",
        "LD_LIBRARY_PATH",
        "DYLD_LIBRARY_PATH",
        "DYLD_FALLBACK_LIBRARY_PATH",
        "CUDA_VISIBLE_DEVICES",
    ]
)
_PASSED_ON_PREFIXES: Final = ("LC_", "MLX_", "OMP_", "OPENBLAS_", "CUDA_", "METAL_", "COV_")
_NOT_PASSED_ON_PREFIX: Final = "MLX_ROUTER_"


def worker_environment(environment: dict[str, str]) -> dict[str, str]:
    """What a worker may see of the router's environment: no keys, no tokens, and no way to the network.

    PYTHONDONTWRITEBYTECODE is left out on purpose: without byte code a cold start takes three times as long.
    """
    kept = {
        name: value
        for name, value in environment.items()
        if name in _PASSED_ON or (name.startswith(_PASSED_ON_PREFIXES) and not name.startswith(_NOT_PASSED_ON_PREFIX))
    }
    kept.update(
        HF_HUB_OFFLINE="1",
        TRANSFORMERS_OFFLINE="1",
        TRANSFORMERS_NO_ADVISORY_WARNINGS="1",
        TOKENIZERS_PARALLELISM="false",
        PYTHONUNBUFFERED="1",
    )
    return kept


class ChildProcess(Protocol):
    """A process that was started for the router; spawned by it, or forked by its fork server."""

    @property
    def pid(self) -> int: ...

    @property
    def alive(self) -> bool: ...

    @property
    def stderr(self) -> asyncio.StreamReader: ...

    async def wait(self) -> int | None:
        """Return the exit status once the process has ended; negative numbers are signals, None is not known."""

    def signal_group(self, number: signal.Signals) -> None:
        """Send a signal to the process and everything it started."""

    def write(self, data: bytes) -> None:
        """Write to its standard input; what cannot be written because it has ended is dropped."""

    def close(self) -> None:
        """Close our end of its standard input."""


class WorkerProcess:
    """A running worker: its pid, its end, and the last lines it wrote to standard error."""

    def __init__(self, worker_id: str, process: ChildProcess) -> None:
        self.worker_id = worker_id
        self.label = worker_id
        """What its lines in the log are marked with; the model's name once it has one."""
        self._process = process
        self._traceback: deque[str] = deque(maxlen=_TRACEBACK_LINES)
        self._tail: deque[str] = deque(maxlen=_TAIL_LINES)
        self._relay = asyncio.create_task(self._relay_stderr(), name=f"stderr-{worker_id}")

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def alive(self) -> bool:
        return self._process.alive

    @property
    def stderr_tail(self) -> list[str]:
        return list(self._tail)

    async def wait(self) -> int | None:
        """Return the exit status once the process has ended; negative numbers are signals, None is not known."""
        status = await self._process.wait()
        # Its last words are wanted, but a grandchild that holds the pipe open must not hold us.
        await asyncio.wait([self._relay], timeout=_LAST_WORDS_SECONDS)
        self._relay.cancel()
        self._process.close()
        return status

    def begin(self, bootstrap: Bootstrap) -> None:
        """Have it connect and say hello. Called once, when its hello is listened for: a forked worker is quick."""
        self._process.write(encode_bootstrap(bootstrap))

    def signal_group(self, number: signal.Signals) -> None:
        """Send a signal to the worker and everything it started."""
        self._process.signal_group(number)

    def describe_exit(self, status: int | None) -> str:
        """Return a sentence about an end that was not requested."""
        if status is None:
            return "its worker process has ended; its exit status is not known"
        if status < 0:
            try:
                how = f"was ended by signal {signal.Signals(-status).name}"
            except ValueError:
                how = f"was ended by signal {-status}"
        else:
            how = f"exited with status {status}"
        last = next((line for line in reversed(self._tail) if line.strip()), "")
        return f"its worker process {how}" + (f" ({last.strip()[:200]})" if last and status >= 0 else "")

    def _log_line(self, text: str) -> None:
        """A line each, but for tracebacks, which are one record."""
        if text.startswith(_TRACEBACK):
            self._log_traceback()
            self._traceback.append(text)
        elif self._traceback:
            self._traceback.append(text)
            if not text.startswith(" ") and text:  # the exception itself ends it
                self._log_traceback()
        else:
            log.info("event=worker_output worker=%s text=%r", self.label, text)

    def _log_traceback(self) -> None:
        if self._traceback:
            log.warning("event=worker_traceback worker=%s text=%r", self.label, "\n".join(self._traceback))
            self._traceback.clear()

    async def _relay_stderr(self) -> None:
        stream = self._process.stderr
        while True:
            try:
                line = await stream.readline()
            except ValueError:  # a line longer than the reader's limit; the rest of it comes next
                continue
            if not line:
                self._log_traceback()
                return
            text = line[:_LINE_BYTES].decode("utf-8", "replace").rstrip()
            self._tail.append(text)
            self._log_line(text)


class _SpawnedProcess:
    """A ``ChildProcess`` that asyncio has started."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def alive(self) -> bool:
        return self._process.returncode is None

    @property
    def stderr(self) -> asyncio.StreamReader:
        assert self._process.stderr is not None
        return self._process.stderr

    async def wait(self) -> int:
        return await self._process.wait()

    def signal_group(self, number: signal.Signals) -> None:
        if self.alive:
            try:
                os.killpg(self.pid, number)
            except (ProcessLookupError, PermissionError):
                pass  # it ended in this very moment; of a group of zombies, macOS says that it is not allowed

    def write(self, data: bytes) -> None:
        assert self._process.stdin is not None
        with suppress(OSError, RuntimeError):  # it has ended, as its exit status will say; uvloop raises the second
            self._process.stdin.write(data)

    def close(self) -> None:
        if self._process.stdin is not None:
            self._process.stdin.close()


async def spawn(module: str, *arguments: str, stdin: int = asyncio.subprocess.PIPE) -> _SpawnedProcess:
    """Start ``python -m module`` as workers are started. Raises ``OSError`` when it cannot be started."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-P",  # a queue.py in the user's folder must not be imported instead of the standard one
        "-m",
        module,
        *arguments,
        stdin=stdin,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
        env=worker_environment(dict(os.environ)),
        start_new_session=True,
    )
    return _SpawnedProcess(process)


async def launch(worker_id: str) -> WorkerProcess:
    """Start a worker, which waits for its bootstrap. Raises ``OSError`` when it cannot be started."""
    return WorkerProcess(worker_id, await spawn("mlx_router_worker"))
