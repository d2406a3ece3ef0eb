"""Admission of active caches: the arithmetic, against a model that adds up rows one by one."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from mlx_router_shared.cache_size import CacheSize, WorkSize
from mlx_router_worker.generation.memory import MemoryLedger

_groups = st.lists(st.lists(st.integers(1, 5_000), min_size=1, max_size=6), max_size=4)


def _ledger(limit: int) -> MemoryLedger:
    return MemoryLedger(
        limit_bytes=limit, weights_bytes=1_000_000, cache=CacheSize(per_token=100, fixed=5_000),
        work=WorkSize(per_token=10, per_score=1),
    )  # fmt: skip


@given(_groups)
def test_each_row_of_a_batch_costs_as_much_as_its_longest(groups: list[list[int]]) -> None:
    ledger = _ledger(0)
    expected = sum(100 * (-(-max(group) // 256) * 256) + 5_000 for group in groups for _ in group)
    assert ledger.active_bytes(groups) == expected
    longest = max((max(group) for group in groups), default=0)
    work = 32 * 10 + 32 * max(longest, 32)
    assert ledger.needed_bytes(groups) == 1_000_000 + 2 * expected + work


@given(_groups, st.integers(0, 5_000_000), st.integers(1, 5_000))
def test_what_does_not_fit_does_not_fit_with_another_row(groups: list[list[int]], limit: int, row: int) -> None:
    ledger = _ledger(limit)
    if not ledger.fits(groups):
        assert not ledger.fits([*groups, [row]])


@given(st.integers(1_000_000, 8_000_000))
def test_the_longest_row_fits_and_one_that_is_longer_does_not(limit: int) -> None:
    ledger = _ledger(limit)
    longest = ledger.longest_row(20_000)
    assert longest == 0 or ledger.fits([[longest]])
    assert longest == 20_000 or not ledger.fits([[longest + 1]])


@given(_groups, st.integers(1_000_000, 80_000_000))
def test_a_chunk_is_as_long_as_its_work_space_allows(groups: list[list[int]], limit: int) -> None:
    ledger = _ledger(limit)
    chunk = ledger.longest_chunk(groups)
    assert 32 <= chunk <= 2048
    assert chunk == 32 or ledger.fits(groups, chunk)
    assert chunk == 2048 or not ledger.fits(groups, 2 * chunk)


def test_without_a_limit_everything_fits() -> None:
    ledger = _ledger(0)
    assert ledger.fits([[10**9] * 1000])
    assert ledger.longest_chunk([[10**6]]) == 2048
