"""Code in the folder of a vision, encoder or rerank model is never run, and nothing is asked on standard input."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import pytest

from tests.support.hostile import add_code
from tests.support.http import call
from tests.support.router import running_router, write_config
from tests.tiny_models.encoders import make_encoder, make_reranker
from tests.tiny_models.vision import make_qwen2_vl, png

_IMAGE = base64.b64encode(png((255, 0, 0))).decode()
_CHAT = {"messages": [{"role": "user", "content": "What?", "images": [_IMAGE]}], "stream": False,
         "options": {"num_predict": 2}}  # fmt: skip
_REQUESTS: dict[str, tuple[str, dict[str, Any]]] = {
    "vision": ("/api/chat", _CHAT),
    "encoder": ("/api/embed", {"input": "hello"}),
    "reranker": ("/api/rerank", {"query": "a", "documents": ["b"]}),
}


def _make(kind: str, folder: Path) -> Path:
    if kind == "vision":
        return make_qwen2_vl(folder)
    if kind == "encoder":
        make_encoder(folder, "bert", pooling="mean")
    else:
        make_reranker(folder, "bert")
    return folder


@pytest.mark.req("R33")
@pytest.mark.parametrize("kind", _REQUESTS)
def test_code_is_not_run(home: Path, tmp_path: Path, kind: str) -> None:
    marker = tmp_path / "marker"
    add_code(_make(kind, tmp_path / "models" / kind), marker)
    path, body = _REQUESTS[kind]
    with running_router(home, "--models-dir", str(tmp_path / "models")) as router:
        reply = call(router, "POST", path, {"model": kind, **body})
        assert reply.status == 200, reply.body
        if kind == "vision":
            count = call(router, "POST", "/v1/messages/count_tokens",
                         {"model": kind, "messages": [{"role": "user", "content": "hello"}]})  # fmt: skip
            assert count.status == 200, count.body
        assert not any("[y/N]" in line for line in router.lines)
    assert not marker.exists()


@pytest.mark.parametrize("kind", _REQUESTS)
def test_an_adapter_that_cannot_be_used_is_refused_at_load(home: Path, tmp_path: Path, kind: str) -> None:
    folder, adapter = _make(kind, tmp_path / kind), tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapters.safetensors").write_bytes(b"\x02\0\0\0\0\0\0\0{}")
    config = write_config(home, {kind: {"path": str(folder), "adapter": str(adapter)}})
    path, body = _REQUESTS[kind]
    with running_router(home, "--config", str(config)) as router:
        reply = call(router, "POST", path, {"model": kind, **body})
        assert (reply.status, "adapter cannot be used" in reply.json()["error"]) == (500, True), reply.body
