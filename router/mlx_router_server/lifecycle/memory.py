"""Memory as numbers: how tight it is on the machine, and what one worker may use of it. Readings are handed in."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Final

from mlx_router_server.lifecycle.spec import Share

__all__ = ["MemoryReading", "Pressure", "share_of"]

_CACHE_SHARE: Final = 0.08
_CACHE_MOST: Final = 2 * 2**30


class Pressure(IntEnum):
    """How tight memory is on the machine, in the three levels of macOS."""

    NORMAL = 0
    WARNING = 1
    """Freed buffers are given back."""
    CRITICAL = 2
    """Idle models leave, and nothing new is loaded."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryReading:
    """The machine, or the control group, at one moment."""

    available_bytes: int
    total_bytes: int
    pressure: Pressure


def share_of(
    reserved_bytes: int, *, budget_bytes: int, wired_bytes: int, loaded_bytes: int = 0, surplus_bytes: int = 0
) -> Share:
    """Return the limits of a worker with this reservation.

    ``loaded_bytes`` is the part of it that the loaded model takes; the rest is for requests. ``surplus_bytes`` is its
    part of what no worker has reserved; it is taken back when another model is loaded. Because reservations and surplus
    stay within the budget, so do limits. ``wired_bytes`` is what the machine may wire in all; 0 where nothing is wired.
    """
    memory = reserved_bytes + surplus_bytes
    wired = min(memory, memory * wired_bytes // budget_bytes) if wired_bytes and budget_bytes else 0
    cache = min(int(reserved_bytes * _CACHE_SHARE), _CACHE_MOST)
    return Share(
        memory_bytes=memory, cache_bytes=cache, wired_bytes=wired, requests_bytes=max(memory - loaded_bytes, 1)
    )
