"""How many rows fit: admission of active caches by bytes.

Pure arithmetic over lengths. ``weights + 2 x active + work space <= limit``: a batch pays for its longest row in each
of its rows, and old and new buffers exist side by side while rows join, leave or outgrow their buffers. Kept prefixes
take what is left.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from mlx_router_shared.cache_size import CACHE_COPIES, SHORTEST_CHUNK, CacheSize, WorkSize
from mlx_router_shared.errors import ContextLengthExceeded
from mlx_router_worker.generation.schedule import LONGEST_CHUNK

__all__ = ["MemoryLedger", "too_long_for_memory"]

Groups = Iterable[Sequence[int]]
"""The rows of each batch by their lengths in tokens."""


@dataclass(slots=True, kw_only=True)
class MemoryLedger:
    """Bytes. A limit of 0 is no limit."""

    limit_bytes: int
    weights_bytes: int
    cache: CacheSize
    """Of one row; replaced by what is measured."""
    work: WorkSize = field(default_factory=WorkSize)

    def active_bytes(self, groups: Groups) -> int:
        """Return what the caches of these batches take."""
        return sum(len(lengths) * self.cache.bytes_for(max(lengths)) for lengths in groups if lengths)

    def needed_bytes(self, groups: Groups, chunk: int = SHORTEST_CHUNK) -> int:
        """Return the most that the worker holds with these batches while a chunk of so many tokens is processed."""
        groups = [list(lengths) for lengths in groups]
        longest = max((max(lengths) for lengths in groups if lengths), default=0)
        active = CACHE_COPIES * self.active_bytes(groups)
        return self.weights_bytes + active + self.work.bytes_for(chunk, longest)

    def fits(self, groups: Groups, chunk: int = SHORTEST_CHUNK) -> bool:
        return not self.limit_bytes or self.needed_bytes(groups, chunk) <= self.limit_bytes

    def longest_chunk(self, groups: Groups, most: int = LONGEST_CHUNK) -> int:
        """Return the most tokens, up to ``most``, whose work space fits beside these batches; at least the shortest
        chunk, whose work space was part of their admission."""
        groups = [list(lengths) for lengths in groups]
        chunk = LONGEST_CHUNK
        while chunk > SHORTEST_CHUNK and not self.fits(groups, chunk):
            chunk //= 2
        return min(chunk, most)

    def longest_row(self, most: int) -> int:
        """Return the length of the longest row, up to ``most`` tokens, that fits alone."""
        low, high = 0, most
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.fits([[middle]]) else (low, middle - 1)
        return low


def too_long_for_memory(tokens: int, limit: int) -> ContextLengthExceeded:
    """Return the refusal of a conversation of so many tokens, where up to ``limit`` fit."""
    return ContextLengthExceeded(
        f"a conversation of {tokens} tokens does not fit in the memory of this model; up to {limit} tokens do",
        tokens=tokens,
        limit=limit,
    )
