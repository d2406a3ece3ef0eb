"""Admission of rows: whether the caches of a row fit beside those that other rows hold now.

Applies the arithmetic of ``MemoryLedger`` to the rows of one engine. The router sets the limit, and may lower it while
requests run.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import mlx.core as mx

from mlx_router_shared.cache_size import CacheSize
from mlx_router_worker.generation.decode import Batches
from mlx_router_worker.generation.drafts import DraftLane
from mlx_router_worker.generation.memory import MemoryLedger, too_long_for_memory
from mlx_router_worker.generation.prefill import PrefillLane
from mlx_router_worker.generation.prefixes import PrefixCache
from mlx_router_worker.generation.rows import Row

__all__ = ["RowAdmission"]

_HEADROOM_TOKENS: Final = 256
"""Of an answer, for which memory must be free when a row begins."""
_LEAST_ROW_TOKENS: Final = 256
"""A row of this length is accepted whatever the limit says: less memory would make a loaded model useless."""
_UNLIMITED_SPARE_BYTES: Final = 4 * 2**30


class RowAdmission:
    """Reads which rows hold caches; changes none of them, but drops kept prefixes. Used by the compute thread, except
    ``spare_bytes``."""

    def __init__(
        self, ledger: MemoryLedger, lane: PrefillLane, batches: Batches, drafts: DraftLane | None,
        prefixes: PrefixCache, longest_chunk: int,
    ) -> None:  # fmt: skip
        self._ledger = ledger
        self._prefixes = prefixes
        self._longest_chunk = longest_chunk
        self._lane = lane
        self._batches = batches
        self._drafts = drafts
        self._limit = 0

    # -------------------------------------------------------------------- limit

    def set_limit(self, memory_bytes: int, requests_bytes: int) -> None:
        """``memory_bytes``: of the whole worker. ``requests_bytes``: beside the weights; 0 if unknown."""
        self._limit = requests_bytes + self._ledger.weights_bytes if requests_bytes else memory_bytes
        self._apply_limit()

    def _apply_limit(self) -> None:
        ledger = self._ledger
        ledger.limit_bytes = max(self._limit, ledger.needed_bytes([[_LEAST_ROW_TOKENS]])) if self._limit else 0

    def note_size(self, size: CacheSize) -> None:
        """Replace the estimated size of caches by what was measured."""
        self._ledger.cache = size
        self._apply_limit()  # the shortest row that is accepted in any case takes what is known now

    @property
    def bytes_per_token(self) -> int:
        size = self._ledger.cache
        return size.per_token + size.sliding_per_token

    def spare_bytes(self) -> int:
        """Return what the compute thread may still allocate; callable from any thread."""
        return max((self._ledger.limit_bytes or _UNLIMITED_SPARE_BYTES) - mx.get_active_memory(), 0)

    def free_unused(self) -> None:
        """Give MLX's unused buffers back while they and the used ones are above the limit."""
        limit = self._ledger.limit_bytes
        if limit and mx.get_active_memory() + mx.get_cache_memory() > limit:
            mx.clear_cache()

    # --------------------------------------------------------------------- rows

    @property
    def decoding(self) -> list[Row]:
        drafted = self._drafts.row if self._drafts is not None else None
        return [*self._batches.rows, drafted] if drafted is not None else self._batches.rows

    @property
    def holding(self) -> list[Row]:
        """The rows that hold caches."""
        return [*self._lane.begun, *self.decoding]

    def _lengths(self) -> list[list[int]]:
        """Of the rows that hold caches, in tokens, by batch."""
        drafted = self._drafts.row if self._drafts is not None else None
        single = [[len(row.tokens)] for row in [*self._lane.begun, *([drafted] if drafted is not None else [])]]
        return [*self._batches.lengths, *single]

    def check(self, tokens: int) -> None:
        """Raise ``ContextLengthExceeded`` if a conversation of so many tokens does not even fit alone."""
        if not self._ledger.fits([[tokens + 1]]):
            raise too_long_for_memory(tokens, self._ledger.longest_row(tokens))

    def fits(self, rows: Sequence[Row]) -> bool:
        """Return whether there is memory for these rows beside those that hold caches."""
        if not self._ledger.limit_bytes:
            return True
        lengths = self._lengths()
        for row in rows:
            left = row.stream.budget - row.stream.tokens
            lengths.append([len(row.tokens) + min(max(left, 0), _HEADROOM_TOKENS)])
        if len(lengths) == 1:  # alone, a row only needs what it has been accepted for
            lengths = [[len(rows[0].tokens) + 1]]
        return self._fit(lengths)

    def is_exceeded(self) -> bool:
        """Return whether the rows that hold caches do not fit any more."""
        return not self._fit(self._lengths())

    def _fit(self, lengths: list[list[int]]) -> bool:
        """Whether rows of these lengths fit, by batch. Kept prefixes make way for them, and for a long chunk beside
        them."""
        if not self._ledger.limit_bytes:
            return True
        self._prefixes.shrink(self._ledger.limit_bytes - self._ledger.needed_bytes(lengths, self._longest_chunk))
        return self._ledger.fits(lengths)

    def limit_prefixes(self) -> None:
        """Keep no more of the prefixes than there is memory for."""
        self._fit(self._lengths())

    def longest_chunk(self, most: int) -> int:
        """Return the most tokens, up to ``most``, that a chunk may have now."""
        return self._ledger.longest_chunk(self._lengths(), most)
