"""The candidates of sampling and log probabilities, against a sort of everything."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_router_shared.generation import Sampling
from mlx_router_worker.generation.sampling import Samplers, draw, read_scores, score_tokens, top_candidates


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 4), st.integers(1, 20_000), st.integers(1, 64), st.integers(0, 2**31))
def test_the_candidates_are_the_largest_in_descending_order(rows: int, width: int, count: int, seed: int) -> None:
    logits = np.random.default_rng(seed).normal(size=(rows, width)).astype(np.float32)
    values, places = top_candidates(mx.array(logits), count)
    expected = np.sort(logits, axis=-1)[:, ::-1][:, :count]
    assert np.array_equal(np.array(values), expected)
    assert np.array_equal(np.take_along_axis(logits, np.array(places).astype(np.int64), axis=-1), expected)


def test_log_probabilities_are_those_of_a_softmax() -> None:
    logits = np.random.default_rng(1).normal(size=(3, 5_000)).astype(np.float32) * 4
    tokens = [7, 4_999, 0]
    exact = logits.astype(np.float64) - np.log(np.exp(logits.astype(np.float64)).sum(axis=-1, keepdims=True))
    scores = read_scores(*score_tokens(mx.array(logits), mx.array(tokens), 5))
    for row, token, found in zip(exact, tokens, scores, strict=True):
        assert found.logprob == pytest.approx(row[token], abs=1e-4)
        assert [place for place, _ in found.best] == list(np.argsort(-row)[:5])
        assert [value for _, value in found.best] == pytest.approx(sorted(row)[::-1][:5], abs=1e-4)


class _Row:
    processors = ()

    def __init__(self, sampling: Sampling, samplers: Samplers, top: int | None = None) -> None:
        self.sampler = samplers.get(sampling)
        self.top_logprobs = top


def test_filters_leave_the_tokens_that_ollama_leaves() -> None:
    """Of 10,000 draws none is outside of what top-k, then top-p, then min-p leave, and all of that is drawn."""
    logits = mx.log(mx.array([[0.4, 0.3, 0.2, 0.05, 0.05, *[1e-6] * 2_000]]))
    many = mx.broadcast_to(logits, (10_000, logits.shape[-1]))
    samplers = Samplers(logits.shape[-1])
    for sampling, expected in (
        (Sampling(temperature=1.0, top_k=3), {0, 1, 2}),
        (Sampling(temperature=1.0, top_p=0.6), {0, 1}),
        (Sampling(temperature=1.0, top_k=40, top_p=0.9), {0, 1, 2, 3}),
        (Sampling(temperature=1.0, top_k=5, min_p=0.6), {0, 1}),
        (Sampling(temperature=0.0), {0}),
    ):
        mx.random.seed(3)
        drawn = np.array(samplers.get(sampling)(many))
        assert set(drawn.tolist()) - {4} == expected - {4}, sampling


def test_rows_with_different_samplers_get_their_own_tokens_in_their_own_places() -> None:
    samplers = Samplers(4)
    rows = [_Row(Sampling(temperature=0.0), samplers, 2), _Row(Sampling(temperature=1.0, top_k=1), samplers),
            _Row(Sampling(temperature=0.0), samplers, 1)]  # fmt: skip
    logits = mx.array([[9.0, 0, 0, 0], [0, 9.0, 0, 0], [0, 0, 9.0, 1.0]])
    found = draw(rows, logits, [None] * 3).read(rows)
    assert [token for token, _ in found] == [0, 1, 2]
    assert found[1][1] is None
    assert found[0][1] is not None
    assert len(found[0][1].best) == 2
    assert found[2][1] is not None
    assert found[2][1].best[0][0] == 2
    kept = draw(rows, logits, [None] * 3).keep(rows, [rows[1], rows[2]])
    assert [token for token, _ in kept.read(rows[1:])] == [1, 2]
