"""A request field about thinking that a model's template cannot follow is named in the response."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.http import call
from tests.support.router import RouterProcess, running_router
from tests.tiny_models.parrot import make_parrot

_ALWAYS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)
_SWITCH = _ALWAYS.replace("<think>\n{%", "{% if thinking is not defined or thinking %}<think>\n{% endif %}{%")
_MESSAGES = [{"role": "user", "content": "Hello!"}]


@pytest.fixture(scope="module")
def router(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RouterProcess]:
    root = tmp_path_factory.mktemp("thinkers")
    for name, template in (("always", _ALWAYS), ("switch", _SWITCH)):
        make_parrot(root / "models" / name, ["so", "</think>", "yes"], chat_template=template)
    with running_router(root, "--models-dir", str(root / "models")) as router:
        yield router


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("path", "body", "always", "switch"),
    [
        ("/api/chat", {"think": False}, "think", None),
        ("/api/chat", {"think": True}, None, None),
        ("/api/chat", {}, None, None),
        ("/api/chat", {"think": "low"}, "think", "think"),
        ("/v1/chat/completions", {"reasoning_effort": "none"}, "reasoning_effort", None),
        ("/v1/chat/completions", {}, None, None),
        ("/v1/responses", {"reasoning": {"effort": "none"}}, "reasoning.effort", None),
        ("/v1/messages", {"thinking": {"type": "disabled"}}, "thinking", None),
        ("/v1/messages", {}, None, None),
    ],
)
def test_what_the_template_cannot_follow_is_named(
    router: RouterProcess, path: str, body: dict[str, Any], always: str | None, switch: str | None, stream: bool
) -> None:
    for model, named in (("always", always), ("switch", switch)):
        asked: dict[str, Any] = {"model": model, "stream": stream, **body}
        asked |= {"input": "Hello!"} if path == "/v1/responses" else {"messages": _MESSAGES}
        if path == "/v1/messages":
            asked["max_tokens"] = 20
        reply = call(router, "POST", path, asked)
        assert reply.status == 200, reply.body
        assert reply.headers["x-ignored-fields"] == named, model


def test_a_model_that_never_thinks_is_told_not_to_without_a_word(tmp_path: Path) -> None:
    plain = _ALWAYS.replace("<think>\n", "")
    make_parrot(tmp_path / "models" / "plain", ["yes"], chat_template=plain)
    with running_router(tmp_path, "--models-dir", str(tmp_path / "models")) as router:
        body = {"model": "plain", "messages": _MESSAGES, "think": False, "stream": False}
        reply = call(router, "POST", "/api/chat", body)
        assert reply.status == 200
        assert reply.headers["x-ignored-fields"] is None
