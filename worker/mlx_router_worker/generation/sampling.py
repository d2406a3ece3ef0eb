"""Samplers and logits processors: what stands between a model's logits and the token that is drawn.

None of them may raise in a step: an exception there corrupts the rows of the other requests.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, Protocol

import mlx.core as mx
import numpy as np
from mlx_lm.sample_utils import make_logits_processors

from mlx_router_shared.errors import InvalidRequest
from mlx_router_shared.generation import Sampling
from mlx_router_worker.text.grammar import Mask
from mlx_router_worker.text.guide import Guide, as_mask

__all__ = [
    "Draw", "Drawable", "GuideProcessor", "Processor", "Sampler", "Samplers", "Scores", "check_bias", "draw",
    "processors_for", "read_scores", "score_tokens", "top_candidates",
]  # fmt: skip

Sampler = Callable[[mx.array], mx.array]
"""From logits of shape [rows, vocabulary], or log probabilities, to tokens of shape [rows]."""
Processor = Callable[[mx.array, mx.array], mx.array]

_BLOCK: Final = 256


# ------------------------------------------------------------------------------------------------- candidates


def top_candidates(logits: mx.array, count: int) -> tuple[mx.array, mx.array]:
    """Return the ``count`` largest of each row, in descending order, and their places: twice [rows, count].

    The largest lie in the blocks with the largest maxima, so only these are sorted: a tenth of the time of a partition
    of a whole vocabulary.
    """
    width = logits.shape[-1]
    count = min(count, width)
    blocks = width // _BLOCK
    if count >= blocks:
        return _sorted_top(logits, count)
    even = blocks * _BLOCK
    tiles = logits[:, :even].reshape(-1, blocks, _BLOCK)
    best = mx.argpartition(-tiles.max(axis=-1), kth=count - 1, axis=-1)[:, :count]
    values = mx.take_along_axis(tiles, best[..., None], axis=1).reshape(logits.shape[0], -1)
    places = (best[..., None] * _BLOCK + mx.arange(_BLOCK)).reshape(logits.shape[0], -1)
    if even < width:
        values = mx.concatenate([values, logits[:, even:]], axis=-1)
        rest = mx.broadcast_to(mx.arange(even, width), (logits.shape[0], width - even))
        places = mx.concatenate([places, rest.astype(places.dtype)], axis=-1)
    values, order = _sorted_top(values, count)
    return values, mx.take_along_axis(places, order, axis=-1)


def _sorted_top(values: mx.array, count: int) -> tuple[mx.array, mx.array]:
    order = mx.argpartition(-values, kth=count - 1, axis=-1)[:, :count] if count < values.shape[-1] else None
    kept = values if order is None else mx.take_along_axis(values, order, axis=-1)
    descending = mx.argsort(-kept, axis=-1)
    kept = mx.take_along_axis(kept, descending, axis=-1)
    return kept, descending if order is None else mx.take_along_axis(order, descending, axis=-1)


# --------------------------------------------------------------------------------------------------- samplers


class Samplers:
    """One object per set of parameters, because equal objects are called once for the whole batch."""

    def __init__(self, vocabulary: int) -> None:
        self._vocabulary = vocabulary
        self._known: dict[tuple[float, float, int, float], Sampler] = {}

    def get(self, sampling: Sampling) -> Sampler:
        """Return the sampler of normalised parameters (``parameters.normalise``)."""
        temperature = sampling.temperature if sampling.temperature is not None else 1.0
        if temperature == 0:
            return _greedy
        top_k = sampling.top_k or 0
        key = (temperature, sampling.top_p or 1.0, top_k if top_k < self._vocabulary else 0, sampling.min_p or 0.0)
        if sampling.seed is not None:
            return _make_sampler(*key, seed=sampling.seed)
        if key not in self._known:
            if len(self._known) > 64:
                self._known.clear()
            self._known[key] = _make_sampler(*key, seed=None)
        return self._known[key]


def _greedy(logits: mx.array) -> mx.array:
    return mx.argmax(logits, axis=-1)


def _make_sampler(temperature: float, top_p: float, top_k: int, min_p: float, *, seed: int | None) -> Sampler:
    """Ollama's order of filters: top-k, temperature, top-p, min-p. Everything after top-k sees its candidates only.

    A seeded sampler has a key of its own: MLX's global one belongs to all requests.
    """
    key = None if seed is None else mx.random.key(seed & 0xFFFFFFFFFFFFFFFF)
    nucleus = 0 < top_p < 1

    def sample(logits: mx.array) -> mx.array:
        nonlocal key
        candidates = None
        if top_k or nucleus:  # top-p reads them from the likeliest on
            logits, candidates = top_candidates(logits, top_k or logits.shape[-1])
        logits = logits.astype(mx.float32) / temperature
        if nucleus:
            probabilities = mx.softmax(logits, axis=-1)
            before = mx.cumsum(probabilities, axis=-1) - probabilities
            before[..., 0] = 0
            logits = mx.where(before < top_p, logits, -mx.inf)
        if min_p > 0:
            least = mx.max(logits, axis=-1, keepdims=True) + math.log(min_p)
            logits = mx.where(logits >= least, logits, -mx.inf)
        draw_key = None
        if key is not None:
            key, draw_key = mx.random.split(key)
        drawn = mx.random.categorical(logits, key=draw_key)
        return drawn if candidates is None else mx.take_along_axis(candidates, drawn[..., None], axis=-1)[..., 0]

    return sample


# ------------------------------------------------------------------------------------------- logits processors


def check_bias(sampling: Sampling, is_token: Callable[[int], bool]) -> None:
    """Raise ``InvalidRequest`` for a bias on an unknown token id."""
    if not all(is_token(token) for token in sampling.logit_bias):
        raise InvalidRequest("logit_bias names a token id outside of this model's vocabulary", param="logit_bias")


def processors_for(sampling: Sampling, context_tokens: int) -> list[Processor]:
    """Penalties and biases; an empty list costs nothing."""
    last = 64 if sampling.repeat_last_n is None else sampling.repeat_last_n
    size = context_tokens if last < 0 else last
    repeat = None if sampling.repeat_penalty in (None, 1.0) else sampling.repeat_penalty
    processors: list[Processor] = make_logits_processors(
        logit_bias=sampling.logit_bias or None,
        repetition_penalty=repeat if size else None,
        repetition_context_size=size,
        presence_penalty=(sampling.presence_penalty or None) if size else None,
        presence_context_size=size,
        frequency_penalty=(sampling.frequency_penalty or None) if size else None,
        frequency_context_size=size,
    )
    return processors


def _favourite(logits: mx.array, mask: Mask) -> int:
    """The most likely of the allowed tokens."""
    width = min(logits.shape[-1], len(mask))
    allowed = mx.where(mx.array(mask[:width]), logits[0, :width], mx.array(-np.inf, logits.dtype))
    return int(mx.argmax(allowed))


class GuideProcessor:
    """Lets a guide see what was drawn and applies what it allows. Reading a token waits for its step, so only rows
    with a guide pay for it. A failure is kept in ``failure`` and the row passes unguided until it is removed."""

    def __init__(self, guide: Guide) -> None:
        self.guide = guide
        self.failure = ""
        self._began = False
        self._taken = 0

    def is_complete_after(self, count: int, token: int) -> bool:
        """Whether the text of the grammar is whole after ``count`` tokens, of which ``token`` is the last and the last
        of the budget; the guide may not have seen it."""
        if self.failure or self.guide.idle:
            return False
        if self._taken < count:
            self._taken = count
            self.guide.take(token)
        return self.guide.complete

    def __call__(self, tokens: Any, logits: mx.array) -> mx.array:
        if self.failure or self.guide.idle:
            return logits
        try:
            if self._began:
                self._taken += 1
                self.guide.take(int(tokens[-1].item()))
            self._began = True  # what came before is the prompt
            mask = as_mask(self.guide.allowed(partial(_favourite, logits)), logits.shape[-1])
            if self.guide.broken:
                raise RuntimeError(self.guide.broken.splitlines()[0][:200])
            if mask is None:
                return logits
            if not mask.any():
                raise RuntimeError("the grammar allows no token")
        except Exception as error:
            self.failure = str(error) or type(error).__name__
            return logits
        return mx.where(mx.array(mask[None]), logits, mx.array(-np.inf, logits.dtype))


# ----------------------------------------------------------------------------------------------------- drawing


class Drawable(Protocol):
    """What is needed of a row to draw its next token."""

    @property
    def sampler(self) -> Sampler: ...

    @property
    def processors(self) -> Sequence[Processor]: ...

    @property
    def top_logprobs(self) -> int | None: ...


@dataclass(frozen=True, slots=True)
class Scores:
    """The log probability of a token, and the likeliest tokens at its place with theirs, the best first."""

    logprob: float
    best: list[tuple[int, float]]


@dataclass(frozen=True, slots=True)
class Draw:
    """The drawn tokens of some rows, [rows], and the scores of those rows that want them; not yet evaluated."""

    tokens: mx.array
    scored: list[int]
    """The places of the rows that want scores."""
    scores: tuple[mx.array, mx.array, mx.array] | None
    """Of the drawn tokens [scored], and of the likeliest: values and ids, [scored, most]."""

    @property
    def arrays(self) -> list[mx.array]:
        return [self.tokens, *(self.scores or ())]

    def keep(self, rows: Sequence[Drawable], kept: Sequence[Drawable]) -> Draw:
        """Return the draw of ``kept``, which are some of its rows."""
        places = [place for place, row in enumerate(rows) if any(row is other for other in kept)]
        scored = [place for place in self.scored if place in places]
        scores = None
        if self.scores is not None and scored:
            chosen = mx.array([self.scored.index(place) for place in scored])
            own, values, ids = self.scores
            scores = own[chosen], values[chosen], ids[chosen]
        return Draw(self.tokens[mx.array(places)], [places.index(place) for place in scored], scores)

    def read(self, rows: Sequence[Drawable]) -> list[tuple[int, Scores | None]]:
        """Wait for the result and return it for each row; one transfer for all of them."""
        tokens: Any = self.tokens.tolist()
        out: list[tuple[int, Scores | None]] = [(token, None) for token in tokens]
        if self.scores is not None:
            for place, scores in zip(self.scored, read_scores(*self.scores), strict=True):
                most = rows[place].top_logprobs or 0
                out[place] = (tokens[place], Scores(scores.logprob, scores.best[:most]))
        return out


def draw(rows: Sequence[Drawable], logits: mx.array, contexts: Sequence[mx.array | None]) -> Draw:
    """Draw the next token of each row from logits of shape [rows, vocabulary].

    ``contexts`` holds the tokens before it for the rows with processors. Rows that share a sampler are drawn together.
    """
    if any(row.processors for row in rows):
        pieces = []
        for place, (row, context) in enumerate(zip(rows, contexts, strict=True)):
            piece = logits[place : place + 1]
            for processor in row.processors:
                piece = processor(context, piece)  # type: ignore[arg-type]  # a row with processors has a context
            pieces.append(piece)
        logits = mx.concatenate(pieces, axis=0)
    by_sampler: dict[int, list[int]] = {}
    for place, row in enumerate(rows):
        by_sampler.setdefault(id(row.sampler), []).append(place)
    if len(by_sampler) == 1:
        tokens = rows[0].sampler(logits)
    else:
        parts = [rows[places[0]].sampler(logits[mx.array(places)]) for places in by_sampler.values()]
        order = np.argsort([place for places in by_sampler.values() for place in places])
        tokens = mx.concatenate([part.astype(mx.uint32) for part in parts])[mx.array(order)]
    scored = [place for place, row in enumerate(rows) if row.top_logprobs is not None]
    scores = None
    if scored:
        most = max(row.top_logprobs or 0 for row in rows)
        all_of_them = len(scored) == len(rows)
        places = mx.array(scored)
        scores = score_tokens(
            logits if all_of_them else logits[places], tokens if all_of_them else tokens[places], most
        )
    return Draw(tokens, scored, scores)


def score_tokens(logits: mx.array, tokens: mx.array, most: int) -> tuple[mx.array, mx.array, mx.array]:
    """Return the log probabilities of ``tokens`` [rows] under ``logits`` [rows, vocabulary], and the values and ids of
    the ``most`` likeliest, [rows, most]; not yet evaluated."""
    logits = logits.astype(mx.float32)
    total = mx.logsumexp(logits, axis=-1, keepdims=True)
    own = mx.take_along_axis(logits, tokens[:, None].astype(mx.int32), axis=-1) - total
    values, ids = top_candidates(logits, max(most, 1))
    return own[:, 0], values - total, ids


def read_scores(own: mx.array, values: mx.array, ids: mx.array) -> list[Scores]:
    columns: tuple[Any, Any, Any] = (own.tolist(), values.tolist(), ids.tolist())
    return [Scores(logprob, list(zip(best, top, strict=True))) for logprob, top, best in zip(*columns, strict=True)]
