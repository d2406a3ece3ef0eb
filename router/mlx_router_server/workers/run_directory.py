"""The private folder of one router run: short, mode 0700, with a lock that dies with the router.

Short, because a socket's path may have 103 bytes on macOS, whose own temporary folder takes half of that. A ZeroMQ
bind replaces whatever file is in its way, so the folder must be ours alone.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from pathlib import Path
from typing import Final

__all__ = ["RunDirectory"]

_PREFIX: Final = "mlxr-"


class RunDirectory:
    """Made by ``create``, removed by ``remove``; folders that a killed router left behind are swept on the way."""

    def __init__(self, path: Path, lock: int) -> None:
        self.path = path
        self._lock = lock

    @classmethod
    def create(cls, parent: Path = Path("/tmp")) -> RunDirectory:
        cls._sweep(parent)
        path = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))  # mode 0700
        lock = os.open(path / "lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return cls(path, lock)

    @property
    def endpoint(self) -> str:
        """Where workers connect to."""
        return f"ipc://{self.path}/s"

    def remove(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)

    @staticmethod
    def _sweep(parent: Path) -> None:
        for left in parent.glob(f"{_PREFIX}*"):
            try:
                if left.is_symlink() or left.stat().st_uid != os.getuid():
                    continue
                lock = os.open(left / "lock", os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
            except OSError:
                continue  # not ours, or being made at this moment
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                continue  # its router lives
            else:
                shutil.rmtree(left, ignore_errors=True)
            finally:
                os.close(lock)
