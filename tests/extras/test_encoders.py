"""Encoders and rerankers through the whole server, with random weights in the layouts of the real ones."""

from __future__ import annotations

import math
from typing import Any

import pytest

from mlx_router_server.workers.memory import process_bytes
from tests.support.http import call
from tests.support.router import RouterProcess

_TEXTS = ["hello world", "the ship and the light " * 10, "paris is the capital of france", "a"]


def _embed(router: RouterProcess, model: str, texts: Any, **more: Any) -> list[list[float]]:
    reply = call(router, "POST", "/v1/embeddings", {"model": model, "input": texts, **more})
    assert reply.status == 200, reply.body
    return [entry["embedding"] for entry in reply.json()["data"]]


@pytest.mark.parametrize("model", ["bert-mean", "xlm-roberta-mean", "modernbert-mean", "bert-cls", "bert-max"])
def test_a_text_has_the_same_vector_alone_and_beside_others(router: RouterProcess, model: str) -> None:
    together = _embed(router, model, _TEXTS)
    for text, vector in zip(_TEXTS, together, strict=True):
        (alone,) = _embed(router, model, text)
        assert all(math.isclose(a, b, abs_tol=1e-5) for a, b in zip(alone, vector, strict=True))
        assert all(math.isfinite(value) for value in vector)
    unit = all(math.isclose(math.hypot(*vector), 1, abs_tol=1e-4) for vector in together)
    assert unit == (model != "bert-cls"), "of unit length where the model's files say so"


def test_pooling_is_what_the_model_says(router: RouterProcess) -> None:
    """The same weights pooled in three ways are three different vectors."""
    found = [_embed(router, model, _TEXTS[0])[0] for model in ("bert-mean", "bert-cls", "bert-max")]
    lengths = [math.hypot(*vector) for vector in found]
    unit = [[value / length for value in vector] for vector, length in zip(found, lengths, strict=True)]
    for number, left in enumerate(unit):
        for right in unit[number + 1 :]:
            assert sum(a * b for a, b in zip(left, right, strict=True)) < 0.999


def test_what_is_too_long_is_cut_or_refused(router: RouterProcess) -> None:
    long = "the cat sat on the mat " * 60
    for model in ("bert-mean", "xlm-roberta-mean"):
        cut = call(router, "POST", "/api/embed", {"model": model, "input": long})
        assert cut.status == 200
        assert cut.json()["prompt_eval_count"] == 128
        assert all(math.isfinite(value) for value in cut.json()["embeddings"][0])
        kept = call(router, "POST", "/api/embed", {"model": model, "input": long, "truncate": False})
        assert (kept.status, kept.json()) == (400, {"error": "the input length exceeds the context length"})


@pytest.mark.parametrize("kind", ["bert", "xlm-roberta", "modernbert"])
@pytest.mark.parametrize("path", ["/v1/rerank", "/api/rerank"])
def test_documents_are_ranked(router: RouterProcess, kind: str, path: str) -> None:
    query = "what is the capital of france"
    documents = ["paris is the capital", "the cat sat on the mat " * 20, "rain"]
    body = {"model": f"{kind}-reranker", "query": query, "documents": documents, "return_documents": True}
    answer = call(router, "POST", path, body).json()
    scores = [result["relevance_score"] for result in answer["results"]]
    assert scores == sorted(scores, reverse=True)
    assert all(0 <= score <= 1 for score in scores)
    assert {result["index"] for result in answer["results"]} == {0, 1, 2}
    for result in answer["results"]:
        assert result["document"] == {"text": documents[result["index"]]}
        alone = call(router, "POST", path, {**body, "documents": [{"text": documents[result["index"]]}]}).json()
        assert math.isclose(alone["results"][0]["relevance_score"], result["relevance_score"], abs_tol=1e-5)
    best = call(router, "POST", path, {**body, "top_n": 1}).json()["results"]
    assert (len(best), best[0]["index"]) == (1, answer["results"][0]["index"])


def test_a_query_that_leaves_no_room_is_refused_and_a_document_is_cut(router: RouterProcess) -> None:
    body = {"model": "bert-reranker", "query": "the " * 300, "documents": ["rain"]}
    refused = call(router, "POST", "/v1/rerank", body)
    assert (refused.status, refused.json()["error"]["param"]) == (400, "query")
    cut = call(router, "POST", "/v1/rerank", {**body, "query": "rain", "documents": ["the " * 1000]})
    assert (cut.status, cut.json()["usage"]["prompt_tokens"]) == (200, 128)


def test_texts_of_megabytes_are_cut_before_they_are_tokenised(router: RouterProcess) -> None:
    """A hundred bytes of memory a character would be more than a gigabyte here."""
    text = "the cat " * 1_500_000
    short = call(router, "POST", "/api/embed", {"model": "bert-mean", "input": "the cat " * 1000}).json()["embeddings"]
    reply = call(router, "POST", "/api/embed", {"model": "bert-mean", "input": text})
    assert reply.json()["embeddings"] == short
    assert call(router, "POST", "/api/embed", {"model": "bert-mean", "input": text, "truncate": False}).status == 400
    query = {"model": "bert-reranker", "query": text, "documents": ["a"]}
    assert call(router, "POST", "/v1/rerank", query).status == 400
    documents = {"model": "bert-reranker", "query": "cat", "documents": [text, "the cat " * 1000]}
    first, second = call(router, "POST", "/v1/rerank", documents).json()["results"]
    assert first["relevance_score"] == second["relevance_score"]
    messages = [{"role": "user", "content": text}]
    assert call(router, "POST", "/api/chat", {"model": "seer", "messages": messages, "stream": False}).status == 400
    for name in ("bert-mean", "bert-reranker", "seer"):
        assert process_bytes(router.model(name)["pid"]) < 1_000_000_000


def test_each_kind_is_told_apart_and_refuses_the_work_of_the_others(router: RouterProcess) -> None:
    tags = {m["name"].partition(":")[0]: m["capabilities"] for m in call(router, "GET", "/api/tags").json()["models"]}
    assert (tags["bert-mean"], tags["bert-reranker"]) == (["embedding"], ["rerank"])
    for model, path, body in (
        ("bert-mean", "/v1/rerank", {"query": "a", "documents": ["b"]}),
        ("bert-reranker", "/v1/embeddings", {"input": "a"}),
        ("bert-mean", "/api/chat", {"messages": [{"role": "user", "content": "a"}]}),
    ):
        reply = call(router, "POST", path, {"model": model, **body})
        assert (reply.status, "does not support" in str(reply.json()["error"])) == (400, True)
