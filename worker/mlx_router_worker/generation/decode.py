"""Decoding: batches of rows that draw their next tokens together.

Built on mlx-lm's batch caches, but not on its ``BatchGenerator``: that one takes over prompts, stops and sampling as
well, and a row whose first token is known cannot join it without a forward pass of its own. Rows join with a ready
cache and a token to feed. One step of a batch is always under way while the tokens of the step before are read.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, Final

import mlx.core as mx

from mlx_router_worker.generation.caches import Cache, evaluate, merge
from mlx_router_worker.generation.rows import Row
from mlx_router_worker.generation.sampling import Draw, Scores, draw

__all__ = ["Batch", "Batches", "Drawn"]

Drawn = tuple[Row, int, Scores | None]

_STEPS_BETWEEN_EVALUATIONS: Final = 256
_MOST_GROUPS: Final = 3
_SIDE_SHARE: Final = 0.35
"""Of the time, for all groups but the one with the most rows, when they cannot keep step with it."""


class Batch:
    """Rows that share each forward pass. A single row keeps its own cache as it is; that is also how rows whose caches
    cannot be batched are decoded."""

    def __init__(self, model: Any) -> None:
        self.rows: list[Row] = []
        self._model = model
        self._cache: Cache = []
        self._is_merged = False
        self._next: mx.array | None = None
        """The token that each row is fed next: [rows]."""
        self._draw: Draw | None = None
        """Where these tokens are from, until they have been read; its rows are the first ones."""
        self._unread: list[Row] = []
        self._steps = 0

    @property
    def cache(self) -> Cache:
        return self._cache

    @property
    def lengths(self) -> list[int]:
        """Of the rows, in tokens."""
        return [len(row.tokens) + 1 for row in self.rows]

    def join(self, rows: Sequence[Row], cache: Cache | None = None, fed: mx.array | None = None) -> None:
        """Add rows whose last token is not in their cache.

        ``cache``: of all of them, if it is merged already; otherwise each row brings its own. ``fed``: these last
        tokens, [rows], if the rows do not know them yet.
        """
        fed = mx.array([row.tokens[-1] for row in rows], dtype=mx.uint32) if fed is None else fed.astype(mx.uint32)
        if cache is None and len(rows) == 1 and not self.rows:
            self._cache, self._is_merged = rows[0].cache or [], False
        else:
            joining = merge([row.cache or [] for row in rows]) if cache is None else cache
            if not self.rows:
                self._cache = joining
            else:
                if not self._is_merged:
                    self._cache = merge([self._cache])
                for layer, other in zip(self._cache, joining, strict=True):
                    layer.extend(other)
                    mx.eval(layer.state)  # layer by layer, so that old and new buffers of one exist at a time
            self._is_merged = True
        self._next = fed if self._next is None else mx.concatenate([self._next.astype(mx.uint32), fed])
        self.rows.extend(rows)
        for row in rows:
            row.cache = None

    def place(self, row: Row) -> int | None:
        """Return the row's place in ``cache``; None if that is the row's own."""
        return self.rows.index(row) if self._is_merged else None

    def absorb(self, other: Batch) -> list[Drawn]:
        """Take over all rows of another batch. Returns tokens that were under way."""
        drawn = self.flush() + other.flush()
        rows, other.rows = other.rows, []
        self.join(rows, other._cache if other._is_merged else merge([other._cache]), other._next)
        other._cache, other._next = [], None
        return drawn

    def step(self) -> list[Drawn]:
        """Feed each row its token and return those of the step before."""
        if self._draw is None:
            self._launch()
        drawn, unread = self._draw, self._unread
        assert drawn is not None
        self._launch()
        return [(row, *result) for row, result in zip(unread, drawn.read(unread), strict=True)]

    def flush(self) -> list[Drawn]:
        """Return the tokens that are under way without starting another step."""
        drawn, unread, self._draw, self._unread = self._draw, self._unread, None, []
        return [] if drawn is None else [(row, *result) for row, result in zip(unread, drawn.read(unread), strict=True)]

    def wait(self) -> None:
        """Return when no step is under way."""
        if self._next is not None:
            mx.eval(self._next)

    def _launch(self) -> None:
        fed = self._next
        assert fed is not None
        logits = self._model(fed[:, None], cache=self._cache)[:, -1, :]
        for row in self.rows:
            row.position += 1
        contexts = [row.fetch_context(fed[place : place + 1]) for place, row in enumerate(self.rows)]
        self._draw = draw(self.rows, logits, contexts)
        self._unread = list(self.rows)
        self._next = self._draw.tokens
        mx.async_eval(self._draw.arrays, [context for context in contexts if context is not None])
        self._steps += 1
        if self._steps % _STEPS_BETWEEN_EVALUATIONS == 0:
            evaluate(self._cache)

    def remove(self, row: Row) -> None:
        """Drop a row with its cache. Tokens under way must have been read, if they are wanted."""
        place = self.rows.index(row)
        keep = [other for other in range(len(self.rows)) if other != place]
        del self.rows[place]
        if not keep:
            self._cache, self._next, self._draw, self._unread, self._is_merged = [], None, None, [], False
            return
        assert self._next is not None
        kept = mx.array(keep)
        for layer in self._cache:
            layer.filter(kept)
        unread = [other for other in self._unread if other is not row]
        if self._draw is not None:
            self._draw = self._draw.keep(self._unread, unread) if unread else None
        self._unread = unread
        self._next = self._next[kept]


class Batches:
    """All rows that are decoded, in groups of similar length, so that short rows do not pay for a long one's padding.

    A row joins the group in which padding costs the least, if that is less than reading the weights once more; else it
    opens a group. The group with the most rows makes a step in each round. The others keep step with it as long as
    they take no more than their share of the time.
    """

    def __init__(self, model: Any, *, can_batch: bool, weights_bytes: int) -> None:
        self._model = model
        self._can_batch = can_batch
        self._weights_bytes = weights_bytes
        self._groups: list[Batch] = []
        self._credit = 0.0

    @property
    def rows(self) -> list[Row]:
        return [row for group in self._groups for row in group.rows]

    @property
    def lengths(self) -> list[list[int]]:
        """Of the rows in each group, in tokens."""
        return [group.lengths for group in self._groups]

    @property
    def groups(self) -> list[Batch]:
        return self._groups

    def join(self, rows: list[Row], bytes_per_token: int, cache: Cache | None = None) -> None:
        """Add rows, see ``Batch.join``."""
        place = self._place(max(len(row.tokens) for row in rows), bytes_per_token)
        if place is None:
            self._groups.append(Batch(self._model))
            place = -1
        self._groups[place].join(rows, cache)

    def _place(self, length: int, bytes_per_token: int) -> int | None:
        """The group that a row of this length joins; None for one of its own."""
        if not self._can_batch or not self._groups:
            return None
        costs = [_padding(group.lengths, length) * bytes_per_token for group in self._groups]
        place = min(range(len(costs)), key=costs.__getitem__)
        if costs[place] >= self._weights_bytes and len(self._groups) < _MOST_GROUPS:
            return None
        return place

    def step(self) -> list[Drawn]:
        """Return the newly drawn tokens of one round."""
        main, *others = sorted(self._groups, key=lambda group: -len(group.rows))
        started = time.perf_counter()
        drawn = main.step()
        if not others:
            return drawn
        if not self._can_batch:  # rows by themselves: each gets a token
            return drawn + [item for group in others for item in group.step()]
        is_turn_of_others = self._credit >= 0
        if is_turn_of_others:
            main.wait()  # steps are computed one after the other: each group is charged for its own
        self._credit += (time.perf_counter() - started) * _SIDE_SHARE / (1 - _SIDE_SHARE)
        if not is_turn_of_others:
            return drawn
        started = time.perf_counter()
        for group in others:
            drawn += group.step()
            group.wait()
        self._credit = min(self._credit - (time.perf_counter() - started), 0.0)
        return drawn

    def wait(self) -> None:
        for group in self._groups:
            group.wait()

    def group_of(self, row: Row) -> Batch | None:
        return next((group for group in self._groups if row in group.rows), None)

    def remove(self, row: Row, bytes_per_token: int) -> list[Drawn]:
        """Drop a row. Returns tokens of others that were under way, if groups became one."""
        group = self.group_of(row)
        if group is None:
            return []
        group.remove(row)
        self._groups = [group for group in self._groups if group.rows]
        return self._unite(bytes_per_token) if self._can_batch else []

    def _unite(self, bytes_per_token: int) -> list[Drawn]:
        """Make one group of two whose padding has become cheap."""
        for group in self._groups:
            for other in self._groups:
                if group is other or len(group.rows) < len(other.rows):
                    continue
                longest = max(group.lengths + other.lengths)
                padding = sum(longest - length for length in group.lengths + other.lengths) * bytes_per_token
                if 2 * padding < self._weights_bytes:  # well below the bound, so that groups do not come and go
                    drawn = group.absorb(other)
                    self._groups.remove(other)
                    return drawn
        return []


def _padding(lengths: list[int], length: int) -> int:
    """The slots that are wasted in addition when a row of this length joins."""
    longest = max(lengths)
    return longest - length if length <= longest else (length - longest) * len(lengths)
