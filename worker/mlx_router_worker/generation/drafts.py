"""Speculative decoding: a smaller model guesses ahead, and the model checks all of its guesses in one step.

mlx-lm does it for one answer at a time and not in a batch, so this is a lane beside the batch: whoever comes while it
is taken joins the batch, and nobody waits for it. What is drawn is what the model alone would draw. Owned by the
compute loop's thread, like the engine that it belongs to.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.generate import speculative_generate_step
from mlx_lm.models.cache import KVCache, make_prompt_cache
from mlx_lm.utils import load_model, load_tokenizer

from mlx_router_shared.errors import LoadFailed
from mlx_router_worker.generation.answers import Drawn
from mlx_router_worker.generation.sampling import Sampler

__all__ = ["DraftLane"]

_GUESSES: Final = 4  # tokens a round, as Ollama's draft_num_predict


@dataclass(slots=True)
class _Answer:
    """The one that is being written; ``tokens`` is None until the prompt has been read."""

    uid: int
    prompt: list[int]
    budget: int
    sampler: Sampler
    caches: tuple[list[Any], list[Any]]
    read: int = 0
    told: int = 0
    tokens: Iterator[tuple[int, mx.array, bool]] | None = None


class DraftLane:
    """``free`` or taken by one answer, which ``step`` carries on."""

    def __init__(self, model: Any, tokenizer: Any, folder: Path, prefill_tokens: int) -> None:
        """Load the draft model of that folder. Raises ``LoadFailed`` when the two cannot work together."""
        draft, _ = load_model(folder, lazy=True)
        vocabulary = load_tokenizer(folder, {"trust_remote_code": False}).get_vocab()
        if vocabulary != tokenizer.get_vocab():
            raise LoadFailed("draft_model: its tokens are not those of the model, so that its guesses mean nothing")
        for who, what in (("the model", model), ("draft_model", draft)):
            caches = make_prompt_cache(what)
            # Guesses that were wrong have to be taken back; a cache with a window cannot do that once it is full.
            if len(caches) != len(what.layers) or not all(type(cache) is KVCache for cache in caches):
                kinds = ", ".join(sorted({type(cache).__name__ for cache in caches}))
                raise LoadFailed(f"draft_model: {who} keeps a cache from which nothing can be taken back ({kinds})")
        weights = [array for _, array in tree_flatten(draft.parameters())]
        mx.eval(weights)
        self.weights_bytes = sum(array.nbytes for array in weights)
        self._model = model
        self._draft = draft
        self._ends = frozenset(tokenizer.eos_token_ids)
        self._prefill_tokens = prefill_tokens
        self._answer: _Answer | None = None

    @property
    def free(self) -> bool:
        return self._answer is None

    def begin(self, uid: int, prompt: list[int], budget: int, sampler: Sampler) -> None:
        """Take the lane; it has to be free, and the budget at least one token."""
        assert self._answer is None
        caches = (make_prompt_cache(self._model), make_prompt_cache(self._draft))
        self._answer = _Answer(uid, prompt, budget, sampler, caches)

    def cancel(self) -> None:
        """Free it; nothing is told any more."""
        self._answer = None

    def step(self) -> list[tuple[int, Drawn]]:
        """One more chunk of the prompt, or one round: the guesses that were right and the token after them."""
        answer = self._answer
        if answer is None:
            return []
        # The last token of the prompt is left: what follows it is drawn.
        chunk = answer.prompt[answer.read : min(answer.read + self._prefill_tokens, len(answer.prompt) - 1)]
        if chunk:
            for model, cache in zip((self._model, self._draft), answer.caches, strict=True):
                model(mx.array([chunk]), cache=cache)
                mx.eval([layer.state for layer in cache])
            answer.read += len(chunk)
            return []
        if answer.tokens is None:
            answer.tokens = speculative_generate_step(
                mx.array(answer.prompt[answer.read :]),
                self._model,
                self._draft,
                # Of this thread; mlx-lm's own would stay in force between two steps.
                mx.default_stream(mx.default_device()),
                num_draft_tokens=_GUESSES,
                max_tokens=answer.budget,
                sampler=answer.sampler,
                prompt_cache=[layer for cache in answer.caches for layer in cache],
            )
        return self._round(answer, answer.tokens)

    def _round(self, answer: _Answer, tokens: Iterator[tuple[int, mx.array, bool]]) -> list[tuple[int, Drawn]]:
        drawn = []
        for token, logprobs, guessed in tokens:
            answer.told += 1
            end = "stop" if token in self._ends else "length" if answer.told == answer.budget else None
            drawn.append((answer.uid, Drawn(token, logprobs, end)))
            if end is not None:
                self._answer = None
            if end is not None or not guessed:
                break
        return drawn
