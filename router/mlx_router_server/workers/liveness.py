"""Detect a process that makes no progress before it reports anything."""

from __future__ import annotations

import time
from typing import Final

import psutil

__all__ = ["Liveness"]

_WORKING: Final = (psutil.STATUS_RUNNING, psutil.STATUS_DISK_SLEEP)


class Liveness:
    """A process makes progress while it uses CPU time, waits for a disk or sends messages."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._used_seconds = -1.0
        self._moved_at = time.monotonic()

    def note(self) -> None:
        """Record that the process has sent a message."""
        self._moved_at = time.monotonic()

    def still_seconds(self) -> float:
        """Return the seconds since its last progress."""
        try:
            process = psutil.Process(self._pid)
            times = process.cpu_times()
            is_working = process.status() in _WORKING
        except psutil.Error:
            return 0.0  # it has ended, which is known elsewhere
        if is_working or times.user + times.system > self._used_seconds:
            self._used_seconds = times.user + times.system
            self._moved_at = time.monotonic()
        return time.monotonic() - self._moved_at
