"""Ollama's list where it needs models of several kinds: what each can do, embeddings, formats, contexts, templates."""

from __future__ import annotations

import json
import math
import re
import time
from typing import Any

import ollama
import pytest

from tests.support.fakes import fake_config
from tests.support.http import Reply, call
from tests.support.router import RouterProcess, running_router, wait_until
from tests.tiny_models.script import GREETING, WEATHER_TOOL


def _user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def _generate(router: RouterProcess, **body: Any) -> Reply:
    return call(router, "POST", "/api/generate", {"model": "demo", "prompt": "Hello!", "stream": False, **body})


def _chat(router: RouterProcess, **body: Any) -> Reply:
    return call(router, "POST", "/api/chat", {"model": "demo", "messages": _user("Hello!"), "stream": False, **body})


@pytest.fixture(scope="module")
def client(fleet: RouterProcess) -> Any:
    made = ollama.Client(host=fleet.url, timeout=30)
    yield made
    made._client.close()  # it has no close of its own


@pytest.mark.covers("T006", "T137")
def test_there_is_no_cloud(fleet: RouterProcess) -> None:
    assert call(fleet, "GET", "/api/status").json()["cloud"]["disabled"] is True
    assert call(fleet, "POST", "/api/me").status == 401
    assert call(fleet, "POST", "/api/experimental/web_search", {"query": "x"}).status == 403


@pytest.mark.covers("T007", "T012", "T013")
@pytest.mark.parametrize("path", ["/api/embed", "/api/embeddings"])
def test_embedding_bodies_are_read_alike(fleet: RouterProcess, path: str) -> None:
    assert call(fleet, "POST", path).json() == {"error": "missing request body"}
    body = {"model": "embedder", "input": "x", "prompt": "x", "unheard_of": 1}
    reply = call(fleet, "POST", path, body)
    assert (reply.status, "unheard_of" in reply.headers["x-ignored-fields"]) == (200, True)


@pytest.mark.covers("T030", "T037", "T043")
def test_capabilities_and_orders(fleet: RouterProcess) -> None:
    entries = call(fleet, "GET", "/api/tags").json()["models"]
    found = {entry["name"].partition(":")[0]: set(entry["capabilities"]) for entry in entries}
    assert found["plain"] == {"completion"}
    assert found["embedder"] == {"embedding"}
    assert found["filler"] == {"completion", "tools", "thinking", "insert"}
    times = [entry["modified_at"] for entry in entries]
    assert times == sorted(times, reverse=True)
    _generate(fleet, keep_alive="1h", options={"num_predict": 1})
    _generate(fleet, model="plain", keep_alive="10m", options={"num_predict": 1})
    loaded = call(fleet, "GET", "/api/ps").json()["models"]
    ends = [entry["expires_at"] for entry in loaded]
    assert ends == sorted(ends, reverse=True)
    digests = {entry["name"]: entry["digest"] for entry in entries}
    assert all(entry["digest"] == digests[entry["name"]] for entry in loaded)
    assert len(set(digests.values())) == len(digests)


@pytest.mark.covers("T040", "T041", "T055", "T056")
def test_expiry_follows_the_end_of_the_last_request(fleet: RouterProcess) -> None:
    for _ in range(2):
        _generate(fleet, keep_alive="2s")
        (entry,) = [m for m in call(fleet, "GET", "/api/ps").json()["models"] if m["name"] == "demo:latest"]
        left = _seconds_from_now(entry["expires_at"])
        assert 0 < left <= 2.0
        assert entry["size"] > 0
        assert re.fullmatch("[0-9a-f]{64}", entry["digest"])
        assert entry["context_length"] == 4096
        assert set(entry["details"]) >= {"family", "format", "parameter_size"}
    wait_until(
        lambda: all(m["name"] != "demo:latest" for m in call(fleet, "GET", "/api/ps").json()["models"]), "gone", 6
    )


def _seconds_from_now(text: str) -> float:
    from datetime import datetime

    return datetime.fromisoformat(text).timestamp() - time.time()


@pytest.mark.covers("T047", "T048", "T054")
def test_a_loaded_model_answers_at_once_and_keep_alive_0_lets_it_go(fleet: RouterProcess) -> None:
    _generate(fleet, prompt="")
    warm = _generate(fleet).json()
    assert warm["load_duration"] < 500_000_000
    last = _generate(fleet, keep_alive=0).json()
    assert last["response"] == GREETING
    gone = lambda: all(m["name"] != "demo:latest" for m in call(fleet, "GET", "/api/ps").json()["models"])  # noqa: E731
    wait_until(gone, "it left", 5)
    _generate(fleet, prompt="")
    assert _generate(fleet, prompt="", keep_alive=0).json()["done_reason"] == "unload"
    wait_until(gone, "it left again", 5)


@pytest.mark.covers("T051", "T052")
def test_every_form_of_keep_alive(fleet: RouterProcess) -> None:
    for value in ("5m", 300, 300.5, "1h2m3s", -1, "-1m", "0s", "0", 0, None):
        assert _generate(fleet, keep_alive=value, options={"num_predict": 1}).status == 200, value
    for value in ("300", "-1", "", "abc", "1d"):
        assert _generate(fleet, keep_alive=value).status == 400, value
    _generate(fleet, keep_alive="5m", options={"num_predict": 1})


@pytest.mark.covers("T059")
def test_openai_requests_leave_the_duration(fleet: RouterProcess) -> None:
    _generate(fleet, keep_alive="1h", options={"num_predict": 1})
    call(fleet, "POST", "/v1/chat/completions", {"model": "demo", "messages": _user("hi"), "max_tokens": 1})
    assert fleet.model("demo")["expires_in_seconds"] > 3500
    call(
        fleet,
        "POST",
        "/v1/chat/completions",
        {"model": "demo", "messages": _user("hi"), "keep_alive": "10m", "max_tokens": 1},
    )
    assert 500 < fleet.model("demo")["expires_in_seconds"] <= 600, "ours: the field is honoured there as well"


@pytest.mark.covers("T062", "T115", "T116", "T117", "T118", "T119", "T120")
def test_embed(fleet: RouterProcess, client: Any) -> None:
    texts = ["one", "two words", "three"]
    answer = call(fleet, "POST", "/api/embed", {"model": "embedder", "input": texts}).json()
    assert (answer["model"], len(answer["embeddings"])) == ("embedder", 3)
    assert all(answer[name] > 0 for name in ("prompt_eval_count", "total_duration", "load_duration"))
    for number, text in enumerate(texts):
        (alone,) = call(fleet, "POST", "/api/embed", {"model": "embedder", "input": text}).json()["embeddings"]
        assert math.isclose(math.hypot(*alone), 1, abs_tol=1e-3)
        assert math.isclose(
            sum(a * b for a, b in zip(alone, answer["embeddings"][number], strict=True)), 1, abs_tol=1e-3
        )
    (cut,) = call(fleet, "POST", "/api/embed", {"model": "embedder", "input": "x", "dimensions": 16}).json()[
        "embeddings"
    ]
    assert (len(cut), round(math.hypot(*cut), 3)) == (16, 1.0)
    wrong: tuple[Any, ...] = (5, [1, 2], {}, [None])
    for bad in wrong:
        reply = call(fleet, "POST", "/api/embed", {"model": "embedder", "input": bad})
        assert (reply.status, reply.json()) == (400, {"error": "invalid input type"}), bad
    unknown = call(fleet, "POST", "/api/embed", {"model": "nosuch", "input": "x"})
    assert (unknown.status, unknown.json()) == (404, {"error": "model 'nosuch' not found"})
    long = {"model": "embedder", "input": "word " * 200}
    assert call(fleet, "POST", "/api/embed", long).status == 200
    kept = call(fleet, "POST", "/api/embed", {**long, "truncate": False})
    assert (kept.status, kept.json()) == (400, {"error": "the input length exceeds the context length"})
    nothing: tuple[Any, ...] = (None, "", [])
    for empty in nothing:
        loaded = call(fleet, "POST", "/api/embed", {"model": "embedder", "input": empty, "keep_alive": 0})
        assert loaded.json() == {"model": "embedder", "embeddings": []}
    wait_until(lambda: fleet.model("embedder")["state"] == "unloaded", "it left")
    assert len(client.embed("embedder", ["a", ""]).embeddings) == 2, "an empty text among others is embedded"


@pytest.mark.covers("T121", "T122")
def test_the_older_form_of_embeddings(fleet: RouterProcess) -> None:
    old = call(fleet, "POST", "/api/embeddings", {"model": "embedder", "prompt": "a"}).json()["embedding"]
    (new,) = call(fleet, "POST", "/api/embed", {"model": "embedder", "input": "a"}).json()["embeddings"]
    length = math.hypot(*old)
    assert abs(length - 1) > 1e-3, "as the model makes it"
    assert sum(a * b for a, b in zip(old, new, strict=True)) / length > 0.99
    assert call(fleet, "POST", "/api/embeddings", {"model": "embedder"}).json() == {"embedding": []}
    assert call(fleet, "POST", "/api/embeddings", {"prompt": "a"}).status == 400
    missing = call(fleet, "POST", "/api/embeddings", {"model": "nosuch", "prompt": "a"})
    assert (missing.status, missing.json()["error"]) == (404, 'model "nosuch" not found, try pulling it first')


@pytest.mark.covers("T077", "T092", "T097", "T107")
def test_what_a_model_cannot_do_is_said_in_ollamas_words(fleet: RouterProcess) -> None:
    for reply, text in (
        (_generate(fleet, model="embedder"), '"embedder" does not support generate'),
        (_chat(fleet, model="embedder"), '"embedder" does not support chat'),
        (
            _chat(fleet, model="plain", tools=[WEATHER_TOOL]),
            "registry.ollama.ai/library/plain:latest does not support tools",
        ),
        (_chat(fleet, model="plain", think=True), '"plain" does not support thinking'),
        (_chat(fleet, model=""), "model is required"),
        (call(fleet, "POST", "/api/embed", {"model": "plain", "input": "x"}), '"plain" does not support embeddings'),
    ):
        assert (reply.status, reply.json()) == (400, {"error": text})
    assert _chat(fleet, model="plain", think=False, options={"num_predict": 2}).status == 200


@pytest.mark.covers("T079", "T081", "T082")
def test_raw_context_template_and_the_rendered_prompt(fleet: RouterProcess) -> None:
    first = _generate(fleet, prompt="My name is Ada.", think=False).json()
    assert all(isinstance(token, int) for token in first["context"])
    second = _generate(fleet, prompt="What is my name?", think=False, context=first["context"]).json()
    assert second["prompt_eval_count"] > len(first["context"])
    assert second["context"][: len(first["context"])] == first["context"]
    assert "context" not in _generate(fleet, raw=True, options={"num_predict": 2}).json()
    loads = fleet.model("filler")["loads"]
    shown = _generate(fleet, model="filler", system="Be brief.", prompt="Why?", _debug_render_only=True).json()
    prompt = shown["_debug_info"]["rendered_template"]
    assert "Be brief." in prompt
    assert "Why?" in prompt
    assert fleet.model("filler")["loads"] == loads, "nothing is loaded for it"
    templated = "<|im_start|>user\n{{ .Prompt }}<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    assert _generate(fleet, template=templated).json()["response"] == GREETING
    conditional = "{{ if .System }}{{ .System }}{{ else }}<|im_start|>user\n{{- end }}\n{{ .Prompt }}<|im_end|>\n<|im_start|>assistant\n"
    assert _generate(fleet, template=conditional).status == 200


@pytest.mark.covers("T088", "T095")
def test_prompts_that_are_too_long(fleet: RouterProcess) -> None:
    long = _generate(fleet, prompt="word " * 5000, truncate=False, shift=False)
    assert long.status == 400
    assert "exceeds the model's maximum context length" in long.json()["error"]
    history = [
        m
        for n in range(200)
        for m in (*_user(f"Question {n} " + "word " * 20), {"role": "assistant", "content": "Yes"})
    ]
    answer = _chat(fleet, messages=[*history, *_user("Hello!")], options={"num_ctx": 1024}).json()
    assert answer["prompt_eval_count"] <= 1024
    assert answer["truncated_messages"] > 300


@pytest.mark.covers("T091", "T094")
def test_a_system_message_is_obeyed(fleet: RouterProcess) -> None:
    messages = [{"role": "system", "content": "You are a pirate."}, *_user("Hello!")]
    assert _chat(fleet, messages=messages, think=False).json()["message"]["content"] == "Arr! What be your wish?"


@pytest.mark.covers("T090")
def test_the_lines_of_a_chat(fleet: RouterProcess) -> None:
    *parts, last = call(fleet, "POST", "/api/chat", {"model": "demo", "messages": _user("hi")}).lines()
    assert all(part["message"]["role"] == "assistant" and isinstance(part["message"]["content"], str) for part in parts)
    assert (last["message"], last["done_reason"]) == ({"role": "assistant", "content": ""}, "stop")


@pytest.mark.covers("T098", "T099", "T100", "T103")
def test_a_tool_is_called_whole_and_its_result_used(fleet: RouterProcess, client: Any) -> None:
    ask = {"model": "demo", "messages": _user("What is the weather in Paris?"), "tools": [WEATHER_TOOL], "think": False}
    lines = call(fleet, "POST", "/api/chat", ask).lines()
    (with_call,) = [line for line in lines if "tool_calls" in line["message"]]
    (made,) = with_call["message"]["tool_calls"]
    assert with_call["message"]["content"] == ""
    assert made["id"].startswith("call_")
    assert made["function"] == {"index": 0, "name": "get_weather", "arguments": {"city": "Paris", "unit": "celsius"}}
    assert lines[-1]["done_reason"] == "stop"
    for key in ({"tool_name": "get_weather"}, {"tool_call_id": made["id"]}, {}):
        history = [*_user("What is the weather in Paris?"), {"role": "assistant", "content": "", "tool_calls": [made]},
                   {"role": "tool", "content": '{"temp": 18, "sky": "clear"}', **key}]  # fmt: skip
        answer = _chat(fleet, messages=history, tools=[WEATHER_TOOL], think=False).json()
        assert answer["message"]["content"] == "It is 18 degrees in Paris, and the sky is clear."
    options = {"num_predict": 20, "temperature": 0}
    plain = list(client.chat("random", messages=_user("Hello!"), tools=[WEATHER_TOOL], options=options, stream=True))
    assert len(plain) > 5, "offered and not needed: ordinary text"
    assert not any(part.message.tool_calls for part in plain)


@pytest.mark.slow
@pytest.mark.covers("T109", "T110", "T112")
@pytest.mark.parametrize("stream", [False, True])
def test_formats_hold_streamed_or_not(fleet: RouterProcess, stream: bool) -> None:
    schema = {
        "type": "object",
        "properties": {"a": {"type": "integer"}, "b": {"enum": ["x", "y"]}},
        "required": ["a", "b"],
    }
    for path in ("/api/chat", "/api/generate"):
        for seed in range(2):
            for form in ("json", schema):
                body = {"model": "random", "messages": _user("hi"), "prompt": "hi", "format": form, "stream": stream,
                        "options": {"seed": seed, "temperature": 1.0, "num_predict": 150}}  # fmt: skip
                lines = call(fleet, "POST", path, body).lines()
                text = "".join(line.get("response", "") or line.get("message", {}).get("content", "") for line in lines)
                value = json.loads(text)
                assert isinstance(value, dict)
                assert form == "json" or (isinstance(value["a"], int) and value["b"] in ("x", "y"))
    assert _chat(fleet, format="").json()["message"]["content"] == GREETING


@pytest.mark.covers("T111")
def test_a_schema_leaves_thinking_free(fleet: RouterProcess) -> None:
    schema = {
        "type": "object",
        "properties": {"sum": {"type": "integer"}},
        "required": ["sum"],
        "additionalProperties": False,
    }
    for think in (None, False):
        message = _chat(fleet, messages=_user("What is 17 + 25?"), format=schema, think=think,
                        options={"num_predict": 200}).json()["message"]  # fmt: skip
        assert isinstance(json.loads(message["content"])["sum"], int)
        assert ("thinking" in message) == (think is None)


@pytest.mark.covers("T123", "T125", "T126")
def test_names(fleet: RouterProcess) -> None:
    for name in ("plain", "plain:latest", "library/plain", "registry.ollama.ai/library/plain:latest", "PLAIN"):
        answer = _generate(fleet, model=name, options={"num_predict": 1})
        assert (answer.status, answer.json()["model"]) == (200, name)
    for name in ("a//b", ":tag", "name:", "m@sha256:00", "../x", "a" * 81):
        reply = _generate(fleet, model=name)
        assert (reply.status, reply.json()) == (400, {"error": "invalid model name"}), name
    assert _generate(fleet, model="hf.co/user/repo:Q4").status == 404


@pytest.mark.covers("T018", "T019", "T020", "T023", "T024", "T025", "T039")
def test_origins_keys_and_an_empty_house(home: Any) -> None:
    with running_router(home, *fake_config(home, {}, allowed_origins=["https://a.example"])) as router:
        assert call(router, "GET", "/api/tags", authorization="Bearer x").json() == {"models": []}
        assert call(router, "GET", "/api/ps").json() == {"models": []}
        assert call(router, "GET", "/v1/models").json()["data"] == []
        for origin in (
            "https://a.example",
            "http://localhost:3000",
            "app://x",
            "tauri://localhost",
            "vscode-webview://abc",
        ):
            assert call(router, "GET", "/api/tags", origin=origin).headers["access-control-allow-origin"] == origin
        assert call(router, "GET", "/api/tags", origin="https://b.example").status == 403


@pytest.mark.covers("T019", "T023")
def test_any_origin_and_any_host(home: Any) -> None:
    with running_router(home, "--allowed-origins", "*", "--host", "0.0.0.0", "--insecure-bind", "true") as router:
        local = router.url.replace("0.0.0.0", "127.0.0.1")
        router.url = local
        assert (
            call(router, "GET", "/api/tags", origin="https://b.example").headers["access-control-allow-origin"] == "*"
        )
        assert call(router, "GET", "/api/tags", host="evil.example").status == 200


@pytest.mark.covers("T126")
def test_local_and_cloud_at_once_make_no_sense(fleet: RouterProcess) -> None:
    reply = _generate(fleet, model="x:cloud:local")
    assert (reply.status, "use either :local or :cloud" in reply.json()["error"]) == (400, True)


@pytest.mark.covers("T183")
def test_a_context_that_is_asked_for_bounds_the_request(fleet: RouterProcess) -> None:
    """MLX grows its cache as it goes, so a smaller context needs no other process; it bounds this request."""
    reply = _generate(fleet, prompt="word " * 40, options={"num_ctx": 30})
    assert (reply.status, "(30 tokens)" in reply.json()["error"]) == (400, True)
    cut = _generate(fleet, prompt="Tell me a long story.", options={"num_ctx": 64}).json()
    assert (cut["done_reason"], cut["prompt_eval_count"] + cut["eval_count"]) == ("length", 64)


@pytest.mark.covers("T184")
def test_options_never_reload(fleet: RouterProcess) -> None:
    _generate(fleet, prompt="")
    before = fleet.model("demo")["pid"]
    changes: list[dict[str, Any]] = [
        {"options": {"num_ctx": 128}}, {"options": {"num_gpu": 0}}, {"think": False}, {"format": "json"},
        {"options": {"temperature": 2.0}},
    ]  # fmt: skip
    for more in changes:
        assert _generate(fleet, **{**more, "options": {"num_predict": 3, **more.get("options", {})}}).status == 200
    assert fleet.model("demo")["pid"] == before


@pytest.mark.covers("T042")
@pytest.mark.parametrize("keep_alive", [1e15, 9e18, "99999999h", -1])
def test_a_time_beyond_all_calendars_is_for_ever(fleet: RouterProcess, keep_alive: float | str) -> None:
    """What a client may ask for, a list has to be able to show."""
    asked = _generate(fleet, prompt="", keep_alive=keep_alive)
    assert asked.status in (200, 400), asked.body
    listed = call(fleet, "GET", "/api/ps")
    assert listed.status == 200, listed.body
    if asked.status == 200:
        years = [int(model["expires_at"][:4]) for model in listed.json()["models"]]
        assert max(years) > 2100
