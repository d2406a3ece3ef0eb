"""What a swap cost, stage by stage, in seconds."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

__all__ = ["EvictionTimings", "SwapTimings"]


@dataclass(frozen=True, slots=True, kw_only=True)
class EvictionTimings:
    """How one model left: drain of its requests, exit of the process, reaping, memory seen to be back."""

    model: str
    cause: str
    """One word of ``lifecycle.states.Cause``."""
    reason: str
    drain_seconds: float
    exit_seconds: float
    reap_seconds: float
    memory_back_seconds: float
    held_bytes: int
    """What the process held before; 0 when it could not be read."""
    returned_bytes: int
    """By how much the machine's used memory fell."""
    verdict: str
    """``returned``, ``stranded`` (not back within the limit) or ``unknown`` (it was gone before it could be read)."""
    rung: str

    def as_dict(self) -> dict[str, Any]:
        """For JSON, rounded to microseconds."""
        values = {name: getattr(self, name) for name in EvictionTimings.__dataclass_fields__}
        return {name: round(value, 6) if isinstance(value, float) else value for name, value in values.items()}


@dataclass(slots=True, kw_only=True)
class SwapTimings:
    """How one model came; the evictions that made its room come first."""

    model: str
    started_at: float
    """Wall clock."""
    waited_seconds: float = 0.0
    """For room: from the first request to the reservation."""
    evictions: list[EvictionTimings] = field(default_factory=list)
    source: str = ""
    """How its worker was obtained: ``fork``, ``standby`` or ``spawn``; empty until there is one."""
    yielded: bool = False
    """It was read more slowly, because others were answering."""
    spawn_seconds: float = 0.0
    import_seconds: float = 0.0
    weights_seconds: float = 0.0
    warm_up_seconds: float = 0.0
    ready_seen_seconds: float = 0.0
    """From the worker's saying that it is ready to the router's knowing it."""
    first_token_seconds: float | None = None
    """From the first grant to the first token; None until there was one."""

    def as_dict(self) -> dict[str, Any]:
        """For JSON, rounded to microseconds."""
        stages = ("waited", "spawn", "import", "weights", "warm_up", "ready_seen", "first_token")
        values = {f"{stage}_seconds": getattr(self, f"{stage}_seconds") for stage in stages}
        return {
            "model": self.model,
            "started_at": self.started_at,
            "standby": self.source in ("fork", "standby"),
            "source": self.source,
            "yielded": self.yielded,
            **{name: None if value is None else round(value, 6) for name, value in values.items()},
            "evictions": [eviction.as_dict() for eviction in self.evictions],
        }
