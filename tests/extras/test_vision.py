"""A model that sees, with random weights: what it says means nothing, but it changes with the picture."""

from __future__ import annotations

import base64
import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.support.http import Reply, call
from tests.support.router import RouterProcess, wait_until
from tests.tiny_models.vision import png

_RED, _BLUE = (base64.b64encode(png(color)).decode() for color in ((255, 0, 0), (0, 0, 255)))
_OPTIONS = {"temperature": 0, "num_predict": 12}


def _chat(router: RouterProcess, images: list[str], text: str = "What do you see?", **more: Any) -> Reply:
    messages = [{"role": "user", "content": text, "images": images}]
    return call(
        router,
        "POST",
        "/api/chat",
        {"model": "seer", "messages": messages, "stream": False, "options": _OPTIONS, **more},
    )


def _said(reply: Reply) -> str:
    assert reply.status == 200, reply.body
    text: str = reply.json()["message"]["content"]
    return text


def test_it_is_known_as_a_model_that_sees(router: RouterProcess) -> None:
    shown = call(router, "POST", "/api/show", {"model": "seer"}).json()
    assert {"vision", "completion"} <= set(shown["capabilities"])


@pytest.mark.covers("T153", "T170")
def test_an_image_on_all_three_apis_is_seen(router: RouterProcess) -> None:
    red, blue, none = _said(_chat(router, [_RED])), _said(_chat(router, [_BLUE])), _said(_chat(router, []))
    assert len({red, blue, none}) == 3
    assert _said(_chat(router, [_RED])) == red
    counts = [_chat(router, images).json()["prompt_eval_count"] for images in ([], [_RED], [_RED, _BLUE])]
    assert counts[0] < counts[1] < counts[2]
    parts = [
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{_RED}"}},
        {"type": "text", "text": "What do you see?"},
    ]
    by_openai = call(router, "POST", "/v1/chat/completions",
                     {"model": "seer", "messages": [{"role": "user", "content": parts}], "temperature": 0, "max_tokens": 12})  # fmt: skip
    assert by_openai.json()["choices"][0]["message"]["content"] == red
    inputs = [{"role": "user", "content": [{"type": "input_image", "image_url": f"data:image/png;base64,{_RED}"},
                                           {"type": "input_text", "text": "What do you see?"}]}]  # fmt: skip
    by_responses = call(
        router, "POST", "/v1/responses", {"model": "seer", "input": inputs, "temperature": 0, "max_output_tokens": 12}
    )
    assert by_responses.json()["output"][0]["content"][0]["text"] == red
    blocks = [
        {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": _RED}},
        {"type": "text", "text": "What do you see?"},
    ]
    by_anthropic = call(router, "POST", "/v1/messages",
                        {"model": "seer", "messages": [{"role": "user", "content": blocks}], "temperature": 0, "max_tokens": 12})  # fmt: skip
    assert by_anthropic.json()["content"][0]["text"] == red
    generated = call(router, "POST", "/api/generate",
                     {"model": "seer", "prompt": "What do you see?", "images": [_RED], "stream": False, "options": _OPTIONS})  # fmt: skip
    assert generated.json()["response"] == red


def test_hundreds_of_steps_change_nothing(router: RouterProcess) -> None:
    first = _said(_chat(router, [_RED]))
    for _ in range(30):
        assert _said(_chat(router, [_RED])) == first


def test_many_at_once_answer_as_they_would_alone(router: RouterProcess) -> None:
    asks = [[_RED], [_BLUE], [], [_RED, _BLUE]] * 4
    alone = [_said(_chat(router, images)) for images in asks[:4]]
    with ThreadPoolExecutor(16) as pool:
        together = list(pool.map(lambda images: _said(_chat(router, images)), asks))
    assert together == alone * 4


def test_everything_else_of_an_answer_is_as_with_text(router: RouterProcess) -> None:
    schema = {
        "type": "object",
        "properties": {"a": {"type": "integer"}},
        "required": ["a"],
        "additionalProperties": False,
    }
    held = _said(_chat(router, [_RED], format=schema, options={"num_predict": 40, "temperature": 1.0, "seed": 3}))
    assert isinstance(json.loads(held)["a"], int)
    scored = _chat(router, [_RED], logprobs=True, top_logprobs=2).json()
    assert "".join(entry["token"] for entry in scored["logprobs"]) == scored["message"]["content"]
    assert all(entry["logprob"] <= 0 and len(entry["top_logprobs"]) == 2 for entry in scored["logprobs"])
    seeded = [
        _said(_chat(router, [_RED], options={"num_predict": 12, "seed": 5, "temperature": 2.0})) for _ in range(2)
    ]
    assert seeded[0] == seeded[1]


@pytest.mark.parametrize(
    ("data", "text"),
    [(b"\x89PNG\r\n\x1a\n", "invalid image input"), (b"hello", "not a PNG"), (png((1, 2, 3), (3000, 8)), "images")],
)
def test_pictures_that_cannot_be_taken(router: RouterProcess, data: bytes, text: str) -> None:
    reply = _chat(router, [base64.b64encode(data).decode()])
    assert reply.status == 400
    assert text in reply.json()["error"]
    assert _chat(router, [_RED]).status == 200, "the engine is none the worse"


def test_the_marker_of_an_image_in_a_text_is_only_text(router: RouterProcess) -> None:
    assert _chat(router, [_RED], "What <|image_pad|> do you see?").status == 200
    assert _chat(router, [], "<|image_pad|><|image_pad|>").status == 200


def test_a_picture_is_too_large_before_it_is_unpacked(router: RouterProcess) -> None:
    head = png((0, 0, 0), (8, 8))
    huge = head[:16] + (60_000).to_bytes(4) + (60_000).to_bytes(4) + head[24:]
    reply = _chat(router, [base64.b64encode(huge).decode()])
    assert reply.status == 400
    assert "image" in reply.json()["error"]


def test_addresses_are_not_fetched(router: RouterProcess) -> None:
    parts = [{"type": "image_url", "image_url": {"url": "http://127.0.0.1:1/x.png"}}]
    reply = call(
        router, "POST", "/v1/chat/completions", {"model": "seer", "messages": [{"role": "user", "content": parts}]}
    )
    assert (reply.status, "not currently supported" in reply.json()["error"]["message"]) == (400, True)


def test_its_imports_are_done_by_the_next_fork_server(router: RouterProcess) -> None:
    """The first worker of a kind that needs an extra imports it after the fork, later ones before."""
    router.client.post("/admin/models/seer/load")
    assert router.model("seer")["last_swap"]["source"] == "fork"
    router.client.post("/admin/models/seer/unload")

    def source() -> dict[str, Any]:
        found: dict[str, Any] = router.status()["router"]["worker_source"]
        return found

    wait_until(lambda: "vlm" in source()["fork_server_engines"] and source()["fork_server_ready"], "it is replaced")
    router.client.post("/admin/models/seer/load")
    assert router.model("seer")["last_swap"]["source"] == "fork"
    assert (source()["kind"], source()["reason"]) == ("fork", "")
