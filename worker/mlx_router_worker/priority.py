"""Do work at a low CPU priority and return to the normal one, which an ordinary user cannot do with ``nice``."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from typing import Final, TypeVar

__all__ = ["at_low_priority"]

_T = TypeVar("_T")
_NICE: Final = 10
_PRIO_DARWIN_PROCESS: Final = 4  # <sys/resource.h> of macOS
_PRIO_DARWIN_BG: Final = 0x1000


def at_low_priority(work: Callable[[], _T]) -> _T:
    """Return ``work()``, computed at a low CPU priority; what it raises is raised here.

    On Linux the nice value belongs to the thread and cannot be lowered again by an ordinary user, so ``work`` runs in a
    thread of its own. On macOS the process becomes a background one meanwhile; the router can end that early.
    """
    if sys.platform == "darwin":
        _set_priority(_PRIO_DARWIN_PROCESS, 0, _PRIO_DARWIN_BG)
        try:
            return work()
        finally:
            _set_priority(_PRIO_DARWIN_PROCESS, 0, 0)
    results: list[_T] = []
    errors: list[BaseException] = []

    def run() -> None:
        _set_priority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)
        try:
            results.append(work())
        except BaseException as error:  # raised again below
            errors.append(error)

    thread = threading.Thread(target=run, name="low-priority")
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]


def _set_priority(which: int, who: int, priority: int) -> None:
    try:
        os.setpriority(which, who, priority)
    except OSError:
        pass  # a sandbox forbids it: then it runs at the normal priority
