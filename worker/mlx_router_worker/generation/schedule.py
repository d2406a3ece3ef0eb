"""When a prompt is processed, and how much of it at once, while other requests are being answered.

A pure function of measured times: the scheduler is told how long chunks and decode steps took and what waits, and says
what is next. It owns no row and reads no clock.

- While nothing decodes, prompts get all of the time, in long chunks.
- While something decodes, a chunk is as long as fits in ``longest_gap_seconds`` together with a decode step, or as long
  as a step where that is more. Each chunk of ``c`` seconds is followed by ``c * (1 - share) / share`` seconds of
  decoding.
- Short prompts that arrive together are processed before any of them decodes further than its first token: decoding
  all of them at once is faster.
- The prompt that needs the least time is next. A prompt that has waited for as long as it needs itself is not
  overtaken any more: the time that it has waited counts as time that it does not need.
- A higher priority is processed first, and gets a larger share when it is above that of the running requests.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from mlx_router_shared.cache_size import SHORTEST_CHUNK

__all__ = ["LONGEST_CHUNK", "SHORT_PROMPT", "Chunk", "PrefillScheduler", "WaitingPrompt"]

LONGEST_CHUNK: Final = 2048
"""Tokens. Longer chunks are hardly more efficient, and need more memory."""
_FIRST_CHUNK: Final = 64
"""Tokens, while something decodes and nothing has been measured."""
SHORT_PROMPT: Final = 128
"""Tokens; prompts up to this length are processed together."""
_LITTLE_LEFT: Final = 512
"""Tokens that are left of a prompt which may begin in any case."""
_MOST_BEGUN: Final = 2
"""Longer prompts that hold memory for their caches at once."""
_BANDS: Final = (2048, 8192, 32768)
"""Positions between which the seconds per token are measured separately: attention takes longer at higher ones."""
_PRIORITY_SHARE: Final = 0.2
_NEWEST_WEIGHT: Final = 0.5
"""Of the newest measurement in an average."""
_TOGETHER_SECONDS: Final = 1.0
"""Since the oldest request that decodes arrived, in which short prompts do not wait for it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WaitingPrompt:
    """A prompt that is not processed to its end. ``key`` is returned as it is."""

    key: Any
    position: int
    """Tokens that are processed, or whose state is kept."""
    remaining: int
    """Tokens that are not."""
    arrived: float
    """Seconds, on the clock of ``PrefillScheduler.next_chunk``."""
    priority: int = 0
    has_begun: bool = False
    """Whether it holds memory."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """Up to ``tokens`` of the prompt ``key`` may be processed now; the budget is not bounded by what remains of it."""

    key: Any
    tokens: int
    owes: bool = False
    """Whether it takes time from requests that decode."""


class PrefillScheduler:
    """Owned by the engine's thread. Times are in seconds."""

    def __init__(
        self, share: float = 0.46, longest_gap_seconds: float = 0.15, longest_chunk: int = LONGEST_CHUNK
    ) -> None:
        """``share``: of the time, for prompts, while something decodes; between 0 and 1. ``longest_chunk``: in tokens,
        while nothing does."""
        self._longest_chunk = longest_chunk
        self._share = share
        self._longest_gap = longest_gap_seconds
        self._token_seconds: list[float | None] = [None] * (len(_BANDS) + 1)
        self._step_seconds = 0.0
        self._owed = 0.0
        """Seconds of decoding that running requests are owed."""

    def note_chunk(
        self, position: int, tokens: int, seconds: float, *, owes: bool, priority: int = 0, running_priority: int = 0
    ) -> None:
        """A chunk that began at ``position`` took so long. ``owes``: as the chunk said."""
        band = _band(position)
        self._token_seconds[band] = _average(self._token_seconds[band], seconds / tokens)
        if owes:
            share = self._share_of(priority, running_priority)
            self._owed = seconds * (1 - share) / share

    def note_decode(self, seconds: float) -> None:
        """A decode step of all running requests took so long."""
        self._step_seconds = _average(self._step_seconds or None, seconds)
        self._owed -= seconds

    def in_order(self, now: float, prompts: Sequence[WaitingPrompt]) -> list[WaitingPrompt]:
        """Return the prompts in the order in which they are processed."""

        def rank(prompt: WaitingPrompt) -> tuple[int, float, float]:
            needed = self._seconds_for(prompt.position, prompt.remaining)
            return (-prompt.priority, needed - (now - prompt.arrived), prompt.arrived)

        return sorted(prompts, key=rank)

    def may_begin(self, prompt: WaitingPrompt, prompts: Sequence[WaitingPrompt]) -> bool:
        """Return whether the prompt may begin beside those that have begun."""
        begun = sum(other.has_begun and other.remaining > _LITTLE_LEFT for other in prompts)
        return prompt.has_begun or prompt.remaining <= _LITTLE_LEFT or begun < _MOST_BEGUN

    def next_chunk(self, now: float, prompts: Sequence[WaitingPrompt], *, decoding_since: float | None) -> Chunk | None:
        """Return the chunk to process now; None if it is the turn of the requests that decode.

        ``prompts`` are those that may be processed now. ``decoding_since``: when the oldest request that decodes
        arrived; None if nothing decodes.
        """
        if not prompts:
            return None
        allowed = [prompt for prompt in self.in_order(now, prompts) if self.may_begin(prompt, prompts)]
        prompt = allowed[0]  # one that has begun may always go on
        if decoding_since is None:
            self._owed = 0.0
            return Chunk(prompt.key, self._longest_chunk)
        if now - decoding_since < _TOGETHER_SECONDS and prompt.position + prompt.remaining <= SHORT_PROMPT:
            return Chunk(prompt.key, self._longest_chunk)
        if self._owed > 0:
            return None
        return Chunk(prompt.key, self._tokens_within_gap(prompt.position), owes=True)

    def _tokens_within_gap(self, position: int) -> int:
        each = self._seconds_per_token(position)
        if each is None:
            return _FIRST_CHUNK
        seconds = max(self._longest_gap - self._step_seconds, self._step_seconds)
        tokens = int(seconds / each) // SHORTEST_CHUNK * SHORTEST_CHUNK
        return min(max(tokens, SHORTEST_CHUNK), self._longest_chunk)

    def _share_of(self, priority: int, running_priority: int) -> float:
        raised = (priority > running_priority) - (priority < running_priority)
        return min(max(self._share + raised * _PRIORITY_SHARE, 0.05), 0.95)

    def _seconds_per_token(self, position: int) -> float | None:
        """As measured at about this position; None before anything was measured."""
        band = _band(position)
        known = sorted(
            (abs(other - band), -other) for other, value in enumerate(self._token_seconds) if value is not None
        )
        return self._token_seconds[-known[0][1]] if known else None

    def _seconds_for(self, position: int, tokens: int) -> float:
        """The time that so many tokens from ``position`` on take; in tokens before anything was measured."""
        total, end = 0.0, position + tokens
        while position < end:
            band = _band(position)
            upto = min(_BANDS[band] if band < len(_BANDS) else end, end)
            each = self._seconds_per_token(position)
            total += (upto - position) * (1.0 if each is None else each)
            position = upto
        return total


def _band(position: int) -> int:
    return sum(position >= border for border in _BANDS)


def _average(before: float | None, newest: float) -> float:
    return newest if before is None else before + _NEWEST_WEIGHT * (newest - before)
