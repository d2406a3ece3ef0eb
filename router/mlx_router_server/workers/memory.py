"""Readings of memory: of one process, and of the machine.

Linux: anonymous memory, which is what a process alone holds; file pages stay in the cache after it and mean nothing.
macOS: the physical footprint, what Activity Monitor shows; resident size misses the memory that Metal holds.
"""

from __future__ import annotations

import ctypes
import sys
from functools import cache
from pathlib import Path
from typing import Final

import psutil

__all__ = ["default_budget", "machine_used_bytes", "process_bytes"]

_KB: Final = 1024
_MAC_SHARE: Final = 0.75  # of all memory, where the device has not told its working set yet
_RESERVE_SHARE: Final = 0.1
_RESERVE_MOST: Final = 2 * 2**30
_RUSAGE_INFO_V0: Final = 0
_FOOTPRINT_OFFSET: Final = 72  # ri_phys_footprint in struct rusage_info_v0 of <sys/resource.h>


def process_bytes(pid: int) -> int:
    """Bytes that would come back if this process ended; 0 when it is gone or may not be read."""
    if sys.platform == "darwin":
        return _mac_footprint(pid)
    try:
        # Counters that the kernel keeps; smaps_rollup is a little more exact and walks every page of a large model.
        text = Path(f"/proc/{pid}/status").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return 0
    for line in text.splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * _KB
    return 0


@cache
def _libproc() -> ctypes.CDLL:
    return ctypes.CDLL("/usr/lib/libproc.dylib", use_errno=True)


def _mac_footprint(pid: int) -> int:
    buffer = ctypes.create_string_buffer(512)
    if _libproc().proc_pid_rusage(pid, _RUSAGE_INFO_V0, buffer) != 0:
        return 0
    return int.from_bytes(buffer.raw[_FOOTPRINT_OFFSET : _FOOTPRINT_OFFSET + 8], sys.byteorder)


def machine_used_bytes() -> int:
    """Memory of the machine that cannot be given to anyone else; falls when a worker's memory is back."""
    if sys.platform == "darwin":
        memory = psutil.virtual_memory()
        return int(memory.total - memory.available)
    for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        if line.startswith("AnonPages:"):
            return int(line.split()[1]) * _KB
    return 0


def default_budget() -> int:
    """What models may use together when the operator does not say: what is free now, less a reserve."""
    memory = psutil.virtual_memory()
    if sys.platform == "darwin":
        return int(memory.total * _MAC_SHARE)
    free = int(memory.available)
    if (limit := _cgroup_free()) is not None:
        free = min(free, limit)
    return free - min(int(free * _RESERVE_SHARE), _RESERVE_MOST)


def _cgroup_free() -> int | None:
    """What the control group of this process may still take; None without a limit."""
    for limit_file, used_file in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        try:
            limit = Path(limit_file).read_text(encoding="ascii").strip()
            used = int(Path(used_file).read_text(encoding="ascii"))
        except (OSError, ValueError):
            continue
        if limit.isdigit():
            return max(int(limit) - used, 0)
    return None
