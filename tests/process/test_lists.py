"""What is listed is what can be asked for: on all APIs, before, during and after whatever happens."""

from __future__ import annotations

import json
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from mlx_router_server.catalogue.catalogue import DEMO_FOLDER
from tests.support.fakes import fake_config
from tests.support.http import call
from tests.support.router import RouterProcess, running_router, wait_until, write_config
from tests.unit.test_catalogue import write_model


def _cache(home: Path) -> None:
    """Twelve repositories: seven that can be asked, five that cannot."""
    hub = home / "hf" / "hub"

    def put(repo: str, config: dict[str, Any] | None = None, **files: str) -> None:
        base = hub / f"models--{repo.replace('/', '--')}"
        write_model(base / "snapshots" / "abc", config, **files)
        (base / "refs").mkdir()
        (base / "refs" / "main").write_text("abc")

    for number in range(5):
        put(f"org/chat-{number}", None, **{"chat_template.jinja": "{{ messages }}"})
    put("org/vectors", None, **{"1_Pooling__config_json": "{}"})
    put("Org/Plain")
    put("org/whisper", {"model_type": "whisper"})
    put("org/kokoro", {"model_type": "kokoro"})
    put("org/packed", {"model_type": "qwen3", "quantization_config": {"quant_method": "bitsandbytes"}})
    put("org/broken", {"model_type": "roberta_of_old"})
    put("org/part", None, **{"model.safetensors.index_json": json.dumps({"weight_map": {"a": "model-9.safetensors"}})})


def _lists(router: RouterProcess) -> dict[str, set[str]]:
    anthropic = {"anthropic-version": "2023-06-01"}
    return {
        "tags": {model["name"] for model in call(router, "GET", "/api/tags").json()["models"]},
        "openai": {model["id"] for model in call(router, "GET", "/v1/models").json()["data"]},
        "anthropic": {
            model["id"] for model in call(router, "GET", "/v1/models?limit=1000", **anthropic).json()["data"]
        },
        "admin": {model["name"] for model in router.status()["models"]},
    }


@pytest.mark.req("R25", "R28")
def test_what_is_listed_is_what_resolves_on_all_apis(home: Path) -> None:
    _cache(home)
    with running_router(home) as router:
        lists = _lists(router)
        expected = {f"org/chat-{number}:latest" for number in range(5)}
        expected |= {"org/vectors:latest", "Org/Plain:latest", "demo:latest"}
        assert lists == dict.fromkeys(lists, expected)
        candidates = expected | {f"org/{name}:latest" for name in ("whisper", "kokoro", "packed", "broken", "part")}
        resolved = {name for name in candidates if call(router, "POST", "/api/show", {"model": name}).status == 200}
        assert resolved == expected
        assert {name for name in candidates if call(router, "GET", f"/v1/models/{name}").status == 200} == expected
        told = router.status()["router"]
        assert set(told["unservable"]) == {f"org/{name}" for name in ("whisper", "kokoro", "packed", "broken", "part")}
        assert told["unservable_kinds"]["org/whisper"] == "audio-in"
        assert "incomplete" in told["unservable"]["org/part"]


@pytest.mark.req("R25")
def test_with_on_demand_off_only_what_is_served_is_listed(home: Path) -> None:
    _cache(home)
    (home / "config.toml").write_text("[models.demo]\npreload = true\n")
    with running_router(home, "--on-demand", "false") as router:
        router.wait_state("demo", "ready")
        lists = _lists(router)
        del lists["admin"]  # the operator sees all of them
        assert set(map(frozenset, lists.values())) == {frozenset({"demo:latest"})}
        assert call(router, "POST", "/api/show", {"model": "org/chat-1"}).status == 404


@pytest.mark.req("R25", "R30")
def test_each_entry_says_what_it_is_and_lists_can_be_narrowed(home: Path) -> None:
    _cache(home)
    write_config(home, {"org/chat-1": {"aliases": ["first", "second:1b"]}})
    with running_router(home) as router:
        entries = {model["id"]: model for model in call(router, "GET", "/v1/models").json()["data"]}
        for entry in entries.values():
            assert entry["size"] > 0
            assert entry["context_length"] == 4096
            assert entry["state"] == "unloaded"
        assert entries["org/chat-1:latest"]["aliases"] == ["first", "second:1b"]
        assert entries["org/vectors:latest"]["kind"] == "embedding"
        assert entries["Org/Plain:latest"]["kind"] == "completion"
        tags = {model["name"]: model for model in call(router, "GET", "/api/tags").json()["models"]}
        assert tags["org/vectors:latest"]["capabilities"] == ["embedding"]
        assert tags["org/chat-1:latest"]["aliases"] == ["first", "second:1b"]

        def ids(query: str) -> set[str]:
            return {model["id"] for model in call(router, "GET", f"/v1/models?{query}").json()["data"]}

        assert ids("type=embedding") == ids("capability=embedding") == {"org/vectors:latest"}
        assert ids("type=chat") == {f"org/chat-{number}:latest" for number in range(5)} | {"demo:latest"}
        assert ids("capability=tools") == {"demo:latest"}
        assert ids("capability=tools&type=embedding") == set()
        assert call(router, "GET", "/v1/models?type=nonsense").status == 400
        router.generate("demo", prompt="Hello!")
        entries = {model["id"]: model for model in call(router, "GET", "/v1/models").json()["data"]}
        assert entries["demo:latest"]["state"] == "ready"


@pytest.mark.req("R30", "R42")
@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/embeddings", {"model": "org/chat-1", "input": "x"}),
        ("/api/embed", {"model": "org/chat-1", "input": "x"}),
        ("/v1/rerank", {"model": "org/chat-1", "query": "x", "documents": ["y"]}),
        ("/v1/chat/completions", {"model": "org/vectors", "messages": [{"role": "user", "content": "x"}]}),
        ("/v1/messages", {"model": "org/vectors", "max_tokens": 5, "messages": [{"role": "user", "content": "x"}]}),
        ("/api/generate", {"model": "org/vectors", "prompt": "x"}),
        ("/v1/responses", {"model": "org/vectors", "input": "x"}),
    ],
)
def test_the_wrong_kind_of_model_is_told_before_anything_is_loaded(home: Path, path: str, body: dict[str, Any]) -> None:
    _cache(home)
    with running_router(home) as router:
        assert call(router, "POST", path, body).status == 400
        assert all(model["state"] == "unloaded" for model in router.status()["models"])
        assert router.children() == []


@pytest.mark.slow
@pytest.mark.req("R29")
def test_a_new_repository_is_there_within_five_seconds_and_goes_as_quickly(home: Path) -> None:
    _cache(home)
    with running_router(home) as router:
        before = _lists(router)["tags"]
        shutil.copytree(DEMO_FOLDER, home / "hf" / "hub" / "models--new--comer" / "snapshots" / "1")
        began = time.monotonic()
        wait_until(lambda: _lists(router)["tags"] == before | {"new/comer:latest"}, "it is listed", 5)
        assert router.generate("new/comer", prompt="Hello!")["done"]
        assert time.monotonic() - began < 30
        shutil.rmtree(home / "hf" / "hub" / "models--new--comer")
        wait_until(lambda: _lists(router)["tags"] == before, "it is gone", 5)


@pytest.mark.req("R26")
def test_lists_are_the_same_during_swaps_failures_and_reloads(home: Path) -> None:
    scripts: dict[str, dict[str, Any]] = {"a": {"tokens": 1}, "b": {"tokens": 1}, "broken": {"fail_load": "no"}}
    arguments = fake_config(home, scripts, max_loaded_models=1)
    with running_router(home, *arguments) as router:
        expected = _lists(router)
        wrong: list[Any] = []
        over = threading.Event()

        def watch() -> None:
            while not over.is_set():
                if (seen := _lists(router)) != expected:
                    wrong.append(seen)

        watcher = threading.Thread(target=watch)
        watcher.start()
        for number in range(6):
            name = ("a", "b", "broken")[number % 3]
            assert call(router, "POST", "/api/generate", {"model": name, "prompt": "x"}).status in (200, 500, 503)
        router.process.send_signal(1)
        router.wait_line("event=reloaded")
        over.set()
        watcher.join(10)
        assert wrong == []
        assert _lists(router) == expected
