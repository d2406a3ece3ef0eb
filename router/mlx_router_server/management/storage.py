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
_OF_THE_PROCESS: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.EAGAIN, errno.ENOMEM, None})
_OF_OTHERS: Final = (ConnectionError, TimeoutError, ChildProcessError, ProcessLookupError)


@contextmanager
def storage_faults() -> Generator[None, None, None]:
    """Raise ``InsufficientStorage`` for an ``OSError`` of a disk, around work on the home folder or the cache.

    The path is logged and not sent to the client.
    """
    try:
        yield
    except OSError as error:
        if error.errno in _OF_THE_PROCESS or isinstance(error, _OF_OTHERS):
            raise
        log.error("event=storage_fault path=%r error=%r", error.filename, str(error))
        why = (error.strerror or type(error).__name__).lower()
        hint = "make room on the disk" if error.errno in _FULL else "the server's log names the file"
        raise InsufficientStorage(f"the server cannot write to its storage: {why}; {hint}") from error
