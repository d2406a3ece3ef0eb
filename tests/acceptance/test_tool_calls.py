"""Tool calls as models write them, through the whole server: the same call streamed and whole."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mlx_router_worker.text.json_calls import plain_json, read_json
from tests.support.http import call
from tests.support.router import RouterProcess, running_router
from tests.support.sse import read_frames
from tests.tiny_models.parrot import make_parrot

_TOOL = {"type": "function", "function": {"name": "write", "parameters": {
    "type": "object", "properties": {"text": {"type": "string"}}}}}  # fmt: skip
_HEAD = '{"name": "write", "arguments": {"text": "'
_BODIES: dict[str, tuple[list[str], str]] = {
    "raw-break": ([_HEAD + "one", "\ntwo", '"}}'], "one\ntwo"),
    "raw-tab": ([_HEAD + "one", "\ttwo", '"}}'], "one\ttwo"),
    "bad-escape": ([_HEAD, "\\d+", '"}}'], "\\d+"),
    "windows-path": ([_HEAD, "C:\\dir", '"}}'], "C:\\dir"),
    "one-brace-too-many": ([_HEAD + "abc", '"}', "}}"], "abc"),
    "trailing-comma": ([_HEAD + "abc", '",', " } }"], "abc"),
    "unclosed-at-the-end": ([_HEAD + "abc", '"}}'], "abc"),
    "half-a-pair": ([_HEAD + "a", "\\ud83d", '"}}'], "a\ufffd"),
    "second-half": ([_HEAD + "a", "\\ude00 b", '"}}'], "a\ufffd b"),
    "two-first-halves": ([_HEAD, "\\ud83d\\ud83d", '\\ude00"}}'], "\ufffd😀"),
    "whole-pair": ([_HEAD, "\\ud83d", "\\ude00", '"}}'], "😀"),
    "unicode": ([_HEAD, "\\u00e9 😀", '"}}'], "é 😀"),
}


_MISTRAL = (
    "{% if tools %}[AVAILABLE_TOOLS]{{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}"
    "{% for m in messages %}{% if m.tool_calls %}[TOOL_CALLS]{{ m.tool_calls | tojson }}"
    "{% elif m.role == 'tool' %}[TOOL_RESULTS]{{ m.content }}[/TOOL_RESULTS]"
    "{% else %}[INST]{{ m.content }}[/INST]{% endif %}{% endfor %}"
)


@pytest.fixture(scope="module")
def router(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RouterProcess]:
    root: Path = tmp_path_factory.mktemp("parrots")
    for name, (body, _) in _BODIES.items():
        make_parrot(root / name, ["<tool_call>", *body, *([] if "unclosed" in name else ["</tool_call>"])])
    # The end marker inside an argument is written in pieces, since a parrot has each token once.
    make_parrot(root / "marker-inside", ["<tool_call>", _HEAD + "use ", "</tool", "_call> tag", '"}}', "</tool_call>"])
    make_parrot(root / "broken", ["<tool_call>", _HEAD + "abc"])
    calls = ["[TOOL_CALLS]", '[{"name": "write", ', '"arguments": {"text": "a\\ud83d", "n": NaN}, "id": "abcdefghi"}]']
    make_parrot(root / "mistral", calls, markers=("[TOOL_CALLS]",), chat_template=_MISTRAL)
    with running_router(tmp_path_factory.mktemp("home"), "--models-dir", str(root)) as found:
        yield found


def _body(model: str, **more: Any) -> dict[str, Any]:
    return {"model": model, "messages": [{"role": "user", "content": "go"}], "tools": [_TOOL], **more}


@pytest.mark.parametrize(
    ("model", "text"), [*((n, t) for n, (_, t) in _BODIES.items()), ("marker-inside", "use </tool_call> tag")]
)
def test_a_call_is_the_same_streamed_and_whole_on_every_api(router: RouterProcess, model: str, text: str) -> None:
    choice = call(router, "POST", "/v1/chat/completions", _body(model)).json()["choices"][0]
    (made,) = choice["message"]["tool_calls"]
    assert json.loads(made["function"]["arguments"]) == {"text": text}
    assert (choice["finish_reason"], choice["message"]["content"]) == ("tool_calls", None)
    streamed, reason = "", None
    for frame in read_frames(call(router, "POST", "/v1/chat/completions", _body(model, stream=True)).body)[:-1]:
        assert "error" not in frame.data
        part = frame.data["choices"][0]
        streamed += "".join(c["function"]["arguments"] for c in part["delta"].get("tool_calls", []))
        reason = part["finish_reason"] or reason
    assert (json.loads(streamed), reason) == ({"text": text}, "tool_calls")
    native = call(router, "POST", "/api/chat", _body(model, stream=False)).json()["message"]
    assert native["tool_calls"][0]["function"]["arguments"] == {"text": text}
    tools = [{"name": "write", "input_schema": _TOOL["function"]["parameters"]}]  # type: ignore[index]
    blocks = call(router, "POST", "/v1/messages", _body(model, tools=tools, max_tokens=50)).json()["content"]
    assert [block["input"] for block in blocks if block["type"] == "tool_use"] == [{"text": text}]


def test_a_stream_does_not_end_inside_a_call_without_an_error(router: RouterProcess) -> None:
    frames = read_frames(call(router, "POST", "/v1/chat/completions", _body("broken", stream=True)).body)
    assert "error" in frames[-1].data
    whole = call(router, "POST", "/v1/chat/completions", _body("broken")).json()["choices"][0]
    assert (whole["finish_reason"], "tool_calls" in whole["message"]) == ("stop", False)
    assert whole["message"]["content"].startswith("<tool_call>"), "shown as it was written"
    cut = call(router, "POST", "/v1/chat/completions", _body("raw-break", max_tokens=3)).json()["choices"][0]
    assert cut["finish_reason"] == "length"


@pytest.mark.parametrize("path", ["/api/chat", "/v1/chat/completions", "/v1/messages", "/v1/responses"])
@pytest.mark.parametrize("stream", [False, True])
def test_what_another_family_writes_cannot_be_unencodable(router: RouterProcess, path: str, stream: bool) -> None:
    """Half of a surrogate pair and a number that is none, through one of mlx-lm's own parsers."""
    body = _body("mistral", stream=stream, max_tokens=50)
    if path == "/v1/messages":
        body["tools"] = [{"name": "write", "input_schema": _TOOL["function"]["parameters"]}]  # type: ignore[index]
    elif path == "/v1/responses":
        function: Any = _TOOL["function"]
        body = {"model": "mistral", "input": "go", "tools": [{"type": "function", **function}], "stream": stream}
    reply = call(router, "POST", path, body)
    assert reply.status == 200, reply.body
    assert b"write" in reply.body
    assert b'"error":{' not in reply.body
    assert b"NaN" not in reply.body
    assert router.model("mistral")["failures"] == 0


def test_values_of_other_parsers_become_plain_json() -> None:
    text = plain_json({"a": "x\ud83d", "b": [float("nan"), float("inf"), 1.5], "\udc00": {"c": "\ud83d\ude00"}})
    assert json.loads(text) == {"a": "x\ufffd", "b": [None, None, 1.5], "\ufffd": {"c": "😀"}}
    text.encode()
    assert read_json('{"x": NaN, "y": -Infinity, "z": -5, "w": 1e-5, "v": [-1, True]}') == {
        "x": None, "y": None, "z": -5, "w": 1e-5, "v": [-1, True]
    }  # fmt: skip
