"""Wait until a tree of processes computes nothing."""

from __future__ import annotations

import time

import psutil

from tests.support.router import wait_until

__all__ = ["wait_idle"]


def _cpu_seconds(pid: int) -> float:
    process = psutil.Process(pid)
    times = [found.cpu_times() for found in [process, *process.children(recursive=True)]]
    return sum(time.user + time.system for time in times)


def wait_idle(pid: int) -> None:
    """Until nothing of this process tree computes any more."""

    def idle() -> bool:
        before = _cpu_seconds(pid)
        time.sleep(0.25)
        return _cpu_seconds(pid) - before < 0.03

    wait_until(idle, "it is idle", 60)
