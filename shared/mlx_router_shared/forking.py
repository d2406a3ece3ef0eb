"""Messages between the router and its fork server, over a Unix socket that keeps message boundaries (Linux only).

The router sends ``ForkWorker`` with two file descriptors attached, the worker's standard input and standard error; the
fork server answers with ``Forked`` and a pidfd of the worker, or with ``ForkFailed``. Nothing secret passes through the
fork server: the worker reads its token from its own standard input.
"""

from __future__ import annotations

import os
from typing import Final

from msgspec import Struct

__all__ = [
    "MAX_FORK_MESSAGE_BYTES",
    "ForkFailed",
    "ForkServerReady",
    "ForkWorker",
    "Forked",
    "FromForkServer",
    "Retire",
    "ToForkServer",
    "WorkerEnded",
    "exit_status",
]

MAX_FORK_MESSAGE_BYTES: Final = 65_536


class ForkWorker(Struct, frozen=True, kw_only=True, tag="fork"):
    """Fork one worker. Attached: the read end of its standard input, the write end of its standard error."""

    request: int
    """Returned in the answer."""


class Retire(Struct, frozen=True, kw_only=True, tag="retire"):
    """Fork no more workers, and exit when the last one has ended."""


ToForkServer = ForkWorker | Retire


class ForkServerReady(Struct, frozen=True, kw_only=True, tag="ready"):
    """The imports are done. Sent once."""

    import_seconds: float
    engines: list[str]
    """The engine kinds whose imports are done."""
    import_errors: dict[str, str] = {}
    """Engine kinds that could not be imported, with the reason; a worker of such a kind imports it itself."""
    unsafe: str = ""
    """Why workers cannot be forked from this process, for example because a library started threads; else empty."""


class Forked(Struct, frozen=True, kw_only=True, tag="forked"):
    """A worker process exists. Attached: its pidfd."""

    request: int
    pid: int


class ForkFailed(Struct, frozen=True, kw_only=True, tag="fork_failed"):
    """No worker was forked."""

    request: int
    reason: str


class WorkerEnded(Struct, frozen=True, kw_only=True, tag="ended"):
    """A worker has ended and is reaped."""

    request: int
    """The one that it was forked for."""
    status: int
    """Its exit status; negative numbers are signals, as in ``subprocess``."""


def exit_status(result: os.waitid_result) -> int:
    """Return the exit status of a process that ``os.waitid`` has reaped; negative numbers are signals."""
    return result.si_status if result.si_code == os.CLD_EXITED else -result.si_status


FromForkServer = ForkServerReady | Forked | ForkFailed | WorkerEnded
