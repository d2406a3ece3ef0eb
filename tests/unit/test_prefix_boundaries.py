"""Positions of snapshots in a prompt."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_router_worker.prefix.boundaries import cut_points, turn_end_tokens

_END = 7


def _turns(*lengths: int) -> list[int]:
    return [token for length in lengths for token in [*([1] * (length - 1)), _END]]


@pytest.mark.parametrize(
    ("tokens", "cuts"),
    [
        ([1] * 20, []),
        (_turns(100), []),
        ([*_turns(100), 1, 1], [100]),
        ([*_turns(100, 50, 60, 70, 80), 1, 1], [100, 280, 360]),
        ([*_turns(10, 50), 1, 1], [60]),
        ([*_turns(100, 50, 5), 1, 1], [100, 155]),
        ([*_turns(100, 5), 1, 1], [100]),
        ([1] * 5000, [2048, 4096]),
        ([*_turns(100, 5000), 1, 1], [100, 2148, 4196, 5100]),
    ],
    ids=[
        "short",
        "whole",
        "one",
        "several",
        "short first turn",
        "short last turn",
        "short only turn",
        "no turns",
        "long turn",
    ],
)
def test_cuts_are_the_first_turn_the_last_two_and_some_between(tokens: list[int], cuts: list[int]) -> None:
    assert cut_points(tokens, frozenset({_END})) == cuts


@given(st.lists(st.sampled_from([1, 1, 1, 1, _END]), max_size=6000))
def test_cuts_are_in_order_apart_and_before_the_end(tokens: list[int]) -> None:
    cuts = cut_points(tokens, frozenset({_END}))
    assert all(after - before >= 32 for before, after in zip([0, *cuts], cuts, strict=False))
    assert all(cut < len(tokens) for cut in cuts)


def test_turn_ends_are_special_tokens_after_the_words_of_the_probe() -> None:
    words = {
        1: "<s>",
        2: " Zanz",
        3: "ibar",
        4: "<end>",
        5: "Quixotic",
        6: "\n",
        7: "Marzipan",
        8: "</s>",
        9: "Bivouac",
    }

    def decode(tokens: list[int]) -> str:
        return "".join(words[token] for token in tokens)

    found = turn_end_tokens([1, 2, 3, 4, 5, 6, 7, 8, 9], decode, frozenset({1, 4, 8}))
    assert found == {4, 8}, "a line break may be anywhere, and nothing follows the last word"
