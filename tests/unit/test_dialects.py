"""The pure translations where a socket adds nothing: templates, fields, images, what is kept of responses."""

from __future__ import annotations

import base64
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import Struct

from mlx_router_server.api.response_store import ResponseStore
from mlx_router_server.dialects.fields import FieldRules
from mlx_router_server.dialects.go_template import render_prompt, render_template
from mlx_router_server.dialects.images import image_from_base64, image_from_url
from mlx_router_shared.errors import (
    ContextLengthExceeded,
    EngineFailed,
    InvalidRequest,
    MlxRouterError,
    ModelNotFound,
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
    ],
)  # fmt: skip
def test_the_part_of_go_templates_that_prompts_are_written_in(template: str, expected: str) -> None:
    assert render_prompt(template, "S", "P") == expected


@pytest.mark.parametrize(
    "template",
    ["{{ .Prompt", "{{ if .System }}x", "{{ end }}", "{{ template \"x\" }}", "{{ .Prompt | upper }}", "{{ $x := 1 }}", "{{ }}",
     "{{ printf \"%s\" .Prompt }}", "{{ range .Prompt }}x{{ end }}", "{{ (eq .System }}", "x" * 200_000],
)  # fmt: skip
def test_a_template_that_is_not_understood_is_refused(template: str) -> None:
    with pytest.raises(InvalidRequest, match="template error"):
        render_prompt(template, "S", "P")


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
    assert rules.check({"model": "m", "user": "u", "new": 1, "empty": [], "off": False}) == ("user", "new")
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
    assert store.delete("big3") is True
    assert store.delete("big3") is False


def test_a_conversation_is_told_apart_by_its_messages() -> None:
    store = ResponseStore()
    messages: list[Any] = [Message(role=Role.USER, content="a"), Message(role=Role.ASSISTANT, content="b")]
    store.put({"id": "r"}, messages, [{"id": "i"}], most=5, seconds=10)
    stored = store.get("r")
    assert stored is not None
    assert (stored.messages, stored.input_items) == (messages, [{"id": "i"}])
