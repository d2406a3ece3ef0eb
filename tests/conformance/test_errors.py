"""The shape of every error on every route: the one that the clients of that API read."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
from starlette.routing import Route

from mlx_router_server.app import create_app
from mlx_router_server.settings import Settings
from tests.meta.test_app import INFERENCE_ROUTES
from tests.process.test_names import body_for
from tests.support.fakes import fake_config
from tests.support.http import Reply, call
from tests.support.router import RouterProcess, running_router

_TYPES = {
    400: "invalid_request_error", 401: "authentication_error", 404: "not_found_error", 405: "invalid_request_error",
    413: "request_too_large", 500: "api_error", 529: "overloaded_error",
}  # fmt: skip
_WITH_BODY = sorted(
    path
    for route in create_app(Settings()).routes
    if isinstance(route, Route) and "POST" in (route.methods or ())
    for path in [route.path]
    if path.startswith(("/api/", "/v1/")) and "experimental" not in path and path not in ("/api/me", "/api/signout")
)
# What these are asked for besides a model that is not there: they are about other things.
_ABSENT: dict[str, tuple[dict[str, Any], int]] = {
    "/api/copy": ({"source": "nosuch", "destination": "x"}, 404),
    "/api/create": ({"model": "x", "from": "nosuch"}, 404),
    "/api/pull": ({"model": "nosuch", "stream": False}, 404),
    "/api/push": ({"model": "nosuch"}, 400),
}


def _broken(path: str) -> str:
    """A model of its own for each route: after some failures one is given up."""
    return "broken" + path.replace("/", "-")


@pytest.fixture(scope="module")
def router(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RouterProcess]:
    home = tmp_path_factory.mktemp("errors")
    scripts: dict[str, dict[str, Any]] = {_broken(path): {"fail_load": "it is broken"} for path in INFERENCE_ROUTES}
    with running_router(home, *fake_config(home, scripts)) as found:
        yield found


def _check(path: str, reply: Reply, status: int) -> None:
    """The status, as this API has it, and a body of its own shape."""
    if path.startswith("/v1/messages"):
        status = 529 if status == 503 else status
        body = reply.json()
        assert set(body) == {"type", "error", "request_id"}
        assert (body["type"], set(body["error"])) == ("error", {"type", "message"})
        assert body["error"]["type"] == _TYPES[status]
        assert body["request_id"] == reply.headers["request-id"]
        message = body["error"]["message"]
    elif path.startswith("/v1/"):
        body = reply.json()
        assert (set(body), set(body["error"])) == ({"error"}, {"message", "type", "param", "code"})
        kinds = {404: "not_found_error", 500: "api_error", 503: "api_error"}
        assert body["error"]["type"] == kinds.get(status, "invalid_request_error" if status in (400,) else "api_error")
        assert body["error"]["code"] is None or re.fullmatch("[a-z_]+", body["error"]["code"])
        assert body["error"]["param"] is None or isinstance(body["error"]["param"], str)
        message = body["error"]["message"]
    else:
        assert list(reply.json()) == ["error"]
        message = reply.json()["error"]
    assert reply.status == status
    assert isinstance(message, str)
    assert message
    assert reply.headers["content-type"].startswith("application/json")
    assert reply.headers["x-request-id"].startswith("req_")
    assert "/tmp" not in message, "no folder of this machine"
    if status in (503, 529):
        assert 1 <= int(reply.headers["retry-after"]) <= 60
    elif status < 500:
        assert not any(word in message.lower() for word in ("overloaded", "busy", "rate limit", "too many requests"))


@pytest.mark.covers("O129")
@pytest.mark.parametrize("path", _WITH_BODY)
def test_bad_requests_and_unknown_models(router: RouterProcess, path: str) -> None:
    for body in (b"", b"{", b"[]", b'"x"', {"model": 5}, {}, {"model": "a b", **body_for(path)}):
        if path == "/api/show" and isinstance(body, dict) and "prompt" in body:
            continue
        _check(path, call(router, "POST", path, body), 400)
    if path in _ABSENT:
        body, status = _ABSENT[path]
        _check(path, call(router, "POST", path, body), status)
    elif "{" not in path:
        _check(path, call(router, "POST", path, {**body_for(path), "model": "nosuch"}), 404)


@pytest.mark.parametrize("path", sorted(INFERENCE_ROUTES))
def test_a_load_that_fails_and_the_pause_after_it(router: RouterProcess, path: str) -> None:
    body = {**body_for(path), "model": _broken(path)}
    _check(path, call(router, "POST", path, body), 500)
    _check(path, call(router, "POST", path, body), 503)


@pytest.mark.parametrize("path", sorted(INFERENCE_ROUTES))
def test_wrong_methods_name_the_right_ones(router: RouterProcess, path: str) -> None:
    reply = call(router, "PUT", path)
    assert (reply.status, "POST" in reply.headers["allow"]) == (405, True)
    if path.startswith("/v1/"):
        assert reply.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize("path", ["/v1/nope", "/v1/messages/nope", "/api/nope", "/nope", "/v1/responses/x/nope"])
def test_unknown_addresses(router: RouterProcess, path: str) -> None:
    reply = call(router, "GET", path)
    assert reply.status == 404
    if path.startswith("/v1/messages"):
        assert reply.json()["error"]["type"] == "not_found_error"
    elif path.startswith("/v1/"):
        assert reply.json()["error"]["code"] == "unknown_url"
    else:
        assert reply.body == b"404 page not found"


@pytest.mark.parametrize(
    ("path", "body", "field"),
    [
        ("/v1/messages/count_tokens", {"messages": [{"role": "user", "content": "x"}], "bogus": 1}, "bogus"),
        ("/v1/responses/input_tokens", {"input": "x", "bogus": 1}, "bogus"),
        (
            "/api/chat",
            {"messages": [{"role": "user", "content": "x"}], "_debug_render_only": True, "bogus": 1},
            "bogus",
        ),
        ("/api/generate", {"bogus": 1}, "bogus"),
        ("/api/chat", {"options": {"num_gpu": 1}}, "options.num_gpu"),
    ],
)
def test_routes_that_generate_nothing_name_what_they_ignore(
    fleet: RouterProcess, path: str, body: dict[str, Any], field: str
) -> None:
    reply = call(fleet, "POST", path, {"model": "demo", **body})
    assert reply.status == 200, reply.body
    assert field in reply.headers["x-ignored-fields"]


@pytest.mark.parametrize("body", [{"options": {"temperature": "hot"}}, {"format": "xml"}, {"think": "bogus"}])
@pytest.mark.parametrize("path", ["/api/generate", "/api/chat"])
def test_a_call_that_only_loads_is_checked_like_any_other(
    fleet: RouterProcess, path: str, body: dict[str, Any]
) -> None:
    assert call(fleet, "POST", path, {"model": "demo", **body}).status == 400


def test_a_history_as_servers_send_it_is_not_reported(fleet: RouterProcess) -> None:
    made = {"id": "call_1", "type": "function", "index": 0, "function": {"name": "f", "arguments": "{}"}}
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": "x"}, {"role": "assistant", "content": "", "tool_calls": [made]},
        {"role": "tool", "content": "1", "tool_call_id": "call_1"},
    ]  # fmt: skip
    body = {"model": "demo", "messages": messages, "max_tokens": 1}
    assert "x-ignored-fields" not in call(fleet, "POST", "/v1/chat/completions", body).headers
    native = {"id": "call_1", "function": {"index": 0, "name": "f", "arguments": {}}}
    messages[1]["tool_calls"] = [native]
    native_body = {"model": "demo", "messages": messages, "options": {"num_predict": 1}, "stream": False}
    assert "x-ignored-fields" not in call(fleet, "POST", "/api/chat", native_body).headers


def test_a_tool_output_of_plain_strings_is_not_lost(fleet: RouterProcess) -> None:
    items = [{"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
             {"type": "function_call_output", "call_id": "c", "output": ["lost"]}]  # fmt: skip
    reply = call(fleet, "POST", "/v1/responses", {"model": "demo", "input": items})
    assert (reply.status, reply.json()["error"]["param"]) == (400, "input[1].output")


_SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}


@pytest.mark.parametrize(
    ("path", "body", "field"),
    [
        ("/v1/chat/completions", {"response_format": {"type": "text", "schema": _SCHEMA}}, "response_format.type"),
        (
            "/v1/chat/completions",
            {"response_format": {"type": "json_schema", "json_schema": "x"}},
            "response_format.json_schema",
        ),
        ("/v1/responses", {"text": {"format": "json_object"}}, "text.format"),
        ("/v1/responses", {"reasoning": {"effort": 3}}, "reasoning.effort"),
        ("/v1/messages", {"thinking": {"type": "bogus"}}, "thinking.type"),
        ("/v1/messages", {"output_config": {"effort": "bogus"}}, "output_config.effort"),
        ("/v1/messages", {"output_config": {"effort": ["low"]}}, "output_config.effort"),
    ],
)
def test_a_form_that_is_none_is_refused_and_not_dropped(
    fleet: RouterProcess, path: str, body: dict[str, Any], field: str
) -> None:
    reply = call(fleet, "POST", path, {**body_for(path, model="demo", max_tokens=4), **body})
    assert reply.status == 400, reply.body
    assert field in reply.body.decode()


def test_a_schema_without_its_type_and_one_beside_a_forced_tool(fleet: RouterProcess) -> None:
    body = {"model": "random", "messages": [{"role": "user", "content": "go"}], "max_tokens": 60, "temperature": 0}
    reply = call(
        fleet, "POST", "/v1/chat/completions", {**body, "response_format": {"json_schema": {"schema": _SCHEMA}}}
    )
    assert reply.json()["choices"][0]["message"]["content"].startswith("{")
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": _SCHEMA}}
    forced = {**body, "tools": [tool], "tool_choice": "required", "response_format": form}
    reply = call(fleet, "POST", "/v1/chat/completions", forced)
    assert reply.status == 200, reply.body
    assert "response_format" in reply.headers["x-ignored-fields"]
