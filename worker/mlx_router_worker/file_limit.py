"""The limit of open files, which mlx-lm sets while it is imported.

``mlx_lm/utils.py`` asks for 4,096 as the hard limit. The system refuses that where the limit is lower, which would end
the import, and where it is higher, what had been raised would be lowered for good.
"""

from __future__ import annotations

import resource
from collections.abc import Generator
from contextlib import contextmanager

__all__ = ["kept_file_limit"]


@contextmanager
def kept_file_limit() -> Generator[None, None, None]:
    """Around the import of mlx-lm: what it sets raises the soft limit within the hard one, and lowers none."""
    system_call = resource.setrlimit

    def set_limit(kind: int, limits: tuple[int, int]) -> None:
        soft, hard = resource.getrlimit(kind)
        wanted = limits[0]
        if soft != resource.RLIM_INFINITY and wanted > soft:
            system_call(kind, (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard))

    resource.setrlimit = set_limit
    try:
        yield
    finally:
        resource.setrlimit = system_call
