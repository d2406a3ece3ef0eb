"""One grammar followed token by token, and the shortest way out of it.

Thin over llguidance, whose matchers never raise: they enter an error state, which is told as ``broken``.
"""

from __future__ import annotations

from typing import Any, Final

import llguidance.numpy as masks
import numpy as np
from llguidance import LLMatcher, LLTokenizer
from numpy.typing import NDArray

__all__ = ["Follower", "Grammars"]

# What brings a JSON text to its end soonest, best first; anything else only where none of these may stand.
_CLOSERS: Final = ("}", "]", '"', ",", ":", "0")
_QUOTE: Final = b'"'[0]
_BACKSLASH: Final = b"\\"[0]
_LONGEST_WAY_OUT: Final = 512

Mask = NDArray[np.bool_]


class Grammars:
    """Knows one tokenizer; makes followers. Building one takes a second for a large vocabulary, so there is one."""

    def __init__(self, tokenizer_json: str, end_tokens: list[int]) -> None:
        self.tokenizer = LLTokenizer(tokenizer_json, eos_token=end_tokens)
        self.size: int = self.tokenizer.vocab_size
        self.end_tokens = end_tokens
        self.closers = [tokens[0] for text in _CLOSERS if len(tokens := self.tokenizer.tokenize_str(text)) == 1]
        quote = self.tokenizer.tokenize_str('"')
        self.quote = quote[0] if len(quote) == 1 else None

    def follow(self, grammar: str) -> Follower:
        """A follower at the beginning of the grammar."""
        return Follower(self, LLMatcher(self.tokenizer, grammar, log_level=0))


class Follower:
    """Where one answer is in its grammar."""

    def __init__(self, grammars: Grammars, matcher: Any) -> None:
        self._grammars = grammars
        self._matcher = matcher
        self._bits = masks.allocate_token_bitmask(1, grammars.size)
        self._in_string = False
        self._escaped = False

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

    def closing_token(self) -> int | None:
        """The token that brings the text nearest to its end; None when it is complete or broken."""
        if self.complete or self.broken:
            return None
        forced = self._matcher.compute_ff_tokens()
        if forced:
            return int(forced[0])
        mask = self.mask()
        quote = [self._grammars.quote] if self._in_string and self._grammars.quote is not None else []
        for token in quote + self._grammars.end_tokens + self._grammars.closers:
            if token < len(mask) and mask[token]:
                return token
        found = np.flatnonzero(mask)
        return int(found[0]) if len(found) else None

    def way_out(self) -> int:
        """How many tokens it takes from here to the end by closing tokens alone."""
        scout = Follower(self._grammars, self._matcher.deep_copy())
        scout._in_string, scout._escaped = self._in_string, self._escaped
        for count in range(_LONGEST_WAY_OUT):
            token = scout.closing_token()
            if token is None or token in self._grammars.end_tokens:
                return count
            scout.take(token)
        return _LONGEST_WAY_OUT
