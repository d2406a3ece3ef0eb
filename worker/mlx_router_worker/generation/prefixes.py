"""Kept prefixes: what rows find of their prompts, and what they leave behind for later ones.

Owned by the compute thread. The states are kept in a ``PrefixTree`` within a limit of bytes, and given up before any
request waits for memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from mlx_router_worker.generation.caches import Cache, CacheLayout, RowState, new_cache
from mlx_router_worker.generation.rows import Row
from mlx_router_worker.prefix.tree import PrefixTree, as_tokens

__all__ = ["PrefixCache", "PrefixFigures"]

_LEAST_HIT: Final = 32
"""Tokens; fewer are processed about as fast as they are copied."""
_MOST_NODES: Final = 20_000
"""Each holds a few buffers, of which Metal allows 499,000."""
_TOKENS_BETWEEN_KEEPS: Final = 512
"""Of a prompt, so that prompts with the same beginning need not wait for its end."""
_LEARNED_BRANCH: Final = 64
"""Tokens between the last usable state and the end of what is in common, from which on a snapshot there is worth it."""


@dataclass(slots=True)
class PrefixFigures:
    """Counted since the model was loaded."""

    prompt_tokens: int = 0
    """Of prompts that have begun."""
    hit_tokens: int = 0
    """Of these, tokens whose state was kept."""
    evicted_bytes: int = 0
    poisoned: int = 0
    """Hits that were dropped because the first logits after them were not finite."""
    last_miss: str = ""
    """Why the last prompt without a hit had none."""


class PrefixCache:
    """``set_limit`` may be called at any time; a limit of 0 keeps nothing."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._layout = CacheLayout(new_cache(model))
        self._tree = PrefixTree(needs_snapshot=self._layout.needs_snapshot)
        self._limit = 0
        self.figures = PrefixFigures()

    @property
    def is_possible(self) -> bool:
        """Whether the states of this model's caches can be kept."""
        return self._layout.is_known

    @property
    def needs_snapshot(self) -> bool:
        return self._layout.needs_snapshot

    @property
    def nbytes(self) -> int:
        return self._tree.nbytes

    @property
    def nodes(self) -> int:
        return self._tree.count

    def set_limit(self, limit_bytes: int) -> None:
        self._limit = limit_bytes if self.is_possible else 0
        self.shrink(self._limit)

    def shrink(self, most_bytes: int) -> None:
        """Drop what was used the longest time ago until no more than this is kept."""
        self.figures.evicted_bytes += self._tree.evict(max(most_bytes, 0), _MOST_NODES)

    def clear(self) -> None:
        self._tree.clear()

    # ------------------------------------------------------------------- lookup

    def look_up(self, row: Row) -> None:
        """Note how many tokens of a prompt that has not begun need not be processed. Cheap while nothing changes."""
        if row.cache is None and row.looked_up != self._tree.version:
            row.looked_up = self._tree.version
            usable = self._tree.match(row.scope, as_tokens(row.tokens[:-1])).usable if row.reuses else 0
            row.usable = usable if usable >= _LEAST_HIT else 0

    def begin(self, row: Row) -> None:
        """Give a row that begins the kept state of its prompt's beginning, if there is one."""
        self.figures.prompt_tokens += len(row.tokens)
        row.looked_up = -1
        row.usable = 0
        if not row.reuses:
            return
        tokens = as_tokens(row.tokens[:-1])
        match = self._tree.match(row.scope, tokens)
        self._tree.touch(row.scope, tokens)
        if self.needs_snapshot and match.common >= match.usable + _LEARNED_BRANCH:
            row.cuts = sorted({*row.cuts, match.common})
        if match.usable < _LEAST_HIT:
            self.figures.last_miss = _miss(match.usable, match.common, len(row.tokens))
            return
        segments = [node.segment for node in match.nodes if node.segment is not None]
        row.cache = self._layout.rebuild(self._model, segments, match.snapshot, match.usable)
        row.position = match.usable
        row.stream.cached_tokens = match.usable
        row.reused = match.nodes[0] if match.nodes else None
        self.figures.hit_tokens += match.usable

    def forget(self, row: Row) -> None:
        """Drop what a row has reused, which was wrong, and keep it from reusing anything else."""
        self.figures.poisoned += 1
        if row.reused is not None:
            self._tree.forget(row.reused.path[0])  # it may have been split since
        row.reused = None
        row.reuses = row.keeps = False
        row.stream.cached_tokens = 0

    # ------------------------------------------------------------------ keeping

    def longest_chunk(self, row: Row, tokens: int) -> int:
        """Return how many of the next tokens of a prompt can be processed before its state is kept."""
        following = [cut for cut in row.cuts if cut > row.position]
        return min(tokens, following[0] - row.position) if following and self._keeps(row) else tokens

    def keep_prompt(self, row: Row) -> None:
        """Keep the state of a row whose prompt is being processed, where that is worth it."""
        if row.cache is None or not self._keeps(row):
            return
        if self.needs_snapshot:
            if row.position in row.cuts:
                self._keep(row, row.cache)
        elif row.position - row.kept >= _TOKENS_BETWEEN_KEEPS or not row.remaining:
            self._keep(row, row.cache)

    def keep_answer(self, row: Row, cache: Cache, place: int | None = None) -> None:
        """Keep the state of a row that ends, in whose cache ``row.position`` tokens are. ``place``: in a batch."""
        if self._keeps(row) and row.kept < row.position <= len(row.tokens):
            self._keep(row, cache, place)

    def _keeps(self, row: Row) -> bool:
        return self._limit > 0 and row.keeps

    def _keep(self, row: Row, cache: Cache, place: int | None = None) -> None:
        """Keep as much of a row's state as the limit allows: what does not fit is the end of a long conversation."""
        row.kept = row.position
        state = RowState(self._layout, cache, place)
        size = state.size
        most = max(self._limit - size.snapshot, 0) // max(size.per_token, 1) if size.per_token else row.position
        if size.snapshot > self._limit or (self.needs_snapshot and most < row.position):
            return
        tokens = as_tokens(row.tokens[: min(row.position, most)])
        common = self._tree.touch(row.scope, tokens)
        self.shrink(self._limit - (len(tokens) - common) * size.per_token - size.snapshot)
        self._tree.insert(row.scope, tokens, state)
        self.shrink(self._limit)


def _miss(usable: int, common: int, tokens: int) -> str:
    if not common:
        return "nothing of the prompt is kept"
    if common > usable:
        return f"no state is kept of the {common} tokens in common"
    return f"only {common} of {tokens} tokens are in common"
