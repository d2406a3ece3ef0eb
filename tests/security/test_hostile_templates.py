"""Chat templates that loop or fill the memory: the request is refused, and every other one is served."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.support.http import call
from tests.support.router import running_router
from tests.tiny_models.parrot import make_parrot

_SHOW = "{% for m in messages %}{{ m.content }}{% endfor %}"
_LOOPS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
_HOSTILE = {
    "string": "{{ 'x' * 99999999999 }}",
    "format": "{{ '%99999999999d' % 1 }}",
    "list": "{% set a = [1] * 99999999999 %}",
    "loop": _LOOPS,
    "text": "{% for a in range(99999) %}{{ 'x' * 9999 }}{% endfor %}",
}
_NEEDS_LINUX = {"string", "format", "list"}


@pytest.mark.req("R28", "R46")
@pytest.mark.parametrize(
    "how",
    [
        pytest.param(how, marks=[pytest.mark.slow] if how != "string" else [])
        for how in _HOSTILE
        if sys.platform == "linux" or how not in _NEEDS_LINUX
    ],
)
def test_a_template_that_needs_too_much_is_refused_and_harms_no_other_model(
    home: Path, tmp_path: Path, how: str
) -> None:
    """Where the model is loaded, and in the worker that counts the prompts of all models."""
    make_parrot(tmp_path / "bad", ["fine"], chat_template=_HOSTILE[how] + _SHOW)
    make_parrot(tmp_path / "good", ["well"])
    with running_router(home, "--models-dir", str(tmp_path)) as router:
        body = {"model": "bad", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 3}
        chat = call(router, "POST", "/v1/chat/completions", body)
        assert (chat.status, b"chat template" in chat.body or b"input length" in chat.body) == (400, True), chat.body
        assert call(router, "POST", "/v1/messages/count_tokens", body).status == 400
        again = call(router, "POST", "/v1/messages/count_tokens", {**body, "model": "good"})
        assert again.json()["input_tokens"] > 0
        assert router.generate("good")["response"] == "well"
        assert call(router, "POST", "/v1/completions", {"model": "bad", "prompt": "a", "max_tokens": 2}).status == 200


@pytest.mark.slow
@pytest.mark.req("R28")
def test_a_template_that_needs_too_much_for_one_conversation_serves_the_next(home: Path, tmp_path: Path) -> None:
    make_parrot(
        tmp_path / "odd",
        ["fine"],
        chat_template=f"{{% if messages[0].content == 'long' %}}{_LOOPS}{{% endif %}}{_SHOW}",
    )
    with running_router(home, "--models-dir", str(tmp_path)) as router:
        for content, status in (("long", 400), ("short", 200)):
            body = {"model": "odd", "messages": [{"role": "user", "content": content}], "max_tokens": 3}
            assert call(router, "POST", "/v1/chat/completions", body).status == status
