"""What a model that needs an extra says where it is not installed: the command, and nothing is started for it."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import pytest

from mlx_router_server.catalogue.architectures import has_vlm
from mlx_router_server.catalogue.extras import install_command
from tests.support.http import call
from tests.support.router import running_router
from tests.tiny_models.encoders import make_encoder, make_reranker
from tests.tiny_models.vision import make_qwen2_vl, png


def test_encoders_rerankers_and_images_name_the_command(home: Path, tmp_path: Path) -> None:
    assert not has_vlm(), "the environment of `make test` has no extras; that of `make test-extras` does not run this"
    models = tmp_path / "models"
    make_encoder(models / "encoder")
    make_reranker(models / "ranker")
    make_qwen2_vl(models / "seer")
    image = {"role": "user", "content": "What?", "images": [base64.b64encode(png()).decode()]}
    asks: list[tuple[str, dict[str, Any], str]] = [
        ("/v1/embeddings", {"model": "encoder", "input": "a"}, "encoders"),
        ("/api/embed", {"model": "encoder", "input": "a"}, "encoders"),
        ("/api/embed", {"model": "encoder"}, "encoders"),
        ("/v1/rerank", {"model": "ranker", "query": "a", "documents": ["b"]}, "encoders"),
        ("/api/chat", {"model": "seer", "messages": [image]}, "vision"),
    ]
    with running_router(home, "--models-dir", str(models)) as router:
        for path, body, extra in asks:
            reply = call(router, "POST", path, body)
            assert reply.status == 400
            assert install_command(extra) in reply.body.decode()
        assert call(router, "POST", "/admin/models/encoder/load").status == 400
        assert router.children() == []
        tags = {m["name"]: m["capabilities"] for m in call(router, "GET", "/api/tags").json()["models"]}
        assert (tags["encoder:latest"], tags["ranker:latest"]) == (["embedding"], ["rerank"])


@pytest.mark.parametrize("strict", [False, True])
def test_ignored_fields_are_named_or_refused(home: Path, strict: bool) -> None:
    from tests.support.fakes import fake_config

    with running_router(home, *fake_config(home, {"a": {"tokens": 2}}, strict=strict)) as router:
        for path, body, names in (
            (
                "/v1/chat/completions",
                {"messages": [{"role": "user", "content": "x"}], "user": "u", "new": 1},
                "user,new",
            ),
            (
                "/api/generate",
                {"prompt": "x", "stream": False, "options": {"num_gpu": 1}, "shift": True},
                "shift,options.num_gpu",
            ),
            (
                "/v1/messages",
                {"max_tokens": 5, "messages": [{"role": "user", "content": "x"}], "metadata": {"a": 1}},
                "metadata",
            ),
            ("/v1/embeddings", {"input": "x", "user": "u"}, "user"),
        ):
            reply = call(router, "POST", path, {"model": "a", **body})
            if strict:
                first = names.partition(",")[0]
                assert reply.status == 400
                assert f"this server ignores {names.replace(',', ', ')}" in reply.body.decode()
                assert path == "/api/generate" or path == "/v1/messages" or reply.json()["error"]["param"] == first
            else:
                assert (reply.status, reply.headers["x-ignored-fields"]) == (200, names)
        assert (router.model("a")["loads"] == 0) == strict
