"""What the owner of the lifecycle does about defects in its decisions."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from mlx_router_server.lifecycle.events import Decided, Ticked
from mlx_router_server.lifecycle.limits import Limits
from mlx_router_server.lifecycle.machine import Lifecycle
from mlx_router_server.workers.plan import SupervisorOptions
from mlx_router_server.workers.supervisor import Supervisor

_LIMITS = Limits(budget_bytes=10**9)


async def _run_until(supervisor: Supervisor, done: asyncio.Event) -> None:
    await supervisor.start()
    try:
        async with asyncio.timeout(30):
            await done.wait()
    finally:
        await supervisor.stop()


def test_what_was_decided_before_a_defect_is_carried_out(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    real = Lifecycle.handle
    calls = 0

    def handle(self: Lifecycle, event: Any, now: float) -> Any:
        nonlocal calls
        calls += 1
        effects = real(self, event, now)
        if calls > 1:
            return effects
        broken: Any = object()  # an effect that cannot be carried out
        self._books.effects += [Decided(what="first", model="a"), broken, Decided(what="last", model="a")]
        raise KeyError("a defect")

    async def test() -> None:
        supervisor = Supervisor(SupervisorOptions(limits=_LIMITS, standby_workers=0))
        done = asyncio.Event()
        tell = supervisor.happenings.tell

        def told(kind: str, **fields: Any) -> None:
            tell(kind, **fields)
            if fields.get("what") == "last":
                done.set()

        monkeypatch.setattr(supervisor.happenings, "tell", told)
        monkeypatch.setattr(Lifecycle, "handle", handle)
        await _run_until(supervisor, done)

    asyncio.run(test())
    assert "event=first model='a'" in caplog.text
    assert "event=last model='a'" in caplog.text
    assert "KeyError: 'a defect'" in caplog.text


def test_a_router_that_gives_up_exits_with_a_failure(tmp_path: Path) -> None:
    """A service manager treats an exit by SIGTERM as requested and does not restart the router."""
    script = """
import sys
from mlx_router_server.cli import main
from mlx_router_server.lifecycle.machine import Lifecycle
from mlx_router_server.workers import supervisor

def fail(self, event, now):
    raise KeyError("a defect")

supervisor._MOST_DEFECTS = 2
Lifecycle.handle = fail
sys.exit(main())
"""
    environment = {**os.environ, "MLX_ROUTER_HOME": str(tmp_path)}
    arguments = ["start", "--port", "0", "--standby-workers", "0", "--drain-timeout-seconds", "1"]
    done = subprocess.run([sys.executable, "-P", "-c", script, *arguments], env=environment, capture_output=True,
                          text=True, timeout=40)  # fmt: skip
    assert "event=router_gives_up" in done.stderr
    assert done.returncode == 1


def test_a_defect_that_comes_back_slows_down_and_ends_the_router(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    times: list[float] = []

    real = Lifecycle.handle

    def handle(self: Lifecycle, event: Any, now: float) -> Any:
        if not isinstance(event, Ticked):
            return real(self, event, now)
        times.append(now)
        raise KeyError("a defect")

    async def test() -> None:
        ended, done = [], asyncio.Event()

        def kill(pid: int, number: int) -> None:
            assert pid == os.getpid()
            ended.append((number, times[-1] - times[-4]))
            done.set()

        monkeypatch.setattr("mlx_router_server.workers.supervisor.os.kill", kill)
        monkeypatch.setattr("mlx_router_server.workers.supervisor._MOST_DEFECTS", 4)
        monkeypatch.setattr(Lifecycle, "handle", handle)
        monkeypatch.setattr(Lifecycle, "next_deadline", lambda self: time.monotonic())
        await _run_until(Supervisor(SupervisorOptions(limits=_LIMITS, standby_workers=0)), done)
        assert len(ended) == 1
        assert ended[0][0] == signal.SIGTERM
        assert ended[0][1] >= 0.1 + 0.2 + 0.4

    asyncio.run(test())
    assert caplog.text.count("event=router_gives_up") >= 1
