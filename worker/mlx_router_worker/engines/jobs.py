"""Requests that are many pieces, each computed by itself: texts to embed, documents to rank.

Pieces of different requests share a step, chosen by length so that little of a batch is padding. A request is answered
when its last piece is done, in the order of its pieces.
"""

from __future__ import annotations

from abc import abstractmethod
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final, Generic, NamedTuple, TypeVar

import mlx.core as mx

from mlx_router_shared.generation import Event, Request, Started, StreamEvents
from mlx_router_shared.protocol import ModelFacts
from mlx_router_worker.engines.base import BaseEngine
from mlx_router_worker.text.pooling import batches

__all__ = ["Job", "JobEngine", "PreparedJob"]

# Padded tokens of one step: what bounds its memory, and how long a cancel or another request waits.
_BATCH_TOKENS: Final = 4096

Piece = TypeVar("Piece")


@dataclass(slots=True)
class Job(Generic[Piece]):
    """A request: its pieces, what has been computed of them by their numbers, and the events that answer it."""

    pieces: list[Piece]
    finish: Callable[[list[Any]], list[Event]]
    results: dict[int, Any] = field(default_factory=dict)


class PreparedJob(NamedTuple):
    """A job and the number of its tokens."""

    tokens: int
    job: Job[Any]


class JobEngine(BaseEngine, Generic[Piece]):
    """Most of an ``Engine`` for such requests; what a piece is and comes to is said by those who derive from it."""

    def __init__(self, _send_bytes: Callable[[bytes], None]) -> None:
        super().__init__()
        self._jobs: dict[str, Job[Piece]] = {}
        self._order: deque[tuple[str, int]] = deque()

    @abstractmethod
    def _length(self, piece: Piece) -> int:
        """In tokens."""

    @abstractmethod
    def _compute(self, pieces: list[Piece]) -> list[Any]:
        """One result for each piece, whatever stands beside it."""

    def _facts(self) -> ModelFacts:
        """What is known of a model that has no conversation."""
        return ModelFacts(
            context_tokens=self._context_tokens,
            has_chat_template=False,
            has_thinking=False,
            has_tools=False,
            weights_bytes=self._weights_bytes,
            memory_bytes=mx.get_active_memory(),
            weights_seconds=self._weights_seconds,
            warm_up_seconds=0.0,
        )

    @abstractmethod
    def prepare(self, request: Request) -> PreparedJob: ...

    def submit(self, request_id: str, prepared: Any) -> list[Event]:
        assert isinstance(prepared, PreparedJob)
        job = prepared.job
        self._jobs[request_id] = job
        self._order.extend((request_id, number) for number in range(len(job.pieces)))
        return [Started(prompt_tokens=prepared.tokens)]

    def cancel(self, request_id: str) -> None:
        if self._jobs.pop(request_id, None) is not None:
            self._order = deque(item for item in self._order if item[0] != request_id)

    @property
    def streams(self) -> int:
        return len(self._jobs)

    def step(self) -> list[StreamEvents]:
        """One batch."""
        lengths = [self._length(self._jobs[request_id].pieces[number]) for request_id, number in self._order]
        chosen = [self._order[at] for at in batches(lengths, _BATCH_TOKENS)]
        pieces = [self._jobs[request_id].pieces[number] for request_id, number in chosen]
        self._tokens_total += sum(map(self._length, pieces))
        for (request_id, number), result in zip(chosen, self._compute(pieces), strict=True):
            self._jobs[request_id].results[number] = result
        gone = set(chosen)
        self._order = deque(item for item in self._order if item not in gone)
        out = []
        for request_id in dict.fromkeys(request_id for request_id, _ in chosen):
            job = self._jobs[request_id]
            if len(job.results) == len(job.pieces):
                del self._jobs[request_id]
                events = job.finish([job.results[number] for number in range(len(job.pieces))])
                out.append(StreamEvents(request_id=request_id, events=events))
        return out

    def close(self) -> None:
        self._jobs.clear()
        self._order.clear()
        super().close()
