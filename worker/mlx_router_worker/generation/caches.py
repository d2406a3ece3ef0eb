"""The caches of a model: the one module that knows mlx-lm's cache classes."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.models.cache import (
    ArraysCache,
    BatchKVCache,
    BatchRotatingKVCache,
    CacheList,
    ChunkedKVCache,
    KVCache,
    RotatingKVCache,
    make_prompt_cache,
    trim_prompt_cache,
)

from mlx_router_shared.cache_size import CacheSize

__all__ = [
    "Cache", "CacheLayout", "RowState", "Segment", "Snapshot", "StateSize", "cache_kinds", "can_batch", "can_trim",
    "copy_cache", "evaluate", "held_tokens", "longest_pass", "measure", "merge", "new_cache", "trim_to",
]  # fmt: skip

Cache = list[Any]
"""One object for each layer."""


def new_cache(model: Any) -> Cache:
    """Return the empty caches of one row."""
    return list(make_prompt_cache(model))


def _leaves(cache: Sequence[Any]) -> list[Any]:
    """The caches, with lists of them taken apart."""
    return [leaf for layer in cache for leaf in (_leaves(layer.caches) if isinstance(layer, CacheList) else [layer])]


def cache_kinds(cache: Cache) -> list[str]:
    """Return the names of the classes in it."""
    return sorted({type(leaf).__name__ for leaf in _leaves(cache)})


def can_batch(cache: Cache) -> bool:
    """Return whether rows with such caches can be decoded together."""
    return all(hasattr(leaf, "merge") for leaf in _leaves(cache))


def can_trim(cache: Cache) -> bool:
    """Return whether the last tokens can be taken back at any time. Decided by a table: ``is_trimmable`` is also true
    for classes that lose tokens, and a window cannot be trimmed once it is full."""
    return all(type(leaf) is KVCache for leaf in _leaves(cache))


def trim_to(cache: Cache, tokens: int) -> None:
    """Take back what lies beyond so many tokens; ``can_trim`` must be true."""
    surplus = _leaves(cache)[0].offset - tokens
    if surplus > 0:
        trim_prompt_cache(cache, surplus)


def held_tokens(cache: Cache) -> int:
    """Return the tokens in the caches of one row; ``can_trim`` must be true."""
    return int(_leaves(cache)[0].offset)


def longest_pass(cache: Cache) -> int | None:
    """Return the most tokens that one forward pass may take; None without such a bound.

    Chunked attention keeps the keys of one chunk: a pass over several of them would need keys that are dropped.
    """
    return min((leaf.chunk_size for leaf in _leaves(cache) if isinstance(leaf, ChunkedKVCache)), default=None)


def evaluate(cache: Cache) -> None:
    """Evaluate everything in it, also what no token depends on, so that no graph grows from step to step."""
    mx.eval([layer.state for layer in cache if not layer.empty()])


def copy_cache(cache: Cache) -> Cache:
    """Return an independent copy."""
    copied = copy.deepcopy(cache)
    evaluate(copied)
    return copied


def merge(rows: list[Cache]) -> Cache:
    """Return the caches of a batch with these rows, each of which may be empty."""
    return [layers[0].merge(list(layers)) for layers in zip(*rows, strict=True)]


def measure(cache: Cache, tokens: int, rows: int = 1) -> CacheSize:
    """Return what the caches of one row take, of ``rows`` with up to so many tokens in them."""
    per_token = sliding = window = fixed = 0
    for leaf in _leaves(cache):
        if isinstance(leaf, ArraysCache):
            fixed += leaf.nbytes // rows
        elif isinstance(leaf, RotatingKVCache | BatchRotatingKVCache | ChunkedKVCache):
            sliding += _slot_bytes(leaf)
            window = max(window, leaf.chunk_size if isinstance(leaf, ChunkedKVCache) else leaf.max_size)
        elif isinstance(leaf, KVCache | BatchKVCache):
            per_token += _slot_bytes(leaf)
        else:
            per_token += leaf.nbytes // (rows * max(tokens, 1))
    return CacheSize(per_token=per_token, sliding_per_token=sliding, window=window, fixed=fixed)


def _slot_bytes(leaf: Any) -> int:
    """The bytes of one token in one row."""
    if leaf.keys is None:
        return 0
    rows, _, slots, _ = leaf.keys.shape
    return int(leaf.nbytes) // (rows * slots)


# ------------------------------------------------------------------------- kept states


@dataclass(frozen=True, slots=True)
class Segment:
    """Keys and values of a run of tokens, of all layers with full attention. Layers of equal shape share an array
    [layers, heads, tokens, size]: the number of buffers is limited on Metal."""

    arrays: tuple[mx.array, ...]
    """Keys and values of each group of layers in turn."""

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.arrays)

    def split(self, tokens: int) -> tuple[Segment, Segment]:
        parts = [
            Segment(tuple(mx.contiguous(array[:, :, of]) for array in self.arrays))
            for of in (slice(None, tokens), slice(tokens, None))
        ]
        mx.eval(*(part.arrays for part in parts))
        return parts[0], parts[1]


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The state of all other layers after a token."""

    states: tuple[Any, ...]
    """Of each of these layers, see ``_whole_state``."""

    @property
    def nbytes(self) -> int:
        return sum(value.nbytes for _, value in tree_flatten(list(self.states)) if isinstance(value, mx.array))

    def split(self, tokens: int) -> tuple[Any, Any]:
        raise TypeError("a snapshot belongs to one position")


@dataclass(frozen=True, slots=True)
class StateSize:
    """Bytes of a row's state: of each token, and of a snapshot."""

    per_token: int
    snapshot: int


class CacheLayout:
    """Which layers of a model can be cut at any token, and which are only kept as they are after one."""

    def __init__(self, cache: Cache) -> None:
        """``cache``: the empty caches of one row."""
        kinds = [type(leaf) for leaf in _leaves(cache)]
        self._cut = [place for place, kind in enumerate(kinds) if kind is KVCache]
        self._whole = [place for place, kind in enumerate(kinds) if kind is not KVCache]
        self.is_known = all(_is_kept(leaf) for leaf in _leaves(cache))
        """Whether states of such caches can be kept."""
        self._groups: list[list[int]] = []
        """Of ``_cut``: layers whose keys and values have equal shapes; known once a state was kept."""

    @property
    def needs_snapshot(self) -> bool:
        return bool(self._whole)

    def _grouped(self, leaves: list[Any]) -> list[list[int]]:
        if not self._groups:
            groups: dict[Any, list[int]] = {}
            for place in self._cut:
                if (keys := leaves[place].keys) is not None:
                    values = leaves[place].values
                    shape = (keys.shape[1], keys.shape[3], values.shape[1], values.shape[3], keys.dtype, values.dtype)
                    groups.setdefault(shape, []).append(place)
            self._groups = list(groups.values())
        return self._groups

    def rebuild(self, model: Any, segments: Sequence[Segment], snapshot: Snapshot | None, tokens: int) -> Cache:
        """Return the caches of a row that holds so many tokens: those of the segments, the last perhaps in part."""
        cache = new_cache(model)
        leaves = _leaves(cache)
        surplus = sum(segment.arrays[0].shape[2] for segment in segments) - tokens if self._groups else 0
        for number, group in enumerate(self._groups):
            for layer, place in enumerate(group):
                keys, values = (
                    mx.concatenate([segment.arrays[2 * number + part][layer] for segment in segments], axis=1)
                    for part in (0, 1)
                )
                end = keys.shape[1] - surplus
                leaves[place].keys, leaves[place].values = keys[None, :, :end], values[None, :, :end]
                leaves[place].offset = tokens
        if snapshot is not None:
            for place, state in zip(self._whole, snapshot.states, strict=True):
                _restore(leaves[place], state)
        evaluate(cache)
        return cache


class RowState:
    """The state of one row, as the prefix tree takes it. ``place``: the row's in a batch; None for plain caches."""

    def __init__(self, layout: CacheLayout, cache: Cache, place: int | None = None) -> None:
        self._layout = layout
        self._leaves = _leaves(cache)
        self._place = place
        self._padding = 0
        """Slots before the row's first token."""
        if place is not None and layout._cut:
            self._padding = int(self._leaves[layout._cut[0]].left_padding[place].item())

    @property
    def size(self) -> StateSize:
        """What keeping this row's state takes."""
        cut, whole = ([self._leaves[place] for place in places] for places in (self._layout._cut, self._layout._whole))
        rows = 1
        if self._place is not None:
            leaf = self._leaves[0]
            rows = leaf.batch_size if isinstance(leaf, ArraysCache) else leaf.keys.shape[0]
        return StateSize(
            per_token=sum(_slot_bytes(leaf) for leaf in cut), snapshot=sum(leaf.nbytes for leaf in whole) // rows
        )

    def segment(self, start: int, end: int) -> Segment | None:
        """Return the keys and values of the tokens from ``start`` to ``end``, evaluated and in buffers of their own."""
        arrays = []
        for group in self._layout._grouped(self._leaves):
            for part in ("keys", "values"):
                rows = [self._cut(self._leaves[place], part, start, end) for place in group]
                arrays.append(mx.contiguous(mx.stack(rows)))
        if not arrays:
            return None
        mx.eval(arrays)
        return Segment(tuple(arrays))

    def _cut(self, leaf: Any, part: str, start: int, end: int) -> mx.array:
        """[heads, tokens, size]"""
        array: mx.array = getattr(leaf, part)[self._place or 0, :, self._padding + start : self._padding + end]
        return array

    def snapshot(self) -> Snapshot | None:
        if not self._layout._whole:
            return None
        leaves = [self._leaves[place] for place in self._layout._whole]
        if self._place is not None:
            leaves = [leaf.extract(self._place) for leaf in leaves]
        states = tuple(_whole_state(leaf) for leaf in leaves)
        mx.eval(states)
        return Snapshot(states)


_KEPT_KINDS: Final = (KVCache, RotatingKVCache, ArraysCache, ChunkedKVCache)


def _is_kept(leaf: Any) -> bool:
    """Whether the states of such a cache can be kept. A rotating cache that never drops its first tokens is none."""
    return type(leaf) in _KEPT_KINDS and not getattr(leaf, "keep", 0)


def _whole_state(leaf: Any) -> tuple[Any, ...]:
    """Return what ``_restore`` needs to make an empty cache equal to this one, in buffers of its own."""
    if isinstance(leaf, ArraysCache):
        return tuple(None if slot is None else mx.contiguous(slot) for slot in leaf.cache)
    if leaf.keys is None:
        return ()
    if isinstance(leaf, ChunkedKVCache):
        slots = leaf.offset - leaf.start_position
        keys, values = leaf.keys[..., :slots, :], leaf.values[..., :slots, :]
        return (mx.contiguous(keys), mx.contiguous(values), leaf.offset, leaf.start_position)
    slots = min(leaf.offset, leaf.max_size)
    keys, values = (leaf._temporal_order(array)[..., -slots:, :] for array in (leaf.keys, leaf.values))
    return (mx.contiguous(keys), mx.contiguous(values), leaf.offset)


def _restore(leaf: Any, state: tuple[Any, ...]) -> None:
    # Arrays are assigned to in place by the caches: each row gets array objects of its own.
    state = tuple(mx.contiguous(value) if isinstance(value, mx.array) else value for value in state)
    if isinstance(leaf, ArraysCache):
        leaf.cache = list(state)
    elif state:
        leaf.keys, leaf.values, leaf.offset, *more = state
        if isinstance(leaf, ChunkedKVCache):
            (leaf.start_position,) = more
        else:
            leaf._idx = leaf.keys.shape[2]
