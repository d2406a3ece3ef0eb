"""The right to use a model, as a request holds it."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Callable

from mlx_router_server.workers.handle import WorkerHandle
from mlx_router_server.workers.timings import SwapTimings
from mlx_router_shared.generation import Event, ReasoningDelta, Request, TextDelta, ToolCallDone
from mlx_router_shared.protocol import ModelFacts

__all__ = ["Lease"]


class Lease:
    """Valid inside ``async with supervisor.acquire(...)``."""

    def __init__(
        self,
        handle: WorkerHandle,
        timings: SwapTimings,
        granted_at: float,
        waited_seconds: float,
        on_first_token: Callable[[], None],
    ) -> None:
        self._handle = handle
        self._on_first_token = on_first_token
        self._timings = timings
        self._granted_at = granted_at
        self.waited_seconds = waited_seconds

    @property
    def facts(self) -> ModelFacts:
        assert self._handle.facts is not None
        return self._handle.facts

    async def generate(self, request: Request) -> AsyncGenerator[list[Event], None]:
        """The events of a request; closing the generator cancels the request."""
        stream = self._handle.generate(request)
        try:
            async for events in stream:
                if self._timings.first_token_seconds is None:
                    self._note_first_token(events)
                yield events
        finally:
            await stream.aclose()

    def _note_first_token(self, events: list[Event]) -> None:
        if any(isinstance(event, TextDelta | ReasoningDelta | ToolCallDone) for event in events):
            self._timings.first_token_seconds = time.monotonic() - self._granted_at
            self._on_first_token()
