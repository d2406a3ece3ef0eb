"""Kept prefixes take what running requests leave."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from mlx_router_shared.cache_size import CacheSize
from mlx_router_worker.generation.admission import RowAdmission
from mlx_router_worker.generation.memory import MemoryLedger

_WEIGHTS = 1_000_000
_PER_TOKEN = 100


class _Prefixes:
    nbytes = 10_000_000

    def shrink(self, most_bytes: int) -> None:
        self.nbytes = min(self.nbytes, max(most_bytes, 0))


def _row(tokens: int) -> Any:
    return SimpleNamespace(tokens=[1] * tokens, stream=SimpleNamespace(budget=0, tokens=0))


def _admission(prefixes: _Prefixes, requests_bytes: int) -> RowAdmission:
    ledger: Any = MemoryLedger(limit_bytes=0, weights_bytes=_WEIGHTS, cache=CacheSize(per_token=_PER_TOKEN))
    lane: Any = SimpleNamespace(begun=[])
    batches: Any = SimpleNamespace(rows=[], lengths=[])
    kept: Any = prefixes
    admission = RowAdmission(ledger, lane, batches, None, kept, longest_chunk=512)
    admission.set_limit(0, requests_bytes)
    return admission


def test_prefixes_are_dropped_before_a_row_has_to_wait() -> None:
    prefixes = _Prefixes()
    admission = _admission(prefixes, 1_000_000)
    assert admission.fits([_row(2048)])
    assert prefixes.nbytes == 1_000_000 - 2 * 2304 * _PER_TOKEN


def test_a_row_that_does_not_fit_even_without_them_waits() -> None:
    prefixes = _Prefixes()
    assert not _admission(prefixes, 1_000_000).fits([_row(8192)])
    assert prefixes.nbytes == 0


def test_without_a_limit_nothing_is_dropped() -> None:
    prefixes = _Prefixes()
    admission = _admission(prefixes, 0)
    admission.limit_prefixes()
    assert admission.fits([_row(8192)])
    assert prefixes.nbytes == _Prefixes.nbytes
