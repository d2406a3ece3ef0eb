"""How models that fill in the middle want to be asked, told by the tokens in their vocabulary.

The catalogue looks whether a model can do it, the worker writes the prompt; both by this table.
"""

from __future__ import annotations

from collections.abc import Container
from typing import Final, NamedTuple

__all__ = ["InfillFormat", "infill_format"]


class InfillFormat(NamedTuple):
    """The markers of one family; ``suffix_first`` when the text after the hole comes first."""

    prefix: str
    suffix: str
    middle: str
    suffix_first: bool = False

    def prompt(self, before: str, after: str) -> str:
        """The text to be continued."""
        if self.suffix_first:
            return f"{self.suffix}{after}{self.prefix}{before}{self.middle}"
        return f"{self.prefix}{before}{self.suffix}{after}{self.middle}"


_FORMATS: Final = (
    InfillFormat("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),  # Qwen, CodeGemma
    InfillFormat("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),  # StarCoder, Granite
    InfillFormat("<fim-prefix>", "<fim-suffix>", "<fim-middle>"),  # SantaCoder
    InfillFormat("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),  # DeepSeek
    InfillFormat("▁<PRE>", "▁<SUF>", "▁<MID>"),  # Code Llama
    InfillFormat("[PREFIX]", "[SUFFIX]", "", suffix_first=True),  # Codestral
)


def infill_format(vocabulary: Container[str]) -> InfillFormat | None:
    """The first format whose markers are all in the vocabulary."""
    for known in _FORMATS:
        if all(marker in vocabulary for marker in known[:3] if marker):
            return known
    return None
