"""Reads of folders with a time limit, because a network mount or a failing disk may never answer."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, TypeVar

__all__ = ["BoundedScans", "ScanTimeout"]

Result = TypeVar("Result")


class ScanTimeout(Exception):
    """A folder did not answer within the limit."""


class _Scan:
    """One read in a daemon thread, which does not keep the process from exiting."""

    def __init__(self, work: Callable[[], Any]) -> None:
        self.result: Any = None
        self.error: Exception | None = None
        self.done = threading.Event()
        self.progress = 0
        self._work = work
        threading.Thread(target=self._run, name="scan", daemon=True).start()

    def _run(self) -> None:
        try:
            self.result = self._work()
        except Exception as error:
            self.error = error
        finally:
            self.done.set()


class BoundedScans:
    """Runs reads by name. One that hangs is not started a second time: its name fails until it has returned."""

    def __init__(self, limit_seconds: float) -> None:
        """``limit_seconds``: the longest time without progress."""
        self._limit_seconds = limit_seconds
        self._scans: dict[str, _Scan] = {}
        self._hanging: dict[str, _Scan] = {}

    def note_progress(self, name: str) -> None:
        """The read of this name has got something: its time begins anew."""
        if (scan := self._scans.get(name)) is not None:
            scan.progress += 1

    def run(self, name: str, work: Callable[[], Result]) -> Result:
        """Return what ``work`` returns. Raises what it raises, and ``ScanTimeout`` at the limit."""
        before = self._hanging.get(name)
        if before is not None and not before.done.is_set():
            raise ScanTimeout("its folder still does not answer")
        self._hanging.pop(name, None)
        scan = self._scans[name] = _Scan(work)
        seen = 0
        while not scan.done.wait(self._limit_seconds):
            if scan.progress == seen:
                self._hanging[name] = scan
                raise ScanTimeout(f"its folder did not answer within {self._limit_seconds:g} s")
            seen = scan.progress
        del self._scans[name]
        if scan.error is not None:
            raise scan.error
        result: Result = scan.result
        return result
