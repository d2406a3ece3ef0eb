"""Encoders (BERT, XLM-RoBERTa, ModernBERT) and the rerankers built on them, by mlx-vlm: the extra ``encoders``.

mlx-vlm pools by the mean whatever the model says; so only its states are used, and pooled as the model's own files
have it. Texts are padded on the right and tokenised by ``tokenizer.json`` itself: transformers would rebuild parts of
it from other files.
"""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import mlx.core as mx
import numpy as np
from mlx_vlm.embedding_loader import load_embedding_model
from mlx_vlm.reranker_loader import load_reranker
from tokenizers import Tokenizer

from mlx_router_shared.errors import InvalidRequest, LoadFailed, UnsupportedCapability
from mlx_router_shared.generation import (
    Event,
    Finish,
    FinishReason,
    Request,
    RerankRequest,
    Scores,
    Started,
    StreamEvents,
    Usage,
)
from mlx_router_shared.protocol import Load, ModelFacts
from mlx_router_worker.engine import Report
from mlx_router_worker.mlx_base import MlxBase
from mlx_router_worker.mlx_embedding import EmbeddingEngine
from mlx_router_worker.text.pooling import Kind, batches

__all__ = ["EncoderEngine", "RerankEngine"]

_BATCH_TOKENS: Final = 4096
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
        self._apply_limits(load.memory_limit_bytes, load.cache_limit_bytes)
        started = time.perf_counter()
        report("weights", 0.0)
        folder = Path(load.path)
        config = _read_config(folder)
        self._model = load_embedding_model(folder)
        _steady(self._model, config)
        self._weights_bytes = self._evaluate(report)
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


@dataclass(slots=True)
class _Job:
    pairs: list[tuple[list[int], list[int]]]
    """Tokens and their segments, one for each document."""
    scores: dict[int, float]


class RerankEngine(MlxBase):
    """Implements ``Engine`` for rerankers: one number for a query and a document, between 0 and 1."""

    def __init__(self, _send_bytes: Callable[[bytes], None]) -> None:
        super().__init__()
        self._jobs: dict[str, _Job] = {}
        self._order: deque[tuple[str, int]] = deque()
        self._pad = 0
        self._segments = False

    def load(self, load: Load, report: Report) -> ModelFacts:
        self._apply_limits(load.memory_limit_bytes, load.cache_limit_bytes)
        started = time.perf_counter()
        report("weights", 0.0)
        folder = Path(load.path)
        config = _read_config(folder)
        self._model, _ = load_reranker(str(folder))
        _steady(self._model, config)
        self._weights_bytes = self._evaluate(report)
        self._note_config(load, config)
        self._context_tokens = min(_context_of(config), load.context_tokens or _LONGEST)
        self._tokenizer = _tokenizer_of(folder)
        self._pad = int(config.get("pad_token_id") or 0)
        # Models with one segment would read behind the end of their table for a second one.
        self._segments = int(config.get("type_vocab_size") or 0) > 1
        return ModelFacts(
            context_tokens=self._context_tokens,
            has_chat_template=False,
            has_thinking=False,
            has_tools=False,
            weights_bytes=self._weights_bytes,
            memory_bytes=mx.get_active_memory(),
            weights_seconds=time.perf_counter() - started,
            warm_up_seconds=0.0,
        )

    def warm_up(self) -> None:
        if mx.default_device() != mx.Device(mx.cpu):
            self._scores([([0, 0], [0, 0])])

    def submit(self, request_id: str, request: Request) -> list[Event]:
        if not isinstance(request, RerankRequest):
            raise UnsupportedCapability("this model ranks documents; it generates nothing")
        pairs = [self._pair(request.query, document) for document in request.documents]
        if not pairs:
            raise InvalidRequest("there is nothing to rank", param="documents")
        self._jobs[request_id] = _Job(pairs, {})
        self._order.extend((request_id, number) for number in range(len(pairs)))
        return [Started(prompt_tokens=sum(len(tokens) for tokens, _ in pairs))]

    def _pair(self, query: str, document: str) -> tuple[list[int], list[int]]:
        """A document is cut at its end; a query that leaves no room for one is refused."""
        encoded = self._tokenizer.encode(query, document)
        over = len(encoded.ids) - self._context_tokens
        if over <= 0:
            return list(encoded.ids), list(encoded.type_ids)
        own = self._tokenizer.encode(document, add_special_tokens=False)
        if over >= len(own.ids):
            raise InvalidRequest(f"the query is longer than the model's {self._context_tokens} tokens", param="query")
        end = own.offsets[len(own.ids) - over - 1][1]
        shorter = self._tokenizer.encode(query, document[:end])
        return list(shorter.ids)[: self._context_tokens], list(shorter.type_ids)[: self._context_tokens]

    def cancel(self, request_id: str) -> None:
        if self._jobs.pop(request_id, None) is not None:
            self._order = deque(item for item in self._order if item[0] != request_id)

    @property
    def streams(self) -> int:
        return len(self._jobs)

    def step(self) -> list[StreamEvents]:
        lengths = [len(self._jobs[request_id].pairs[number][0]) for request_id, number in self._order]
        chosen = [self._order[at] for at in batches(lengths, _BATCH_TOKENS)]
        found = self._scores([self._jobs[request_id].pairs[number] for request_id, number in chosen])
        for (request_id, number), score in zip(chosen, found, strict=True):
            self._jobs[request_id].scores[number] = score
        gone = set(chosen)
        self._order = deque(item for item in self._order if item not in gone)
        out = []
        for request_id in dict.fromkeys(request_id for request_id, _ in chosen):
            job = self._jobs[request_id]
            if len(job.scores) == len(job.pairs):
                del self._jobs[request_id]
                scores = Scores(scores=[job.scores[number] for number in range(len(job.pairs))])
                usage = Usage(prompt_tokens=sum(len(tokens) for tokens, _ in job.pairs), completion_tokens=0)
                events: list[Event] = [scores, usage, Finish(reason=FinishReason.STOP)]
                out.append(StreamEvents(request_id=request_id, events=events))
        return out

    def _scores(self, pairs: list[tuple[list[int], list[int]]]) -> list[float]:
        tokens, mask = _padded([tokens for tokens, _ in pairs], self._pad)
        more = {"token_type_ids": _padded([segments for _, segments in pairs], 0)[0]} if self._segments else {}
        logits = self._model(tokens, attention_mask=mask, **more).logits[:, 0].astype(mx.float32)
        self._tokens_total += sum(len(tokens) for tokens, _ in pairs)
        return [float(score) for score in np.array(mx.sigmoid(logits))]

    def close(self) -> None:
        self._jobs.clear()
        self._order.clear()
        super().close()
