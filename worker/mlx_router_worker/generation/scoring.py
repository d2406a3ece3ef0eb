"""Log probabilities of a prompt's own tokens, collected while the prompt is processed."""

from __future__ import annotations

from dataclasses import dataclass, field

import mlx.core as mx

from mlx_router_shared.generation import TokenLogprob
from mlx_router_worker.generation.answers import Vocabulary
from mlx_router_worker.generation.sampling import Scores, read_scores, score_tokens

__all__ = ["PromptScore"]


@dataclass(slots=True, kw_only=True)
class PromptScore:
    """One prompt's."""

    tokens: list[int]
    vocabulary: Vocabulary
    top: int
    """How many of the likeliest tokens are reported at each place."""
    entries: list[TokenLogprob] = field(default_factory=list)

    def note(self, position: int, logits: mx.array) -> None:
        """Take the logits of a chunk that begins at ``position``: [tokens, vocabulary]."""
        if position == 0:
            self.entries.append(self.vocabulary.entry(self.tokens[0], None))  # nothing stands before it
        following = self.tokens[position + 1 : position + 1 + logits.shape[0]]
        if not following:
            return
        scored = read_scores(*score_tokens(logits[: len(following)], mx.array(following), self.top))
        for token, scores in zip(following, scored, strict=True):
            self.entries.append(self.vocabulary.logprob(token, Scores(scores.logprob, scores.best[: self.top])))
