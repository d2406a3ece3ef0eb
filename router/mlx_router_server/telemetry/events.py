"""What happened, for those who watch: a bounded ring for readers, and a call for those who count.

Lives in the event loop of the router; nothing here waits, so that telling costs the teller nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from mlx_router_server.telemetry.ring import Ring

__all__ = ["Happening", "Happenings"]

_KEPT: Final = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class Happening:
    """One entry of ``/admin/events``."""

    at: float
    """Wall clock, seconds since 1970."""
    kind: str
    data: dict[str, Any]


class Happenings:
    """``tell`` from anywhere in the loop; ``ring`` has the last of them."""

    def __init__(self) -> None:
        self.ring: Ring[Happening] = Ring(_KEPT)
        self.observers: list[Callable[[Happening], None]] = []
        """Called with each, at once; they must not wait and must not raise."""

    def tell(self, kind: str, **data: Any) -> None:
        happening = Happening(at=time.time(), kind=kind, data=data)
        self.ring.add(happening)
        for observe in self.observers:
            observe(happening)

    def close(self) -> None:
        """Let go of everybody who follows."""
        self.ring.close()
