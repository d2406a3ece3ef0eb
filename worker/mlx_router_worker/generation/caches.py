"""The caches of a model: the one module that knows mlx-lm's cache classes."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import mlx.core as mx
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
    "Cache", "can_batch", "can_trim", "cache_kinds", "copy_cache", "evaluate", "longest_pass", "measure", "merge",
    "new_cache", "trim_to",
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
