"""Ollama's API over a real socket: the checks of this release, named by the T-numbers of the compatibility list."""

from __future__ import annotations

import re
from typing import Any

import pytest

from tests.support.http import call
from tests.support.router import RouterProcess, wait_until

_PNG = "iVBORw0KGgo="  # no more than its first bytes


def _user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


@pytest.mark.covers("T001", "T002", "T003")
def test_t001_t002_t003_root_and_version(demo_router: RouterProcess) -> None:
    root = call(demo_router, "GET", "/")
    assert (root.status, root.body) == (200, b"Ollama is running")
    assert root.headers["content-type"].startswith("text/plain")
    head = call(demo_router, "HEAD", "/")
    assert (head.status, head.body) == (200, b"")
    assert re.fullmatch(r"\d+\.\d+\.\d+", call(demo_router, "GET", "/api/version").json()["version"])


@pytest.mark.covers("T004", "T005")
def test_t004_t005_head_and_unknown_paths(demo_router: RouterProcess) -> None:
    assert call(demo_router, "HEAD", "/api/tags").status == 200
    assert call(demo_router, "GET", "/nope").status == 404
    wrong = call(demo_router, "GET", "/api/chat")
    assert wrong.status == 405
    assert "POST" in wrong.headers["allow"]


@pytest.mark.covers("T007")
@pytest.mark.parametrize("path", ["/api/chat", "/api/generate", "/api/show"])
def test_t007_an_empty_body_is_refused(demo_router: RouterProcess, path: str) -> None:
    reply = call(demo_router, "POST", path)
    assert (reply.status, reply.json()) == (400, {"error": "missing request body"})


@pytest.mark.req("R42")
@pytest.mark.covers("T009", "T010", "T013", "T053", "T074", "T076", "T086", "T108", "T112", "T114", "T124")
@pytest.mark.parametrize("path", ["/api/chat", "/api/generate"])
@pytest.mark.parametrize(
    ("body", "status", "text"),
    [
        (b"{", 400, "not JSON"),
        (b"[]", 400, "JSON object"),
        (b"\xff\xfe", 400, "not JSON"),
        (b"[" * 100_000, 400, "not JSON"),
        ({"model": 5}, 400, "Expected str, got int for model"),
        ({"model": "demo", "stream": "yes"}, 400, "stream"),
        ({"model": "nosuch"}, 404, "model 'nosuch' not found"),
        ({"model": "bad name!"}, 400, "invalid model name"),
        ({"model": "../../etc/passwd"}, 400, "invalid model name"),
        ({"model": "a" * 1_000_000}, 400, "invalid model name"),
        ({"model": "demo:nosuchtag"}, 404, "model 'demo:nosuchtag' not found"),
        ({"model": "demo", "options": {"temperature": "hot"}}, 400, 'option "temperature" must be of type float32'),
        ({"model": "demo", "options": {"stop": "x"}}, 400, 'option "stop" must be of type array'),
        ({"model": "demo", "keep_alive": "300"}, 400, "missing unit"),
        ({"model": "demo", "keep_alive": True}, 400, "Unsupported type: 'bool'"),
        ({"model": "demo", "think": "weird"}, 400, "invalid think value"),
        ({"model": "demo", "think": 5}, 400, "think must be"),
        ({"model": "demo", "top_logprobs": 21}, 400, "top_logprobs must be between 0 and 20"),
        ({"model": "demo", "format": "xml"}, 400, "invalid format"),
        ({"model": "demo", "format": {"type": "object", "not": {}}}, 400, 'Unimplemented keys: ["not"]'),
    ],
)
def test_bad_input_is_refused_in_ollamas_shape_and_starts_nothing(
    demo_router: RouterProcess, path: str, body: Any, status: int, text: str
) -> None:
    if isinstance(body, dict):
        body = {"prompt": "hi", "messages": _user("hi"), **body}
    before = [(m["loads"], m["state"]) for m in demo_router.status()["models"]]
    reply = call(demo_router, "POST", path, body)
    assert (reply.status, list(reply.json())) == (status, ["error"])
    assert text in reply.json()["error"]
    assert reply.headers["content-type"].startswith("application/json")
    assert [(m["loads"], m["state"]) for m in demo_router.status()["models"]] == before


@pytest.mark.covers("T011", "T012")
def test_t011_t012_any_content_type_and_unknown_fields(demo_router: RouterProcess) -> None:
    body = {"Model": "demo", "prompt": "hi", "stream": False, "unheard_of": 1, "options": None, "keep_alive": None}
    reply = call(demo_router, "POST", "/api/generate", body, content_type="application/x-www-form-urlencoded")
    assert (reply.status, reply.json()["done"]) == (200, True)


@pytest.mark.covers("T014-T017")
def test_t014_to_t017_origins(demo_router: RouterProcess) -> None:
    plain = call(demo_router, "GET", "/api/tags")
    assert not [name for name in plain.headers if name.lower().startswith("access-control")]
    for origin in (
        "http://localhost:3000",
        "app://x",
        "tauri://localhost",
        "vscode-webview://abc",
        "https://127.0.0.1",
    ):
        assert call(demo_router, "GET", "/api/tags", origin=origin).headers["access-control-allow-origin"] == origin
    for origin in ("https://evil.example", "http://localhost.evil.example", "http://localhost:1.evil.example", "null"):
        foreign = call(demo_router, "GET", "/api/tags", origin=origin)
        # Ollama sends no body here; this one says which setting would allow it.
        assert (foreign.status, "allowed_origins" in foreign.json()["error"]) == (403, True), origin
    preflight = call(demo_router, "OPTIONS", "/api/chat", origin="http://localhost")
    assert preflight.status == 204
    assert "POST" in preflight.headers["access-control-allow-methods"]
    assert "Authorization" in preflight.headers["access-control-allow-headers"]
    assert "x-stainless-arch" in preflight.headers["access-control-allow-headers"]


@pytest.mark.covers("T021", "T022")
@pytest.mark.parametrize(
    ("host", "status"),
    [("evil.example", 403), ("localhost:11434", 200), ("127.0.0.1", 200), ("a.local", 200), ("a.internal", 200),
     ("a.localhost", 200), ("192.168.1.5", 200), ("[::1]:5", 200), ("8.8.8.8", 403), ("localhost.evil.example", 403)],
)  # fmt: skip
def test_t021_t022_host_header(demo_router: RouterProcess, host: str, status: int) -> None:
    assert call(demo_router, "GET", "/api/tags", host=host).status == status


@pytest.mark.covers("T026", "T027", "T028", "T029", "T031")
def test_t026_to_t031_tags(demo_router: RouterProcess) -> None:
    (entry,) = call(demo_router, "GET", "/api/tags").json()["models"]
    assert entry["name"] == entry["model"] == "demo:latest"
    assert re.fullmatch(r"[0-9a-f]{64}", entry["digest"])
    assert entry["size"] > 0
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d+[+-]\d\d:\d\d", entry["modified_at"])
    assert entry["details"]["format"] == "safetensors"
    assert all(entry["details"][key] for key in ("family", "families", "parameter_size", "quantization_level"))
    assert set(entry["capabilities"]) == {"completion", "tools", "thinking"}


@pytest.mark.covers("T032", "T033", "T034", "T035", "T036", "T038")
def test_t032_to_t038_show(demo_router: RouterProcess) -> None:
    for key in ("model", "name"):
        shown = call(demo_router, "POST", "/api/show", {key: "DEMO"}).json()
        architecture = shown["model_info"]["general.architecture"]
        assert shown["model_info"][f"{architecture}.context_length"] == 4096
        assert "FROM demo:latest" in shown["modelfile"]
        assert "enable_thinking" in shown["template"]
    assert len(call(demo_router, "POST", "/api/show", {"model": "demo", "verbose": True}).json()["tensors"]) > 10
    assert call(demo_router, "POST", "/api/show", {"model": "nosuch"}).status == 404
    assert call(demo_router, "POST", "/api/show", {}).json() == {"error": "model is required"}
    assert call(demo_router, "POST", "/api/show", {"model": "a b"}).status == 400


@pytest.mark.covers("T042", "T045", "T046", "T049", "T050", "T057", "T058")
def test_t039_to_t054_load_ps_unload(demo_router: RouterProcess) -> None:
    loaded = call(demo_router, "POST", "/api/generate", {"model": "demo"})
    assert loaded.headers["content-type"].startswith("application/json")
    assert {**loaded.json(), "created_at": ""} == {
        "model": "demo", "created_at": "", "response": "", "done": True, "done_reason": "load",
    }  # fmt: skip
    (entry,) = call(demo_router, "GET", "/api/ps").json()["models"]
    assert entry["size"] == entry["size_vram"] > 0
    assert entry["context_length"] == 4096
    chat = call(demo_router, "POST", "/api/chat", {"model": "demo", "messages": [], "keep_alive": -1}).json()
    assert (chat["done_reason"], chat["message"]) == ("load", {"role": "assistant", "content": ""})
    assert call(demo_router, "GET", "/api/ps").json()["models"][0]["expires_at"] > "2046"
    call(demo_router, "POST", "/api/generate", {"model": "demo", "prompt": "hi", "stream": False})
    assert call(demo_router, "GET", "/api/ps").json()["models"][0]["expires_at"] > "2046", "T057: it stays pinned"
    call(demo_router, "POST", "/api/generate", {"model": "demo", "prompt": "hi", "keep_alive": "1m"})
    assert 50 < demo_router.model("demo")["expires_in_seconds"] <= 60, "T058"
    unloaded = call(demo_router, "POST", "/api/chat", {"model": "demo", "keep_alive": 0}).json()
    assert unloaded["done_reason"] == "unload"
    wait_until(lambda: call(demo_router, "GET", "/api/ps").json() == {"models": []}, "it left")
    assert (
        call(demo_router, "POST", "/api/generate", {"model": "demo", "keep_alive": 0}).json()["done_reason"] == "unload"
    )
    assert call(demo_router, "POST", "/api/generate", {"model": "nosuch", "keep_alive": 0}).status == 404


@pytest.mark.covers("T063-T071")
def test_t063_to_t071_generate(demo_router: RouterProcess) -> None:
    reply = call(demo_router, "POST", "/api/generate", {"model": "Demo", "prompt": "hi"})
    assert reply.headers["content-type"] == "application/x-ndjson"
    *parts, last = reply.lines()
    assert {part["model"] for part in parts} == {"Demo"}
    assert all(part["done"] is False and set(part) == {"model", "created_at", "response", "done"} for part in parts)
    assert all(part["created_at"].endswith("Z") for part in parts)
    assert (last["done"], last["done_reason"], last["response"]) == (True, "stop", "")
    metrics = [
        "total_duration",
        "load_duration",
        "prompt_eval_count",
        "prompt_eval_duration",
        "eval_count",
        "eval_duration",
    ]
    assert all(isinstance(last[name], int) and last[name] > 0 for name in metrics)
    spent = last["load_duration"] + last["prompt_eval_duration"] + last["eval_duration"]
    assert last["total_duration"] * 1.05 >= spent
    cut = {"model": "demo", "prompt": "hi", "stream": False, "options": {"num_predict": 3.9}}
    short = call(demo_router, "POST", "/api/generate", cut).json()
    assert (short["done_reason"], short["eval_count"]) == ("length", 3)


@pytest.mark.covers("T078", "T080", "T083", "T084")
def test_t078_t080_t083_t084_what_cannot_be_done_is_said(demo_router: RouterProcess) -> None:
    for more, text in (
        ({"raw": True, "system": "x"}, "raw mode does not support template, system, or context"),
        ({"suffix": "x"}, "does not support insert"),
        ({"images": ["!!"]}, "illegal base64"),
        ({"images": ["aGk="]}, "not a PNG, JPEG"),
        ({"images": [_PNG]}, "demo:latest does not support images"),
        ({"template": "{{ .Nope | upper }}"}, "template error"),
        ({"context": [99999]}, "vocabulary"),
    ):
        reply = call(demo_router, "POST", "/api/generate", {"model": "demo", "prompt": "hi", **more})
        assert reply.status == 400, more
        assert text in reply.json()["error"]


@pytest.mark.covers("T085")
def test_t085_options_that_mean_nothing_here_are_taken(demo_router: RouterProcess) -> None:
    options = {"numa": False, "low_vram": True, "mirostat": 1, "tfs_z": 1.0, "num_gpu": 99, "num_thread": 4, "new": 1,
               "temperature": None, "use_mmap": True, "penalize_newline": True, "num_keep": 5}  # fmt: skip
    body = {"model": "demo", "prompt": "hi", "stream": False, "options": options}
    assert call(demo_router, "POST", "/api/generate", body).status == 200
    told = demo_router.wait_line("event=ignored_fields.*numa")
    assert all(name in told for name in ("numa", "mirostat", "new", "num_keep"))
    assert "temperature" not in told


@pytest.mark.covers("T093", "T096")
def test_t093_t096_odd_messages_are_taken(demo_router: RouterProcess) -> None:
    for messages in (
        [{"role": "USER", "content": "hi"}],
        [{"role": "user", "content": "hi"}, {"role": "assistant", "content": None, "images": []}],
        [{"role": "system", "content": "a"}, {"role": "user", "content": "hi"}, {"role": "system", "content": "b"}],
        [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "Hello"}],
        [{"role": "system", "content": "a"}, {"role": "system", "content": "b"}, {"role": "user", "content": "hi"}],
    ):
        assert call(demo_router, "POST", "/api/chat", {"model": "demo", "messages": messages}).status == 200, messages
    parts = [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]
    assert call(demo_router, "POST", "/api/chat", {"model": "demo", "messages": parts}).status == 400


@pytest.mark.covers("T102")
def test_t102_arguments_as_text_are_taken_in_history(demo_router: RouterProcess) -> None:
    messages = [
        {"role": "user", "content": "What is the weather in Paris?"},
        {"role": "assistant", "tool_calls": [{"function": {"name": "get_weather", "arguments": '{"city": "Paris"}'}}]},
        {"role": "tool", "content": "{}"},
    ]
    assert call(demo_router, "POST", "/api/chat", {"model": "demo", "messages": messages}).status == 200


@pytest.mark.covers("T104", "T105", "T106")
def test_t104_to_t108_thinking(demo_router: RouterProcess) -> None:
    body = {"model": "demo", "messages": _user("What is 17 + 25?")}
    parts = call(demo_router, "POST", "/api/chat", body).lines()
    kinds = ["thinking" if "thinking" in p["message"] else "content" for p in parts if not p["done"]]
    assert kinds == sorted(kinds, reverse=True), "thinking comes first"
    assert {"thinking", "content"} == set(kinds)
    off = call(demo_router, "POST", "/api/chat", {**body, "think": False, "stream": False}).json()["message"]
    assert off == {"role": "assistant", "content": "17 + 25 = 42."}
    assert call(demo_router, "POST", "/api/chat", {**body, "think": "high", "stream": False}).status == 200


@pytest.mark.covers("T113")
def test_t113_logprobs(demo_router: RouterProcess) -> None:
    body = {"model": "demo", "messages": _user("hi"), "stream": False, "logprobs": True, "top_logprobs": 3}
    answer = call(demo_router, "POST", "/api/chat", body).json()
    assert "".join(entry["token"] for entry in answer["logprobs"]) == answer["message"]["content"]
    for entry in answer["logprobs"]:
        assert entry["logprob"] <= 0
        assert bytes(entry["bytes"]).decode() == entry["token"]
        best = [other["logprob"] for other in entry["top_logprobs"]]
        assert len(best) == 3
        assert best == sorted(best, reverse=True)
    without = call(demo_router, "POST", "/api/chat", {**body, "logprobs": False}).json()
    assert "logprobs" not in without


def test_every_answer_has_a_request_id(demo_router: RouterProcess) -> None:
    ids = {call(demo_router, "GET", path).headers["x-request-id"] for path in ("/", "/api/tags", "/nope", "/v1/nope")}
    assert len(ids) == 4


def test_a_body_without_end_is_refused(demo_router: RouterProcess) -> None:
    reply = call(demo_router, "POST", "/api/chat", b'{"model":"' + b"a" * (33 * 2**20))
    assert (reply.status, "longer than" in reply.json()["error"]) == (413, True)
