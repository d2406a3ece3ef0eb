"""One grammar followed token by token, and a short way from any point of it to its end.

Thin over llguidance, whose matchers never raise: they enter an error state, which is told as ``broken``.

llguidance knows which tokens may come next, not how far the end is. So the way out is searched for: between values a
JSON text is ended by its closing brackets; inside a value a best-first search over single characters finds the fewest
tokens after which the value may end. Points at the same distance at which the same tokens are allowed count as one.
"""

from __future__ import annotations

import heapq
from itertools import count
from typing import Any, Final

import llguidance.numpy as masks
import numpy as np
from llguidance import LLMatcher, LLTokenizer
from numpy.typing import NDArray

__all__ = ["Follower", "Grammars"]

_QUOTE: Final = b'"'[0]
_BACKSLASH: Final = b"\\"[0]
_BRACKETS: Final = frozenset(b"}]")
_NUMBER_BYTES: Final = frozenset(b"0123456789+-.eE")
_CLOSERS: Final = ("}", "]", ",")
"""What stands after a value, the one that ends most first."""
_SHORT_VALUES: Final = ('""', "null", "true", "false", "[]", "{}", '"')
_USUAL: Final = '"019-.@:TZ,[{'
"""Characters that end most values, tried first."""
_PUNCTUATION: Final = "\":,-.+@/_ ;#!?%&*()<>=~|'{}[]\\"
_MOST_LETTERS: Final = 6
_MOST_MASKS: Final = 800
"""Of one search for the end of a value. A mask takes about 0.1 ms for a vocabulary of 150,000 tokens."""

_LONGEST_WAY_OUT: Final = 4096
_EARLY_STEPS: Final = 24
_OPENERS: Final = ("{", "[", '"', "1")

Mask = NDArray[np.bool_]


class Grammars:
    """Knows one tokenizer; makes followers. Building one takes a second for a large vocabulary, so there is one."""

    def __init__(self, tokenizer_json: str, end_tokens: list[int]) -> None:
        self.tokenizer = LLTokenizer(tokenizer_json, eos_token=end_tokens)
        self.size: int = self.tokenizer.vocab_size
        self.end_tokens = end_tokens
        self.closers = self._single_tokens(*_CLOSERS)
        self.openers = self._single_tokens(*_OPENERS)
        texts = {token: self.tokenizer.decode_bytes([token]) for token in range(self.size)}
        self.number_tokens = np.array([bool(text) and text[0] in _NUMBER_BYTES for text in texts.values()])
        brackets = [token for token, text in texts.items() if len(text) > 1 and set(text) <= _BRACKETS]
        self.longest_closers = sorted(brackets, key=lambda token: -len(texts[token])) + self.closers
        self._string_ends = [token for token, text in texts.items()
                             if len(text) > 1 and text[0] == _QUOTE and set(text[1:]) <= _BRACKETS]  # fmt: skip
        self._quote = self._single_tokens('"')
        spaced = (f" {value}" for value in _SHORT_VALUES)
        self._usual = self._single_tokens(*_SHORT_VALUES, *spaced, *_USUAL)
        self._others = self._single_tokens(*_PUNCTUATION, *"0123456789")
        self._letters = [self._single_tokens(*map(chr, range(ord(first), ord(first) + 26))) for first in "aA"]

    def _single_tokens(self, *texts: str) -> list[int]:
        """The tokens of those texts that are one token."""
        found = (self.tokenizer.tokenize_str(text) for text in texts)
        return list(dict.fromkeys(tokens[0] for tokens in found if len(tokens) == 1))

    def follow(self, grammar: str) -> Follower:
        """A follower at the beginning of the grammar."""
        return Follower(self, LLMatcher(self.tokenizer, grammar, log_level=0))

    def representatives(self, mask: Mask, *, thorough: bool) -> list[int]:
        """A few of the allowed tokens that stand for all: some single characters, or with ``thorough`` all of them but
        letters beyond the first few."""
        if not thorough and mask.sum() > self.size // 2:  # in a string that may hold anything
            tokens = [token for token in (*self._string_ends, *self._quote, *self._letters[0][:1]) if mask[token]]
        else:
            tokens = [token for token in (*self._string_ends, *self._usual) if mask[token]]
            for letters in self._letters:
                allowed = [token for token in letters if mask[token]]
                tokens += allowed if len(allowed) <= _MOST_LETTERS else allowed[: _MOST_LETTERS if thorough else 1]
            if thorough:
                tokens += [token for token in self._others if mask[token]]
        return list(dict.fromkeys(tokens)) or [int(token) for token in np.flatnonzero(mask)[:_MOST_LETTERS]]


class Follower:
    """Where one answer is in its grammar."""

    def __init__(self, grammars: Grammars, matcher: Any) -> None:
        self._grammars = grammars
        self._matcher = matcher
        self._bits = masks.allocate_token_bitmask(1, grammars.size)
        self._in_string = False
        self._escaped = False
        self.number_length = 0
        """Characters of the number that is being written."""

    @property
    def broken(self) -> str:
        """Why it cannot be followed any further; empty as long as it can."""
        return str(self._matcher.get_error()) if self._matcher.is_error() else ""

    @property
    def complete(self) -> bool:
        """Nothing may follow any more."""
        return bool(self._matcher.is_stopped())

    def take(self, token: int) -> None:
        self._matcher.consume_token(token)
        for byte in self._grammars.tokenizer.decode_bytes([token]):
            in_number = not self._in_string and byte in _NUMBER_BYTES
            self.number_length = self.number_length + 1 if in_number else 0
            if self._escaped:
                self._escaped = False
            elif self._in_string and byte == _BACKSLASH:
                self._escaped = True
            elif byte == _QUOTE:
                self._in_string = not self._in_string

    def mask(self) -> Mask:
        """Which tokens may come next; True where one may."""
        masks.fill_next_token_bitmask(self._matcher, self._bits, 0)
        bits = np.unpackbits(self._bits[0].view(np.uint8), bitorder="little")
        return bits[: self._grammars.size].astype(np.bool_)

    def way_out(self, most: int = _LONGEST_WAY_OUT) -> list[int] | None:
        """Few tokens that bring the text to its end from here, the end token left out; None if none were found, or more
        than ``most`` are needed."""
        return _WayOut(self._grammars).search(self, min(most, _LONGEST_WAY_OUT))

    def fails_early(self) -> str:
        """Why the grammar cannot be followed for a few steps, which compiling it does not tell; empty if it can."""
        ahead = self.copy()
        for _ in range(_EARLY_STEPS):
            mask = ahead.mask()
            if ahead.broken or ahead.complete:
                break
            allowed = [token for token in self._grammars.openers if mask[token]] or np.flatnonzero(mask).tolist()
            tokens = ahead.forced() or allowed[:1]
            for token in tokens:
                ahead.take(token)
            if not tokens:
                break
        return ahead.broken

    def end_of_value(self) -> list[int] | None:
        """Few tokens after which the value that is being written may end; None if none were found."""
        return _WayOut(self._grammars).leave_value(self.copy())

    def without_numbers(self, mask: Mask) -> Mask | None:
        """The part of a mask that does not go on with a number; None where the number may not end."""
        closing = mask & ~self._grammars.number_tokens
        return closing if closing.any() else None

    def can_end_with(self, tokens: list[int]) -> bool:
        """Whether these tokens may come next, and the text may end after them."""
        if self._matcher.validate_tokens(tokens) < len(tokens):
            return False
        ahead = self._matcher.deep_copy()
        ahead.consume_tokens(tokens)
        return bool(ahead.is_accepting() or ahead.is_stopped()) and not ahead.is_error()

    def copy(self) -> Follower:
        """Another follower at the same point."""
        other = Follower(self._grammars, self._matcher.deep_copy())
        other._in_string, other._escaped, other.number_length = self._in_string, self._escaped, self.number_length
        return other

    def is_between_values(self, mask: Mask) -> bool:
        """Whether the text may end here, or a closing bracket or comma may come that is no character of a string."""
        grammars = self._grammars
        tokens = grammars.end_tokens if self._in_string else [*grammars.end_tokens, *grammars.closers]
        return any(token < len(mask) and mask[token] for token in tokens)

    def forced(self) -> list[int]:
        """The tokens that have to come next, as far as there is no choice."""
        return [int(token) for token in self._matcher.compute_ff_tokens()]


class _WayOut:
    """One search; each of its parts is bounded in the number of masks that it computes."""

    def __init__(self, grammars: Grammars) -> None:
        self._grammars = grammars

    def search(self, start: Follower, most: int) -> list[int] | None:
        """From ``start`` to the end, value by value."""
        at = start.copy()
        path: list[int] = []
        while not (at.complete or at.broken):
            tokens = at.forced() or self._next(at)
            if tokens is None:
                return None
            if not tokens:
                return path
            for token in tokens:
                at.take(token)
            path += tokens
            if len(path) > most:
                return None
        return None if at.broken else path

    def _next(self, at: Follower) -> list[int] | None:
        """The next tokens on the way; empty where the text may end."""
        mask = at.mask()
        if any(token < len(mask) and mask[token] for token in self._grammars.end_tokens):
            return []
        if at.is_between_values(mask):
            return [next(token for token in self._grammars.longest_closers if mask[token])]
        return self.leave_value(at)

    def leave_value(self, start: Follower) -> list[int] | None:
        """The tokens to the nearest point between values."""
        return self._search_value(start, thorough=False) or self._search_value(start, thorough=True)

    def _search_value(self, start: Follower, *, thorough: bool) -> list[int] | None:
        """Best-first by the number of tokens."""
        order = count()
        frontier: list[tuple[int, int, Follower, list[int]]] = [(0, next(order), start, [])]
        seen: set[tuple[int, bytes]] = set()
        masks_left = _MOST_MASKS
        while frontier and masks_left:
            distance, _, at, path = heapq.heappop(frontier)
            if at.complete:
                return path
            mask = at.mask()
            masks_left -= 1
            if path and at.is_between_values(mask):
                return path
            point = distance, mask.tobytes()
            if point in seen:
                continue
            seen.add(point)
            for token in self._grammars.representatives(mask, thorough=thorough):
                further = at.copy()
                further.take(token)
                tokens = [token]
                if not further.broken:
                    tokens += further.forced()
                for forced in tokens[1:]:
                    further.take(forced)
                if not further.broken:
                    item = (distance + len(tokens), next(order), further, [*path, *tokens])
                    heapq.heappush(frontier, item)
        return None
