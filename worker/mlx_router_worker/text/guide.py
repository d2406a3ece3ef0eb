"""What may be drawn next in one answer: thinking left free, then calls and text by their grammars, then the end.

A guide sees every token that is drawn, in order, and says before each draw which tokens are allowed. It knows tokens
only; the text of an answer is cut up elsewhere. Phases:

    START ──▶ THINKING ──▶ START        an open or a new think block; left alone, ended when it is too long
    START ──▶ LEAD ──▶ TEXT             a forced call: its opening marker, then its grammar
    START ──▶ CALL ──▶ START            a call the model chose to make, by the grammar of strict tools
    START ──▶ TEXT ──▶ END              the answer by its grammar, or free
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from typing import Final

import numpy as np

from mlx_router_worker.text.grammar import Follower, Mask

__all__ = ["AllBut", "Allowed", "Guide", "Markers", "as_mask"]

# A constrained model whose last tokens are the same few over and over will not come to an end by itself.
_CIRCLE: Final = 48
_FEW: Final = 3
_LEAST_ANSWER: Final = 16  # tokens beyond the shortest answer that thinking leaves
# One token can open a block and a name in it (`{"`): what has to be closed then, and the token itself.
_MOST_GROWTH: Final = 8
_LOOK_FOR_WAY_OUT: Final = 256  # tokens left, from where on the way out is measured


@dataclass(frozen=True, slots=True)
class AllBut:
    """Every token but these."""

    tokens: tuple[int, ...]


Allowed = Mask | list[int] | AllBut | None
"""A mask over the vocabulary, a few tokens, all but a few, or None for all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Markers:
    """The token sequences by which a family opens and closes its blocks; empty where it has none."""

    think_start: Sequence[int] = ()
    think_end: Sequence[int] = ()
    call_start: Sequence[int] = ()
    call_end: Sequence[int] = ()


class _Phase(Enum):
    START = auto()
    THINKING = auto()
    TEXT = auto()
    CALL = auto()
    END = auto()


class Guide:
    """Created with the request; ``take`` a token, then ask ``allowed`` for the next."""

    def __init__(
        self,
        *,
        markers: Markers,
        end_tokens: Sequence[int],
        budget: int,
        text: Follower | None = None,
        call: Callable[[], Follower | None] | None = None,
        lead: Sequence[int] = (),
        may_think: bool = False,
        is_thinking: bool = False,
        max_thinking_tokens: int | None = None,
    ) -> None:
        """``text`` is the grammar of the answer, or of the one call that is forced, which then begins with ``lead``.
        ``call`` makes a follower for a call that the model chooses to make, or None where it writes one freely; without
        it the model may make none while there is a grammar. ``budget`` is the most tokens drawn."""
        self._markers = markers
        self._end_tokens = list(end_tokens)
        self._text = text
        self._make_call = call
        self._call: Follower | None = None
        self._lead = list(lead)
        self._may_think = (may_think or is_thinking) and bool(markers.think_end)
        self._phase = _Phase.THINKING if is_thinking and markers.think_end else _Phase.START
        self._forced: deque[int] = deque()
        self._thought = 0
        self._most_thinking = max_thinking_tokens
        self._left = budget
        self._recent: deque[int] = deque(maxlen=max(len(markers.think_end), len(markers.call_end), 1))
        self._lately: deque[int] = deque(maxlen=_CIRCLE)
        self._last: int | None = None
        self._closing = False
        self._called = False
        self._reserve: int | None = None
        """Tokens that thinking has to leave for the answer."""
        self._look_at = _LOOK_FOR_WAY_OUT
        self.cut = False
        """The text was brought to its end, because it would not have come there in time."""

    @property
    def broken(self) -> str:
        """Why the guide cannot go on; empty as long as it can."""
        return next((f.broken for f in (self._text, self._call) if f is not None and f.broken), "")

    @property
    def idle(self) -> bool:
        """Everything is allowed from here on, whatever is drawn."""
        return self._phase is _Phase.TEXT and self._text is None and self._make_call is None and not self._forced

    def allowed(self) -> Allowed:
        if self._forced:
            return [self._forced[0]]
        match self._phase:
            case _Phase.THINKING:
                return self._while_thinking()
            case _Phase.END:
                return self._end_tokens
            case _Phase.CALL:
                return self._by(self._call)
            case _Phase.TEXT:
                return self._by(self._text)
            case _Phase.START:
                return self._at_start()

    def take(self, token: int) -> None:
        self._left -= 1
        self._lately.append(token)
        self._last = token
        self._recent.append(token)
        if self._forced:
            self._forced.popleft()
            return
        match self._phase:
            case _Phase.THINKING:
                self._take_thought()
            case _Phase.CALL:
                self._take_call(token)
            case _Phase.TEXT:
                self._take_text(token)
            case _Phase.START:
                self._take_first(token)
            case _Phase.END:
                pass

    # ------------------------------------------------------------------ phases

    def _while_thinking(self) -> Allowed:
        """Free, but where something has to be answered the turn cannot end here."""
        if self._text is None:
            return None
        call = self._markers.call_start[:1] if self._make_call is None else ()
        return AllBut((*self._end_tokens, *call))

    def _at_start(self) -> Allowed:
        """The beginning of an answer: of its text, or of a block, if the model likes."""
        opening = [self._markers.think_start[0]] if self._may_think and self._markers.think_start else []
        if self._lead:
            return [*opening, self._lead[0]]
        if self._text is None:
            return None
        mask = self._text.mask()
        if self._make_call is not None and self._markers.call_start:
            opening.append(self._markers.call_start[0])
        if self._called:
            opening += self._end_tokens  # a turn may end with its calls
        for token in opening:
            if token < len(mask):
                mask[token] = True
        return mask

    def _take_first(self, token: int) -> None:
        markers = self._markers
        if self._called and token in self._end_tokens:
            self._phase = _Phase.END
        elif self._may_think and markers.think_start and token == markers.think_start[0]:
            self._forced.extend(markers.think_start[1:])
            self._phase = _Phase.THINKING
        elif self._lead and token == self._lead[0]:
            self._forced.extend(self._lead[1:])
            self._phase = _Phase.TEXT
        elif self._make_call is not None and markers.call_start and token == markers.call_start[0]:
            self._begin_call(markers.call_start[1:])
        else:
            self._phase = _Phase.TEXT
            self._take_text(token)

    def _take_thought(self) -> None:
        self._thought += 1
        markers = self._markers
        end = markers.think_end
        if self._make_call is not None and markers.call_start and self._last == markers.call_start[0]:
            self._begin_call(markers.call_start[1:])
        elif list(self._recent)[-len(end) :] == list(end):
            self._may_think = False
            self._phase = _Phase.START
        elif self._most_thinking is not None and self._thought >= self._most_thinking:
            self._end_thinking()
        elif self._text is not None and self._left <= self._reserved(self._text):
            self.cut = True
            self._end_thinking()

    def _end_thinking(self) -> None:
        self._forced.extend(self._markers.think_end)
        self._may_think = False
        self._phase = _Phase.START

    def _reserved(self, text: Follower) -> int:
        if self._reserve is None:
            needed = text.way_out() + len(self._lead)
            self._reserve = len(self._markers.think_end) + needed + max(needed, _LEAST_ANSWER)
        return self._reserve

    def _take_text(self, token: int) -> None:
        if self._text is not None:
            self._text.take(token)
            if self._text.complete:
                self._phase = _Phase.END
            else:
                self._watch(self._text)
        elif self._make_call is not None and self._markers.call_start and token == self._markers.call_start[0]:
            self._begin_call(self._markers.call_start[1:])

    def _begin_call(self, rest: Sequence[int]) -> None:
        assert self._make_call is not None
        self._forced.extend(rest)
        self._call = self._make_call()
        self._phase = _Phase.CALL

    def _take_call(self, token: int) -> None:
        if self._call is None:  # written freely
            over = list(self._recent)[-len(self._markers.call_end) :] == list(self._markers.call_end)
        else:
            self._call.take(token)
            over = self._call.complete
            if over:
                self._forced.extend(self._markers.call_end)
            else:
                self._watch(self._call)
        if over:
            self._call = None
            self._called = True
            # Free text may follow a call, and the next call; a schema binds a final answer, which this is not.
            self._phase = _Phase.TEXT if self._text is None else _Phase.START

    # ------------------------------------------------------------- coming to an end

    def _by(self, follower: Follower | None) -> Allowed:
        if follower is None:
            return None
        if self._closing and (token := follower.closing_token()) is not None:
            return [token]
        return follower.mask()

    def _watch(self, follower: Follower) -> None:
        """A text that would not end in time, or that goes round in circles, is brought to its end."""
        if self._closing or follower.broken:
            return
        if len(self._lately) == _CIRCLE and len(set(self._lately)) <= _FEW:
            self._closing = self.cut = True
        elif self._left <= self._look_at:
            needed = follower.way_out() + len(self._markers.call_end) + 1
            if self._left <= needed + _MOST_GROWTH:
                self._closing = self.cut = True
            # The way out grows as blocks are opened: look again before it could have outgrown what is left.
            self._look_at = self._left - max((self._left - needed) // _MOST_GROWTH, 1)


def as_mask(allowed: Allowed, size: int) -> Mask | None:
    """``allowed`` over a vocabulary of ``size``, which may be larger than the tokenizer's; None for all."""
    if allowed is None:
        return None
    if isinstance(allowed, AllBut):
        mask = np.ones(size, dtype=np.bool_)
        mask[list(allowed.tokens)] = False
        return mask
    mask = np.zeros(size, dtype=np.bool_)
    if isinstance(allowed, list):
        mask[allowed] = True
    else:
        count = min(size, len(allowed))
        mask[:count] = allowed[:count]
    return mask
