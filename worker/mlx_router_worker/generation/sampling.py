"""Samplers and logits processors: what stands between a model's logits and the token that is drawn.

None of them may raise in a step: an exception there corrupts the rows of the other requests.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.sample_utils import apply_min_p, apply_top_k, apply_top_p, greedy_sampler, make_logits_processors

from mlx_router_shared.errors import InvalidRequest
from mlx_router_shared.generation import Sampling
from mlx_router_worker.text.grammar import Mask
from mlx_router_worker.text.guide import Guide, as_mask

__all__ = ["GuideProcessor", "Sampler", "Samplers", "processors_for"]

Sampler = Callable[[mx.array], mx.array]
Processor = Callable[[mx.array, mx.array], mx.array]


class Samplers:
    """One object per set of parameters, because equal objects are called once for the whole batch."""

    def __init__(self, vocabulary: int) -> None:
        self._vocabulary = vocabulary
        self._known: dict[tuple[float, float, int, float], Sampler] = {}

    def get(self, sampling: Sampling) -> Sampler:
        """Return the sampler of normalised parameters (``sampling.normalise``)."""
        temperature = sampling.temperature if sampling.temperature is not None else 1.0
        if temperature == 0:
            return greedy_sampler
        top_k = sampling.top_k or 0
        key = (temperature, sampling.top_p or 1.0, top_k if top_k < self._vocabulary else 0, sampling.min_p or 0.0)
        if sampling.seed is not None:
            return _make_sampler(*key, seed=sampling.seed)
        if key not in self._known:
            if len(self._known) > 64:
                self._known.clear()
            self._known[key] = _make_sampler(*key, seed=None)
        return self._known[key]


def _make_sampler(temperature: float, top_p: float, top_k: int, min_p: float, *, seed: int | None) -> Sampler:
    """Ollama's order of filters. A seeded sampler has a key of its own: MLX's global one belongs to all requests."""
    key = None if seed is None else mx.random.key(seed & 0xFFFFFFFFFFFFFFFF)

    def sample(logprobs: mx.array) -> mx.array:
        nonlocal key
        if top_k:
            logprobs = apply_top_k(logprobs, top_k)
        logprobs = logprobs.astype(mx.float32) / temperature
        if 0 < top_p < 1:
            logprobs = apply_top_p(logprobs, top_p)
        if min_p > 0:
            logprobs = apply_min_p(logprobs, min_p)
        if key is None:
            return mx.random.categorical(logprobs)
        key, draw = mx.random.split(key)
        return mx.random.categorical(logprobs, key=draw)

    return sample


def processors_for(sampling: Sampling, context_tokens: int, is_token: Callable[[int], bool]) -> list[Processor]:
    """Penalties and biases; an empty list costs nothing. Raises ``InvalidRequest`` for an unknown token id."""
    last = 64 if sampling.repeat_last_n is None else sampling.repeat_last_n
    size = context_tokens if last < 0 else last
    if not all(is_token(token) for token in sampling.logit_bias):
        raise InvalidRequest("logit_bias names a token id outside of this model's vocabulary", param="logit_bias")
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
