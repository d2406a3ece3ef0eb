"""Limits on the rendering of a chat template, which is a program that a stranger wrote.

Processor time is limited by a timer signal, memory by a resource limit of the process. A signal does not interrupt a
call into C: a multiplied string is stopped by its memory, and a loop by its time.
"""

from __future__ import annotations

import resource
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Final, NoReturn

__all__ = ["TemplateOverrun", "template_limits"]

_SECONDS: Final = 5.0
"""Processor time of the process. Rendering ten million characters takes less than a second."""
_MEMORY_BYTES: Final = 2 * 2**30
"""Address space beyond what the process has already."""
_SIZES: Final = Path("/proc/self/statm")
"""Linux only: its first number is the address space in pages."""


class TemplateOverrun(BaseException):
    """The template went over a limit. No ``Exception``, so that nothing that expects a template to fail goes on."""


@contextmanager
def template_limits(seconds: float = _SECONDS) -> Iterator[None]:
    """Raise ``TemplateOverrun`` in the block when it takes too much time, and ``MemoryError`` for too much memory.

    Time is limited on the main thread alone, and memory on Linux alone.
    """
    with _memory_limit(), _time_limit(seconds):
        yield


@contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(_signal: int, _frame: FrameType | None) -> NoReturn:
        raise TemplateOverrun(f"takes more than {seconds:g} s")

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


@contextmanager
def _memory_limit() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    try:
        used = int(_SIZES.read_text(encoding="ascii").split()[0]) * resource.getpagesize()
    except OSError:
        yield
        return
    most = used + _MEMORY_BYTES
    with suppress(ValueError, OSError):
        if soft == resource.RLIM_INFINITY or most < soft:
            resource.setrlimit(resource.RLIMIT_AS, (most, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
