"""Pulling from a hub on loopback with the real huggingface_hub client, through a real router."""

from __future__ import annotations

import hashlib
import http.client
import json
import shutil
import signal
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil
import pytest

from mlx_router_server.access.keys import Scope, keys_file, make_key, write_keys
from mlx_router_server.catalogue.catalogue import DEMO_FOLDER
from mlx_router_server.jobs.pull import Pull
from mlx_router_shared.jobs import OURS, PullJob
from tests.support.http import RawStream, Reply, call
from tests.support.hub import Hub, running_hub
from tests.support.router import DEADLINE, RouterProcess, running_router, still_alive, wait_until

_REPO = "mlx-community/Tiny-4bit"


@pytest.fixture
def hub() -> Iterator[Hub]:
    with running_hub() as hub:
        hub.add_folder(_REPO, DEMO_FOLDER, **{
            "README.md": b"# read me", "modeling_evil.py": b"raise SystemExit", "pytorch_model.bin": b"x" * 1000,
            "onnx/model.onnx": b"x", "sub/config.json": b"{}",
        })  # fmt: skip
        yield hub


def _with(hub: Hub, home: Path, *arguments: str, **variables: str) -> Any:
    return running_router(
        home, "--demo-model", "false", *arguments,
        variables={"HF_ENDPOINT": hub.url, "HF_TOKEN_PATH": str(home / "no-token"), **variables},
    )  # fmt: skip


def _pull(router: RouterProcess, model: str = _REPO, **body: Any) -> list[dict[str, Any]]:
    reply = call(router, "POST", "/api/pull", {"model": model, **body})
    assert reply.status == 200, reply.body
    assert reply.headers["content-type"] == "application/x-ndjson"
    return reply.lines()


def _answers(router: RouterProcess, model: str) -> None:
    assert router.generate(model, prompt="Hello!")["response"].startswith("Hello! I am the demo model")


def _repository(home: Path) -> Path:
    return home / "hf" / "hub" / f"models--{_REPO.replace('/', '--')}"


def _large(tmp_path: Path, size: int = 40_000_000) -> Path:
    """A random model of this size, in a folder."""
    from tests.tiny_models.random_model import make_random_model

    make_random_model(tmp_path / "large", size_bytes=size, seed=3)
    return tmp_path / "large"


@pytest.mark.covers("T131", "T133")
def test_a_pull_tells_its_progress_and_the_model_answers_at_once(hub: Hub, home: Path) -> None:
    with _with(hub, home) as router:
        lines = _pull(router)
        assert lines[0] == {"status": "pulling manifest"}
        assert [line["status"] for line in lines[-2:]] == ["writing manifest", "success"]
        told: dict[str, list[tuple[int, int]]] = {}
        for line in lines:
            if "digest" in line:
                assert line["status"].startswith("pulling ")
                told.setdefault(line["digest"], []).append((line["total"], line["completed"]))
        weights = hashlib.sha256((DEMO_FOLDER / "model.safetensors").read_bytes()).hexdigest()
        assert set(told) == {f"sha256:{weights}"} | {digest for digest in told if weights not in digest}
        for steps in told.values():
            assert len({total for total, _ in steps}) == 1
            assert [done for _, done in steps] == sorted(done for _, done in steps)
            assert steps[-1][0] == steps[-1][1]
        _answers(router, _REPO)
        snapshot = _repository(home) / "snapshots" / hub.repositories[_REPO].commit
        wanted = {path.name for path in DEMO_FOLDER.iterdir() if path.suffix != ".md"}
        assert {path.name for path in snapshot.iterdir()} == wanted, "no code, no other formats, nothing to read"
        record = json.loads((home / "store" / "pulled.json").read_text())
        assert [(entry["repository"], entry["revision"]) for entry in record] == [
            (_REPO, hub.repositories[_REPO].commit)
        ]
        # Again: all of the sequence, nothing of the weights.
        hub.sent.clear()
        assert _pull(router)[-1] == {"status": "success"}
        assert hub.sent == {}
        assert call(router, "POST", "/api/pull", {"name": _REPO, "stream": False}).json() == {"status": "success"}
    assert hub.tokens == set()


@pytest.mark.slow
@pytest.mark.covers("T133")
def test_leaving_ends_the_download_and_the_next_one_goes_on(hub: Hub, home: Path, tmp_path: Path) -> None:
    folder = _large(tmp_path)
    hub.add_folder(_REPO, folder)
    hub.gate = threading.Event()
    size = (folder / "model.safetensors").stat().st_size
    with _with(hub, home) as router:
        for _ in range(3):  # whoever comes while it is being ended begins anew
            _leave_at_half(router, hub)
        wait_until(lambda: not _jobs(router), "the job is gone")
        (part,) = _repository(home).glob("blobs/*.incomplete")
        have = part.stat().st_size
        assert have >= size // 2
        assert router.client.get("/api/tags") == {"models": []}
        hub.gate.set()
        hub.sent.clear()
        lines = _pull(router)
        assert lines[-1] == {"status": "success"}
        assert hub.asked("model.safetensors")[-1] == f"bytes={have}-"
        first = next(line for line in lines if line.get("total") == size)
        assert first["completed"] >= have
        assert router.generate(_REPO, options={"num_predict": 1})["done"]


def _leave_at_half(router: RouterProcess, hub: Hub) -> None:
    """Begin a pull, and hang up when half of the weights have come."""
    parts = urlsplit(router.url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=DEADLINE)
    connection.request("POST", "/api/pull", json.dumps({"model": _REPO}).encode())
    response = connection.getresponse()
    while line := json.loads(response.readline()):
        if line.get("total", 0) > 1_000_000 and line["completed"] >= line["total"] // 2:
            break
    response.close()
    connection.close()


def _jobs(router: RouterProcess) -> list[psutil.Process]:
    def is_job(child: psutil.Process) -> bool:
        try:
            return "mlx_router_server.jobs.pull" in child.cmdline()
        except psutil.Error:
            return False  # it ends in this moment

    return [child for child in router.children() if is_job(child)]


@pytest.mark.req("R48")
def test_a_killed_router_takes_its_download_along_and_the_next_one_goes_on(
    hub: Hub, home: Path, tmp_path: Path
) -> None:
    folder = _large(tmp_path)
    hub.add_folder(_REPO, folder)
    hub.gate = threading.Event()
    with _with(hub, home) as router:
        puller = threading.Thread(target=_ignore_errors, args=(router,))
        puller.start()
        (job,) = wait_until(lambda: _jobs(router), "a job")
        wait_until(lambda: _part_size(home) >= 15_000_000, "a good part of it has come")
        router.process.send_signal(signal.SIGKILL)
        job.wait(DEADLINE)
        puller.join(DEADLINE)
        router.process.wait(DEADLINE)
    have = _part_size(home)
    assert have >= 15_000_000
    hub.gate.set()
    hub.sent.clear()
    with _with(hub, home) as router:
        assert _pull(router)[-1] == {"status": "success"}
        assert hub.asked("model.safetensors")[-1] == f"bytes={have}-"
        (blob,) = (path for path in _repository(home).glob("blobs/*") if path.stat().st_size > 10_000_000)
        assert hashlib.sha256(blob.read_bytes()).hexdigest() == blob.name


def _part_size(home: Path) -> int:
    size = 0
    for part in _repository(home).glob("blobs/*.incomplete"):
        with suppress(FileNotFoundError):  # it has become whole meanwhile
            size += part.stat().st_size
    return size


def _ignore_errors(router: RouterProcess) -> None:
    try:
        _pull(router)
    except (OSError, http.client.HTTPException, ValueError, AssertionError):
        pass  # the router is killed meanwhile


def test_a_second_signal_ends_downloads_as_well(hub: Hub, home: Path, tmp_path: Path) -> None:
    folder = _large(tmp_path)
    hub.add_folder(_REPO, folder)
    hub.gate = threading.Event()
    with _with(hub, home) as router, ThreadPoolExecutor(1) as pool:
        pulling = pool.submit(_pull, router)
        wait_until(lambda: _part_size(home), "some of it has come")
        jobs = _jobs(router)
        router.process.terminate()
        wait_until(lambda: _is_closed(router), "it takes no new connections")
        assert not pulling.done(), "the first signal cuts nothing"
        router.process.terminate()
        assert "shutting down" in pulling.result(DEADLINE)[-1]["error"]
        assert router.process.wait(DEADLINE) == -signal.SIGTERM
        assert still_alive(jobs) == []


def _is_closed(router: RouterProcess) -> bool:
    parts = urlsplit(router.url)
    try:
        socket.create_connection((parts.hostname or "", parts.port or 0), DEADLINE).close()
    except ConnectionRefusedError:
        return True
    return False


def test_two_who_want_the_same_share_one_download(hub: Hub, home: Path, tmp_path: Path) -> None:
    folder = _large(tmp_path)
    hub.add_folder(_REPO, folder)
    hub.gate = threading.Event()
    with _with(hub, home) as router:
        lines: list[list[dict[str, Any]]] = []
        threads = [threading.Thread(target=lambda: lines.append(_pull(router))) for _ in range(3)]
        for thread in threads:
            thread.start()
        wait_until(lambda: hub.sent.get("model.safetensors", 0) > 20_000_000, "half of it has come")
        assert len(_jobs(router)) == 1
        # One that leaves does not end it for the others.
        _leave_at_half(router, hub)
        hub.gate.set()
        for thread in threads:
            thread.join(DEADLINE)
        assert [told[-1] for told in lines] == [{"status": "success"}] * 3
        assert hub.sent["model.safetensors"] == (folder / "model.safetensors").stat().st_size


def test_a_connection_that_breaks_off_is_gone_on_with(hub: Hub, home: Path, tmp_path: Path) -> None:
    folder = _large(tmp_path)
    hub.add_folder(_REPO, folder)
    hub.drop_after["model.safetensors"] = [5_000_000, 7_000_000]
    with _with(hub, home) as router:
        assert _pull(router)[-1] == {"status": "success"}
        size = (folder / "model.safetensors").stat().st_size
        assert hub.sent["model.safetensors"] <= size + 3_000_000, "what had come was not fetched again"
        assert len([said for said in hub.asked("model.safetensors") if said.startswith("bytes=")]) == 2


def test_content_that_is_not_what_was_announced_is_thrown_away(hub: Hub, home: Path) -> None:
    repository = hub.repositories[_REPO]
    right = repository.digest("model.safetensors")
    repository.files["model.safetensors"] = bytes(1_000_000)
    repository.sizes["model.safetensors"] = 1_000_000
    with _with(hub, home) as router:
        assert "digest mismatch" in _pull(router)[-1]["error"]
        assert not list(_repository(home).glob("blobs/*.incomplete"))
        assert call(router, "POST", "/api/show", {"model": _REPO}).status == 404
        # A first part that is wrong is thrown away as well, and the whole is fetched once more.
        weights = (DEMO_FOLDER / "model.safetensors").read_bytes()
        repository.files["model.safetensors"] = weights
        repository.sizes.clear()
        part = _repository(home) / "blobs" / f"{right}.mlx-router.incomplete"
        part.write_bytes(bytes(1000))
        assert _pull(router)[-1] == {"status": "success"}
        _answers(router, _REPO)


@pytest.mark.slow
@pytest.mark.parametrize("ignores_ranges", [False, True])
def test_a_first_part_is_used_or_done_again(hub: Hub, home: Path, ignores_ranges: bool) -> None:
    hub.ignores_ranges = ignores_ranges
    weights = (DEMO_FOLDER / "model.safetensors").read_bytes()
    blobs = _repository(home) / "blobs"
    blobs.mkdir(parents=True)
    (blobs / f"{hashlib.sha256(weights).hexdigest()}.mlx-router.incomplete").write_bytes(weights[:300_000])
    with _with(hub, home) as router:
        assert _pull(router)[-1] == {"status": "success"}
        assert hub.sent["model.safetensors"] == len(weights) - (0 if ignores_ranges else 300_000)
        _answers(router, _REPO)


@pytest.mark.covers("T132")
@pytest.mark.parametrize(
    ("change", "status", "sentence"),
    [
        ({}, 404, "pull model manifest: file does not exist"),
        ({"private": True}, 404, "set HF_TOKEN"),
        ({"gated": True}, 403, "accept its conditions"),
        ({"files": {"config.json": b"{}", "model.gguf": b"x"}}, 400, "GGUF"),
        ({"files": {"config.json": b'{"model_type": "roberta"}', "model.safetensors": b"x"}}, 400, "'roberta'"),
        ({"files": {"config.json": b"nonsense", "model.safetensors": b"x"}}, 400, "cannot be read"),
        ({"sizes": {"model.safetensors": 10**15}}, 507, "not enough disk space"),
    ],
)
def test_what_cannot_be_pulled_says_why(
    hub: Hub, home: Path, change: dict[str, Any], status: int, sentence: str
) -> None:
    name = "org/other"
    if change:
        files = change.pop("files", {**hub.repositories[_REPO].files})
        hub.add(name, files, **change)
    with _with(hub, home) as router:
        whole = call(router, "POST", "/api/pull", {"model": name, "stream": False})
        assert (whole.status, sentence in whole.json()["error"]) == (status, True), whole.body
        streamed = _pull(router, name)
        assert streamed[0] == {"status": "pulling manifest"}
        assert list(streamed[-1]) == ["error"]
        assert sentence in streamed[-1]["error"]
        assert hub.sent.get("model.safetensors", 0) == 0
        assert not _jobs(router)


def test_a_token_opens_what_is_private_and_no_worker_sees_it(hub: Hub, home: Path) -> None:
    hub.repositories[_REPO].private = True
    with _with(hub, home, HF_TOKEN="right") as router:
        assert _pull(router)[-1] == {"status": "success"}
        _answers(router, _REPO)
        assert hub.tokens == {"right"}
        worker = psutil.Process(router.model(_REPO)["pid"])
        assert not [name for name in worker.environ() if name in ("HF_TOKEN", "HF_ENDPOINT")]
        assert worker.environ()["HF_HUB_OFFLINE"] == "1"


@pytest.mark.slow
def test_a_hub_that_is_busy_is_asked_again_and_one_that_is_gone_is_named(hub: Hub, home: Path) -> None:
    with _with(hub, home) as router:
        hub.busy = 0
        hub.down = True
        reply = call(router, "POST", "/api/pull", {"model": _REPO, "stream": False})
        assert (reply.status, "503" in reply.json()["error"]) == (503, True)
        hub.down = False
        hub.busy = 1
        reply = call(router, "POST", "/api/pull", {"model": _REPO, "stream": False})
        assert (reply.status, "429" in reply.json()["error"]) == (503, True)
        assert int(reply.headers["retry-after"]) >= 1
        # In the middle of it, the hub's word is waited for.
        hub.busy_files["model.safetensors"] = 1
        assert _pull(router)[-1] == {"status": "success"}
        assert hub.busy_files["model.safetensors"] == 0
    with _with(hub, home, HF_ENDPOINT="http://127.0.0.1:9") as router:
        reply = call(router, "POST", "/api/pull", {"model": _REPO, "stream": False})
        assert (reply.status, "cannot be reached" in reply.json()["error"]) == (503, True), reply.body


def test_a_pull_of_which_nothing_comes_leaves_nothing(tmp_path: Path) -> None:
    """Whoever fetches that repository next may be another program."""
    pull = Pull(PullJob(repository="org/x", cache=str(tmp_path)), lambda event: None)
    folder = tmp_path / "models--org--x"
    with suppress(ConnectionError), pull._marked():
        assert (folder / OURS).exists()
        (folder / "blobs").mkdir()
        raise ConnectionError
    assert not folder.exists()
    with suppress(ConnectionError), pull._marked():
        (folder / "part").write_bytes(b"x")
        raise ConnectionError
    assert (folder / OURS).exists(), "what has come so far is ours"
    (folder / OURS).unlink()
    with pull._marked():
        assert not (folder / OURS).exists(), "it was there before"


def test_short_names_and_hub_names(hub: Hub, home: Path) -> None:
    (home / "config.toml").write_text(f'[model_aliases]\n"house:1b" = "{_REPO}"\n')
    with _with(hub, home) as router:
        assert _pull(router, "house:1b")[-1] == {"status": "success"}
        names = {model["name"]: model for model in router.client.get("/api/tags")["models"]}
        assert set(names) == {f"{_REPO}:latest", "house:1b"}
        assert names["house:1b"]["digest"] == names[f"{_REPO}:latest"]["digest"]
        assert names["house:1b"]["details"]["parent_model"] == f"{_REPO}:latest"
        for name in ("house:1b", _REPO, f"hf.co/{_REPO}", f"HuggingFace.co/{_REPO}:latest"):
            _answers(router, name)
        assert len(router.client.get("/api/ps")["models"]) == 1, "one worker for all of the names"
        assert _pull(router, f"hf.co/{_REPO}")[-1] == {"status": "success"}
        assert call(router, "POST", "/api/copy", {"source": "house:1b", "destination": "copied"}).status == 200
        assert _pull(router, "copied")[-1] == {"status": "success"}, "it is here, and stands for no repository"
        for name in ("nosuch", "house:7b"):
            assert "file does not exist" in _pull(router, name)[-1]["error"]
        for name in ("", "a b", "../x", "https://x/y"):
            assert call(router, "POST", "/api/pull", {"model": name}).json() == {"error": "invalid model name"}


@pytest.mark.slow
@pytest.mark.req("R28", "R29")
def test_a_new_revision_is_served_when_it_is_whole(hub: Hub, home: Path) -> None:
    with _with(hub, home) as router:
        _pull(router)
        old = router.client.get("/api/tags")["models"][0]["digest"]
        weights = bytearray((DEMO_FOLDER / "model.safetensors").read_bytes())
        weights[-1] ^= 1
        hub.add(_REPO, {**hub.repositories[_REPO].files, "model.safetensors": bytes(weights)})
        hub.drop_after["model.safetensors"] = [1000] * 20
        hub.gate = threading.Event()
        thread = threading.Thread(target=_ignore_errors, args=(router,))
        thread.start()
        wait_until(lambda: hub.asked("model.safetensors"), "the new one is asked for")
        assert [model["digest"] for model in router.client.get("/api/tags")["models"]] == [old]
        hub.drop_after.clear()
        hub.gate.set()
        thread.join(DEADLINE)
        assert [model["digest"] for model in router.client.get("/api/tags")["models"]] != [old]


def test_what_is_here_and_nobodys_to_fetch_is_here(hub: Hub, home: Path, tmp_path: Path) -> None:
    shutil.copytree(DEMO_FOLDER, tmp_path / "models" / "mine")
    with _with(hub, home, "--models-dir", str(tmp_path / "models")) as router:
        assert _pull(router, "mine")[-1] == {"status": "success"}
        assert call(router, "POST", "/api/pull", {"model": "mine", "stream": False}).json() == {"status": "success"}
        assert hub.requests == []


def _reply(router: RouterProcess, body: Any) -> Reply:
    return call(router, "POST", "/api/pull", body)


def test_fields_that_are_ignored_are_named(hub: Hub, home: Path) -> None:
    with _with(hub, home) as router:
        reply = _reply(router, {"model": _REPO, "insecure": True, "username": "x", "stream": False})
        assert reply.headers["x-ignored-fields"] == "insecure,username"


_CHAT = {"messages": [{"role": "user", "content": "Hello!"}]}
_ROUTES: dict[str, dict[str, Any]] = {
    "/api/chat": {**_CHAT, "stream": False},
    "/v1/chat/completions": _CHAT,
    "/v1/messages": {**_CHAT, "max_tokens": 40},
    "/v1/responses": {"input": "Hello!"},
}


@pytest.mark.req("R31", "R5")
@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--download-allowlist", "mlx-community/*"],
        ["--allow-download", "true"],
        ["--allow-download", "true", "--download-allowlist", "other/*"],
        ["--allow-download", "true", "--download-allowlist", "mlx-community/*", "--hub-cache", "false"],
    ],
    ids=str,
)
def test_nothing_is_downloaded_unless_it_is_allowed_twice(hub: Hub, home: Path, arguments: list[str]) -> None:
    with _with(hub, home, *arguments) as router:
        for path, body in _ROUTES.items():
            reply = call(router, "POST", path, {"model": _REPO, **body})
            assert reply.status == (400 if "--hub-cache" in arguments else 404), (path, reply.body)
        assert hub.requests == []
        assert not _jobs(router)


@pytest.mark.req("R31", "R19")
@pytest.mark.parametrize("path", sorted(_ROUTES))
def test_an_allowed_model_is_fetched_loaded_and_answers(hub: Hub, home: Path, path: str) -> None:
    arguments = ["--allow-download", "true", "--download-allowlist", "mlx-community/tiny*,other/*"]
    with _with(hub, home, *arguments) as router:
        reply = call(router, "POST", path, {"model": _REPO, **_ROUTES[path]})
        assert (reply.status, b"Hello! I am the demo model" in reply.body) == (200, True), reply.body
        # What it is was not known before: what it cannot do is told when it is there.
        assert call(router, "POST", "/v1/embeddings", {"model": _REPO, "input": "x"}).status == 400
        # Names that stand for nothing on the list are not there, as ever.
        for name in ("nosuch", "mlx-community/Another", "../x"):
            assert call(router, "POST", path, {"model": name, **_ROUTES[path]}).status in (400, 404)
        assert {path.split("/")[2] for _, path, _ in hub.requests if path.startswith("/mlx")} == {"Tiny-4bit"}


@pytest.mark.req("R31", "R19")
def test_streams_tell_how_far_a_download_is(hub: Hub, home: Path, tmp_path: Path) -> None:
    hub.add_folder(_REPO, _large(tmp_path))
    hub.gate = threading.Event()
    arguments = ["--allow-download", "true", "--download-allowlist", "*", "--heartbeat-seconds", "0.1"]
    with _with(hub, home, *arguments) as router:
        body = {"model": _REPO, "stream": True, "max_tokens": 2, "options": {"num_predict": 2}, **_CHAT}
        streams = {
            path: RawStream(router, path, body) for path in ("/v1/chat/completions", "/v1/messages", "/api/chat")
        }
        for stream in streams.values():
            stream.read_until(b"downloading mlx-community/Tiny-4bit:latest: 6")
        (download,) = router.status()["router"]["downloads"]
        assert download["repository"] == _REPO
        assert 0 < download["completed"] < download["total"]
        # Whoever does not want to wait so long is told to come back.
        late = call(router, "POST", "/api/chat", {**body, "stream": False}, x_deadline_seconds="0.2")
        assert (late.status, "downloading" in late.json()["error"]) == (503, True)
        assert int(late.headers["retry-after"]) >= 1
        hub.gate.set()
        ends = {path: stream.read_to_end() for path, stream in streams.items()}
        assert b"[DONE]" in ends["/v1/chat/completions"]
        assert b"message_stop" in ends["/v1/messages"]
        assert b'"done":true' in ends["/api/chat"]
        assert len(router.client.get("/api/ps")["models"]) == 1


@pytest.mark.req("R31")
def test_a_key_for_inference_alone_downloads_nothing(hub: Hub, home: Path) -> None:
    keys = {}
    stored = []
    for name, scopes in (("talks", [Scope.INFERENCE]), ("pulls", [Scope.INFERENCE, Scope.PULL])):
        keys[name], key = make_key(name, scopes)
        stored.append(key)
    write_keys(keys_file(home), stored)
    with _with(hub, home, "--allow-download", "true", "--download-allowlist", "*") as router:
        body = {"model": _REPO, **_ROUTES["/api/chat"]}
        refused = call(router, "POST", "/api/chat", body, x_api_key=keys["talks"])
        assert (refused.status, "scope pull" in refused.json()["error"]) == (403, True)
        assert hub.requests == []
        assert call(router, "POST", "/api/chat", body, x_api_key=keys["pulls"]).status == 200
        assert call(router, "POST", "/api/chat", body, x_api_key=keys["talks"]).status == 200
