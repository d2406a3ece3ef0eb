"""The prefill lane: prompts are processed on plain caches of one row, in chunks that may end anywhere.

The lane does what it is asked to and decides nothing: which prompt is next, and how much of it, is the scheduler's
answer. Chunks of one row need no padding and no mask array. Short prompts that wait together are processed in one pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import mlx.core as mx

from mlx_router_worker.generation.caches import (
    Cache,
    can_batch,
    copy_cache,
    evaluate,
    longest_pass,
    merge,
    new_cache,
)
from mlx_router_worker.generation.rows import Row
from mlx_router_worker.generation.schedule import SHORT_PROMPT

__all__ = ["PrefillLane"]

_LOGITS_BYTES: Final = 32 * 2**20
"""The most for the logits of a prompt's last chunk, which are computed for each of its tokens."""
_LONGEST_LAST_CHUNK: Final = 256
_MOST_TOGETHER: Final = 8


class PrefillLane:
    """Owns the caches of rows whose prompts are not processed to their end."""

    def __init__(self, model: Any, vocabulary: int) -> None:
        self.rows: list[Row] = []
        self._model = model
        cache = new_cache(model)
        self._can_batch = can_batch(cache)
        self._longest_pass = longest_pass(cache)
        self._last_chunk = max(min(_LOGITS_BYTES // (4 * max(vocabulary, 1)), _LONGEST_LAST_CHUNK), 1)

    @property
    def begun(self) -> list[Row]:
        return [row for row in self.rows if row.cache is not None]

    def process(self, row: Row, tokens: int) -> mx.array | None:
        """Process up to so many tokens of a row. Returns the logits [1, vocabulary] after its last one; None before.

        The last token is processed with a short last chunk, because logits are needed after it alone.
        """
        if row.cache is None:
            row.cache = new_cache(self._model)
        tokens = min(tokens, row.remaining, self._longest_pass or tokens)
        is_last = tokens == row.remaining and tokens <= self._last_chunk
        if tokens == row.remaining and not is_last:
            tokens -= 1
        if row.score is not None:
            tokens = min(tokens, self._last_chunk)
            is_last = tokens == row.remaining
        chunk = row.tokens[row.position : row.position + tokens]
        logits = self._model(mx.array([chunk]), cache=row.cache)
        if row.score is not None:
            row.score.note(row.position, logits[0])
        row.position += tokens
        last = logits[:, -1, :] if is_last else None
        del logits
        evaluate(row.cache)
        if last is not None:
            mx.eval(last)
        return last

    def together(self, first: Row, most_tokens: int) -> list[Row]:
        """Return ``first`` and the short prompts that can be processed in one pass with it."""
        rows = [first]
        if not self._can_batch or not _is_short(first):
            return rows
        for row in self.rows:
            longest = max(other.remaining for other in [*rows, row])
            if row is not first and _is_short(row) and (len(rows) + 1) * longest <= most_tokens:
                rows.append(row)
            if len(rows) == _MOST_TOGETHER:
                break
        return rows

    def process_together(self, rows: Sequence[Row]) -> tuple[mx.array, Cache]:
        """Process short prompts. Returns the logits after them, [rows, vocabulary], and their merged caches.

        The last tokens have a pass of their own: with all others, logits would be computed for each of them.
        """
        lengths = [len(row.tokens) - 1 for row in rows]
        longest = max(lengths)
        padding = [longest - length for length in lengths]
        cache = merge([new_cache(self._model) for _ in rows])
        if any(padding):
            for layer in cache:
                layer.prepare(lengths=lengths, right_padding=padding)
        self._model(
            mx.array([row.tokens[:-1] + [0] * pad for row, pad in zip(rows, padding, strict=True)]), cache=cache
        )
        if any(padding):
            for layer in cache:
                layer.finalize()
        evaluate(cache)
        last: mx.array = self._model(mx.array([row.tokens[-1:] for row in rows]), cache=cache)[:, -1, :]
        evaluate(cache)
        mx.eval(last)
        for row in rows:
            row.position = len(row.tokens)
        return last, cache

    def same_prompt(self, row: Row) -> list[Row]:
        """Return the rows that have not begun and have the very prompt of ``row``, as the choices of one request do."""
        return [
            other
            for other in self.rows
            if other is not row and other.cache is None and other.score is None and other.tokens == row.tokens
        ]

    @staticmethod
    def share(row: Row, others: Sequence[Row]) -> None:
        """Give other rows copies of the cache of a row whose prompt is processed."""
        assert row.cache is not None
        for other in others:
            other.cache = copy_cache(row.cache)
            other.position = row.position


def _is_short(row: Row) -> bool:
    return row.cache is None and not row.usable and row.score is None and 1 < len(row.tokens) <= SHORT_PROMPT
