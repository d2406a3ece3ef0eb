"""Encoders (BERT, XLM-RoBERTa, ModernBERT) and the rerankers built on them, by mlx-vlm: the extra ``encoders``.

mlx-vlm pools by the mean whatever the model says; so only its states are used, and pooled as the model's own files
have it. Texts are padded on the right and tokenised by ``tokenizer.json`` itself: transformers would rebuild parts of
it from other files.
"""

from __future__ import annotations

import json
import time
from functools import partial
from pathlib import Path
from typing import Any, Final

import mlx.core as mx
import numpy as np
from mlx_vlm.embedding_loader import load_embedding_model
from mlx_vlm.reranker_loader import load_sequence_classification_model
from tokenizers import Tokenizer

from mlx_router_shared.errors import InvalidRequest, LoadFailed, UnsupportedCapability
from mlx_router_shared.generation import (
    Event,
    Finish,
    FinishReason,
    Request,
    RerankRequest,
    Scores,
    Usage,
)
from mlx_router_shared.protocol import Load, ModelFacts
from mlx_router_worker.engine import Report
from mlx_router_worker.engines.base import refuse_additions
from mlx_router_worker.engines.embedding import EmbeddingEngine
from mlx_router_worker.engines.jobs import Job, JobEngine, PreparedJob
from mlx_router_worker.text.lengths import LengthBound
from mlx_router_worker.text.pooling import Kind

__all__ = ["EncoderEngine", "RerankEngine"]

_LONGEST: Final = 8192


def _read_config(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return config


def _context_of(config: dict[str, Any]) -> int:
    """The longest text: beyond its table of positions a model computes on, and what comes out means nothing."""
    limit = int(config.get("max_position_embeddings") or _LONGEST)
    if str(config.get("model_type")).replace("-", "_") == "xlm_roberta":
        limit -= int(config.get("pad_token_id", 1)) + 1  # its positions begin behind the pad token
    return limit


def _tokenizer_of(folder: Path) -> Tokenizer:
    file = folder / "tokenizer.json"
    if not file.exists():
        raise LoadFailed("the model has no tokenizer.json")
    tokenizer = Tokenizer.from_file(str(file))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def _steady(model: Any, config: dict[str, Any]) -> None:
    """ModernBERT's window of attention gives no numbers in half precision where a row is padded by more than it."""
    if config.get("model_type") == "modernbert":
        model.set_dtype(mx.float32)


def _padded(rows: list[list[int]], fill: int) -> tuple[mx.array, mx.array]:
    """Tokens and mask, padded on the right: [rows, longest]."""
    longest = max(map(len, rows))
    tokens = np.full((len(rows), longest), fill, np.int32)
    mask = np.zeros((len(rows), longest), np.int32)
    for number, row in enumerate(rows):
        tokens[number, : len(row)] = row
        mask[number, : len(row)] = 1
    return mx.array(tokens), mx.array(mask)


class EncoderEngine(EmbeddingEngine):
    """Implements ``Engine`` for the embeddings of encoders."""

    default_pooling: Kind = "mean"

    def _load_model(self, load: Load, report: Report) -> None:
        refuse_additions(load, "encoder")
        self._apply_limits(load.memory_limit_bytes, load.cache_limit_bytes)
        started = time.perf_counter()
        report("weights", 0.0)
        folder = Path(load.path)
        config = _read_config(folder)
        self._model = load_embedding_model(folder, lazy=True, trust_remote_code=False)
        _steady(self._model, config)
        self._weights_bytes = self._evaluate(report, yields=load.yields)
        self._weights_seconds = time.perf_counter() - started
        self._note_config(load, config)
        limit = _context_of(config)
        self._context_tokens = min(limit, load.context_tokens) if load.context_tokens else limit
        self._tokenizer = _tokenizer_of(folder)
        self._pad = int(config.get("pad_token_id") or 0)

    def _encode(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text).ids)

    def _states(self, rows: list[list[int]]) -> mx.array:
        tokens, mask = _padded(rows, self._pad)
        return self._model(tokens, attention_mask=mask).last_hidden_state


Pair = tuple[list[int], list[int]]
"""The tokens of a query and a document, and which of the two each belongs to."""


class RerankEngine(JobEngine[Pair]):
    """Implements ``Engine`` for rerankers: one number for a query and a document, between 0 and 1."""

    _pad = 0
    _segments = False

    def load(self, load: Load, report: Report) -> ModelFacts:
        refuse_additions(load, "reranker")
        self._apply_limits(load.memory_limit_bytes, load.cache_limit_bytes)
        started = time.perf_counter()
        report("weights", 0.0)
        folder = Path(load.path)
        config = _read_config(folder)
        self._model = load_sequence_classification_model(folder, lazy=True)
        _steady(self._model, config)
        self._weights_bytes = self._evaluate(report, yields=load.yields)
        self._weights_seconds = time.perf_counter() - started
        self._note_config(load, config)
        self._context_tokens = min(_context_of(config), load.context_tokens or _LONGEST)
        self._tokenizer = _tokenizer_of(folder)
        self._pad = int(config.get("pad_token_id") or 0)
        # Models with one segment would read behind the end of their table for a second one.
        self._segments = int(config.get("type_vocab_size") or 0) > 1
        self._bound = LengthBound(self._tokenizer.get_vocab(), self._context_tokens)
        return self._facts()

    def warm_up(self) -> None:
        if mx.default_device() != mx.Device(mx.cpu):
            self._compute([([0, 0], [0, 0])])

    def prepare(self, request: Request) -> PreparedJob:
        if not isinstance(request, RerankRequest):
            raise UnsupportedCapability("this model ranks documents; it generates nothing")
        if self._bound.exceeds(request.query):
            raise self._query_too_long()
        pairs = [self._pair(request.query, self._bound.cut(document)) for document in request.documents]
        if not pairs:
            raise InvalidRequest("there is nothing to rank", param="documents")
        tokens = sum(map(self._length, pairs))
        return PreparedJob(tokens, Job(pairs, partial(self._events, tokens)))

    def _pair(self, query: str, document: str) -> Pair:
        """A document is cut at its end; a query that leaves no room for one is refused."""
        encoded = self._tokenizer.encode(query, document)
        over = len(encoded.ids) - self._context_tokens
        if over <= 0:
            return list(encoded.ids), list(encoded.type_ids)
        own = self._tokenizer.encode(document, add_special_tokens=False)
        if over >= len(own.ids):
            raise self._query_too_long()
        end = own.offsets[len(own.ids) - over - 1][1]
        shorter = self._tokenizer.encode(query, document[:end])
        return list(shorter.ids)[: self._context_tokens], list(shorter.type_ids)[: self._context_tokens]

    def _query_too_long(self) -> InvalidRequest:
        return InvalidRequest(f"the query is longer than the model's {self._context_tokens} tokens", param="query")

    def _length(self, piece: Pair) -> int:
        return len(piece[0])

    def _compute(self, pieces: list[Pair]) -> list[Any]:
        tokens, mask = _padded([tokens for tokens, _ in pieces], self._pad)
        more = {"token_type_ids": _padded([segments for _, segments in pieces], 0)[0]} if self._segments else {}
        logits = self._model(tokens, attention_mask=mask, **more).logits[:, 0].astype(mx.float32)
        return [float(score) for score in np.array(mx.sigmoid(logits))]

    @staticmethod
    def _events(tokens: int, scores: list[float]) -> list[Event]:
        usage = Usage(prompt_tokens=tokens, completion_tokens=0)
        return [Scores(scores=scores), usage, Finish(reason=FinishReason.STOP)]
