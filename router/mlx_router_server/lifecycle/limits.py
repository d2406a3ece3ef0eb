"""What the operator allows, as the lifecycle needs to know it."""

from __future__ import annotations

from dataclasses import dataclass

from mlx_router_server.lifecycle.queueing import BusyPolicy

__all__ = ["Limits"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What the operator allows; times in seconds, sizes in bytes; 0 loaded models means as many as fit."""

    budget_bytes: int
    wired_bytes: int = 0
    """What the machine may wire in all (macOS)."""
    max_loaded_models: int = 0
    max_queue: int = 512
    busy_policy: BusyPolicy = BusyPolicy.WAIT
    queue_timeout_seconds: float = 600.0
    busy_wait_seconds: float = 30.0
    """How long ``wait_then_fail`` waits."""
    drain_timeout_seconds: float = 300.0
    cancel_at_drain_limit: bool = False
    """End what still runs at the drain limit; otherwise the old model is kept and the newcomer refused."""
    min_residency_seconds: float = 0.0
    turn_seconds: float = 10.0
    turn_requests: int = 64
    restore_on_failure: bool = False
