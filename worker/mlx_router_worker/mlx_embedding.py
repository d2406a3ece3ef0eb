"""Embeddings by decoder models (Qwen3-Embedding and the like): mlx-lm's models without their last layer.

Causal attention never looks to the right, so texts of one batch are padded there and each vector is the same alone or
beside others. How a vector is made of a text's states, and whether it gets unit length, is said by the model's
sentence-transformers files; without them it is the last token's state, with unit length.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import mlx.core as mx
import numpy as np

from mlx_router_shared.errors import ContextLengthExceeded, InvalidRequest, LoadFailed, UnsupportedCapability
from mlx_router_shared.generation import (
    EmbeddingRequest,
    Event,
    Failure,
    Finish,
    FinishReason,
    Request,
    Started,
    StreamEvents,
    Usage,
    Vectors,
)
from mlx_router_shared.protocol import Load, ModelFacts
from mlx_router_worker.engine import Report
from mlx_router_worker.mlx_base import MlxBase
from mlx_router_worker.text.pooling import Kind, Pooling, batches, finished, read_pooling

__all__ = ["EmbeddingEngine"]

# Padded tokens of one step: what bounds its memory, and how long a cancel or another request waits.
_BATCH_TOKENS: Final = 4096
_MESSAGE_BYTES: Final = 8 * 2**20


@dataclass(slots=True)
class _Job:
    request: EmbeddingRequest
    inputs: list[list[int]]
    vectors: dict[int, np.ndarray[Any, np.dtype[np.float32]]] = field(default_factory=dict)


class EmbeddingEngine(MlxBase):
    """Implements ``Engine`` for embeddings; what is particular to decoders is in four methods."""

    default_pooling: Kind = "lasttoken"

    def __init__(self, _send_bytes: Callable[[bytes], None]) -> None:
        super().__init__()
        self._jobs: dict[str, _Job] = {}
        self._order: deque[tuple[str, int]] = deque()
        self._pooling = Pooling()

    def load(self, load: Load, report: Report) -> ModelFacts:
        self._load_model(load, report)
        try:
            self._pooling = read_pooling(Path(load.path), self.default_pooling)
        except ValueError as error:
            raise LoadFailed(str(error)) from None
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

    def warm_up(self) -> None:
        if mx.default_device() != mx.Device(mx.cpu):
            mx.eval(self._states([[0, 0]]))

    # ---------------------------------------------- particular to the kind of model

    def _load_model(self, load: Load, report: Report) -> None:
        # The last layer of a model that was saved without one is not needed.
        self._load_weights(load, report, strict=False)
        if not hasattr(self._model, "model"):
            raise LoadFailed("this architecture has no body that its states can be read from")

    def _encode(self, text: str) -> list[int]:
        """The tokens of a text; the state of the end token is what a model that pools the last one was trained for."""
        tokens = list(self._tokenizer.encode(text))
        special = self._tokenizer.all_special_ids
        if self._pooling.kind == "lasttoken" and (not tokens or tokens[-1] not in special):
            tokens.append(self._tokenizer.eos_token_id)
        return tokens or [self._tokenizer.eos_token_id]

    def _cut(self, tokens: list[int], limit: int) -> list[int]:
        return [*tokens[: limit - 1], tokens[-1]]

    def _states(self, rows: list[list[int]]) -> mx.array:
        """The last hidden states, one row a text, with anything beyond its end: [texts, longest, width]."""
        longest = max(map(len, rows))
        padded = mx.array([row + [0] * (longest - len(row)) for row in rows])
        return self._model.model(padded)

    # ----------------------------------------------------------------- requests

    def submit(self, request_id: str, request: Request) -> list[Event]:
        if not isinstance(request, EmbeddingRequest):
            raise UnsupportedCapability("this model makes embeddings; it generates no text")
        inputs = [self._fitted(tokens, request) for tokens in self._encoded(request)]
        if not inputs:
            raise InvalidRequest("there is nothing to embed", param="input")
        self._jobs[request_id] = _Job(request, inputs)
        self._order.extend((request_id, number) for number in range(len(inputs)))
        return [Started(prompt_tokens=sum(map(len, inputs)))]

    def _encoded(self, request: EmbeddingRequest) -> list[list[int]]:
        if any(not 0 <= token < self._vocabulary for tokens in request.tokens for token in tokens):
            raise InvalidRequest(
                f"the input holds a token id outside of this model's vocabulary of {self._vocabulary}", param="input"
            )
        return [list(tokens) for tokens in request.tokens] + [self._encode(text) for text in request.texts]

    def _fitted(self, tokens: list[int], request: EmbeddingRequest) -> list[int]:
        limit = self._context_tokens
        if len(tokens) <= limit:
            return tokens
        if not request.truncate:
            raise ContextLengthExceeded(
                "the input length exceeds the context length", param="input", tokens=len(tokens), limit=limit
            )
        return self._cut(tokens, limit)

    def cancel(self, request_id: str) -> None:
        if self._jobs.pop(request_id, None) is not None:
            self._order = deque(item for item in self._order if item[0] != request_id)

    @property
    def streams(self) -> int:
        return len(self._jobs)

    def step(self) -> list[StreamEvents]:
        """One batch; texts of different requests share it."""
        lengths = [len(self._jobs[request_id].inputs[number]) for request_id, number in self._order]
        chosen = [self._order[at] for at in batches(lengths, _BATCH_TOKENS)]
        self._compute(chosen)
        gone = set(chosen)
        self._order = deque(item for item in self._order if item not in gone)
        out = []
        for request_id in dict.fromkeys(request_id for request_id, _ in chosen):
            job = self._jobs[request_id]
            if len(job.vectors) == len(job.inputs):
                del self._jobs[request_id]
                out.append(StreamEvents(request_id=request_id, events=self._events(job)))
        if not self._jobs:
            mx.clear_cache()
        return out

    def _compute(self, chosen: list[tuple[str, int]]) -> None:
        rows = [self._jobs[request_id].inputs[number] for request_id, number in chosen]
        states = self._states(rows).astype(mx.float32)
        lengths = mx.array([len(row) for row in rows])
        inside = (mx.arange(states.shape[1])[None] < lengths[:, None])[..., None]
        if self._pooling.kind == "mean":  # chosen, not multiplied: what is beyond the end may be no number
            pooled = mx.where(inside, states, 0).sum(axis=1) / lengths[:, None]
        elif self._pooling.kind == "max":
            pooled = mx.where(inside, states, -mx.inf).max(axis=1)
        else:
            at = lengths - 1 if self._pooling.kind == "lasttoken" else mx.zeros_like(lengths)
            pooled = states[mx.arange(len(rows)), at]
        vectors = np.array(pooled)
        self._tokens_total += sum(map(len, rows))
        for (request_id, number), vector in zip(chosen, vectors, strict=True):
            self._jobs[request_id].vectors[number] = vector

    def _events(self, job: _Job) -> list[Event]:
        request = job.request
        matrix = np.stack([job.vectors[number] for number in range(len(job.inputs))])
        if request.dimensions is not None and request.dimensions > matrix.shape[1]:
            message = f"this model's vectors have {matrix.shape[1]} dimensions, not {request.dimensions}"
            return [Failure(code=InvalidRequest.code, message=message, param="dimensions")]
        if not np.isfinite(matrix).all():
            return [Failure(code=InvalidRequest.code, message="embedding contains NaN or Inf values", param="input")]
        normalize = self._pooling.normalize if request.normalize is None else request.normalize
        matrix = finished(matrix, request.dimensions, normalize)
        rows = max(_MESSAGE_BYTES // (4 * matrix.shape[1]), 1)
        events: list[Event] = [
            Vectors(dimensions=matrix.shape[1], data=matrix[at : at + rows].tobytes())
            for at in range(0, len(matrix), rows)
        ]
        usage = Usage(prompt_tokens=sum(map(len, job.inputs)), completion_tokens=0)
        return [*events, usage, Finish(reason=FinishReason.STOP)]

    def close(self) -> None:
        self._jobs.clear()
        self._order.clear()
        super().close()
