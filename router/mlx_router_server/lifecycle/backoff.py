"""How long to leave a model alone after it failed."""

from __future__ import annotations

from typing import Final

__all__ = ["FAILURES_BEFORE_GIVING_UP", "pause_after"]

FAILURES_BEFORE_GIVING_UP: Final = 5
_FIRST_SECONDS: Final = 1.0
_LONGEST_SECONDS: Final = 60.0
_GIVEN_UP_SECONDS: Final = 600.0


def pause_after(failures: int, *, served: bool) -> float:
    """Seconds until the next try, after so many failures in a row.

    A worker that had ``served`` and then crashed for the first time is replaced at once: the next request should not
    pay for an accident. From the second on, and for every failed load, the pause doubles.
    """
    if failures >= FAILURES_BEFORE_GIVING_UP:
        return _GIVEN_UP_SECONDS
    if served:
        failures -= 1
    if failures <= 0:
        return 0.0
    return min(_FIRST_SECONDS * 2.0 ** (failures - 1), _LONGEST_SECONDS)
