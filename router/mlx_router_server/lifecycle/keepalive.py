"""How long an idle model stays: what the request says, within what the operator allows."""

from __future__ import annotations

import math
from dataclasses import dataclass

__all__ = ["KeepAlive"]


@dataclass(frozen=True, slots=True, kw_only=True)
class KeepAlive:
    """The operator's word for one model, in seconds; infinite is for ever."""

    default: float = 300.0
    minimum: float = 0.0
    maximum: float = math.inf
    locked: bool = False
    """Requests may not change it."""

    def effective(self, asked: float | None) -> float:
        """What holds when a request asks for so much; None asks for nothing."""
        if self.locked:
            return self.default
        return min(max(self.default if asked is None else asked, self.minimum), self.maximum)
