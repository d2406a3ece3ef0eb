"""Whether a router and its workers are really gone."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any, Final

import psutil

__all__ = ["Footprint", "footprint_of"]

_POLL_SECONDS: Final = 0.02
_SAME_SECONDS: Final = 30.0  # between the start of a process and of the router in it


@dataclass(frozen=True, slots=True, kw_only=True)
class Footprint:
    """The processes of a router on this machine, before it was asked to leave."""

    router_pid: int
    processes: list[psutil.Process]

    def what_is_left(self, limit_seconds: float) -> str:
        """Wait until all of them are gone; at the limit a sentence about those that are not, empty when all is well."""
        began = time.monotonic()
        while (alive := [process for process in self.processes if _lives(process)]) and (
            time.monotonic() - began < limit_seconds
        ):
            time.sleep(_POLL_SECONDS)  # they are not our children: there is nothing to wait on
        if alive:
            left = ", ".join(str(process.pid) for process in alive)
            return f"still running after {limit_seconds:g} s: pid {left}"
        return ""


def footprint_of(status: dict[str, Any]) -> Footprint | None:
    """Of the router that answered ``/admin/status`` with this; None if it does not run on this machine.

    The numbers come from whoever answers, maybe through a forwarded port: a process counts only if it is a router that
    began when the answer says.
    """
    router = status["router"]
    try:
        process = psutil.Process(router["pid"])
        is_ours = any("mlx" in word for word in process.cmdline()) and (
            abs(process.create_time() - router["started_at"]) < _SAME_SECONDS
        )
        if not is_ours:
            return None
        processes = [process, *process.children(recursive=True)]
    except (psutil.Error, TypeError, ValueError):
        return None
    return Footprint(router_pid=process.pid, processes=processes)


def _lives(process: psutil.Process) -> bool:
    """A zombie has given everything back; only its parent has not looked yet."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
