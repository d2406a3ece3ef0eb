"""Speculative decoding: a smaller model guesses ahead, and the model checks all of its guesses in one step.

It pays for one row at a time: it is used while one row is decoded, and ends when another one joins; the row then goes
on in a batch. mlx-lm's ``speculative_generate_step`` does the same, but gives its caches back only at the end of an
answer. Each token is the one that the model's own sampler draws, so guesses change nothing but the time. Owned by the
engine's thread.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.utils import load_model, load_tokenizer

from mlx_router_shared.errors import LoadFailed
from mlx_router_worker.generation.caches import Cache, cache_kinds, can_trim, evaluate, held_tokens, new_cache, trim_to
from mlx_router_worker.generation.decode import Drawn
from mlx_router_worker.generation.rows import Row
from mlx_router_worker.generation.sampling import read_scores, score_tokens

__all__ = ["DraftLane"]

_MOST_GUESSES: Final = 8
_FIRST_GUESSES: Final = 4  # as Ollama's draft_num_predict
_ROUNDS_BEFORE_MORE: Final = 2
_CHUNK_TOKENS: Final = 512


class DraftLane:
    """Free, or taken by one row."""

    def __init__(self, model: Any, tokenizer: Any, folder: Path) -> None:
        """Load the draft model of that folder. Raises ``LoadFailed`` when the two cannot work together."""
        draft, _ = load_model(folder, lazy=True)
        vocabulary = load_tokenizer(folder, {"trust_remote_code": False}).get_vocab()
        if vocabulary != tokenizer.get_vocab():
            raise LoadFailed("draft_model: its tokens are not those of the model, so that its guesses mean nothing")
        for who, what in (("the model", model), ("draft_model", draft)):
            cache = new_cache(what)
            # Guesses that were wrong are taken back; a cache with a window cannot do that once it is full.
            if len(cache) != len(what.layers) or not can_trim(cache):
                kinds = ", ".join(cache_kinds(cache))
                raise LoadFailed(f"draft_model: {who} keeps a cache from which nothing can be taken back ({kinds})")
        weights = [array for _, array in tree_flatten(draft.parameters())]
        mx.eval(weights)
        self.weights_bytes = sum(array.nbytes for array in weights)
        self.row: Row | None = None
        self._model = model
        self._draft = draft
        self._cache: Cache = []
        self._draft_cache: Cache = []
        self._read = 0
        self._guesses = _FIRST_GUESSES
        self._rounds_right = 0

    def begin(self, row: Row) -> None:
        """Take over a row with its cache, which holds all of its tokens but the last."""
        assert self.row is None
        self.row = row
        self._cache, row.cache = row.cache or [], None
        self._draft_cache, self._read = new_cache(self._draft), 0
        self._guesses, self._rounds_right = _FIRST_GUESSES, 0

    def release(self) -> Row | None:
        """Give the row back with its cache, ready to join a batch; None if the lane is free."""
        row, self.row = self.row, None
        if row is not None:
            row.cache = self._cache
            row.position = min(held_tokens(self._cache), len(row.tokens))
            row.context = None
        self._cache = self._draft_cache = []
        return row

    def step(self) -> list[Drawn]:
        """Process a chunk of the prompt with the draft model, or make one round: return the guesses that were right
        and the token after them."""
        row = self.row
        if row is None:
            return []
        chunk = row.tokens[self._read : min(self._read + _CHUNK_TOKENS, len(row.tokens) - 1)]
        if len(chunk) > 1:
            self._draft(mx.array([chunk]), cache=self._draft_cache)
            evaluate(self._draft_cache)
            self._read += len(chunk)
            return []
        return self._round(row)

    def _round(self, row: Row) -> list[Drawn]:
        known = len(row.tokens)
        most = min(self._guesses, row.stream.budget - row.stream.tokens - 1)
        fed = mx.array(row.tokens[self._read :])
        guesses: list[mx.array] = []
        for _ in range(most):
            fed = row.sampler(self._draft(fed[None], cache=self._draft_cache)[:, -1, :])
            mx.async_eval(fed)
            guesses.append(fed)
        checked = mx.concatenate([mx.array([row.tokens[-1]]), *guesses])
        logits = self._model(checked[None], cache=self._cache)[0]
        tokens = row.sampler(logits)
        scores = None if row.top_logprobs is None else score_tokens(logits, tokens, row.top_logprobs)
        mx.eval(tokens, checked, scores)
        own: Any = tokens.tolist()
        guessed: Any = [guess.item() for guess in guesses]
        right = next((place for place, guess in enumerate(guessed) if guess != own[place]), len(guessed))
        self._adapt(right, len(guessed))
        trim_to(self._cache, known + right)
        if guesses:
            self._read = min(known + right, known + len(guesses) - 1)
            trim_to(self._draft_cache, self._read)
        kept = [None] * (right + 1) if scores is None else read_scores(*scores)
        return [(row, token, score) for token, score in zip(own[: right + 1], kept[: right + 1], strict=True)]

    def _adapt(self, right: int, guesses: int) -> None:
        """Guess further ahead after rounds without a miss, and less far after one with more misses than hits."""
        self._rounds_right = self._rounds_right + 1 if right == guesses else 0
        if self._rounds_right >= _ROUNDS_BEFORE_MORE:
            self._guesses, self._rounds_right = min(2 * self._guesses, _MOST_GUESSES), 0
        elif right < guesses / 2:
            self._guesses = max(self._guesses // 2, 1)
