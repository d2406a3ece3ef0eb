"""Memory of a tree of processes, with pages that several of them share counted once."""

from __future__ import annotations

import sys
from pathlib import Path

import psutil

from mlx_router_server.workers.memory import process_bytes

__all__ = ["tree_bytes"]


def tree_bytes(pid: int) -> int:
    """Bytes of anonymous memory that a process and all of its children use together."""
    process = psutil.Process(pid)
    pids = [pid, *(child.pid for child in process.children(recursive=True))]
    return sum(map(_proportional_bytes if sys.platform == "linux" else process_bytes, pids))


def _proportional_bytes(pid: int) -> int:
    """Anonymous memory, each page divided by the number of processes that share it."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii").splitlines():
        if line.startswith("Pss_Anon:"):
            return int(line.split()[1]) * 1024
    return 0
