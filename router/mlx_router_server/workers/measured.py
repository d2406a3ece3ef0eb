"""What models were measured to take, remembered between runs: the estimate of a load is corrected by it.

A small JSON file in the state folder, read once and written in a thread; without it everything works with estimates.
"""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import Final

import msgspec

from mlx_router_server.files import replace_file

__all__ = ["Measured", "Measurements"]

log = logging.getLogger(__name__)

_MOST_ENTRIES: Final = 2000


class Measured(msgspec.Struct, frozen=True, kw_only=True):
    """One model with one context length, by the digest of its files."""

    loaded_bytes: int
    """What its process held right after the load."""
    peak_bytes: int
    """The most that its process was ever seen to hold."""
    load_seconds: float


class Measurements:
    """Owned by the supervisor; ``note`` changes it, and the file follows."""

    def __init__(self, file: Path | None) -> None:
        self._file = file
        self._entries: dict[str, Measured] = self._read()
        self._writing: asyncio.Task[None] | None = None
        self._changed = False

    def get(self, key: str) -> Measured | None:
        return self._entries.get(key)

    def note(self, key: str, *, loaded_bytes: int, peak_bytes: int, load_seconds: float) -> None:
        """Replaces what was known, but for a peak that was higher."""
        before = self._entries.pop(key, None)
        peak = max(peak_bytes, loaded_bytes, before.peak_bytes if before else 0)
        self._entries[key] = Measured(loaded_bytes=loaded_bytes, peak_bytes=peak, load_seconds=round(load_seconds, 3))
        while len(self._entries) > _MOST_ENTRIES:
            del self._entries[next(iter(self._entries))]
        self._changed = True
        if self._file is not None and (self._writing is None or self._writing.done()):
            self._writing = asyncio.create_task(self._write_all(), name="measurements")

    async def close(self) -> None:
        """Until everything is in the file."""
        if self._writing is not None:
            await self._writing

    def _read(self) -> dict[str, Measured]:
        if self._file is None:
            return {}
        try:
            return msgspec.json.decode(self._file.read_bytes(), type=dict[str, Measured])
        except FileNotFoundError:
            return {}
        except (OSError, msgspec.DecodeError) as error:
            log.warning("event=measurements_unreadable file=%r error=%r", str(self._file), str(error))
            return {}

    async def _write_all(self) -> None:
        while self._changed:
            self._changed = False
            data = msgspec.json.format(msgspec.json.encode(self._entries), indent=1)
            try:
                await asyncio.to_thread(self._write, data)
            except OSError as error:  # remembering is a convenience
                log.warning("event=measurements_not_written error=%r", str(error))

    def _write(self, data: bytes) -> None:
        assert self._file is not None
        replace_file(self._file, data)
