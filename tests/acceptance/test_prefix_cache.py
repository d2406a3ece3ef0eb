"""Kept prefixes over HTTP: what each API tells of them, and who finds whose."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support.http import call
from tests.support.router import RouterProcess, running_router

_SYSTEM = "You are a helpful assistant that answers in full sentences. " * 8
_QUESTION = {"role": "user", "content": "Hello!"}


def _chat(router: RouterProcess, messages: list[dict[str, Any]], **headers: str) -> dict[str, Any]:
    body = {"model": "demo", "messages": messages, "max_tokens": 20, "temperature": 0}
    reply = call(router, "POST", "/v1/chat/completions", body, **headers)
    assert reply.status == 200, reply.body
    found: dict[str, Any] = reply.json()
    return found


def _cached(answer: dict[str, Any]) -> int:
    tokens: int = answer["usage"]["prompt_tokens_details"]["cached_tokens"]
    return tokens


def test_each_turn_is_processed_from_the_end_of_the_last_one_on_every_api(home: Path) -> None:
    with running_router(home) as router:
        messages: list[dict[str, Any]] = [{"role": "system", "content": _SYSTEM}]
        before = 0
        for _ in range(3):
            messages.append(_QUESTION)
            answer = _chat(router, messages)
            usage = answer["usage"]
            assert _cached(answer) >= 0.95 * before
            assert _cached(answer) <= before
            before = usage["total_tokens"]
            messages.append({"role": "assistant", "content": answer["choices"][0]["message"]["content"]})
        messages.append(_QUESTION)
        anthropic = call(
            router, "POST", "/v1/messages",
            {"model": "demo", "system": _SYSTEM, "messages": messages[1:], "max_tokens": 5},
        ).json()["usage"]  # fmt: skip
        assert anthropic["cache_read_input_tokens"] >= 0.95 * before
        responses = call(
            router, "POST", "/v1/responses",
            {"model": "demo", "instructions": _SYSTEM, "input": messages[1:], "max_output_tokens": 5},
        ).json()["usage"]  # fmt: skip
        assert responses["input_tokens_details"]["cached_tokens"] >= 0.95 * before
        ollama = call(router, "POST", "/api/chat", {"model": "demo", "messages": messages, "stream": False}).json()
        assert ollama["prompt_eval_count"] > before, "all of the prompt counts"


def test_choices_of_one_request_tell_the_reuse_once(home: Path) -> None:
    with running_router(home) as router:
        messages = [{"role": "system", "content": _SYSTEM}, _QUESTION]
        first = _chat(router, messages)
        body = {"model": "demo", "messages": messages, "max_tokens": 5, "n": 3}
        again = call(router, "POST", "/v1/chat/completions", body).json()
        assert again["usage"]["prompt_tokens"] == first["usage"]["prompt_tokens"]
        assert _cached(again) == first["usage"]["prompt_tokens"] - 1, "the last token is always processed"


def test_a_request_and_an_operator_can_do_without(home: Path, tmp_path: Path) -> None:
    messages = [{"role": "system", "content": _SYSTEM}, _QUESTION]
    with running_router(home) as router:
        _chat(router, messages, **{"X-Prefix-Cache": "off"})
        assert _cached(_chat(router, messages)) == 0
        assert _cached(_chat(router, messages)) > 0
        assert _cached(_chat(router, messages, **{"X-Prefix-Cache": "OFF "})) == 0
    (other := tmp_path / "other").mkdir()
    with running_router(other, "--prefix-cache-memory", "0") as router:
        assert [_cached(_chat(router, messages)) for _ in range(2)] == [0, 0]


@pytest.mark.parametrize("path", ["/api/chat", "/v1/chat/completions", "/v1/messages", "/v1/responses"])
def test_a_header_that_is_neither_on_nor_off_is_refused(demo_router: RouterProcess, path: str) -> None:
    body = {"model": "demo", "messages": [_QUESTION], "input": "Hello!", "max_tokens": 5}
    reply = call(demo_router, "POST", path, body, X_Prefix_Cache="maybe")
    assert reply.status == 400
    assert b"X-Prefix-Cache must be on or off" in reply.body


def test_two_keys_share_nothing(home: Path) -> None:
    messages = [{"role": "system", "content": _SYSTEM}, _QUESTION]
    with running_router(home, "--api-keys", "key-one,key-two") as router:
        one, two = ({"Authorization": f"Bearer key-{name}"} for name in ("one", "two"))
        assert _cached(_chat(router, messages, **one)) == 0
        assert _cached(_chat(router, messages, **two)) == 0
        assert _cached(_chat(router, messages, **one)) > 0
        assert _cached(_chat(router, messages, **two)) > 0
