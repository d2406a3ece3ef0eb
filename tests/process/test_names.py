"""Which model a name means, on every route and in every shape of configuration; and that a bad request touches none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import openai
import pytest

from tests.meta.test_app import INFERENCE_ROUTES
from tests.support.fakes import fake_config, write_fake
from tests.support.http import call
from tests.support.router import RouterProcess, running_router, write_config

_ROUTES = sorted(INFERENCE_ROUTES)
_BODY: dict[str, Any] = {
    "prompt": "go", "messages": [{"role": "user", "content": "go"}], "input": "go", "query": "go",
    "documents": ["go"], "max_tokens": 5, "stream": False,
}  # fmt: skip
# What each answers with: its words name the model that made them, its vectors and scores do not.
_SILENT = ("/api/embed", "/api/embeddings", "/v1/embeddings", "/api/rerank", "/v1/rerank")
_TELLS = {path: path not in _SILENT for path in _ROUTES}
_OK = {"tokens": 2}


def body_for(path: str, **more: Any) -> dict[str, Any]:
    """A body that every route understands; one API has a field of the same name that is refused."""
    left_out = {"prompt"} if path.startswith("/v1/responses") else set()
    return {name: value for name, value in {**_BODY, **more}.items() if name not in left_out}


def _ask(router: RouterProcess, path: str, model: str | None) -> tuple[int, str]:
    body = body_for(path) if model is None else body_for(path, model=model)
    reply = call(router, "POST", path, body)
    return reply.status, reply.body.decode()


def _no_lifecycle_event(router: RouterProcess) -> bool:
    return router.children() == [] and not any("event=loading" in line for line in router.lines)


@pytest.mark.req("R3")
@pytest.mark.parametrize("count", [0, 1, 2, 50])
def test_the_number_of_models_changes_nothing(home: Path, count: int) -> None:
    """The same requests, the same answers; a single model is not found under a name that is not its own either."""
    names = [f"m{number}" for number in range(count)]
    with running_router(home, *fake_config(home, dict.fromkeys(names, _OK))) as router:
        assert len(router.client.get("/api/tags")["models"]) == count
        assert len(router.client.get("/v1/models")["data"]) == count
        for path in _ROUTES:
            assert _ask(router, path, "other")[0] == 404
            assert _ask(router, path, None)[0] == 400
            assert _ask(router, path, "../x")[0] in (400, 404)
        assert _no_lifecycle_event(router)
        for name in names[:1] + names[-1:]:
            for path in _ROUTES:
                status, body = _ask(router, path, name)
                assert (status, f"{name}:latest-1" in body) == (200, _TELLS[path])
        assert router.client.get("/ready")["ready"] is True


@pytest.mark.req("R4", "R6")
def test_one_rule_for_names_on_all_routes(home: Path) -> None:
    models = {name: {"path": str(write_fake(home / "f" / name, **_OK))} for name in ("alpha", "beta", "org/gamma")}
    models["alpha"]["aliases"] = ["first", "qwen3:4b"]  # type: ignore[assignment]  # a list is TOML and JSON alike
    config = write_config(home, models, demo_model=False, standby_workers=0, default_model="beta")
    with config.open("a") as file:
        file.write('[name_map]\n"gpt-4*" = "alpha"\n"claude-*opus*" = "org/gamma"\n"claude-*haiku*" = "gone"\n')
    expected = {
        "alpha": "alpha", "ALPHA:latest": "alpha", "library/alpha": "alpha", "first": "alpha", "qwen3:4b": "alpha",
        "org/gamma": "org/gamma", "default": "beta", "": "beta", "gpt-4o-mini": "alpha",
        "claude-3-opus-latest": "org/gamma", "claude-sonnet-5": "beta", "claude-haiku": "beta",
    }  # fmt: skip
    with running_router(home, "--config", str(config)) as router:
        for path in _ROUTES:
            for asked, meant in expected.items():
                status, body = _ask(router, path, asked)
                assert status == 200, (path, asked, body)
                assert (f"{meant}:latest-1" in body) == _TELLS[path], (path, asked)
            for unknown in ("alpha:8b", "gpt-5", "gamma", "gone"):
                assert _ask(router, path, unknown)[0] == 404, (path, unknown)


@pytest.mark.req("R5")
def test_unknown_names_are_refused_at_once_and_near_ones_are_named(home: Path) -> None:
    with running_router(home, *fake_config(home, {"mistral-small": _OK})) as router:
        ollama = call(router, "POST", "/api/chat", {"model": "nosuch", **_BODY})
        assert (ollama.status, ollama.json()) == (404, {"error": "model 'nosuch' not found"})
        near = call(router, "POST", "/v1/chat/completions", {"model": "mistral-smal", **_BODY})
        assert near.status == 404
        assert near.json()["error"]["code"] == "model_not_found"
        assert near.json()["error"]["message"].endswith("not found, did you mean 'mistral-small'?")
        for name in ("gpt-4", "claude-3-opus", "mlx-community/Llama-3.2-1B-Instruct-4bit"):
            assert call(router, "POST", "/api/chat", {"model": name, **_BODY}).status == 404
        assert _no_lifecycle_event(router)
        connections = [c for c in _connections(router) if c.raddr and c.raddr.ip != "127.0.0.1"]
        assert connections == [], "no name is looked up anywhere"


def _connections(router: RouterProcess) -> list[Any]:
    import psutil

    return list(psutil.Process(router.pid).net_connections())


@pytest.mark.req("R6")
def test_an_unmapped_claude_name_rides_on_the_one_warm_model_or_is_told_what_to_configure(home: Path) -> None:
    with running_router(home, *fake_config(home, {"a": _OK, "b": _OK}, max_loaded_models=1)) as router:
        client = openai.OpenAI(base_url=f"{router.url}/v1", api_key="none", max_retries=0)
        messages: Any = [{"role": "user", "content": "go"}]
        with client:
            with pytest.raises(openai.NotFoundError, match="name_map"):
                client.chat.completions.create(model="claude-haiku-5", messages=messages)
            assert _no_lifecycle_event(router)
            router.generate("a")
            for name in ("claude-haiku-5", "claude-opus-5"):
                for _ in range(5):
                    answer = client.chat.completions.create(model=name, messages=messages)
                    assert answer.choices[0].message.content == "a:latest-1 a:latest-2 "
                    assert answer.model == name
        assert (router.model("a")["loads"], router.model("b")["loads"]) == (1, 0), "no swap"


@pytest.mark.req("R42")
@pytest.mark.parametrize("path", _ROUTES)
def test_what_ends_in_a_client_error_touches_no_model(home: Path, path: str) -> None:
    """A model is warm, another is cold; rubbish of every kind changes nothing about either."""
    bad: list[Any] = [
        b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"model": "cold"', b"[" * 5000,
        {"model": 7, **_BODY}, {"model": ["cold"], **_BODY}, {"model": "x" * 1_000_000, **_BODY},
        {"model": "cold", **_BODY, "messages": "go", "prompt": 7, "input": 7, "documents": 7},
        {"model": "cold", **_BODY, "messages": [{"role": 7, "content": "x"}], "prompt": {}, "input": {}, "query": {}},
        {"model": "cold", **_BODY, "keep_alive": "soon"},
        {"model": "cold/../../etc", **_BODY}, {"model": "cold\u0000", **_BODY},
    ]  # fmt: skip
    if _TELLS[path]:
        bad += [
            {"model": "cold", **_BODY, "stream": "yes"},
            {"model": "cold", **_BODY, "options": {"temperature": "hot"}},
        ]
    with running_router(home, *fake_config(home, {"warm": _OK, "cold": _OK}, max_loaded_models=1)) as router:
        router.generate("warm")
        before = (router.model("warm")["pid"], router.model("warm")["loads"])
        for body in bad:
            reply = call(router, "POST", path, body)
            assert 400 <= reply.status < 500, (body if len(str(body)) < 200 else "long", reply.status)
            assert b"error" in reply.body
        for header in ("X_Priority", "X_Deadline_Seconds", "X_Keep_Alive"):
            assert call(router, "POST", path, {"model": "cold", **_BODY}, **{header: "x"}).status == 400
        assert (router.model("warm")["pid"], router.model("warm")["loads"]) == before
        assert router.model("cold")["loads"] == 0
        assert sum("event=loading" in line for line in router.lines) == 1
