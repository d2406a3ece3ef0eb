"""What is a model and what is not, by content; and the index that is made of it."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from mlx_router_server.catalogue.architectures import has_vlm, servable_architectures
from mlx_router_server.catalogue.catalogue import DEMO_FOLDER, Catalogue, Registered, Sources
from mlx_router_server.catalogue.discovery import discover_hub, hub_cache
from mlx_router_server.catalogue.entry import Capability
from mlx_router_server.catalogue.index import IndexBuilder
from mlx_router_server.catalogue.inspect import NotServable, inspect_folder
from mlx_router_shared.errors import ModelNotFound


def write_model(folder: Path, config: dict[str, Any] | None = None, **files: str) -> Path:
    """A folder with the files of a model and one tiny tensor."""
    folder.mkdir(parents=True)
    default = {"model_type": "qwen3", "max_position_embeddings": 4096, "num_hidden_layers": 2, "hidden_size": 8,
               "num_attention_heads": 2, "num_key_value_heads": 1}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(default if config is None else config))
    header = json.dumps({"w": {"dtype": "F16", "shape": [4, 2], "data_offsets": [0, 16]}}).encode()
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(16))
    for name, text in files.items():
        path = folder / name.replace("__", "/").replace("_json", ".json")
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    return folder


def test_the_demo_model_is_what_it_is() -> None:
    files = inspect_folder(DEMO_FOLDER)
    assert files.family == "qwen3"
    assert files.capabilities == {Capability.COMPLETION, Capability.TOOLS, Capability.THINKING}
    assert files.context_tokens == 4096
    assert 400_000 < files.parameters < 500_000
    assert files.weights_bytes == files.parameters * 2
    assert len(files.digest) == 64
    # 2 layers, keys and values, 2 heads of 32 in half precision
    assert files.cache.per_token == 2 * 2 * 2 * 32 * 2


def test_the_architectures_come_from_mlx_lm_and_include_renamed_ones() -> None:
    found = servable_architectures()
    assert {"qwen3", "llama", "mistral", "gemma3"} <= found
    assert "roberta" not in found


@pytest.mark.req("R28")
@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"model_type": "roberta"}, "no architecture 'roberta'"),
        ({}, "names no model_type"),
        ({"model_type": "qwen3", "model_file": "evil.py"}, "code of its own"),
        ({"model_type": "qwen3", "quantization_config": {"quant_method": "bitsandbytes"}}, "bitsandbytes"),
        ({"model_type": 5}, "names no model_type"),
    ],
)
def test_what_cannot_be_served_says_why(tmp_path: Path, config: dict[str, Any], reason: str) -> None:
    with pytest.raises(NotServable, match=reason):
        inspect_folder(write_model(tmp_path / "m", config))


@pytest.mark.req("R28")
def test_an_unfinished_download_is_not_served(tmp_path: Path) -> None:
    index = json.dumps({"weight_map": {"w": "model.safetensors", "x": "model-2.safetensors"}})
    folder = write_model(tmp_path / "m", None, **{"model.safetensors.index_json": index})
    with pytest.raises(NotServable, match=r"model-2\.safetensors is missing"):
        inspect_folder(folder)


@pytest.mark.parametrize(
    "content", [b"", b"\xff" * 8, (5).to_bytes(8, "little") + b"hello", (10**15).to_bytes(8, "little")]
)
def test_hostile_weights_are_a_reason_and_not_an_exception(tmp_path: Path, content: bytes) -> None:
    folder = write_model(tmp_path / "m")
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(NotServable, match="safetensors"):
        inspect_folder(folder)


def test_hostile_json_is_a_reason_and_not_an_exception(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m")
    (folder / "config.json").write_text("[" * 100_000)
    with pytest.raises(NotServable, match=r"config\.json"):
        inspect_folder(folder)


@pytest.mark.req("R27")
def test_the_name_is_no_evidence(tmp_path: Path) -> None:
    chat = inspect_folder(write_model(tmp_path / "chat-embed-tuned"))
    assert chat.capabilities == {Capability.COMPLETION}
    embedding = inspect_folder(write_model(tmp_path / "plain", None, **{"1_Pooling__config_json": "{}"}))
    assert embedding.capabilities == {Capability.EMBEDDING}


def _put_in_hub(cache: Path, repo: str, revision: str, tmp_path: Path) -> Path:
    base = cache / f"models--{repo.replace('/', '--')}"
    write_model(base / "snapshots" / revision)
    (base / "refs").mkdir(exist_ok=True)
    (base / "refs" / "main").write_text(revision)
    return base


def test_the_hub_cache_is_served_in_place_at_its_main_revision(tmp_path: Path) -> None:
    _put_in_hub(tmp_path, "org/name", "aaa", tmp_path)
    _put_in_hub(tmp_path, "org/name", "bbb", tmp_path)
    (tmp_path / "datasets--org--name").mkdir()
    (found,) = discover_hub(tmp_path)
    assert (found.name, found.path.name) == ("org/name", "bbb")


def test_the_hub_cache_is_where_huggingface_puts_it() -> None:
    assert hub_cache({"HF_HUB_CACHE": "/x"}) == Path("/x")
    assert hub_cache({"HF_HOME": "/h"}) == Path("/h/hub")
    assert hub_cache({"XDG_CACHE_HOME": "/c"}) == Path("/c/huggingface/hub")


@pytest.mark.req("R25", "R32")
def test_what_is_listed_is_what_resolves_and_links_do_not_lead_out(tmp_path: Path) -> None:
    folder, hub = tmp_path / "models", tmp_path / "hub"
    write_model(folder / "plain")
    write_model(folder / "org" / "nested")
    write_model(folder / "broken", {"model_type": "roberta"})
    outside = write_model(tmp_path / "outside")
    (folder / "escape").symlink_to(outside)
    _put_in_hub(hub, "mlx-community/X-4bit", "aaa", tmp_path)
    registered = Registered(name="mine", path=outside, aliases=("other-name",))
    sources = Sources(registered=(registered,), folders=(folder,), hub=hub)

    async def look() -> None:
        catalogue = Catalogue(sources)
        await catalogue.refresh()
        names = {entry.name.display for entry in catalogue.entries()}
        assert names == {
            "demo:latest",
            "plain:latest",
            "org/nested:latest",
            "mine:latest",
            "mlx-community/X-4bit:latest",
        }
        for name in names:
            assert catalogue.resolve(name).name.display == name
        assert catalogue.resolve("OTHER-NAME").name.display == "mine:latest"
        assert {name: what.reason for name, what in catalogue.unservable.items()} == {
            "broken": "mlx-lm has no architecture 'roberta'"
        }
        for unknown in ("escape", "nosuch", "plain:7b"):
            with pytest.raises(ModelNotFound, match=f"model '{unknown}' not found"):
                catalogue.resolve(unknown)
        write_model(folder / "late")
        await catalogue.refresh()
        assert catalogue.resolve("late")

    asyncio.run(look())


@pytest.mark.req("R29")
def test_an_unchanged_disk_is_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_model(tmp_path / "models" / "plain")

    async def look() -> None:
        catalogue = Catalogue(Sources(demo=False, folders=(tmp_path / "models",)))
        await catalogue.refresh()
        monkeypatch.setattr(IndexBuilder, "build", lambda self: pytest.fail("looked again"))
        await catalogue.refresh()
        assert len(catalogue.entries()) == 1

    asyncio.run(look())


def test_models_of_equal_shape_have_different_digests(tmp_path: Path) -> None:
    one, two = write_model(tmp_path / "a"), write_model(tmp_path / "b")
    data = bytearray((two / "model.safetensors").read_bytes())
    data[-1] = 1
    (two / "model.safetensors").write_bytes(data)
    assert inspect_folder(one).digest != inspect_folder(two).digest


def test_encoders_are_listed_and_say_which_extra_they_need(tmp_path: Path) -> None:
    """Whether it is installed here or not; rerankers are told from classifiers by the shape of their last layer."""
    from tests.tiny_models.encoders import make_encoder, make_reranker

    encoder = inspect_folder(make_encoder(tmp_path / "encoder"))
    ranker = inspect_folder(make_reranker(tmp_path / "ranker", "xlm-roberta"))
    assert (encoder.engine, encoder.capabilities) == ("encode", frozenset({Capability.EMBEDDING}))
    assert (ranker.engine, ranker.capabilities) == ("rerank", frozenset({Capability.RERANK}))
    for files in (encoder, ranker):
        assert bool(files.unusable) != has_vlm()
        assert has_vlm() or "pip install 'mlx-router-server[encoders]'" in files.unusable
    with pytest.raises(NotServable, match="only those with one label"):
        inspect_folder(make_reranker(tmp_path / "classifier", labels=3))
