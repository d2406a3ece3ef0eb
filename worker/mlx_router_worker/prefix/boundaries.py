"""Where a prompt is worth a snapshot: the positions to which later prompts are likely to be equal.

Only models whose state cannot be cut need them. Turns are found by the tokens that end them, which are read off the
template's own rendering of a conversation, so that no request is rendered twice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

__all__ = ["cut_points", "turn_end_tokens"]

_LEAST_DISTANCE: Final = 32
"""Tokens between two snapshots, and before the first."""
_MOST_DISTANCE: Final = 2048
_LATEST_TURNS: Final = 2
PROBE: Final = (("system", "Zanzibar"), ("user", "Quixotic"), ("assistant", "Marzipan"), ("user", "Bivouac"))
"""Role and word of each turn that is rendered to find the ends of turns."""


def turn_end_tokens(
    tokens: Sequence[int], decode: Callable[[list[int]], str], special: frozenset[int]
) -> frozenset[int]:
    """Return the special tokens that follow the words of ``PROBE`` in its rendering."""
    ends = set()
    for _, word in PROBE:
        after = next((end for end in range(1, len(tokens) + 1) if word in decode(list(tokens[:end]))), len(tokens))
        if after < len(tokens) and tokens[after] in special:
            ends.add(tokens[after])
    return frozenset(ends)


def cut_points(tokens: Sequence[int], turn_ends: frozenset[int]) -> list[int]:
    """Return the positions after which a snapshot is taken, in order: the end of the first turn, which often is the
    system's with its tools, the ends of the last two, and some between, so that no two are far apart."""
    ends = [place for place, token in enumerate(tokens, 1) if token in turn_ends]
    wanted = sorted({*ends[:1], *ends[-_LATEST_TURNS:]} - {len(tokens)})
    cuts: list[int] = []
    for position in wanted:
        if position - (cuts[-1] if cuts else 0) >= _LEAST_DISTANCE:
            cuts.append(position)
        elif len(cuts) > 1:
            cuts[-1] = position  # the next turn finds the later one; the first is what other conversations find
    between = [
        position
        for start, end in zip([0, *cuts], [*cuts, len(tokens)], strict=True)
        for position in range(start + _MOST_DISTANCE, end - _LEAST_DISTANCE, _MOST_DISTANCE)
    ]
    return sorted([*cuts, *between])
