"""Log probabilities of a prompt's own tokens, read in chunks between the steps of the others."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx

from mlx_router_shared.generation import TokenLogprob
from mlx_router_worker.generation.answers import Vocabulary

__all__ = ["PromptScore"]


@dataclass(slots=True, kw_only=True)
class PromptScore:
    """One prompt's; ``cache`` is the model's own, empty."""

    tokens: list[int]
    cache: list[Any]
    top: int
    """How many of the likeliest tokens are told at each place."""
    entries: list[TokenLogprob] = field(default_factory=list)
    _at: int = 0

    def read(self, model: Any, words: Vocabulary, most: int) -> bool:
        """At most so many tokens further; True when all of the prompt has been read."""
        if self._at == 0:
            self.entries.append(words.entry(self.tokens[0], None))  # nothing stands before it
        chunk = self.tokens[self._at : self._at + most]
        logits = model(mx.array([chunk]), cache=self.cache)[0]
        logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        for row, following in enumerate(self.tokens[self._at + 1 : self._at + 1 + len(chunk)]):
            self.entries.append(words.logprob(following, logprobs[row], self.top))
        self._at += len(chunk)
        return self._at >= len(self.tokens)
