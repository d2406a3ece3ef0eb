"""Keys on every route of the application, in each form, over a real socket."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.routing import Route

from mlx_router_server.access.keys import Scope, keys_file, make_key, read_keys, write_keys
from mlx_router_server.api.auth import OPEN_PATHS, SCOPES, scope_of
from mlx_router_server.app import create_app
from mlx_router_server.settings import Settings
from tests.support.command import command, command_on
from tests.support.http import call
from tests.support.router import RouterProcess, running_router, wait_until

_ROUTES = sorted(
    {
        (method, re.sub(r"\{\w+(:path)?\}", "demo", route.path))
        for route in create_app(Settings()).routes
        if isinstance(route, Route)
        for method in route.methods or ()
        if method != "HEAD"
    }
)
_KEYS: dict[str, str] = {}


@pytest.fixture(scope="module")
def locked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RouterProcess]:
    """A router with a key for each scope, and one that may use nothing but ``other``."""
    home = tmp_path_factory.mktemp("locked")
    stored = []
    for name, scopes, models in (
        ("inference", [Scope.INFERENCE], ()), ("pull", [Scope.PULL], ()), ("admin", [Scope.ADMIN], ()),
        ("narrow", [Scope.INFERENCE], ("other",)),
    ):  # fmt: skip
        _KEYS[name], key = make_key(name, scopes, models)
        stored.append(key)
    write_keys(keys_file(home), stored)
    with running_router(home) as router:
        wait_until(lambda: call(router, "GET", "/ready").status == 200, "the models are known")
        yield router


@pytest.mark.req("R31")
def test_every_route_has_a_scope_of_its_own() -> None:
    """A new route has to be thought of here: what is not listed is for the operator."""
    for _, path in _ROUTES:
        assert path in OPEN_PATHS or any(path.startswith(prefix) for prefix in SCOPES), path


@pytest.mark.req("R31")
@pytest.mark.covers("O18")
@pytest.mark.parametrize(("method", "path"), _ROUTES, ids=lambda value: str(value))
def test_without_a_key_nothing_is_answered(locked: RouterProcess, method: str, path: str) -> None:
    if path in OPEN_PATHS:
        assert call(locked, method, path).status == 200
        return
    key = _KEYS["admin"]
    for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "Basic " + key},
                    {"x-api-key": "wrong"}, {"authorization": "Bearer "}, {"x-api-key": key[:-1]}):  # fmt: skip
        reply = call(locked, method, path, b"{}", **headers)
        assert reply.status == 401, (headers, reply.body)
        assert reply.headers["www-authenticate"] == "Bearer"
        error = reply.json()["error"]
        if path.startswith("/v1/messages"):
            assert error["type"] == "authentication_error"
        elif path.startswith("/v1/"):
            assert (error["type"], error["code"]) == ("invalid_request_error", "invalid_api_key")
        else:
            assert isinstance(error, str)


@pytest.mark.req("R31")
def test_a_key_put_into_a_path_is_not_logged(locked: RouterProcess) -> None:
    key = _KEYS["admin"]
    assert call(locked, "GET", f"/{key}/v1/models").status == 401
    locked.wait_line("event=refused path='/\\*+/v1/models'")
    assert key not in locked.log


@pytest.mark.req("R31")
@pytest.mark.parametrize(("method", "path"), _ROUTES, ids=lambda value: str(value))
def test_a_key_opens_its_own_scope_only(locked: RouterProcess, method: str, path: str) -> None:
    if path in OPEN_PATHS or path in ("/admin/events", "/admin/logs/stream"):
        return
    needed = scope_of(path)
    for name in ("inference", "pull", "admin"):
        if name == "admin" and path == "/admin/shutdown":
            continue  # it would end the router of the other tests
        # A body that no route takes: what is refused with 403 was refused before anybody looked at it.
        reply = call(locked, method, path, b"[]", authorization=f"Bearer {_KEYS[name]}")
        refused = reply.status == 403 and needed in reply.body.decode() and "scope" in reply.body.decode()
        assert refused == (name not in (needed, "admin")), (name, reply.status, reply.body)


@pytest.mark.req("R31")
@pytest.mark.covers("O18")
def test_each_form_of_the_header_is_taken_on_each_api(locked: RouterProcess) -> None:
    key = _KEYS["inference"]
    message = [{"role": "user", "content": "Hello!"}]
    bodies: dict[str, dict[str, Any]] = {
        "/v1/chat/completions": {"model": "demo", "messages": message},
        "/v1/messages": {"model": "demo", "messages": message, "max_tokens": 20},
        "/api/chat": {"model": "demo", "messages": message, "stream": False},
    }
    for path, body in bodies.items():
        for headers in ({"authorization": f"Bearer {key}"}, {"authorization": f"bearer  {key}"}, {"x-api-key": key},
                        {"api-key": key}):  # fmt: skip
            assert call(locked, "POST", path, body, **headers).status == 200, (path, headers)


@pytest.mark.req("R5", "R31")
def test_a_key_for_some_models_neither_lists_nor_uses_others(locked: RouterProcess) -> None:
    header = {"x-api-key": _KEYS["narrow"]}
    assert call(locked, "GET", "/api/tags", **header).json() == {"models": []}
    assert call(locked, "GET", "/v1/models", **header).json()["data"] == []
    said = set()
    for name in ("demo", "dem0", "nosuch"):
        reply = call(locked, "POST", "/api/generate", {"model": name, "prompt": "x"}, **header)
        assert reply.status == 404
        said.add(reply.json()["error"].replace(name, "NAME"))
        assert call(locked, "POST", "/api/show", {"model": name}, **header).status == 404
    assert said == {"model 'NAME' not found, or not allowed with this key"}
    assert call(locked, "GET", "/api/ps", **header).json() == {"models": []}


@pytest.mark.req("R31")
def test_a_key_for_some_models_does_not_reach_others_by_making_fetching_or_copying(home: Path) -> None:
    text, key = make_key("narrow", [Scope.INFERENCE, Scope.PULL], ("mine-*",))
    write_keys(keys_file(home), [key])
    (home / "config.toml").write_text('[model_aliases]\n"short:1b" = "mine-org/Y"\n')
    unreachable = {"HF_ENDPOINT": "http://127.0.0.1:9"}
    with running_router(home, variables=unreachable) as router:
        for path, body, status in (
            ("/api/create", {"model": "mine-x", "from": "demo"}, 404),
            ("/api/create", {"model": "mine-x", "from": "nosuch"}, 404),
            ("/api/create", {"model": "theirs", "from": "mine-x"}, 403),
            ("/api/copy", {"source": "demo", "destination": "mine-x"}, 404),
            ("/api/copy", {"source": "mine-x", "destination": "theirs"}, 403),
            ("/api/pull", {"model": "org/theirs"}, 403),
            ("/api/pull", {"model": "mine-y"}, 404),
            ("/api/pull", {"model": "hf.co/mine-org/X"}, 503),
            ("/api/pull", {"model": "hf.co/org/X"}, 403),
            ("/api/pull", {"model": "short:1b"}, 503),
        ):
            reply = call(router, "POST", path, {**body, "stream": False}, x_api_key=text)
            assert reply.status == status, (path, body, reply.body)
        assert call(router, "GET", "/api/tags", x_api_key=text).json() == {"models": []}


@pytest.mark.req("R31")
def test_kept_responses_are_found_by_the_key_that_made_them_only(home: Path) -> None:
    texts, keys = zip(*(make_key(name, [Scope.INFERENCE]) for name in ("one", "two")), strict=True)
    write_keys(keys_file(home), list(keys))
    with running_router(home) as router:
        body = {"model": "demo", "input": "Hello!", "max_output_tokens": 16}
        made = call(router, "POST", "/v1/responses", body, x_api_key=texts[0]).json()["id"]
        goes_on = {**body, "previous_response_id": made}

        def tries(key: str) -> list[int]:
            return [
                call(router, "GET", f"/v1/responses/{made}", x_api_key=key).status,
                call(router, "GET", f"/v1/responses/{made}/input_items", x_api_key=key).status,
                call(router, "POST", "/v1/responses", goes_on, x_api_key=key).status,
                call(router, "POST", "/v1/responses/input_tokens", goes_on, x_api_key=key).status,
                call(router, "DELETE", f"/v1/responses/{made}", x_api_key=key).status,
            ]

        assert set(tries(texts[1])) <= {400, 404}
        narrowed = [dataclasses.replace(keys[0], models=("other",)), keys[1]]
        write_keys(keys_file(home), narrowed)
        wait_until(lambda: call(router, "GET", "/api/tags", x_api_key=texts[0]).json() == {"models": []}, "it counts")
        assert set(tries(texts[0])) <= {400, 404}, "it may not use that model any more"
        write_keys(keys_file(home), list(keys))
        wait_until(lambda: call(router, "GET", "/api/tags", x_api_key=texts[0]).json() != {"models": []}, "it counts")
        assert tries(texts[0]) == [200] * 5


def test_a_kept_response_belongs_to_the_key_and_not_to_its_name(home: Path) -> None:
    text, key = make_key("laptop", [Scope.INFERENCE])
    write_keys(keys_file(home), [key])
    with running_router(home) as router:
        body = {"model": "demo", "input": "Hello!", "max_output_tokens": 16}
        made = call(router, "POST", "/v1/responses", body, x_api_key=text).json()["id"]
        assert call(router, "GET", f"/v1/responses/{made}", x_api_key=text).status == 200
        another, key = make_key("laptop", [Scope.INFERENCE])
        write_keys(keys_file(home), [key])
        wait_until(lambda: call(router, "GET", "/v1/models", x_api_key=another).status == 200, "it counts")
        assert call(router, "GET", f"/v1/responses/{made}", x_api_key=another).status == 404


@pytest.mark.parametrize("model", ["gpt-4o", "", "demo:latest"])
def test_a_kept_response_is_found_under_whatever_name_the_model_was_asked(home: Path, model: str) -> None:
    text, key = make_key("one", [Scope.INFERENCE], ("demo",))
    write_keys(keys_file(home), [key])
    (home / "config.toml").write_text('default_model = "demo"\n[name_map]\n"gpt-*" = "demo"\n')
    with running_router(home) as router:
        body = {"model": model, "input": "Hello!", "max_output_tokens": 16}
        reply = call(router, "POST", "/v1/responses", body, x_api_key=text)
        assert reply.status == 200, reply.body
        path = f"/v1/responses/{reply.json()['id']}"
        goes_on = {**body, "previous_response_id": reply.json()["id"]}
        assert call(router, "POST", "/v1/responses", goes_on, x_api_key=text).status == 200
        assert call(router, "GET", path, x_api_key=text).status == 200
        assert call(router, "DELETE", path, x_api_key=text).status == 200


@pytest.mark.req("R31")
def test_keys_come_and_go_while_the_router_runs(home: Path) -> None:
    with running_router(home) as router:
        assert call(router, "GET", "/api/tags").status == 200
        text, key = make_key("new", [Scope.INFERENCE])
        write_keys(keys_file(home), [key])
        wait_until(lambda: call(router, "GET", "/api/tags").status == 401, "the key is asked for")
        assert call(router, "GET", "/api/tags", x_api_key=text).status == 200
        # A file that cannot be read leaves everything as it was.
        keys_file(home).write_text("{")
        router.wait_line("keys_refused")
        assert call(router, "GET", "/api/tags").status == 401
        assert call(router, "GET", "/api/tags", x_api_key=text).status == 200
        assert text not in "\n".join(router.lines)


@pytest.mark.req("R31")
@pytest.mark.parametrize("way", ["file", "home", "pipe"])
def test_keys_that_are_gone_stay_in_force(home: Path, way: str) -> None:
    """A file that is deleted, or a home folder that is unmounted, opens nothing."""
    text, key = make_key("new", [Scope.ADMIN])
    write_keys(keys_file(home), [key])
    with running_router(home, cwd=home.parent) as router:
        assert call(router, "GET", "/admin/config").status == 401
        if way == "home":
            home.rename(home.with_name("unmounted"))
        else:
            keys_file(home).unlink()
            if way == "pipe":
                os.mkfifo(keys_file(home))
        router.wait_line("keys_refused")
        assert call(router, "GET", "/admin/config").status == 401
        assert call(router, "GET", "/admin/config", x_api_key=text).status == 200
        if way == "home":
            home.with_name("unmounted").rename(home)
        else:
            other, key = make_key("other", [Scope.ADMIN])
            keys_file(home).unlink(missing_ok=True)
            write_keys(keys_file(home), [key])
            wait_until(
                lambda: call(router, "GET", "/admin/config", x_api_key=other).status == 200, "the new key counts"
            )
            assert call(router, "GET", "/admin/config", x_api_key=text).status == 401
        assert sum("keys_refused" in line for line in router.lines) == 1, "it is logged once"


@pytest.mark.req("R31")
def test_commands_of_the_same_user_come_in_by_themselves(home: Path) -> None:
    with running_router(home, "--api-keys", "a-configured-secret-key") as router:
        assert command_on(router, "list").returncode == 1
        listed = command_on(router, "list", home=home)
        assert listed.returncode == 0, listed.stderr
        assert "demo:latest" in listed.stdout
        assert command_on(router, "list", environment={"MLX_ROUTER_API_KEY": "a-configured-secret-key"}).returncode == 0
        assert "a-configured-secret-key" not in "\n".join(router.lines)


@pytest.mark.req("R31")
def test_the_command_makes_lists_and_takes_back_keys(home: Path) -> None:
    with running_router(home) as router:
        made = command_on(router, "keys", "add", "laptop", "--scope", "inference", "--model", "demo", home=home)
        text = made.stdout.strip()
        assert text.startswith("mlxr-")
        assert "laptop" in command_on(router, "keys", "list", home=home).stdout
        assert command_on(router, "keys", "add", "laptop", home=home).returncode == 1
        wait_until(lambda: call(router, "GET", "/api/tags").status == 401, "the key is asked for")
        assert call(router, "GET", "/api/tags", x_api_key=text).status == 200
        assert call(router, "GET", "/admin/status", x_api_key=text).status == 403
        assert text not in (home / "keys.json").read_text()
        assert command_on(router, "keys", "remove", "laptop", home=home).returncode == 0
        assert read_keys(keys_file(home)) == []
        assert command_on(router, "keys", "remove", "laptop", home=home).returncode == 1


@pytest.mark.req("R31")
def test_a_router_does_not_start_with_keys_that_it_cannot_read(home: Path) -> None:
    keys_file(home).write_text("{")
    started = command("start", "--port", "0", home=home)
    assert (started.returncode, started.stderr.count("\n")) == (2, 1)
    assert "keys.json is not a file of keys" in started.stderr


def test_a_router_whose_home_cannot_be_written_serves_and_keeps_nothing(tmp_path: Path, home: Path) -> None:
    (tmp_path / "file").write_text("")
    with running_router(home, variables={"MLX_ROUTER_HOME": str(tmp_path / "file")}) as router:
        router.wait_line("home_unusable")
        assert router.generate("demo", prompt="Hello!")["done"]
        refused = call(router, "POST", "/api/copy", {"source": "demo", "destination": "x"})
        assert (refused.status, "no home folder" in refused.json()["error"]) == (400, True)
