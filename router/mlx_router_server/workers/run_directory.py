"""The private folder of one router run: short, mode 0700, with a lock that dies with the router.

Each worker is noted in it by its pid, so that the next run can end those that outlive their router: all of them should
leave by themselves, and one that hangs does not.

Short, because a socket's path may have 103 bytes on macOS, whose own temporary folder takes half of that. A ZeroMQ
bind replaces whatever file is in its way, so the folder must be ours alone.
"""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import signal
import stat
import tempfile
from pathlib import Path
from typing import Final

import psutil

__all__ = ["RunDirectory"]

log = logging.getLogger(__name__)

_PREFIX: Final = "mlxr-"
_WORKER: Final = "w-"
_SAME_SECONDS: Final = 0.02
_GONE_SECONDS: Final = 5.0
_TRIES: Final = 10


class RunDirectory:
    """Made by ``create``, removed by ``remove``; folders that a killed router left behind are swept on the way."""

    def __init__(self, path: Path, lock: int) -> None:
        self.path = path
        self._lock = lock

    @classmethod
    def create(cls, parent: Path = Path("/tmp")) -> RunDirectory:
        """Raises ``OSError`` if none can be made."""
        cls._sweep(parent)
        for _ in range(_TRIES):
            path = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))  # mode 0700
            lock = os.open(path / "lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.stat(path / "lock").st_ino == os.fstat(lock).st_ino:
                    return cls(path, lock)
            except (BlockingIOError, FileNotFoundError):
                pass  # a router that started at the same moment took it for a leftover before it was locked
            os.close(lock)
        raise OSError(f"no run directory could be made in {parent}")

    def is_whole(self) -> bool:
        """Whether it is still there: cleaners of temporary files remove what has not been touched for days."""
        try:
            lock, link = os.stat(self.path / "lock"), os.stat(self.path / "s")
        except OSError:
            return False
        return lock.st_ino == os.fstat(self._lock).st_ino and stat.S_ISSOCK(link.st_mode)

    @property
    def endpoint(self) -> str:
        """Where workers connect to."""
        return f"ipc://{self.path}/s"

    def note_worker(self, pid: int) -> None:
        """Written down when it is started, with its start time: pids are used again."""
        try:
            (self.path / f"{_WORKER}{pid}").write_text(repr(psutil.Process(pid).create_time()), encoding="ascii")
        except (OSError, psutil.Error):
            pass  # it is gone already

    def forget_worker(self, pid: int) -> None:
        (self.path / f"{_WORKER}{pid}").unlink(missing_ok=True)

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
                for note in left.glob(f"{_WORKER}*"):
                    _end_leftover(note)
                shutil.rmtree(left, ignore_errors=True)
            finally:
                os.close(lock)


def _end_leftover(note: Path) -> None:
    """A worker of a router that was killed; it lost its pipe and should be gone, so it does not listen any more."""
    try:
        process = psutil.Process(int(note.name.removeprefix(_WORKER)))
        same = abs(process.create_time() - float(note.read_text(encoding="ascii"))) < _SAME_SECONDS
        if same and any(part.partition(".")[0] == "mlx_router_worker" for part in process.cmdline()):
            log.warning("event=leftover_ended pid=%d", process.pid)
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(_GONE_SECONDS)
    except (OSError, ValueError, psutil.Error):
        return  # gone, or not ours
