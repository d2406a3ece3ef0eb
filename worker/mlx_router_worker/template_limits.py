"""Limits on the rendering of a chat template, which is a program that a stranger wrote.

The time limit stops a loop, the memory limit a huge multiplied string. Neither interrupts a single call into C that
needs little memory: such a template is left to the router's watchdog.
"""

from __future__ import annotations

import resource
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Final

__all__ = ["TemplateOverrun", "template_limits"]

_SECONDS: Final = 5.0
"""Processor time of the thread. Rendering ten million characters takes less than a second."""
_MEMORY_BYTES: Final = 2 * 2**30
"""Address space allowed on top of the current size."""
_SIZES: Final = Path("/proc/self/statm")
"""Linux only: its first number is the address space in pages."""


class TemplateOverrun(BaseException):
    """Raised when a template exceeds a limit. Derived from ``BaseException`` so that handlers of template errors do not
    catch it."""


@contextmanager
def template_limits(seconds: float = _SECONDS, spare_bytes: int = 0) -> Iterator[None]:
    """Raise ``TemplateOverrun`` in the block when it takes too much time, and ``MemoryError`` for too much memory.

    ``spare_bytes`` is what other threads may allocate meanwhile: the memory limit holds for the whole process. Time is
    limited on the main thread alone, and memory on Linux alone. Blocks may not be nested.
    """
    with _memory_limit(spare_bytes), _time_limit(seconds):
        yield


@contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    end = time.thread_time() + seconds

    def stop(_signal: int, _frame: FrameType | None) -> None:
        # The timer counts the time of all threads of the process.
        left = end - time.thread_time()
        if left <= 0:
            raise TemplateOverrun(f"takes more than {seconds:g} s")
        signal.setitimer(signal.ITIMER_VIRTUAL, left)

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


@contextmanager
def _memory_limit(spare_bytes: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    try:
        used = int(_SIZES.read_text(encoding="ascii").split()[0]) * resource.getpagesize()
    except OSError:
        yield
        return
    most = used + _MEMORY_BYTES + spare_bytes
    with suppress(ValueError, OSError):
        if soft == resource.RLIM_INFINITY or most < soft:
            resource.setrlimit(resource.RLIMIT_AS, (most, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
