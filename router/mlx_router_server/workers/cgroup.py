"""Linux control groups: what this process's groups may still take of memory, versions 1 and 2.

A group's limit includes its children's use, and every group above may have a tighter one, so all of them are asked.
Cached file pages count as used but are given up when somebody needs the room, so they are counted as free.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

__all__ = ["CgroupMemory", "read_cgroup_memory"]

_NO_LIMIT: Final = 2**60  # version 1 writes a huge number where there is none


@dataclass(frozen=True, slots=True, kw_only=True)
class CgroupMemory:
    """The tightest limit that holds for this process, in bytes."""

    limit_bytes: int
    available_bytes: int


def read_cgroup_memory(
    proc: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")
) -> CgroupMemory | None:
    """None where no group limits memory, or there are no groups."""
    found = [memory for memory in _limits(proc, root) if memory is not None]
    return min(found, key=lambda memory: memory.available_bytes, default=None)


def _limits(proc: Path, root: Path) -> Iterator[CgroupMemory | None]:
    try:
        lines = proc.read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0" and not controllers:
            yield from _walk(root, path, "memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            yield from _walk(
                root / "memory", path, "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
            )


def _walk(root: Path, path: str, limit: str, used: str, cached: str) -> Iterator[CgroupMemory | None]:
    """From the process's own group up to the root; a container sees its own group as the root."""
    folder = root / path.strip("/")
    while True:
        yield _read(folder, limit, used, cached)
        if folder == root or root not in folder.parents:
            return
        folder = folder.parent


def _read(folder: Path, limit_name: str, used_name: str, cached_name: str) -> CgroupMemory | None:
    try:
        limit_text = (folder / limit_name).read_text(encoding="ascii").strip()
        used = int((folder / used_name).read_text(encoding="ascii"))
        stat = (folder / "memory.stat").read_text(encoding="ascii")
    except (OSError, ValueError):
        return None
    if not limit_text.isdigit() or int(limit_text) >= _NO_LIMIT:
        return None
    cached = next((int(line.split()[1]) for line in stat.splitlines() if line.startswith(cached_name + " ")), 0)
    limit = int(limit_text)
    return CgroupMemory(limit_bytes=limit, available_bytes=max(limit - used + cached, 0))
