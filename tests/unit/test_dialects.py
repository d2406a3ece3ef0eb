"""The pure translations where a socket adds nothing: templates, fields, images, what is kept of responses."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import Struct

from mlx_router_server.api.response_store import ResponseStore
from mlx_router_server.dialects.anthropic_answers import AnthropicStream
from mlx_router_server.dialects.anthropic_requests import parse_messages
from mlx_router_server.dialects.fields import FieldRules
from mlx_router_server.dialects.go_template import render_prompt, render_template
from mlx_router_server.dialects.images import image_from_base64, image_from_url
from mlx_router_server.dialects.ollama_requests import parse_chat
from mlx_router_server.dialects.openai_requests import parse_chat_completion
from mlx_router_server.dialects.options import parse_options
from mlx_router_server.dialects.responses_requests import parse_responses
from mlx_router_shared.errors import (
    ContextLengthExceeded,
    EngineFailed,
    InvalidRequest,
    MlxRouterError,
    ModelNotFound,
    Overloaded,
    UnsupportedCapability,
)
from mlx_router_shared.generation import Failure, Message, Role, error_of, failure_of


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{{ .Prompt }}", "P"),
        ("a {{- .System -}} b", "aSb"),
        ("{{ if .System }}<s>{{ .System }}</s>{{ end }}{{ .Prompt }}{{ .Response }}", "<s>S</s>P"),
        ("{{ if not .System }}x{{ else if eq .Prompt \"P\" }}y{{ else }}z{{ end }}", "y"),
        ("{{ range .Messages }}{{ .Role }}:{{ .Content }};{{ end }}", "system:S;user:P;"),
        ("{{ range .Messages }}{{ if and (eq .Role \"user\") $.System }}{{ .Content }}{{ end }}{{ end }}", "P"),
        ("{{/* nothing */}}{{ len .Messages }}{{ `raw` }}", "2raw"),
        ("{{ if or .Tools .System }}t{{ end }}", "t"),
        ("no action", "no action"),
        ("{{ -5 }}|{{- `a` }} {{ `b` -}} \n|{{-\n`c`\n-}} d", "-5|a b|cd"),
    ],
)  # fmt: skip
def test_the_part_of_go_templates_that_prompts_are_written_in(template: str, expected: str) -> None:
    assert render_prompt(template, "S", "P") == expected


@pytest.mark.parametrize(
    "template",
    ["{{ .Prompt", "{{ if .System }}x", "{{ end }}", "{{ template \"x\" }}", "{{ .Prompt | upper }}", "{{ $x := 1 }}", "{{ }}",
     "{{ printf \"%s\" .Prompt }}", "{{ range .Prompt }}x{{ end }}", "{{ (eq .System }}", "x" * 200_000, "{{ --5 }}", "{{ ² }}", "{{" + " " * 90_000, "{{" * 40_000,
     "{{ if .System }}" * 2000 + "{{ end }}" * 2000, "{{ if .System }}" + "{{ else if .System }}" * 2000 + "{{ end }}",
     "{{ " + "(" * 3000 + ".System" + ")" * 3000 + " }}", "{{ `" + "` `" * 30_000 + " }}",
     "{{ range $.Messages }}" * 19 + "x" + "{{ end }}" * 19],
)  # fmt: skip
def test_a_template_that_is_not_understood_is_refused(template: str) -> None:
    with pytest.raises(InvalidRequest, match="template error"):
        render_prompt(template, "S", "P")


def test_a_template_cannot_make_more_text_than_is_sane() -> None:
    values = {"Prompt": "P" * 100_000, "Messages": [{}] * 1000}
    with pytest.raises(InvalidRequest, match="too much text"):
        render_template("{{ range .Messages }}{{ $.Prompt }}{{ end }}", values)


@given(st.text(alphabet='{}.-"`() Prompteqifndrang$:=\n', max_size=60))
def test_no_text_breaks_the_template_reader(template: str) -> None:
    try:
        assert isinstance(render_template(template, {"Prompt": "P", "Messages": []}), str)
    except InvalidRequest:
        pass


class _Body(Struct):
    model: str = ""


def test_a_field_is_honoured_ignored_or_refused() -> None:
    rules = FieldRules(route="POST /x", body=_Body, ignored={"user": "why"}, refused={"audio": "no sound"})
    assert rules.check({"model": "m", "user": "u", "new": 1, "empty": [], "off": False}) == ("user", "new", "off")
    assert rules.check({"audio": None}) == ()
    with pytest.raises(UnsupportedCapability, match="no sound") as refused:
        rules.check({"audio": {"voice": "x"}})
    assert refused.value.param == "audio"


def test_images_come_as_files_and_never_by_address() -> None:
    data = b"\x89PNG\r\n\x1a\nrest"
    text = base64.b64encode(data).decode()
    assert image_from_base64(text, "p") == data
    assert image_from_url(f"data:image/png;base64,{text}", "p") == data
    for url in ("http://x/y.png", "https://x/y.png", "file:///etc/passwd", "/etc/passwd"):
        with pytest.raises(UnsupportedCapability):
            image_from_url(url, "p")
    for bad in ("data:image/png,abc", "data:;base64,!!", "data:image/png;base64,aGVsbG8="):
        with pytest.raises(InvalidRequest):
            image_from_url(bad, "p")


def test_errors_cross_the_wire_whole() -> None:
    for error in (InvalidRequest("x", param="p"), ModelNotFound("x"), ContextLengthExceeded("x", tokens=9, limit=3)):
        back = error_of(failure_of(error))
        assert (type(back), back.message, back.param) == (type(error), error.message, error.param)
        assert getattr(back, "tokens", None) == getattr(error, "tokens", None)
    assert type(error_of(Failure(code="of_a_newer_worker", message="x"))) is EngineFailed
    assert not isinstance(error_of(Failure(code="internal", message="x")), InvalidRequest)
    assert MlxRouterError.code == "internal"


class _Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def _put(store: ResponseStore, name: str, text: str = "x", most: int = 3) -> None:
    message = Message(role=Role.USER, content=text)
    store.put({"id": name}, [message], [], most=most, seconds=10)


def test_kept_responses_are_bounded_in_number_time_and_size() -> None:
    clock = _Clock()
    store = ResponseStore(clock)
    for number in range(5):
        _put(store, f"r{number}")
    assert [store.get(f"r{n}") is not None for n in range(5)] == [False, False, True, True, True]
    clock.now = 11
    assert store.get("r4") is None
    _put(store, "new")
    assert len(store) == 1
    _put(store, "none", most=0)
    assert store.get("none") is None
    for number in range(4):
        _put(store, f"big{number}", "y" * 20_000_000, most=100)
    assert len(store) <= 3
    _put(store, "huge", "z" * 70_000_000, most=100)
    assert store.get("huge") is None
    store.put({"id": "large", "number": 2**64}, [], [{"number": 2**64}], most=100, seconds=10)
    assert store.get("large") is not None
    store.put({"id": "dropped"}, [], [{"x": "z" * 70_000_000}], most=100, seconds=10)
    assert store.get("dropped") is None, "what came in is counted too"
    assert store.delete("big3") is True
    assert store.delete("big3") is False


_NULL_TOOL: dict[str, Any] = {"name": "f", "description": None, "parameters": None, "strict": None}
_NULL_CALL: dict[str, Any] = {"id": None, "type": "function", "function": {"name": "f", "arguments": None}}
_TURNS: list[dict[str, Any]] = [
    {"role": "user", "content": "x", "name": None, "images": None},
    {"role": "assistant", "content": None, "tool_calls": [_NULL_CALL], "refusal": None},
    {"role": "tool", "content": "r", "tool_call_id": None, "tool_name": None},
]  # fmt: skip
_NULLS: dict[str, tuple[Callable[[bytes], Any], dict[str, Any]]] = {
    "chat completions": (parse_chat_completion, {
        "model": "m", "messages": _TURNS, "tools": [{"type": "function", "function": _NULL_TOOL}],
        "stream_options": {"include_usage": None}, "response_format": {"type": None}, "reasoning": {"effort": None},
        "thinking": {"type": None}, "chat_template_kwargs": {"enable_thinking": None}, "logit_bias": None}),
    "ollama": (parse_chat, {
        "model": "m", "messages": _TURNS, "tools": [{"type": "function", "function": _NULL_TOOL}],
        "options": {"seed": None, "stop": None}, "format": None, "think": None, "keep_alive": None}),
    "anthropic": (parse_messages, {
        "model": "m", "max_tokens": 5,
        "messages": [{"role": "user", "content": [{"type": "text", "text": "x", "cache_control": None}]}],
        "tools": [{"name": "f", "description": None, "input_schema": {"type": "object"}, "cache_control": None}],
        "thinking": {"type": "enabled", "budget_tokens": None}, "metadata": {"user_id": None}, "system": None}),
    "responses": (parse_responses, {
        "model": "m", "tools": [{"type": "function", **_NULL_TOOL}], "reasoning": {"effort": None, "summary": None},
        "input": [{"type": "message", "role": "user", "id": None, "status": None,
                   "content": [{"type": "input_text", "text": "x", "annotations": None}]}],
        "text": {"format": None, "verbosity": None}, "include": None, "truncation": None}),
}  # fmt: skip


@pytest.mark.parametrize("api", _NULLS)
def test_a_null_is_absence_at_any_depth(api: str) -> None:
    parse, body = _NULLS[api]
    assert parse(json.dumps(body).encode())


@pytest.mark.parametrize("depth", [10, 500, 900])
@pytest.mark.parametrize("field", ["stream_options", "messages"])
def test_brackets_within_brackets_are_refused(field: str, depth: int) -> None:
    body: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "x"}], "stream_options": {}}
    nested = "[" * depth + "]" * depth
    text = json.dumps(body | {field: "HERE"}).replace('"HERE"', nested)
    with pytest.raises(InvalidRequest):
        parse_chat_completion(text.encode())


def test_nulls_of_arguments_and_schemas_are_kept() -> None:
    schema = {"type": "object", "properties": {"x": {"enum": [None], "default": None}}}
    call = {"function": {"name": "f", "arguments": {"x": None}}}
    body = {
        "model": "m", "messages": [{"role": "user", "content": "x"}, {"role": "assistant", "tool_calls": [call]}],
        "tools": [{"type": "function", "function": {"name": "f", "parameters": schema}}],
    }  # fmt: skip
    parsed: Any = parse_chat(json.dumps(body).encode())
    request = parsed.call.requests[0]
    assert json.loads(request.tools[0].parameters) == schema
    assert json.loads(request.messages[1].tool_calls[0].arguments) == {"x": None}


@pytest.mark.parametrize("name", ["temperature", "repeat_penalty", "num_predict"])
def test_numbers_beyond_all_bounds_are_refused(name: str) -> None:
    with pytest.raises(InvalidRequest, match="out of range"):
        parse_options({name: 10**400})


def test_an_error_after_a_ping_has_the_type_that_it_has_before_one() -> None:
    for error, kind in ((ContextLengthExceeded("x"), "invalid_request_error"), (ModelNotFound("x"), "not_found_error"),
                        (EngineFailed("x"), "api_error"), (Overloaded("x"), "overloaded_error")):  # fmt: skip
        assert f'"type":"{kind}"' in AnthropicStream("id", "m", show_thinking=False).fail(error).decode()


def test_a_conversation_is_told_apart_by_its_messages() -> None:
    store = ResponseStore()
    messages: list[Any] = [Message(role=Role.USER, content="a"), Message(role=Role.ASSISTANT, content="b")]
    store.put({"id": "r"}, messages, [{"id": "i"}], most=5, seconds=10)
    stored = store.get("r")
    assert stored is not None
    assert (stored.messages, stored.input_items) == (messages, [{"id": "i"}])
