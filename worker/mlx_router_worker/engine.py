"""The seam between the compute loop and whatever computes.

An engine is owned by the compute thread: it alone calls every method, except ``prepare``, which the preparing thread
calls, ``reading``, which the socket thread may call at any time, and ``warm_up``. MLX requires this: arrays belong to
the thread that made them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from mlx_router_shared.generation import Event, Request, StreamEvents
from mlx_router_shared.protocol import Load, ModelFacts, SetLimits

__all__ = ["Engine", "EngineReading", "Report"]

Report = Callable[[str, float], None]
"""Called with a stage and the fraction of it that is done."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineReading:
    """Figures that may be read from any thread: bytes, and tokens generated since the load."""

    memory_bytes: int = 0
    cache_bytes: int = 0
    peak_bytes: int = 0
    tokens_total: int = 0


class Engine(Protocol):
    """Loads one model and answers requests for it, many at once; a ``CountRequest`` may come without a load."""

    def load(self, load: Load, report: Report) -> ModelFacts:
        """Load the model, blocking. Raises ``MlxRouterError`` with a reason for people when that cannot work."""

    def warm_up(self) -> None:
        """Make the first real token as quick as the others: called once after ``load``, in a thread of its own that is
        left alone when it takes too long. Whatever it raises is logged and forgotten."""

    def set_limits(self, limits: SetLimits) -> None:
        """Another share of the machine from now on; with ``trim``, give back what is kept without being needed."""

    def prepare(self, request: Request) -> Any:
        """Do what a request needs before any computation of the model: render, tokenise, build a grammar.

        Called on the preparing thread while the compute thread may be in any other method but ``load``. The result is
        for ``submit``. Raises ``MlxRouterError``.
        """

    def submit(self, request_id: str, prepared: Any) -> list[Event]:
        """Accept a prepared request and return its first events. Raises ``MlxRouterError``; then nothing is changed."""

    def cancel(self, request_id: str) -> None:
        """Forget a request at once; unknown ids are ignored."""

    @property
    def streams(self) -> int:
        """How many requests are unfinished."""

    def step(self) -> list[StreamEvents]:
        """Advance every unfinished request a little; a request's own failure is an event, never an exception."""

    def rest(self) -> None:
        """Give back what only speeds up the next request: there has been none for some seconds."""

    def reading(self) -> EngineReading:
        """Memory and token figures; callable from any thread."""

    def close(self) -> None:
        """Give everything back; nothing is called afterwards."""
