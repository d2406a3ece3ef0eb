"""What one answer cost, from the events that pass by, and ``GET /metrics``."""

from __future__ import annotations

import time
from dataclasses import dataclass

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from mlx_router_server.api.server import Server, server_of
from mlx_router_server.telemetry.metrics import ModelFigures, RouterFigures
from mlx_router_server.version import __version__
from mlx_router_shared.generation import (
    Event,
    Finish,
    ReasoningDelta,
    Started,
    TextDelta,
    ToolCallArguments,
    ToolCallDone,
    Usage,
)

__all__ = ["AnswerFigures", "routes"]

_PIECES = (TextDelta, ReasoningDelta, ToolCallArguments)
_TOKENS = (TextDelta, ReasoningDelta, ToolCallArguments, ToolCallDone)


@dataclass(slots=True)
class AnswerFigures:
    """Tokens and times of one request, of all of its choices together."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    waited_seconds: float | None = None
    """For its lease; None when it got none."""
    decode_seconds: float = 0.0
    first_token_at: float | None = None
    """Monotonic clock."""
    _pieces: int = 0
    """Counted as tokens until the engine says how many they were; that is all there is of an answer that breaks off."""

    def note(self, events: list[Event]) -> None:
        """Look at what the worker has told; called for each message, so it has to be cheap."""
        if self.first_token_at is None and any(isinstance(event, _TOKENS) for event in events):
            self.first_token_at = time.monotonic()
        for event in events:
            if isinstance(event, Started):
                self.prompt_tokens += event.prompt_tokens
            elif isinstance(event, _PIECES):
                self._pieces += 1
                self.completion_tokens += 1
        if events and isinstance(events[-1], Finish):
            for event in events:
                if isinstance(event, Usage):
                    # What the engine counted, instead of the pieces of this choice that were counted on the way.
                    self.completion_tokens += event.completion_tokens - self._pieces
                    self._pieces = 0
                    self.decode_seconds += event.decode_seconds

    def as_dict(self, received: float) -> dict[str, int | float | None]:
        """For JSON; ``received`` is when the request came, monotonic clock."""
        first = None if self.first_token_at is None else self.first_token_at - received
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "first_token_seconds": _rounded(first),
            "between_tokens_seconds": _rounded(self.between_tokens_seconds),
            "waited_seconds": _rounded(self.waited_seconds),
        }

    @property
    def between_tokens_seconds(self) -> float | None:
        """Mean; None of less than two tokens."""
        if self.completion_tokens < 2 or self.first_token_at is None:
            return None
        return self.decode_seconds / (self.completion_tokens - 1)


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 6)


async def metrics(request: Request) -> Response:
    """For Prometheus; of models that nobody asked for since the start nothing is told."""
    server = server_of(request)
    body, media_type = server.metrics.render(request.headers.get("accept", ""), _router_figures(server))
    return Response(body, headers={"content-type": media_type})


def _router_figures(server: Server) -> RouterFigures:
    supervisor = server.supervisor
    reading = supervisor.memory
    views = server.views()
    workers = {view.name: supervisor.worker_view(view.worker) for view in views}
    return RouterFigures(
        version=__version__,
        started_at=server.started_at,
        budget_bytes=supervisor.budget_bytes,
        reserved_bytes=supervisor.reserved_bytes,
        available_bytes=reading.available_bytes if reading is not None else 0,
        total_bytes=reading.total_bytes if reading is not None else 0,
        standby_workers=len(supervisor.source.standby_pids),
        models=[
            ModelFigures(
                name=view.name, state=view.state, leases=view.in_flight, waiting=view.queued,
                reserved_bytes=view.reserved_bytes,
                memory_bytes=worker.memory_bytes if (worker := workers[view.name]) is not None else 0,
            )
            for view in views
        ],
    )  # fmt: skip


def routes() -> list[BaseRoute]:
    return [Route("/metrics", metrics)]
