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

from mlx_router_server.lifecycle.memory import MemoryReading, Pressure
from mlx_router_server.workers.cgroup import read_cgroup_memory

__all__ = [
    "default_budget",
    "judge_pressure",
    "machine_used_bytes",
    "process_bytes",
    "read_memory",
    "shared_bytes",
    "wired_limit",
]

_KB: Final = 1024
_MAC_SHARE: Final = 0.75  # of all memory, where the device has not told its working set yet
_WARNING_SHARE: Final = 0.08
_CRITICAL_SHARE: Final = 0.04
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


def shared_bytes(pid: int) -> int:
    """Bytes of ``process_bytes`` that other processes use as well, so that they stay when this one ends (Linux).

    0 when it has ended or may not be read. The kernel walks every page of the process: some milliseconds per gigabyte.
    """
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii", errors="replace")
    except OSError:
        return 0
    lines = [line.split() for line in text.splitlines()[1:]]  # the first is a header
    sizes = {name: int(size) for name, size, _unit in lines}
    return max(sizes.get("Anonymous:", 0) - sizes.get("Private_Dirty:", 0), 0) * _KB


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


def read_memory() -> MemoryReading:
    """How much the machine, or the control group that this process is in, can still give."""
    memory = psutil.virtual_memory()
    available, total = int(memory.available), int(memory.total)
    if sys.platform == "darwin":
        level = _mac_sysctl("kern.memorystatus_vm_pressure_level")  # 1, 2 or 4, as the system itself judges
        pressure = {2: Pressure.WARNING, 4: Pressure.CRITICAL}.get(level, Pressure.NORMAL)
        return MemoryReading(available_bytes=available, total_bytes=total, pressure=pressure)
    if (group := read_cgroup_memory()) is not None and group.available_bytes < available:
        available, total = group.available_bytes, min(group.limit_bytes, total)
    return MemoryReading(available_bytes=available, total_bytes=total, pressure=judge_pressure(available, total))


def judge_pressure(available_bytes: int, total_bytes: int) -> Pressure:
    """Linux has no word of its own for it: by the share that is left."""
    share = available_bytes / max(total_bytes, 1)
    if share < _CRITICAL_SHARE:
        return Pressure.CRITICAL
    return Pressure.WARNING if share < _WARNING_SHARE else Pressure.NORMAL


def default_budget(reading: MemoryReading) -> int:
    """What models may use together when the operator does not say: what is free now, less a reserve."""
    if sys.platform == "darwin":
        return wired_limit() or int(reading.total_bytes * _MAC_SHARE)
    free = reading.available_bytes
    return free - min(int(free * _RESERVE_SHARE), _RESERVE_MOST)


def wired_limit() -> int:
    """What an administrator lets the GPU wire (macOS, ``sysctl iogpu.wired_limit_mb``); 0: the device's own limit."""
    return _mac_sysctl("iogpu.wired_limit_mb") * 2**20 if sys.platform == "darwin" else 0


def _mac_sysctl(name: str) -> int:
    value = ctypes.c_uint64(0)
    size = ctypes.c_size_t(8)
    system = ctypes.CDLL(None)
    if system.sysctlbyname(name.encode(), ctypes.byref(value), ctypes.byref(size), None, 0) != 0:
        return 0
    return int(value.value)
