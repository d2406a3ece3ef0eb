"""Ollama's bodies that ask for vectors: /api/embed and the older /api/embeddings."""

from __future__ import annotations

from typing import Any, Final

from msgspec import Struct, field

from mlx_router_server.dialects.body import Int64, convert, read_object
from mlx_router_server.dialects.call import Call, Need, Needs
from mlx_router_server.dialects.fields import FieldRules
from mlx_router_server.dialects.ollama_requests import GenerateCall, read_keep_alive
from mlx_router_server.dialects.openai_common import limit_of
from mlx_router_shared.errors import InvalidRequest
from mlx_router_shared.generation import EmbeddingRequest

__all__ = ["EMBEDDINGS_FIELDS", "EMBED_FIELDS", "parse_embed", "parse_embeddings"]


class _EmbedBody(Struct, kw_only=True):
    model: str = ""
    input: Any = None
    truncate: bool = True
    dimensions: Int64 = 0
    keep_alive: Any = None
    options: dict[str, Any] = field(default_factory=dict)


class _EmbeddingsBody(Struct, kw_only=True):
    model: str = ""
    prompt: str = ""
    keep_alive: Any = None
    options: dict[str, Any] = field(default_factory=dict)


_NO_OPTION: Final = "no option affects embeddings; each is reported as ignored"
EMBED_FIELDS: Final = FieldRules(route="POST /api/embed", body=_EmbedBody, notes={"options": _NO_OPTION})
EMBEDDINGS_FIELDS: Final = FieldRules(route="POST /api/embeddings", body=_EmbeddingsBody, notes={"options": _NO_OPTION})


def parse_embed(body: bytes) -> GenerateCall:
    """Raises ``InvalidRequest``; without an input there is no ``call``, and the model is loaded only."""
    data = read_object(body, fold_case=True)
    embed = convert(data, _EmbedBody)
    ignored = EMBED_FIELDS.check(data) + _embedding_options(embed.options)
    texts = [embed.input] if isinstance(embed.input, str) else embed.input or []
    if not isinstance(texts, list) or (embed.input is not None and not isinstance(embed.input, str | list)):
        raise InvalidRequest("invalid input type", param="input")
    if not all(isinstance(text, str) for text in texts):
        raise InvalidRequest("invalid input type", param="input")
    keep_alive = read_keep_alive(embed.keep_alive)
    if texts in ([], [""]):
        return GenerateCall(model=embed.model, keep_alive_seconds=keep_alive, call=None, ignored=ignored)
    request = EmbeddingRequest(
        texts=texts,
        truncate=embed.truncate,
        dimensions=limit_of(embed.dimensions),
        normalize=True,
    )
    return _embedding_call(embed.model, keep_alive, request, ignored)


def parse_embeddings(body: bytes) -> GenerateCall:
    """The older form: one text, and the vector as the model makes it, without unit length."""
    data = read_object(body, fold_case=True)
    embed = convert(data, _EmbeddingsBody)
    ignored = EMBEDDINGS_FIELDS.check(data) + _embedding_options(embed.options)
    keep_alive = read_keep_alive(embed.keep_alive)
    if not embed.prompt:
        return GenerateCall(model=embed.model, keep_alive_seconds=keep_alive, call=None, ignored=ignored)
    request = EmbeddingRequest(texts=[embed.prompt], truncate=False, normalize=False)
    return _embedding_call(embed.model, keep_alive, request, ignored)


def _embedding_call(
    model: str, keep_alive: float | None, request: EmbeddingRequest, ignored: tuple[str, ...]
) -> GenerateCall:
    needs = {Needs.EMBEDDING: Need('"{name}" does not support embeddings')}
    call = Call(model=model, requests=(request,), keep_alive_seconds=keep_alive, needs=needs, ignored=ignored)
    return GenerateCall(model=model, keep_alive_seconds=keep_alive, call=call)


def _embedding_options(options: dict[str, Any]) -> tuple[str, ...]:
    return tuple(f"options.{name}" for name, value in options.items() if value is not None)
