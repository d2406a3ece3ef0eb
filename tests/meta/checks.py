"""The checks of the two compatibility lists, and those that this server does not have to pass, with the reason.

``T001`` to ``T190`` are those of Ollama's API, ``O1`` to ``O135`` those of OpenAI's and Anthropic's. A test says what
it covers by ``@pytest.mark.covers("T001", "O3-O7")``; docs/conformance.md is rendered from here.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

from tests.meta.requirements import marked_tests

__all__ = ["ALL_CHECKS", "NOT_HERE", "covered_checks"]


ALL_CHECKS: Final = [*(f"T{n:03}" for n in range(1, 191)), *(f"O{n}" for n in range(1, 136))]
NOT_HERE: Final[dict[str, str]] = {}


def _expand(text: str) -> list[str]:
    match = re.fullmatch(r"([TO])(\d+)-\1(\d+)", text)
    if match is None:
        return [text]
    width = 3 if match[1] == "T" else 1
    return [f"{match[1]}{number:0{width}}" for number in range(int(match[2]), int(match[3]) + 1)]


def covered_checks(root: Path) -> dict[str, list[str]]:
    """The tests that cover each check, ranges taken apart."""
    found: dict[str, list[str]] = {}
    for text, tests in marked_tests(root, "covers").items():
        for check in _expand(text):
            found.setdefault(check, []).extend(tests)
    return {check: sorted(set(tests)) for check, tests in found.items()}
