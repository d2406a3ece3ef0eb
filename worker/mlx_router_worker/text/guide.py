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

__all__ = ["AllBut", "Allowed", "Favourite", "Guide", "Markers", "as_mask"]

_LONGEST_NUMBER: Final = 4000
"""Characters, and those of one more token: Python reads integers of up to 4,300. A model that goes on will not stop by
itself."""
_LEAST_ANSWER: Final = 16
"""Tokens that thinking reserves beyond the shortest answer, at most 1/``_SPARE_PART`` of the budget."""
_SPARE_PART: Final = 8
_MOST_TRIED: Final = 64
"""Tokens of the longest way out for which a new search is made after each token."""
# One token can open a block and a name in it (`{"`): what has to be closed then, and the token itself.
_MOST_GROWTH: Final = 8


@dataclass(frozen=True, slots=True)
class AllBut:
    """Every token but these."""

    tokens: tuple[int, ...]


Allowed = Mask | list[int] | AllBut | None
"""A mask over the vocabulary, a few tokens, all but a few, or None for all."""

Favourite = Callable[[Mask], int]
"""The token that the model would choose among those of a mask."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Markers:
    """The token sequences by which a family opens and closes its blocks; empty where it has none."""

    think_start: Sequence[int] = ()
    think_end: Sequence[int] = ()
    call_start: Sequence[int] = ()
    call_end: Sequence[int] = ()
    space: Sequence[int] = ()
    """Single tokens of line breaks, which models write behind a think block."""


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
        self._left = self._budget = budget
        self._recent: deque[int] = deque(maxlen=max(len(markers.think_end), len(markers.call_end), 1))
        self._last: int | None = None
        self._way: list[int] | None = None
        """The tokens that remain of the way out, once there is room for little more."""
        self._leave_value = False
        self._may_break = False
        """A line break may come: the model has just thought."""
        self._called = False
        self._reserve: int | None = None
        """Tokens that thinking has to leave for the answer."""
        self._next_check_at = budget
        self.cut = False
        """The model would have written something else, and would not have come to the end of the text in time."""

    @property
    def broken(self) -> str:
        """Why the guide cannot go on; empty as long as it can."""
        return next((f.broken for f in (self._text, self._call) if f is not None and f.broken), "")

    @property
    def complete(self) -> bool:
        """The text of the grammar is whole: nothing but the end of the turn may follow."""
        return self._phase is _Phase.END

    @property
    def idle(self) -> bool:
        """Everything is allowed from here on, whatever is drawn."""
        return self._phase is _Phase.TEXT and self._text is None and self._make_call is None and not self._forced

    def allowed(self, favourite: Favourite | None = None) -> Allowed:
        """What may be drawn next. ``favourite`` is asked near the end of the budget: as long as the text can still come
        to its end in time after it, the model has its way."""
        if self._forced:
            return [self._forced[0]]
        match self._phase:
            case _Phase.THINKING:
                return self._while_thinking()
            case _Phase.END:
                return self._end_tokens
            case _Phase.CALL:
                return self._by(self._call, favourite)
            case _Phase.TEXT:
                return self._by(self._text, favourite)
            case _Phase.START:
                return self._at_start()

    def take(self, token: int) -> None:
        self._left -= 1
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
        if self._may_break:
            opening += self._markers.space
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
        breaks, self._may_break = self._may_break, False
        if breaks and token in markers.space:
            return
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
            self._may_break = True
            self._phase = _Phase.START
        elif self._thinks_too_long():
            self._end_thinking()

    def _thinks_too_long(self) -> bool:
        if self._most_thinking is not None and self._thought >= self._most_thinking:
            return True
        return self._text is not None and self._left <= self._reserved(self._text)

    def _end_thinking(self) -> None:
        self._forced.extend(self._markers.think_end)
        self._may_think = False
        self._phase = _Phase.START

    def _reserved(self, text: Follower) -> int:
        if self._reserve is None:
            # Where no way out is known, thinking leaves the least: nothing is gained by ending it early.
            needed = len(text.way_out(self._left) or ()) + len(self._lead)
            spare = min(max(needed, _LEAST_ANSWER), self._budget // _SPARE_PART)
            self._reserve = len(self._markers.think_end) + needed + spare
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
            self._call = self._way = None
            self._called = True
            # Free text may follow a call, and the next call; a schema binds a final answer, which this is not.
            self._phase = _Phase.TEXT if self._text is None else _Phase.START

    # ------------------------------------------------------------- coming to an end

    def _by(self, follower: Follower | None, favourite: Favourite | None) -> Allowed:
        if follower is None:
            return None
        mask = follower.mask()
        if self._leave_value:
            self._leave_value = False
            self.cut = True
            if (closing := follower.without_numbers(mask)) is not None:
                return closing
            if end := follower.end_of_value():
                self._forced.extend(end[1:])
                return end[:1]
        if self._way is None:
            return mask
        if not self._way:
            self._way = follower.way_out(self._left)
            if not self._way:
                self._way = None
                return mask
        token = favourite(mask) if favourite is not None else self._way[0]
        if token != self._way[0]:
            way = self._way_after(follower, token)
            if way is not None:
                self._way = [token, *way]
            else:
                self.cut = True
        return [self._way[0]]

    def _way_after(self, follower: Follower, token: int) -> list[int] | None:
        """The way out after another token than that of the known way, if there is time for it."""
        assert self._way is not None
        scout = follower.copy()
        scout.take(token)
        if scout.broken:
            return None
        if scout.complete:
            way: list[int] | None = []
        elif len(self._way) > _MOST_TRIED:
            way = self._back_to_way(scout)
        else:
            way = scout.way_out(self._left)
        return way if way is not None and len(way) + self._tail < self._left else None

    def _back_to_way(self, scout: Follower) -> list[int] | None:
        """Finish the value that is being written, then continue with a tail of the known way out; cheap for a long
        one."""
        assert self._way is not None
        for leave in ([], scout.end_of_value()):
            if leave is None:
                continue
            for start in range(_MOST_TRIED):
                way = [*leave, *self._way[start:]]
                if scout.can_end_with(way):
                    return way
        return None

    @property
    def _tail(self) -> int:
        """Tokens that have to follow the text of a grammar: the marker that closes a call."""
        return len(self._markers.call_end) if self._phase is _Phase.CALL else 0

    def _watch(self, follower: Follower) -> None:
        """See to it that the text comes to its end within the budget, and a number to its end at all."""
        if follower.broken:
            return
        if self._way is not None:
            self._way = self._way[1:] if self._way and self._way[0] == self._last else []
        elif follower.number_length > _LONGEST_NUMBER:
            self._leave_value = True
        elif self._left <= self._next_check_at:
            way = follower.way_out(self._left)
            if way is None or len(way) + self._tail > self._left:
                self._next_check_at = self._left // 2  # no way, or no time for it: the model goes on
                return
            needed = len(way) + self._tail
            if self._left <= needed + _MOST_GROWTH:
                self._way = way
            # The way out grows as blocks are opened: look again before it could have outgrown what is left.
            self._next_check_at = self._left - max((self._left - needed) // _MOST_GROWTH, 1)


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
