"""Faults of the disk, as errors that say what to do."""

from __future__ import annotations

import errno
import logging
from collections.abc import Generator
from contextlib import contextmanager
from typing import Final

from mlx_router_shared.errors import InsufficientStorage

__all__ = ["storage_faults"]

log = logging.getLogger(__name__)

_FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT})


@contextmanager
def storage_faults() -> Generator[None, None, None]:
    """Around work on the home folder or the cache: raises ``InsufficientStorage`` for an ``OSError``. The log has the
    path, which is no client's business."""
    try:
        yield
    except OSError as error:
        log.error("event=storage_fault path=%r error=%r", error.filename, str(error))
        why = (error.strerror or type(error).__name__).lower()
        hint = "make room on the disk" if error.errno in _FULL else "its log names the file"
        raise InsufficientStorage(f"the server cannot keep this: {why}; {hint}") from error
