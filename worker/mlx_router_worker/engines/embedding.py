"""Embeddings by decoder models (Qwen3-Embedding and the like): mlx-lm's models without their last layer.

Causal attention never looks to the right, so texts of one batch are padded there and each vector is the same alone or
beside others. How a vector is made of a text's states, and whether it gets unit length, is said by the model's
sentence-transformers files; without them it is the last token's state, with unit length.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, Final

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from mlx_router_shared.errors import ContextLengthExceeded, InvalidRequest, LoadFailed, UnsupportedCapability
from mlx_router_shared.generation import (
    EmbeddingRequest,
    Event,
    Failure,
    Finish,
    FinishReason,
    Request,
    Usage,
    Vectors,
)
from mlx_router_shared.protocol import Load, ModelFacts
from mlx_router_worker.engine import Report
from mlx_router_worker.engines.jobs import Job, JobEngine, PreparedJob
from mlx_router_worker.text.lengths import LengthBound
from mlx_router_worker.text.pooling import Kind, Pooling, finished, read_pooling

__all__ = ["EmbeddingEngine"]

_MESSAGE_BYTES: Final = 8 * 2**20


class EmbeddingEngine(JobEngine[list[int]]):
    """Implements ``Engine`` for embeddings; what is particular to decoders is in four methods."""

    default_pooling: Kind = "lasttoken"
    _pooling = Pooling()

    def load(self, load: Load, report: Report) -> ModelFacts:
        self._load_model(load, report)
        try:
            self._pooling = read_pooling(Path(load.path), self.default_pooling)
        except ValueError as error:
            raise LoadFailed(str(error)) from None
        self._bound = LengthBound(self._tokenizer.get_vocab(), self._context_tokens)
        return self._facts()

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

    def prepare(self, request: Request) -> PreparedJob:
        if not isinstance(request, EmbeddingRequest):
            raise UnsupportedCapability("this model makes embeddings; it generates no text")
        inputs = [self._fitted(tokens, request) for tokens in self._encoded(request)]
        if not inputs:
            raise InvalidRequest("there is nothing to embed", param="input")
        tokens = sum(map(len, inputs))
        return PreparedJob(tokens, Job(inputs, partial(self._events, request, tokens)))

    def _encoded(self, request: EmbeddingRequest) -> list[list[int]]:
        if any(not 0 <= token < self._vocabulary for tokens in request.tokens for token in tokens):
            raise InvalidRequest(
                f"the input holds a token id outside of this model's vocabulary of {self._vocabulary}", param="input"
            )
        if not request.truncate and any(map(self._bound.exceeds, request.texts)):
            raise ContextLengthExceeded(
                "the input length exceeds the context length", param="input", limit=self._context_tokens
            )
        texts = map(self._bound.cut, request.texts)
        return [list(tokens) for tokens in request.tokens] + [self._encode(text) for text in texts]

    def _fitted(self, tokens: list[int], request: EmbeddingRequest) -> list[int]:
        limit = self._context_tokens
        if len(tokens) <= limit:
            return tokens
        if not request.truncate:
            raise ContextLengthExceeded(
                "the input length exceeds the context length", param="input", tokens=len(tokens), limit=limit
            )
        return self._cut(tokens, limit)

    def _length(self, piece: list[int]) -> int:
        return len(piece)

    def _compute(self, pieces: list[list[int]]) -> list[Any]:
        states = self._states(pieces).astype(mx.float32)
        lengths = mx.array([len(row) for row in pieces])
        inside = (mx.arange(states.shape[1])[None] < lengths[:, None])[..., None]
        if self._pooling.kind == "mean":  # chosen, not multiplied: what is beyond the end may be no number
            pooled = mx.where(inside, states, 0).sum(axis=1) / lengths[:, None]
        elif self._pooling.kind == "max":
            pooled = mx.where(inside, states, -mx.inf).max(axis=1)
        else:
            at = lengths - 1 if self._pooling.kind == "lasttoken" else mx.zeros_like(lengths)
            pooled = states[mx.arange(len(pieces)), at]
        return list(np.array(pooled))

    def _events(self, request: EmbeddingRequest, tokens: int, vectors: list[NDArray[np.float32]]) -> list[Event]:
        matrix = np.stack(vectors)
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
        usage = Usage(prompt_tokens=tokens, completion_tokens=0)
        return [*events, usage, Finish(reason=FinishReason.STOP)]
