"""Small files that have to be whole, whatever happens while they are written, and paths as people write them."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

__all__ = ["expanded", "replace_file"]


def expanded(path: str) -> Path:
    """Return the path with the home folder in place of ``~``; as it is where there is no such user."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)


def replace_file(file: Path, data: bytes) -> None:
    """Write beside its place, for this user's eyes only, and move there: a crash leaves the old or the new one. Raises
    ``OSError``."""
    file.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}-")  # mode 0600
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(name, file)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
