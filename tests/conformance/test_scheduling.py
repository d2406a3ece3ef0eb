"""The checks about who is served when, with scripted models; the rest of them are process tests of the lifecycle."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import anthropic
import openai
import pytest

from mlx_router_server.settings_layers import load_settings
from tests.support.fakes import fake_config
from tests.support.http import call
from tests.support.router import RouterProcess, running_router, wait_until

_OK = {"tokens": 2}
_MESSAGES: Any = [{"role": "user", "content": "go"}]


@pytest.mark.covers("T044")
def test_ps_answers_while_a_model_loads(home: Path) -> None:
    with (
        running_router(home, *fake_config(home, {"a": {"load_seconds": 3.0, "tokens": 2}})) as router,
        ThreadPoolExecutor(1) as pool,
    ):
        waiting = pool.submit(router.generate, "a")
        router.wait_state("a", "starting", "loading")
        for _ in range(5):
            began = time.monotonic()
            assert call(router, "GET", "/api/ps").json() == {"models": []}
            assert time.monotonic() - began < 1
        assert router.model("a")["state"] in ("starting", "loading"), "it was still on its way"
        assert waiting.result(20)["done"] is True


@pytest.mark.covers("T061")
@pytest.mark.parametrize(("text", "seconds"), [("10s", 10.0), ("10", 10.0), ("-1", float("inf")), ("0", 0.0)])
def test_ollamas_variable_for_keep_alive(text: str, seconds: float) -> None:
    assert load_settings({}, {"OLLAMA_KEEP_ALIVE": text, "MLX_ROUTER_HOME": "/nonexistent"}).keep_alive == seconds


@pytest.mark.covers("T075", "T087")
def test_an_empty_name_and_odd_options(home: Path) -> None:
    with running_router(home, *fake_config(home, {"a": _OK})) as router:
        assert call(router, "POST", "/api/generate", {"model": "", "prompt": "go"}).status in (400, 404)
        assert router.generate("a", options={"num_predict": 1.9, "seed": None})["eval_count"] == 1


@pytest.mark.covers("T178")
def test_nothing_is_loaded_for_a_client_that_left_the_queue(home: Path) -> None:
    scripts: dict[str, dict[str, Any]] = {"a": {"tokens": 100, "tokens_per_second": 50}, "b": _OK}
    with running_router(home, *fake_config(home, scripts, max_loaded_models=1)) as router:
        stream = router.client.stream("/api/generate", {"model": "a", "prompt": "go"})
        next(stream)
        gone = router.client.stream("/api/generate", {"model": "b", "prompt": "go"})
        with ThreadPoolExecutor(1) as pool:
            first = pool.submit(next, gone)
            wait_until(lambda: router.model("b")["queued"] == 1, "it waits")
            _abandon(router, "b")
            wait_until(lambda: router.model("b")["queued"] in (0, 1), "told")
            assert list(stream)[-1]["done"] is True
            first.exception(20)
        gone.close()
        assert router.model("a")["loads"] == 1


def _abandon(router: RouterProcess, model: str) -> None:
    """A second client for the same model, by a raw socket that is closed at once."""
    from tests.support.http import RawStream

    RawStream(router, "/api/generate", {"model": model, "prompt": "go", "stream": True}).socket.close()


@pytest.mark.covers("T185")
def test_a_model_that_died_while_idle_comes_back_by_itself(home: Path) -> None:
    with running_router(home, *fake_config(home, {"a": _OK})) as router:
        router.generate("a")
        pid = router.model("a")["pid"]
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: router.model("a")["pid"] != pid, "its end is seen")
        wait_until(lambda: _answers(router), "it is back")
        assert router.model("a")["loads"] == 2


def _answers(router: RouterProcess) -> bool:
    return call(router, "POST", "/api/generate", {"model": "a", "prompt": "go", "stream": False}).status == 200


@pytest.mark.covers("T188")
def test_waiting_and_loading_are_in_the_load_duration(home: Path) -> None:
    scripts: dict[str, dict[str, Any]] = {
        "a": {"tokens": 50, "tokens_per_second": 50},
        "b": {"load_seconds": 0.5, "tokens": 2},
    }
    with running_router(home, *fake_config(home, scripts, max_loaded_models=1)) as router:
        stream = router.client.stream("/api/generate", {"model": "a", "prompt": "go"})
        next(stream)
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(router.generate, "b")
            list(stream)
            answer = waiting.result(20)
        assert answer["load_duration"] > 1_000_000_000
        assert answer["total_duration"] >= answer["load_duration"]


@pytest.mark.covers("T190")
def test_two_names_of_one_model_share_it(home: Path) -> None:
    arguments = fake_config(home, {"a": _OK})
    config = home / "config.toml"
    config.write_text(config.read_text().replace('[models."a"]', '[models."a"]\naliases = ["other"]'))
    with running_router(home, *arguments) as router:
        assert router.generate("a")["model"] == "a"
        assert router.generate("other")["model"] == "other"
        assert len(call(router, "GET", "/api/ps").json()["models"]) == router.model("a")["loads"] == 1


@pytest.mark.covers("O127")
def test_the_sdks_come_back_after_a_503(home: Path) -> None:
    """The only slot is taken for a moment and nobody may wait; the SDKs come back when they are told to."""
    scripts: dict[str, dict[str, Any]] = {"a": {"tokens": 30, "tokens_per_second": 30}, "b": _OK}
    arguments = fake_config(home, scripts, max_loaded_models=1, busy_policy="fail")
    with (
        running_router(home, *arguments) as router,
        openai.OpenAI(base_url=f"{router.url}/v1", api_key="x", max_retries=5) as by_openai,
        anthropic.Anthropic(base_url=router.url, api_key="x", max_retries=5) as by_anthropic,
    ):
        openai_api: Any = by_openai
        anthropic_api: Any = by_anthropic
        asks: dict[str, Callable[[], Any]] = {
            "b": lambda: openai_api.chat.completions.create(model="b", messages=_MESSAGES),
            "a": lambda: anthropic_api.messages.create(model="a", max_tokens=2, messages=_MESSAGES),
        }
        for name in asks:  # how long loads and answers take is known then, and Retry-After is not a guess
            router.generate(name)
        for name, ask in asks.items():
            other = "a" if name == "b" else "b"
            stream = router.client.stream("/api/generate", {"model": other, "prompt": "go"})
            next(stream)
            assert f"{name}:latest-1" in str(ask())
            list(stream)


@pytest.mark.covers("O128")
def test_the_sdks_do_not_repeat_what_can_never_work(home: Path) -> None:
    with running_router(home, *fake_config(home, {"a": _OK})) as router:
        with openai.OpenAI(base_url=f"{router.url}/v1", api_key="x", max_retries=3) as client:
            for model, kind in (("nosuch", openai.NotFoundError), ("a b", openai.BadRequestError)):
                with pytest.raises(kind) as raised:
                    client.chat.completions.create(model=model, messages=_MESSAGES)
                assert raised.value.response.request.headers["x-stainless-retry-count"] == "0"
        with anthropic.Anthropic(base_url=router.url, api_key="x", max_retries=3) as client_:
            with pytest.raises(anthropic.NotFoundError) as missing:
                client_.messages.create(model="nosuch", max_tokens=2, messages=_MESSAGES)
            assert missing.value.response.request.headers["x-stainless-retry-count"] == "0"
