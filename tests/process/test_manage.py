"""Making, copying and removing models, over HTTP, with real weights."""

from __future__ import annotations

import asyncio
import errno
import hashlib
import json
import os
import resource
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from mlx_router_server.catalogue.catalogue import DEMO_FOLDER
from mlx_router_server.jobs.process import run_job
from mlx_router_server.management.storage import storage_faults
from mlx_router_shared.errors import InsufficientStorage
from mlx_router_shared.jobs import JobEvent, JobFailed, QuantizeJob
from tests.support.http import Reply, call
from tests.support.hub import Hub, running_hub
from tests.support.router import RouterProcess, running_router, wait_until

_PIRATE = "You are a pirate."


@pytest.fixture(scope="module")
def router(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RouterProcess]:
    home = tmp_path_factory.mktemp("managed")
    with running_router(home) as router:
        yield router


def _post(router: RouterProcess, path: str, **body: Any) -> Reply:
    return call(router, "POST", path, body)


def _create(router: RouterProcess, **body: Any) -> list[dict[str, Any]]:
    reply = call(router, "POST", "/api/create", body)
    assert reply.status == 200, reply.body
    return reply.lines()


def _names(router: RouterProcess) -> dict[str, dict[str, Any]]:
    return {model["name"]: model for model in router.client.get("/api/tags")["models"]}


def _upload(router: RouterProcess, data: bytes) -> str:
    digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
    assert call(router, "POST", f"/api/blobs/{digest}", data).status in (200, 201)
    return digest


def _prompt(router: RouterProcess, model: str, **body: Any) -> str:
    """What the model would be given."""
    body = {"model": model, "messages": [{"role": "user", "content": "Hello!"}], "_debug_render_only": True, **body}
    text: str = _post(router, "/api/chat", **body).json()["_debug_info"]["rendered_template"]
    return text


@pytest.mark.covers("T127", "T128", "T129", "T130", "T008")
def test_copy_and_delete(router: RouterProcess) -> None:
    copied = _post(router, "/api/copy", source="demo", destination="c1")
    assert (copied.status, copied.body) == (200, b"")
    names = _names(router)
    assert names["c1:latest"]["digest"] == names["demo:latest"]["digest"]
    assert router.generate("c1", prompt="Hello!")["model"] == "c1"
    assert [model["name"] for model in router.client.get("/api/ps")["models"]] == ["demo:latest"], "one worker"
    for source, destination, status, text in (
        ("nosuch", "c2", 404, 'model "nosuch" not found'), ("a b", "c2", 400, 'source "a b" is invalid'),
        ("demo", "../x", 400, 'destination "../x" is invalid'), ("c1", "demo", 400, "not created here"),
    ):  # fmt: skip
        reply = _post(router, "/api/copy", source=source, destination=destination)
        assert (reply.status, text in reply.json()["error"]) == (status, True)
    assert call(router, "DELETE", "/api/delete").json() == {"error": "missing request body"}
    assert call(router, "DELETE", "/api/delete", {}).json() == {"error": "model is required"}
    assert call(router, "DELETE", "/api/delete", {"model": "a b"}).json() == {"error": 'name "a b" is invalid'}
    deleted = call(router, "DELETE", "/api/delete", {"name": "c1"})
    assert (deleted.status, deleted.body) == (200, b"")
    assert "c1:latest" not in _names(router)
    again = call(router, "DELETE", "/api/delete", {"model": "c1"})
    assert (again.status, again.json()) == (404, {"error": "model 'c1' not found"})
    refused = call(router, "DELETE", "/api/delete", {"model": "demo"})
    assert (refused.status, "demo_model = false" in refused.json()["error"]) == (400, True)
    assert "demo:latest" in _names(router)


@pytest.mark.covers("T135", "T094")
def test_a_derived_model_says_what_it_was_told_to_and_shares_the_worker(router: RouterProcess) -> None:
    lines = _create(
        router, model="pirate:v1", system=_PIRATE, parameters={"temperature": 0, "num_predict": 4, "stop": ["x"]},
        messages=[{"role": "user", "content": "Ahoy?"}, {"role": "assistant", "content": "Arr."}],
        license="be kind", **{"from": "demo"},
    )  # fmt: skip
    assert lines[-1] == {"status": "success"}
    shown = _post(router, "/api/show", model="pirate:v1").json()
    assert shown["system"] == _PIRATE
    assert shown["details"]["parent_model"] == "demo:latest"
    assert shown["messages"] == [{"role": "user", "content": "Ahoy?"}, {"role": "assistant", "content": "Arr."}]
    assert shown["license"] == "be kind"
    assert "temperature                    0" in shown["parameters"]
    assert "SYSTEM" in shown["modelfile"]
    names = _names(router)
    assert names["pirate:v1"]["digest"] != names["demo:latest"]["digest"]
    prompt = _prompt(router, "pirate:v1")
    assert prompt.index(_PIRATE) < prompt.index("Ahoy?") < prompt.index("Arr.") < prompt.index("Hello!")
    own = _prompt(
        router, "pirate:v1", messages=[{"role": "system", "content": "MINE"}, {"role": "user", "content": "Hi"}]
    )
    assert "MINE" in own
    assert _PIRATE not in own
    answer = router.generate("pirate:v1", prompt="Tell me a long story.")
    assert (answer["done_reason"], answer["eval_count"]) == ("length", 4)
    more = router.generate("pirate:v1", prompt="Tell me a long story.", options={"num_predict": 6})
    assert more["eval_count"] == 6
    # On the other APIs too.
    chat = _post(router, "/v1/chat/completions", model="pirate:v1",
                 messages=[{"role": "user", "content": "Tell me a long story."}]).json()  # fmt: skip
    assert chat["usage"]["completion_tokens"] == 4
    raw = router.generate("pirate:v1", prompt="Hello!", raw=True, _debug_render_only=True)
    assert raw["_debug_info"]["rendered_template"] == "Hello!"
    # What is made from it has all of it, and lies on the same model.
    _create(router, model="captain", **{"from": "pirate:v1"}, parameters={"num_predict": 5})
    shown = _post(router, "/api/show", model="captain").json()
    assert (shown["system"], shown["details"]["parent_model"]) == (_PIRATE, "demo:latest")
    assert router.generate("captain", prompt="Tell me a long story.")["eval_count"] == 5
    assert [model["name"] for model in router.client.get("/api/ps")["models"]] == ["demo:latest"]
    # The base of a base may go.
    assert call(router, "DELETE", "/api/delete", {"model": "pirate:v1"}).status == 200
    assert router.generate("captain", prompt="Tell me a long story.")["eval_count"] == 5
    # Made anew under its name: what it was is gone.
    _create(router, model="Captain", **{"from": "demo"})
    assert "system" not in _post(router, "/api/show", model="captain").json()
    assert len([name for name in _names(router) if name.lower() == "captain:latest"]) == 1


def test_a_template_of_ollamas_kind_replaces_the_models_own(router: RouterProcess) -> None:
    template = "{{ if .System }}S:{{ .System }} {{ end }}U:{{ .Prompt }} A:"
    _create(router, model="templated", template=template, system="sys", **{"from": "demo"})
    assert _prompt(router, "templated") == "S:sys U:Hello! A:"
    shown = _post(router, "/api/show", model="templated").json()
    assert shown["template"] == template
    assert shown["capabilities"] == ["completion"]
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    refused = _post(router, "/api/chat", model="templated", messages=[{"role": "user", "content": "x"}], tools=tools)
    assert (refused.status, "does not support tools" in refused.json()["error"]) == (400, True)


@pytest.mark.covers("T136")
@pytest.mark.parametrize(
    ("body", "status", "sentence"),
    [
        ({"model": "x"}, 400, "neither 'from' or 'files' was specified"),
        ({"from": "demo"}, 400, "invalid model name"),
        ({"model": "a b", "from": "demo"}, 400, "invalid model name"),
        ({"model": "demo", "from": "demo"}, 400, "not created here"),
        ({"model": "x", "from": "nosuch"}, 404, "file does not exist"),
        ({"model": "x", "from": "demo", "parameters": {"temperature": "hot"}}, 400, "must be of type float32"),
        ({"model": "x", "from": "demo", "template": "{{ .Nope"}, 400, "template"),
        ({"model": "x", "from": "demo", "quantize": "q9"}, 400, "unsupported quantization"),
        ({"model": "x", "from": "demo", "remote_host": "https://x"}, 400, "local models only"),
        ({"model": "x", "from": "demo", "messages": [{"role": "robot", "content": "x"}]}, 400, "role"),
        ({"model": "x", "from": "demo", "files": {"a": "b"}}, 400, "not both"),
        ({"model": "x", "files": {"../config.json": "sha256:" + "0" * 64}}, 400, "cannot be the name of a file"),
        ({"model": "x", "files": {"config.json": "sha256:" + "0" * 64}}, 400, "was not uploaded"),
        ({"model": "x", "files": {"config.json": "nonsense"}}, 400, "invalid digest format"),
        ({"model": "x", "from": "demo", "adapters": {"a.gguf": "sha256:" + "0" * 64}}, 400, "not uploaded"),
    ],
)
def test_what_cannot_be_created_leaves_nothing(
    router: RouterProcess, body: dict[str, Any], status: int, sentence: str
) -> None:
    before = _names(router)
    for stream in (True, False):
        reply = _post(router, "/api/create", **body, stream=stream)
        told = reply.lines()[-1]["error"] if reply.status == 200 else reply.json()["error"]
        assert sentence in told
        assert reply.status in (status, 200 if stream else status)
    assert _names(router) == before


@pytest.mark.covers("T134")
def test_blobs(router: RouterProcess) -> None:
    data = b"some bytes" * 300_000
    digest = hashlib.sha256(data).hexdigest()
    assert call(router, "HEAD", f"/api/blobs/sha256:{digest}").status == 404
    assert call(router, "HEAD", "/api/blobs/sha256:zz").status == 400
    assert call(router, "POST", "/api/blobs/md5:00", data).json() == {"error": "invalid digest format"}
    assert call(router, "POST", f"/api/blobs/sha256:{digest}", data).status == 201
    assert call(router, "POST", f"/api/blobs/sha256-{digest}", data).status == 200
    assert call(router, "HEAD", f"/api/blobs/sha256:{digest}").status == 200
    wrong = call(router, "POST", f"/api/blobs/sha256:{'0' * 64}", data)
    assert wrong.status == 400
    assert wrong.json()["error"] == f'digest mismatch, expected "sha256:{"0" * 64}", got "sha256:{digest}"'
    assert call(router, "HEAD", f"/api/blobs/sha256:{'0' * 64}").status == 404
    for path in ("..%2f..%2fetc%2fpasswd", "%00", "sha256:" + "0" * 63):
        assert call(router, "HEAD", f"/api/blobs/{path}").status in (400, 404)


def test_a_model_of_uploaded_files_and_what_is_made_from_it(router: RouterProcess) -> None:
    files = {path.name: _upload(router, path.read_bytes()) for path in DEMO_FOLDER.iterdir() if path.is_file()}
    assert _create(router, model="uploaded", files=files)[-1] == {"status": "success"}
    assert router.generate("uploaded", prompt="Hello!")["response"].startswith("Hello! I am the demo")
    _create(router, model="upper", **{"from": "uploaded"}, system="x")
    assert call(router, "DELETE", "/api/delete", {"model": "uploaded"}).status == 200
    assert router.generate("upper", prompt="Hello!")["done"], "its weights are needed yet"
    freed = call(router, "DELETE", "/api/delete", {"model": "upper"})
    assert int(freed.headers["x-freed-bytes"]) > 500_000
    broken = {**files, "config.json": _upload(router, b'{"model_type": "roberta"}')}
    told = _create(router, model="broken", files=broken)[-1]
    assert "'roberta'" in told["error"]


@pytest.mark.slow
def test_weights_that_no_model_is_made_of_are_not_kept(home: Path) -> None:
    weights = home / "store" / "weights"

    def kept() -> set[str]:
        return {path.name for path in weights.iterdir()}

    with running_router(home) as router:
        files = {path.name: _upload(router, path.read_bytes()) for path in DEMO_FOLDER.iterdir() if path.is_file()}
        assert _create(router, model="made", files=files)[-1] == {"status": "success"}
        first = kept()
        config = json.loads((DEMO_FOLDER / "config.json").read_text()) | {"max_position_embeddings": 2048}
        other = {**files, "config.json": _upload(router, json.dumps(config).encode())}
        # Something goes wrong once the weights are there: an adapter that cannot be one.
        adapter = dict.fromkeys(("adapter_config.json", "adapters.safetensors"), files["config.json"])
        told = _create(router, model="made", files=other, adapters=adapter, quantize="q4_0")[-1]
        assert "without an adapter" in told["error"]
        assert kept() == first, "what failed is gone, and what was there before is there"
        assert router.generate("made", prompt="Hello!")["done"]
        assert _create(router, model="made", files=other)[-1] == {"status": "success"}
        second = kept()
        assert len(second) == 1, "what was replaced is gone"
        assert second != first
        assert _create(router, model="packed", files=files, quantize="q4_0")[-1] == {"status": "success"}
        assert len(kept()) == 2, "of the packed one the packed weights"
        assert _create(router, model="made", **{"from": "demo"})[-1] == {"status": "success"}
        assert len(kept()) == 1
        assert router.generate("packed", options={"num_predict": 2})["eval_count"] == 2
    forgotten = weights / ("0" * 32)
    forgotten.mkdir()
    os.utime(forgotten, (0, 0))
    os.utime(next(iter(weights.iterdir())), (0, 0))
    with running_router(home) as router:
        wait_until(lambda: not forgotten.exists(), "what nobody needs is gone")
        assert set(_names(router)) == {"demo:latest", "made:latest", "packed:latest"}


def test_an_adapter_makes_another_worker(router: RouterProcess, tmp_path: Path) -> None:
    from tests.tiny_models.adapter import make_random_adapter

    make_random_adapter(DEMO_FOLDER, tmp_path / "lora")
    adapters = {path.name: _upload(router, path.read_bytes()) for path in (tmp_path / "lora").iterdir()}
    assert _create(router, model="tuned", **{"from": "demo"}, adapters=adapters)[-1] == {"status": "success"}
    options = {"temperature": 0, "num_predict": 8}
    plain = router.generate("demo", prompt="Hello!", options=options)["response"]
    tuned = router.generate("tuned", prompt="Hello!", options=options)["response"]
    assert plain != tuned
    loaded = {model["name"] for model in router.client.get("/api/ps")["models"]}
    assert {"demo:latest", "tuned:latest"} <= loaded
    assert "ADAPTER" in _post(router, "/api/show", model="tuned").json()["modelfile"]
    assert call(router, "DELETE", "/api/delete", {"model": "tuned"}).status == 200
    wait_until(lambda: len(router.client.get("/api/ps")["models"]) == 1, "its worker has left")


@pytest.mark.slow
def test_adapters_system_and_options_of_the_configuration(home: Path, tmp_path: Path) -> None:
    from tests.tiny_models.adapter import make_random_adapter

    make_random_adapter(DEMO_FOLDER, tmp_path / "lora")
    (home / "config.toml").write_text(
        f'[models."tuned"]\npath = {json.dumps(str(DEMO_FOLDER))}\nadapter = {json.dumps(str(tmp_path / "lora"))}\n'
        f'[models."demo"]\nsystem = "{_PIRATE}"\noptions = {{ num_predict = 3 }}\n'
    )
    with running_router(home) as router:
        assert _PIRATE in _prompt(router, "demo")
        assert router.generate("demo", prompt="Tell me a long story.")["eval_count"] == 3
        greedy = {"temperature": 0, "num_predict": 8}
        assert (
            router.generate("demo", prompt="Hello!", options=greedy, system="x")["response"]
            != router.generate("tuned", prompt="Hello!", options=greedy, system="x")["response"]
        )


def test_quantising_is_a_job_with_progress(home: Path, models_dir: Path) -> None:
    with running_router(home, "--models-dir", str(models_dir)) as router:
        lines = _create(router, model="small-4bit", quantize="q4_K_M", **{"from": "small"})
        assert lines[-1] == {"status": "success"}
        assert any(line["status"].startswith("quantizing") for line in lines)
        assert any("completed" in line for line in lines)
        names = _names(router)
        assert names["small-4bit:latest"]["details"]["quantization_level"] == "4bit"
        assert names["small-4bit:latest"]["size"] < 0.5 * names["small:latest"]["size"]
        assert router.generate("small-4bit", options={"num_predict": 2})["eval_count"] == 2
        again = _post(router, "/api/create", model="twice", quantize="q4_0", **{"from": "small-4bit"})
        assert (again.status, "F16, BF16 and F32" in again.json()["error"]) == (400, True)
        assert sorted(path.name[0] != "." for path in (home / "store" / "weights").iterdir()) == [True]


def test_a_repository_goes_only_when_it_is_ours_and_nobody_needs_it(home: Path) -> None:
    repo = "mlx-community/Tiny-4bit"
    with running_hub() as hub:
        hub.add_folder(repo, DEMO_FOLDER)
        _check_repository(home, hub, repo)


def _check_repository(home: Path, hub: Hub, repo: str) -> None:
    cache = home / "hf" / "hub"
    other = cache / "models--org--by-hand"
    shutil.copytree(DEMO_FOLDER, other / "snapshots" / "abc")
    (other / "refs").mkdir()
    (other / "refs" / "main").write_text("abc")
    (home / "config.toml").write_text(f'[model_aliases]\n"tiny:1b" = "{repo}"\n')
    with running_router(home, variables={"HF_ENDPOINT": hub.url}) as router:
        assert _post(router, "/api/pull", model="tiny:1b", stream=False).status == 200
        _create(router, model="mine", **{"from": repo}, system="x")
        refused = call(router, "DELETE", "/api/delete", {"model": repo})
        assert (refused.status, "mine:latest" in refused.json()["error"]) == (400, True)
        assert call(router, "DELETE", "/api/delete", {"model": "mine"}).status == 200
        # By the short name that it was pulled by: the files go too.
        gone = call(router, "DELETE", "/api/delete", {"model": "tiny:1b"})
        assert gone.status == 200
        assert int(gone.headers["x-freed-bytes"]) > 500_000
        assert set(_names(router)) == {"demo:latest", "org/by-hand:latest"}
        assert not (cache / f"models--{repo.replace('/', '--')}").exists()
        refused = call(router, "DELETE", "/api/delete", {"model": "org/by-hand"})
        assert (refused.status, "other programs" in refused.json()["error"]) == (400, True)
        assert call(router, "DELETE", "/api/delete", {"model": "org/by-hand", "force": True}).status == 200
        assert not other.exists()
        assert set(_names(router)) == {"demo:latest"}
        # From an absent model: it is pulled first.
        lines = _create(router, model="fresh", **{"from": "tiny:1b"}, system="x")
        assert lines[0] == {"status": "pulling manifest"}
        assert lines[-1] == {"status": "success"}
        assert router.generate("fresh", prompt="Hello!")["done"]


def test_what_another_program_fetched_does_not_become_ours_by_a_pull(home: Path) -> None:
    repo = "mlx-community/Tiny-4bit"
    (home / "config.toml").write_text(f'[model_aliases]\n"tiny:1b" = "{repo}"\n')
    with running_hub() as hub:
        hub.add_folder(repo, DEMO_FOLDER)
        folder = home / "hf" / "hub" / f"models--{repo.replace('/', '--')}"
        with running_router(home, variables={"HF_ENDPOINT": hub.url}) as router:
            assert _post(router, "/api/pull", model=repo, stream=False).status == 200
            # Asked for by its own name as well: it does not go with the short one.
            assert _post(router, "/api/pull", model="tiny:1b", stream=False).status == 200
            assert call(router, "DELETE", "/api/delete", {"model": "tiny:1b"}).status == 200
            assert set(_names(router)) == {"demo:latest", f"{repo}:latest"}
            # Another program fetches it anew.
            shutil.rmtree(folder)
            shutil.copytree(DEMO_FOLDER, folder / "snapshots" / "abc")
            (folder / "refs").mkdir()
            (folder / "refs" / "main").write_text("abc")
            assert _post(router, "/api/pull", model="tiny:1b", stream=False).status == 200
            assert call(router, "DELETE", "/api/delete", {"model": "tiny:1b"}).status == 200
            assert folder.exists()
            refused = call(router, "DELETE", "/api/delete", {"model": repo})
            assert (refused.status, "other programs" in refused.json()["error"]) == (400, True)
            assert call(router, "DELETE", "/api/delete", {"model": repo, "force": True}).status == 200
            assert not folder.exists()
            assert _post(router, "/api/pull", model=repo, stream=False).status == 200
            assert call(router, "DELETE", "/api/delete", {"model": repo}).status == 200, "now it is ours"


@pytest.mark.slow
def test_a_pulled_or_created_model_outlives_the_router_and_a_lost_base_is_told(home: Path, tmp_path: Path) -> None:
    folder = tmp_path / "models"
    shutil.copytree(DEMO_FOLDER, folder / "base")
    arguments = ["--models-dir", str(folder), "--demo-model", "false"]
    with running_router(home, *arguments) as router:
        _create(router, model="mine", **{"from": "base"}, system="x")
    with running_router(home, *arguments) as router:
        assert set(_names(router)) == {"base:latest", "mine:latest"}
        (folder / "base").rename(tmp_path / "elsewhere")
        wait_until(lambda: not _names(router), "both are gone")
        assert "base:latest" in router.status()["router"]["unservable"]["mine:latest"]
        (home / "store" / "manifests" / "broken.json").write_text("{")
        wait_until(lambda: "broken.json" in router.status()["router"]["unservable"], "the broken one is told")


def test_pushing_is_refused_by_a_sentence(router: RouterProcess) -> None:
    refused = _post(router, "/api/push", model="demo")
    assert (refused.status, "hf upload" in refused.json()["error"]) == (400, True)
    assert _post(router, "/api/push").json() == {"error": "model is required"}


@pytest.mark.req("R41")
def test_the_official_client_manages_models(home: Path, tmp_path: Path) -> None:
    """All of its calls about models, with what it makes of the answers."""
    import ollama

    repo = "mlx-community/Tiny-4bit"
    with running_hub() as hub:
        hub.add_folder(repo, DEMO_FOLDER)
        with running_router(home, variables={"HF_ENDPOINT": hub.url}) as router:
            client = ollama.Client(host=router.url)
            steps = list(client.pull(repo, stream=True))
            assert steps[-1].status == "success"
            assert max(step.completed or 0 for step in steps) > 500_000
            assert client.pull(repo).status == "success"
            weights = client.create_blob(str(DEMO_FOLDER / "model.safetensors"))
            assert weights.startswith("sha256:")
            made = client.create("brief", from_=repo, system="be brief", parameters={"num_predict": 3})
            assert made.status == "success"
            assert client.copy("brief", "again").status == "success"
            assert {model.model for model in client.list().models} == {
                "demo:latest", f"{repo}:latest", "brief:latest", "again:latest",
            }  # fmt: skip
            shown = client.show("again")
            assert "num_predict" in (shown.parameters or "")
            assert (client.generate("again", "Tell me a long story.").eval_count, len(client.ps().models)) == (3, 1)
            for name in ("again", "brief", repo):
                assert client.delete(name).status == "success"
            assert {model.model for model in client.list().models} == {"demo:latest"}
            with pytest.raises(ollama.ResponseError, match="file does not exist"):
                client.pull("nosuch")
            with pytest.raises(ollama.ResponseError, match="file does not exist"):
                list(client.pull("nosuch", stream=True))
            with pytest.raises(ollama.ResponseError, match="hf upload"):
                client.push("demo")
            client._client.close()


def test_a_removed_home_folder_is_made_again(home: Path) -> None:
    with running_router(home) as router:
        assert _post(router, "/api/copy", source="demo", destination="before").status == 200
        router.generate("before", options={"num_predict": 1})
        shutil.rmtree(home / "store")
        wait_until(lambda: "before:latest" not in _names(router), "it is seen gone")
        assert _post(router, "/api/copy", source="demo", destination="after").status == 200
        assert "after:latest" in _names(router)
        _upload(router, b"{}")


def test_a_store_that_cannot_be_written_is_told_and_nothing_is_lost(home: Path) -> None:
    with running_router(home) as router:
        _post(router, "/api/copy", source="demo", destination="kept")
        before = resource.prlimit(router.pid, resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
        copied = _post(router, "/api/copy", source="demo", destination="new")
        assert copied.status == 507
        assert copied.json()["error"].startswith("the server cannot write to its storage: file too large")
        assert str(home) not in copied.body.decode()
        *begin, last = _post(router, "/api/create", model="new", **{"from": "demo"}).lines()
        assert begin
        assert last["error"].startswith("the server cannot write to its storage: ")
        data = b"x" * 10
        upload = call(router, "POST", f"/api/blobs/sha256:{hashlib.sha256(data).hexdigest()}", data)
        assert upload.status == 507
        resource.prlimit(router.pid, resource.RLIMIT_FSIZE, before)
        assert {"kept:latest"} == {name for name in _names(router) if name.startswith(("kept", "new"))}
        assert _post(router, "/api/copy", source="demo", destination="new").status == 200
        assert "event=storage_fault" in router.log
        # Folders in place of which something else lies: nothing of the path is told.
        shutil.rmtree(home / "store" / "manifests")
        (home / "store" / "manifests").write_text("")
        for path, body in (
            ("/api/copy", {"source": "demo", "destination": "c"}),
            ("/api/create", {"model": "c", "from": "demo"}),
            ("/api/create", {"model": "c", "from": "demo", "stream": False}),
        ):
            reply = _post(router, path, **body)
            assert reply.status == 507, (path, reply.body)
            assert reply.json()["error"].startswith("the server cannot write to its storage: "), path
            assert str(home) not in reply.body.decode()


def test_the_same_model_changed_by_many_at_once(router: RouterProcess) -> None:
    """Each change is done or finds that the model is gone."""
    for _ in range(5):
        assert _post(router, "/api/create", model="shared", system="x", stream=False, **{"from": "demo"}).status == 200
        with ThreadPoolExecutor(12) as pool:
            changes = [
                *(pool.submit(call, router, "DELETE", "/api/delete", {"model": "shared"}) for _ in range(4)),
                *(pool.submit(_post, router, "/api/copy", source="shared", destination=f"s{n}") for n in range(4)),
                *(
                    pool.submit(_post, router, "/api/create", model=f"t{n}", stream=False, **{"from": "shared"})
                    for n in range(4)
                ),
            ]
            replies = [change.result() for change in changes]
        assert {reply.status for reply in replies} <= {200, 404}, [reply.body for reply in replies]
        assert sum(reply.status == 200 for reply in replies[:4]) == 1
        for name in [name for name in _names(router) if name[0] in "st" and name[1].isdigit()]:
            assert call(router, "DELETE", "/api/delete", {"model": name}).status == 200


def test_a_job_that_tells_nothing_is_ended(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As one that was stopped, or hangs in a driver."""
    monkeypatch.setattr("mlx_router_server.jobs.process._SILENCE_SECONDS", 0.05)

    async def run() -> list[JobEvent]:
        job = QuantizeJob(source=str(tmp_path), target=str(tmp_path), bits=4, group_size=64, mode="affine")
        async with asyncio.timeout(30):
            return [event async for event in run_job(job)]

    (last,) = asyncio.run(run())
    assert isinstance(last, JobFailed)
    assert last.message == "the job has reported nothing for 0.05 s and was ended"


@pytest.mark.parametrize(
    ("error", "becomes"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), InsufficientStorage),
        (PermissionError(errno.EACCES, "Permission denied"), InsufficientStorage),
        (OSError(errno.EMFILE, "Too many open files"), OSError),
        (TimeoutError(), TimeoutError),
        (ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"), ConnectionResetError),
    ],
)
def test_only_faults_of_the_disk_are_faults_of_the_storage(error: OSError, becomes: type[Exception]) -> None:
    with pytest.raises(becomes) as caught, storage_faults():
        raise error
    assert type(caught.value) is becomes
