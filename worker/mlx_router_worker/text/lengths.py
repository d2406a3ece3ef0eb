"""How long a text may be before it is tokenised, which takes seconds and a hundred bytes of memory for each character
of megabytes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

__all__ = ["LengthBound"]

_CAUTION: Final = 8
"""For tokenizers that normalise a text to a shorter one, or take a long word for one unknown token."""


class LengthBound:
    """Bounds the texts for a model that reads ``context_tokens`` of them at most."""

    def __init__(self, vocabulary: Iterable[str], context_tokens: int) -> None:
        longest = max(map(len, vocabulary), default=1)
        self._characters = _CAUTION * longest * (context_tokens + 1)

    def exceeds(self, text: str) -> bool:
        """Whether the text has more tokens than the model reads, whatever its words are."""
        return len(text) > self._characters

    def cut(self, text: str) -> str:
        """Return the beginning of the text, of which the model reads a part."""
        return text[: self._characters]
