"""Bodies that ask for vectors and for ranks: /v1/embeddings and /v1/rerank."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from msgspec import Struct, field

from mlx_router_server.dialects.body import Int64, convert, read_object
from mlx_router_server.dialects.call import Call, Need, Needs
from mlx_router_server.dialects.fields import FieldRules
from mlx_router_server.dialects.openai_choices import ACCOUNTING
from mlx_router_server.dialects.openai_common import is_token_ids, limit_of
from mlx_router_server.durations import parse_duration
from mlx_router_shared.errors import InvalidRequest
from mlx_router_shared.generation import EmbeddingRequest, RerankRequest

__all__ = ["EMBEDDING_FIELDS", "RERANK_FIELDS", "EmbeddingCall", "RerankCall", "parse_embeddings", "parse_rerank"]

_MOST_INPUTS: Final = 2048


class _EmbeddingBody(Struct, kw_only=True):
    model: str = ""
    input: Any = None
    encoding_format: str = "float"
    dimensions: Int64 | None = None
    keep_alive: Any = None


class _RerankBody(Struct, kw_only=True):
    model: str = ""
    query: str = ""
    documents: list[str | dict[str, Any]] = field(default_factory=list)
    top_n: Int64 | None = None
    return_documents: bool = False
    keep_alive: Any = None


EMBEDDING_FIELDS: Final = FieldRules(
    route="POST /v1/embeddings",
    body=_EmbeddingBody,
    ignored={"user": ACCOUNTING},
    notes={
        "input": f"text, token ids of the model, or up to {_MOST_INPUTS} of either",
        "dimensions": "the first components, with unit length",
    },
)
RERANK_FIELDS: Final = FieldRules(
    route="POST /v1/rerank, /api/rerank", body=_RerankBody, notes={"documents": "texts, or objects with text"}
)


@dataclass(frozen=True, slots=True)
class EmbeddingCall:
    """A request for vectors, and how they are wanted."""

    call: Call
    as_base64: bool


def parse_embeddings(body: bytes) -> EmbeddingCall:
    """Raises ``InvalidRequest`` with ``param``; nothing was looked up yet."""
    data = read_object(body, empty="EOF")
    embedding = convert(data, _EmbeddingBody)
    ignored = EMBEDDING_FIELDS.check(data)
    if embedding.encoding_format not in ("float", "base64"):
        raise InvalidRequest(
            f"Invalid value for 'encoding_format' = {embedding.encoding_format}. "
            "Supported values: ['float', 'base64'].",
            param="encoding_format",
        )
    if embedding.dimensions is not None and embedding.dimensions < 1:
        raise InvalidRequest("dimensions must be at least 1", param="dimensions")
    texts, tokens = _inputs(embedding.input)
    request = EmbeddingRequest(texts=texts, tokens=tokens, truncate=False, dimensions=embedding.dimensions)
    return EmbeddingCall(_other_call(embedding, request, Needs.EMBEDDING, "embeddings", ignored),
                         embedding.encoding_format == "base64")  # fmt: skip


def _inputs(value: Any) -> tuple[list[str], list[list[int]]]:
    if isinstance(value, str):
        value = [value]
    if is_token_ids(value):
        value = [value]
    if not isinstance(value, list) or not value:
        raise InvalidRequest("invalid input", param="input")
    if len(value) > _MOST_INPUTS:
        raise InvalidRequest(f"invalid input: more than {_MOST_INPUTS} items", param="input")
    if all(isinstance(item, str) and item for item in value):
        return value, []
    if all(is_token_ids(item) for item in value):
        return [], value
    raise InvalidRequest("invalid input: texts that are not empty, or lists of token ids", param="input")


@dataclass(frozen=True, slots=True)
class RerankCall:
    """A request for scores, and which of them are wanted."""

    call: Call
    documents: list[str]
    top_n: int
    with_documents: bool


def parse_rerank(body: bytes) -> RerankCall:
    """Raises ``InvalidRequest`` with ``param``; nothing was looked up yet."""
    data = read_object(body, empty="EOF")
    rerank = convert(data, _RerankBody)
    ignored = RERANK_FIELDS.check(data)
    if not rerank.query:
        raise InvalidRequest("query is required", param="query")
    documents = [item if isinstance(item, str) else item.get("text") for item in rerank.documents]
    if not documents or not all(isinstance(text, str) for text in documents):
        raise InvalidRequest("documents has to be a list of texts", param="documents")
    if len(documents) > _MOST_INPUTS:
        raise InvalidRequest(f"documents holds more than {_MOST_INPUTS} items", param="documents")
    texts = [str(text) for text in documents]
    request = RerankRequest(query=rerank.query, documents=texts)
    call = _other_call(rerank, request, Needs.RERANK, "rerank", ignored)
    return RerankCall(call, texts, limit_of(rerank.top_n) or len(texts), rerank.return_documents)


def _other_call(
    body: _EmbeddingBody | _RerankBody, request: EmbeddingRequest | RerankRequest, need: Needs, what: str,
    ignored: tuple[str, ...],
) -> Call:  # fmt: skip
    return Call(
        model=body.model,
        requests=(request,),
        keep_alive_seconds=None if body.keep_alive is None else parse_duration(body.keep_alive),
        needs={need: Need('"{name}" does not support ' + what)},
        ignored=ignored,
    )
