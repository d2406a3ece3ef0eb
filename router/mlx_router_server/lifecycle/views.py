"""What others may see of the lifecycle: copies of facts. They may inform and must never gate: they are old when read.

Times are those of the clock that was handed to the lifecycle.
"""

from __future__ import annotations

from dataclasses import dataclass

from mlx_router_server.lifecycle.states import State

__all__ = ["LoadForecast", "ModelView", "WaiterView"]


@dataclass(frozen=True, slots=True, kw_only=True)
class WaiterView:
    """Somebody who waits; position 1 is next, counted over all models."""

    ticket: str
    model: str
    position: int
    priority: int
    since: float
    given_up_at: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelView:
    """The facts of one model."""

    name: str
    state: State
    since: float
    worker: str | None
    reserved_bytes: int
    memory_bytes: int
    in_flight: int
    queued: int
    pinned: bool
    expires_at: float | None
    """None while it is not loaded; infinite when it stays for ever."""
    loads: int
    failures: int
    retry_at: float
    reason: str
    """The last human sentence about why it is where it is."""
    waiting_for: tuple[str, ...]
    """The models that have to leave first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadForecast:
    """What loading a model would do now, without doing it."""

    model: str
    state: State
    action: str
    """``serve``, ``join``, ``load``, ``evict``, ``wait`` or ``refuse``."""
    reason: str
    estimate_bytes: int
    budget_bytes: int
    reserved_bytes: int
    evict: tuple[str, ...] = ()
    drain: tuple[str, ...] = ()
    """Of those that would go, the ones that would finish their requests first."""
    wait_for: tuple[str, ...] = ()
    pinned: tuple[str, ...] = ()
    """Pinned models in the way."""
    wait_seconds: float | None = None
    """As far as that can be told; None when it cannot."""
