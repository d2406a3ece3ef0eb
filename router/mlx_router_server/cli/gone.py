"""Whether a router is really gone: its processes, and the memory that they had."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any, Final

import psutil

from mlx_router_server.cli.tables import human_size
from mlx_router_server.workers.memory import machine_used_bytes, process_bytes

__all__ = ["Footprint", "footprint_of"]

_POLL_SECONDS: Final = 0.02
_BACK_SECONDS: Final = 2.0
_BACK_SHARE: Final = 0.9
_NOISE_BYTES: Final = 64 * 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class Footprint:
    """What a router held, before it was asked to leave."""

    processes: list[psutil.Process]
    held_bytes: int
    used_bytes: int
    """Of the whole machine."""

    def what_is_left(self, limit_seconds: float) -> str:
        """Wait until nothing is; at the limit a sentence about what is, empty when all is well."""
        began = time.monotonic()
        while (alive := [process for process in self.processes if _lives(process)]) and (
            time.monotonic() - began < limit_seconds
        ):
            time.sleep(_POLL_SECONDS)  # they are not our children: there is nothing to wait on
        if alive:
            left = ", ".join(str(process.pid) for process in alive)
            return f"still running after {limit_seconds:g} s: pid {left}"
        if missing := self._missing_bytes():
            return f"stopped, but {human_size(missing)} of memory are not back"
        return ""

    def _missing_bytes(self) -> int:
        """What the processes had and the machine did not get back, within the noise of other programs."""
        wanted = int(self.held_bytes * _BACK_SHARE) - _NOISE_BYTES
        began = time.monotonic()
        while (returned := self.used_bytes - machine_used_bytes()) < wanted:
            if time.monotonic() - began > _BACK_SECONDS:
                return wanted - returned
            time.sleep(_POLL_SECONDS)
        return 0


def footprint_of(status: dict[str, Any]) -> Footprint:
    """Of the router that answered ``/admin/status`` with this."""
    router = status["router"]
    pids = [router["pid"], *router["standby_pids"], *(model["pid"] for model in status["models"] if model["pid"])]
    processes = []
    for pid in dict.fromkeys(pids):
        try:
            processes.append(psutil.Process(pid))
        except psutil.NoSuchProcess:
            continue
    held = sum(process_bytes(process.pid) for process in processes)
    return Footprint(processes=processes, held_bytes=held, used_bytes=machine_used_bytes())


def _lives(process: psutil.Process) -> bool:
    """A zombie has given everything back; only its parent has not looked yet."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
