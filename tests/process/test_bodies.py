"""Bodies as clients send them, well-meant or not: encodings, halves of characters, and sizes that stop nobody else."""

from __future__ import annotations

import gzip
import http.client
import json
import threading
import time
import zlib
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil
import pytest

from tests.support.http import call
from tests.support.router import RouterProcess, running_router

_CHAT = {"model": "demo", "messages": [{"role": "user", "content": "Hello!"}], "stream": False}
_JSON = json.dumps(_CHAT).encode()


def _raw_deflate(data: bytes) -> bytes:
    compressor = zlib.compressobj(wbits=-15)
    return compressor.compress(data) + compressor.flush()


@pytest.mark.parametrize(
    ("encoding", "encode"),
    [("gzip", gzip.compress), ("x-gzip", gzip.compress), ("deflate", zlib.compress), ("deflate", _raw_deflate),
     ("identity", bytes), ("GZIP", gzip.compress), ("deflate, gzip", lambda data: gzip.compress(zlib.compress(data))),
     ("gzip", lambda data: gzip.compress(data[:5]) + gzip.compress(data[5:]))],
)  # fmt: skip
def test_a_compressed_body_is_read(demo_router: RouterProcess, encoding: str, encode: Callable[[bytes], bytes]) -> None:
    reply = call(demo_router, "POST", "/api/chat", encode(_JSON), Content_Encoding=encoding)
    assert reply.status == 200, reply.body
    assert reply.json()["message"]["content"]


@pytest.mark.parametrize(
    ("encoding", "body", "status", "text"),
    [("br", _JSON, 415, "not supported"), ("zstd", _JSON, 415, "not supported"), ("gzip", _JSON, 400, "is not gzip"),
     ("gzip", gzip.compress(_JSON)[:-9], 400, "cut off"),
     ("gzip", gzip.compress(_JSON) + b"rubbish", 400, "is not gzip"),
     ("deflate", zlib.compress(_JSON) + b"x", 400, "follows the end"),
     ("gzip", gzip.compress(b"") * 100 + gzip.compress(_JSON), 400, "more than 64 members"),
     ("gzip", gzip.compress(b"") * 3 + gzip.compress(b" " * 40_000_000), 413, "max_body_bytes"),
     ("gzip", gzip.compress(b" " * 40_000_000 + _JSON), 413, "max_body_bytes")],
    ids=["br", "zstd", "plain", "cut", "rubbish", "tail", "many", "members", "bomb"],  # the bytes of gzip hold the time
)  # fmt: skip
def test_an_encoding_that_cannot_be_read_is_named(
    demo_router: RouterProcess, encoding: str, body: bytes, status: int, text: str
) -> None:
    for path in ("/api/chat", "/v1/chat/completions", "/v1/messages"):
        reply = call(demo_router, "POST", path, body, Content_Encoding=encoding)
        assert (reply.status, text in reply.body.decode()) == (status, True), reply.body


@pytest.mark.parametrize(
    ("written", "read"),
    [(rb"cut \ud83d", "cut �"), (rb"\udc00 low", "� low"), (rb"\ud83d\ud83d\ude00", "�😀"),
     (rb"\\ud83d", r"\ud83d"), (rb"\\\ud83d", "\\�"), (rb"\uD83D\uDE00", "😀"), (b"Gr\xfc\xdfe", "Gr��e"),
     (b"\xed\xa0\xbd", "�"), (rb"\ud83dabc", "�abc")],
    ids=str,
)  # fmt: skip
def test_halves_of_characters_are_replaced_as_go_does(demo_router: RouterProcess, written: bytes, read: str) -> None:
    body = b'{"model": "demo", "messages": [{"role": "user", "content": "%s"}], "_debug_render_only": true}' % written
    reply = call(demo_router, "POST", "/api/chat", body)
    assert reply.status == 200, reply.body
    assert read.replace("���", "�") in reply.json()["_debug_info"]["rendered_template"].replace("���", "�")


def _shapes() -> dict[str, tuple[str, bytes]]:
    """About 30 MB each, of what an inference key may send."""
    many = b'{"role":"user","content":"x"}'
    messages = b'{"model":"demo","max_tokens":1,"messages":['
    return {
        "messages": ("/v1/messages", messages + b",".join([many] * 1_000_000) + b"]}"),
        "count": ("/v1/messages/count_tokens", messages + b",".join([many] * 300_000) + b"]}"),
        "nested": ("/api/chat", messages + b",".join([b"[[[[[[[[]]]]]]]]"] * 1_500_000) + b"]}"),
        "one text": ("/api/chat", messages + b'{"role":"user","content":"' + b"word " * 6_000_000 + b'"}]}'),
        "prompt": ("/v1/completions", b'{"model":"demo","prompt":"' + b"word " * 6_000_000 + b'"}'),
        "fields": ("/api/chat", b'{"model":"demo",' + b",".join(b'"f%d":1' % n for n in range(1_000_000)) + b"}"),
        "stops": ("/v1/chat/completions", b'{"model":"demo","stop":[' +
                  b",".join([b'"abc"'] * 2_000_000) + b'],' + messages[1:] + many + b"]}"),
        "biases": ("/v1/chat/completions", b'{"model":"demo","logit_bias":{' +
                   b",".join(b'"%d":1' % n for n in range(1_000_000)) + b'},' + messages[1:] + many + b"]}"),
        "tools": ("/api/chat", messages + many + b'],"tools":[' + b",".join(
            [b'{"type":"function","function":{"name":"f"}}'] * 300_000) + b"]}"),
        "parts": ("/v1/chat/completions", messages + b'{"role":"user","content":[' +
                  b",".join([b'{"type":"text","text":"x"}'] * 300_000) + b"]}]}"),
    }  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_a_large_body_stops_neither_the_loop_nor_other_streams(home: Path) -> None:
    """Each is refused or answered, never a 500; meanwhile /health answers, and the worker's memory stays as it was."""
    with running_router(home) as router:
        call(router, "POST", "/api/chat", _CHAT)
        gaps: list[float] = []
        done = threading.Event()

        def watch() -> None:
            while not done.is_set():
                began = time.monotonic()
                assert call(router, "GET", "/health").status == 200
                gaps.append(time.monotonic() - began)

        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            for name, (path, body) in _shapes().items():
                reply = call(router, "POST", path, body)
                assert reply.status in (200, 400, 413), (name, reply.status, reply.body[:300])
                assert reply.status != 200 or name == "fields", name
        finally:
            done.set()
            watcher.join(30)
        assert router.model("demo")["memory_bytes"] < 400 * 2**20
        assert router.model("demo")["loads"] == 1
        assert max(gaps) < 5, "the bound is generous, because this machine is shared; it was 42 s"


def _inside(**item: Any) -> dict[str, Any]:
    return {"model": "demo", "messages": [{"role": "user", "content": "Hello!", **item}], "max_tokens": 1}


_ASKED = {"model": "demo", "input": "x", "max_output_tokens": 1}
_FUNCTION = {"type": "function", "function": {"name": "f"}}


@pytest.mark.parametrize(
    ("path", "body", "names"),
    [
        ("/v1/chat/completions", _inside(weight=1), "messages[].weight"),
        ("/v1/chat/completions", _inside(content=[{"type": "text", "text": "x", "cache_control": {"type": "e"}}]),
         "messages[].content[].cache_control"),
        ("/v1/chat/completions", {**_inside(), "stream_options": {"include_usage": False, "other": 1}},
         "stream_options.other"),
        ("/v1/chat/completions", {**_inside(), "response_format": {"type": "text", "grammar": "x"}},
         "response_format.grammar"),
        ("/v1/chat/completions", {**_inside(), "tools": [{"type": "function", "x": 1, "function": {
            "name": "f", "returns": {"a": 1}}}]}, "tools[].x,tools[].function.returns"),
        ("/v1/chat/completions", {**_inside(), "brand_new": False}, "brand_new"),
        ("/v1/chat/completions", {**_inside(), "brand_new": 0}, "brand_new"),
        ("/v1/chat/completions", {**_inside(), "chat_template_kwargs": {"messages": [], "tools": [1]}},
         "chat_template_kwargs.messages,chat_template_kwargs.tools"),
        ("/v1/chat/completions", {**_inside(), "reasoning": {"effort": "low", "max_tokens": 5}},
         "reasoning.max_tokens,reasoning_effort"),
        ("/v1/messages", _inside(content=[{"type": "text", "text": "x", "cache_control": {"type": "ephemeral"}}]),
         "messages[].content[].cache_control"),
        ("/v1/messages", {**_inside(), "thinking": {"type": "disabled", "depth": 4}}, "thinking.depth"),
        ("/v1/responses", {"model": "demo", "input": [{"role": "user", "content": [
            {"type": "input_text", "text": "x", "odd": 1}]}], "text": {"verbosity": "low"}, "max_output_tokens": 1},
         "input[].content[].odd,text.verbosity"),
        ("/v1/responses", {**_ASKED, "include": ["message.output_text.logprobs", "file_search_call.results"]},
         "include[1]"),
        ("/v1/responses", {**_ASKED, "input": [{"type": "web_search_call"}, {"role": "user", "content": "x"}]},
         "input[0]"),
        ("/v1/responses", {**_ASKED, "tools": [{"type": "web_search"}, {"type": "custom", "name": "c"}, {
            "type": "namespace", "name": "n", "tools": [{"type": "custom", "name": "m"}]}]},
         "tools[0],tools[1],tools[2].tools[0]"),
        ("/v1/messages", {**_inside(), "tools": [{"type": "web_search_20250305", "name": "web_search"}, {
            "name": "late", "input_schema": {}, "defer_loading": True}]}, "tools[0],tools[1]"),
        ("/v1/chat/completions", _inside(name="Ann"), "messages[0].name"),
        ("/v1/chat/completions", {**_inside(), "thinking": {"type": "auto"}}, "thinking.type"),
        ("/v1/chat/completions", {**_inside(), "tool_choice": {}, "reasoning_effort": ""}, None),
        ("/v1/chat/completions", {**_inside(), "tools": [_FUNCTION], "tool_choice": {
            "type": "function", "function": {"name": "f", "odd": 1}}}, "tool_choice.function.odd"),
        ("/api/chat", {**_inside(), "stream": False, "think": "", "max_tokens": None}, None),
        ("/api/embed", {"model": "demo", "options": {"num_ctx": 64}, "odd": 1}, "odd,options.num_ctx"),
        ("/api/show", {"model": "demo", "system": "x", "odd": 1}, "system,odd"),
        ("/api/chat", {**_inside(audio=["x"]), "stream": False, "options": {"num_predict": 1}},
         "messages[].audio,max_tokens"),
    ],
    ids=lambda value: str(value)[-60:],
)  # fmt: skip
def test_what_is_ignored_inside_an_object_is_named(
    demo_router: RouterProcess, path: str, body: dict[str, Any], names: str
) -> None:
    reply = call(demo_router, "POST", path, body)
    assert reply.status == 200, reply.body
    assert reply.headers.get("x-ignored-fields") == names


@pytest.mark.parametrize(
    ("path", "body", "field"),
    [
        (
            "/v1/chat/completions",
            {**_inside(), "chat_template_kwargs": {"enable_thinking": "false"}},
            "enable_thinking",
        ),
        ("/admin/plan", {"model": "demo", "odd": 1}, "odd"),
    ],
)
def test_what_would_be_ignored_against_its_meaning_is_refused(
    demo_router: RouterProcess, path: str, body: dict[str, Any], field: str
) -> None:
    reply = call(demo_router, "POST", path, body)
    assert (reply.status, field in reply.body.decode()) == (400, True)


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/v1/completions", {"model": "demo", "prompt": ["y"] * 3_000_000}, 400),
        ("/api/chat", {**_inside(), **{f"f{n}": 0 for n in range(500_000)}}, 413),
        ("/api/chat", {**_inside(), "options": {f"f{n}": 0 for n in range(500_000)}}, 413),
        ("/api/chat", {"model": "demo", "messages": [{"role": "tool", "content": json.dumps(
            {f"f{n}": 0 for n in range(500_000)})}]}, 400),
    ],
    ids=["prompts", "fields", "options", "text that is JSON"],
)  # fmt: skip
def test_what_cannot_be_served_is_refused_before_it_costs_anything(
    demo_router: RouterProcess, path: str, body: dict[str, Any], status: int
) -> None:
    before = psutil.Process(demo_router.pid).memory_info().rss
    assert call(demo_router, "POST", path, body).status == status
    assert psutil.Process(demo_router.pid).memory_info().rss < before + 600 * 2**20


@pytest.mark.parametrize("path", ["/admin/events", "/admin/logs/stream"])
def test_head_of_an_endless_answer_ends(demo_router: RouterProcess, path: str) -> None:
    """The next request on the connection is answered."""
    parts = urlsplit(demo_router.url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=5)
    with closing(connection):
        connection.request("HEAD", path)
        reply = connection.getresponse()
        assert (reply.status, reply.read()) == (200, b"")
        assert (reply.getheader("content-type") or "").startswith("text/event-stream")
        sock = connection.sock
        assert sock is not None, "the connection stays open"
        connection.request("GET", "/api/version")
        assert connection.getresponse().read().startswith(b"{")
        assert connection.sock is sock


def test_routes_that_manage_models_name_what_they_ignore(home: Path) -> None:
    made = {"model": "made", "from": "demo", "stream": False, "parameters": {"num_gpu": 1, "top_k": 3},
            "messages": [{"role": "user", "content": "x", "images": ["y"]}]}  # fmt: skip
    with running_router(home) as router:
        for method, path, body, names in (
            ("POST", "/api/create", made, "messages[].images,parameters.num_gpu"),
            ("POST", "/api/copy", {"source": "made", "destination": "copied", "odd": 1}, "odd"),
            ("DELETE", "/api/delete", {"model": "copied", "odd": 1}, "odd"),
        ):
            reply = call(router, method, path, body)
            assert (reply.status, reply.headers["x-ignored-fields"]) == (200, names), reply.body


def test_a_strict_router_refuses_what_it_ignores_on_every_route(home: Path) -> None:
    with running_router(home, "--strict", "true") as router:
        for method, path, body in (
            ("POST", "/v1/chat/completions", _inside(weight=1)),
            ("POST", "/api/show", {"model": "demo", "odd": 1}),
            ("POST", "/api/pull", {"model": "org/none", "insecure": True}),
            ("POST", "/api/create", {"model": "made", "from": "demo", "odd": 1}),
            ("POST", "/api/copy", {"source": "demo", "destination": "copied", "odd": 1}),
            ("POST", "/api/push", {"model": "demo", "odd": 1}),
            ("DELETE", "/api/delete", {"model": "demo", "odd": 1}),
            ("POST", "/api/embed", {"model": "demo", "odd": 1}),
        ):
            reply = call(router, method, path, body)
            assert (reply.status, b"ignores" in reply.body) == (400, True), (path, reply.body)
        assert [entry.get("name") for entry in call(router, "GET", "/api/tags").json()["models"]] == ["demo:latest"]
