"""One answer while it is generated: from the tokens drawn to the events that tell it."""

from __future__ import annotations

import time
from collections import deque
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Final

from mlx_lm.generate import TextStateMachine

from mlx_router_shared.generation import (
    ContextTokens,
    Event,
    Failure,
    Finish,
    FinishReason,
    Logprobs,
    TokenLogprob,
    Usage,
)
from mlx_router_worker.generation.sampling import GuideProcessor, Scores
from mlx_router_worker.text.answer import AnswerBuilder
from mlx_router_worker.text.token_bytes import token_bytes

__all__ = ["AnswerStream", "Drawn", "Vocabulary"]

_NO_LOGPROB: Final = -9999.0  # JSON has no infinity


@dataclass(frozen=True, slots=True)
class Drawn:
    """A drawn token; its scores, if the request wants them; ``stop`` or ``length`` if it is the last."""

    token: int
    scores: Scores | None
    finish_reason: str | None


class Vocabulary:
    """Log probabilities with the tokens' text and bytes."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._byte_level = "BPE" in type(tokenizer.detokenizer).__name__

    def logprob(self, token: int, scores: Scores) -> TokenLogprob:
        """Return the scores of a token in words."""
        return self.entry(token, scores.logprob, [self.entry(other, logprob) for other, logprob in scores.best])

    def entry(self, token: int, logprob: float | None, best: list[TokenLogprob] | None = None) -> TokenLogprob:
        data = token_bytes(self._tokenizer.convert_ids_to_tokens(token), byte_level=self._byte_level)
        value = None if logprob is None else max(logprob, _NO_LOGPROB)
        return TokenLogprob(token=data.decode("utf-8", "replace"), data=data, logprob=value, top=best or [])


@dataclass(slots=True, kw_only=True)
class AnswerStream:
    """A request that is being answered."""

    request_id: str
    vocabulary: Vocabulary
    detokenizer: Any
    pieces: Any
    """State of the text state machine; None for a raw prompt, which is all text."""
    answer: AnswerBuilder
    prompt_tokens: int
    full_reason: FinishReason
    """What running out of tokens means: the request's budget or the context."""
    started: float
    budget: int
    """The most tokens that are drawn."""
    guide: GuideProcessor | None = None
    context: list[int] | None = None
    """Token ids of prompt and answer, if they are wanted."""
    cached_tokens: int = 0
    """Of the prompt, whose state was kept."""
    first_token: float = 0.0
    tokens: int = 0
    reasoning_tokens: int = 0
    _logprobs: deque[tuple[int, TokenLogprob]] = field(default_factory=deque)
    """Each with the length of the text before it."""
    _text_length: int = 0

    def advance(self, drawn: Drawn) -> list[Event]:
        """The events of one token; the last of them is ``Finish`` or ``Failure`` when the answer has ended."""
        if not self.first_token:
            self.first_token = time.perf_counter()
        ended = drawn.finish_reason == "stop"
        new = not ended  # the token that ends a turn is not part of its text
        if new:
            self.tokens += 1
            with suppress(IndexError, KeyError, TypeError):  # an id that the tokenizer does not know: no text
                self.detokenizer.add_token(drawn.token)
        if self.context is not None:
            self.context.append(drawn.token)
        pieces = self._cut(drawn.finish_reason is not None)
        if new and pieces[-1][0] == "reasoning":
            self.reasoning_tokens += 1
        elif new and drawn.scores is not None:
            self._logprobs.append((self._text_length, self.vocabulary.logprob(drawn.token, drawn.scores)))
        self._text_length += sum(len(text) for kind, text in pieces if kind == "normal")
        events = self.answer.feed(pieces)
        whole = ended or (drawn.finish_reason is not None and self._is_whole(drawn.token))
        if drawn.finish_reason is not None:
            events += self.answer.finish(cut=not whole)
        events += self._settled_logprobs(drawn.finish_reason is not None)
        if events and isinstance(events[-1], Failure):
            return events
        if self.guide is not None and self.guide.failure:
            return [*events, Failure(code="engine_failed", message=f"the grammar failed: {self.guide.failure}")]
        if self.answer.complete:
            reason = self.answer.finish_reason
        elif drawn.finish_reason is None:
            return events
        elif not whole:
            reason = self.full_reason
        elif self.guide is not None and self.guide.guide.cut:
            reason = FinishReason.LENGTH
        else:
            reason = self.answer.finish_reason
        return [*events, *self._end(reason)]

    def _is_whole(self, token: int) -> bool:
        """Whether the answer's grammar ends with the last token of the budget: then nothing is missing."""
        return self.guide is not None and self.guide.is_complete_after(self.tokens, token)

    def _cut(self, last: bool) -> list[tuple[str, str]]:
        """The new text, cut into reasoning, calls and what is neither."""
        if last:
            self.detokenizer.finalize()
        text = self.detokenizer.last_segment
        if self.pieces is None:
            return [("normal", text)]
        self.pieces, pieces = TextStateMachine.split(self.pieces, text)
        if last:
            self.pieces, rest, kind = TextStateMachine.flush(self.pieces)
            pieces.append((kind, rest))
        return list(pieces)

    def _settled_logprobs(self, last: bool) -> list[Event]:
        """Of the tokens whose text is decided upon; what a stop string cuts off is never told."""
        shown = self._text_length - self.answer.held_characters
        if self.answer.stop_string is not None:
            shown = self._text_length - self.answer.cut_characters
        out = []
        while self._logprobs and (self._logprobs[0][0] < shown or (last and self.answer.stop_string is None)):
            out.append(self._logprobs.popleft()[1])
        return [Logprobs(tokens=out)] if out else []

    def _end(self, reason: FinishReason) -> list[Event]:
        usage = Usage(
            prompt_tokens=self.prompt_tokens,
            cached_tokens=self.cached_tokens,
            completion_tokens=self.tokens,
            reasoning_tokens=self.reasoning_tokens,
            prefill_seconds=self.first_token - self.started,
            decode_seconds=time.perf_counter() - self.first_token,
        )
        context: list[Event] = [ContextTokens(tokens=self.context)] if self.context is not None else []
        return [*context, usage, Finish(reason=reason, stop_string=self.answer.stop_string)]
