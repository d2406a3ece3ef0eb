"""Schemas as pydantic, zod and their like write them: what only narrows a value is dropped and named, what changes its
shape is refused by name."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.support.http import Reply, call
from tests.support.router import RouterProcess

_ZOD_EMAIL = r"^(?!\.)(?!.*\.\.)([A-Za-z0-9_'+\-\.]*)[A-Za-z0-9_+-]@([A-Za-z0-9][A-Za-z0-9\-]*\.)+[A-Za-z]{2,}$"
_DECIMAL = r"^(?!^[-+.]*$)[+-]?0*\d*\.?\d*$"

_DROPPED: list[tuple[dict[str, Any], list[str]]] = [
    ({"anyOf": [{"type": "number"}, {"type": "string", "pattern": _DECIMAL}]}, ["anyOf[1].pattern"]),
    ({"type": "string", "format": "email", "pattern": _ZOD_EMAIL}, ["pattern"]),
    ({"type": "string", "format": "path"}, ["format"]),
    ({"type": "string", "format": "password", "writeOnly": True}, ["format"]),
    ({"type": "string", "format": "binary"}, ["format"]),
    ({"type": "string", "format": "ipvanyaddress"}, ["format"]),
    ({"type": "string", "format": "phone"}, ["format"]),
    ({"type": "string", "format": "json-string"}, ["format"]),
    ({"type": "string", "pattern": r"^(a)\1$"}, ["pattern"]),
    ({"type": "array", "items": {"type": "integer"}, "uniqueItems": True}, ["uniqueItems"]),
    ({"type": "object", "propertyNames": {"type": "string"}, "additionalProperties": {"type": "number"}},
     ["propertyNames"]),
    ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, ["oneOf"]),
    ({"const": 2**53 + 1}, ["const"]),
    ({"enum": [2**63, -5]}, ["enum"]),
    ({"type": "integer", "minimum": 10**30}, ["minimum"]),
    ({"type": "integer", "minimum": 3, "maximum": 2**53}, []),
    ({"type": "string", "minLength": None, "pattern": None, "enum": None}, []),
    ({"type": "object", "properties": {"format": {"type": "string"}, "pattern": {"type": "string"}}}, []),
    ({"const": {"format": "path"}}, []),
    ({"enum": ["(?!a)"], "default": {"format": "x"}}, []),
]  # fmt: skip


def _wrapped(inner: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "properties": {"v": inner}, "required": ["v"], "additionalProperties": False}


def _ask(router: RouterProcess, path: str, schema: dict[str, Any]) -> Reply:
    messages = [{"role": "user", "content": "go"}]
    body: dict[str, Any] = {"model": "random", "messages": messages, "temperature": 0}
    if path == "/v1/chat/completions":
        form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
        body |= {"max_tokens": 60, "response_format": form}
    elif path == "/v1/responses":
        body = {"model": "random", "input": "go", "max_output_tokens": 60,
                "text": {"format": {"type": "json_schema", "name": "x", "schema": schema}}}  # fmt: skip
    elif path == "/v1/messages":
        body |= {"max_tokens": 60, "output_config": {"format": {"type": "json_schema", "schema": schema}}}
    else:
        body = {"model": "random", "messages": messages, "stream": False, "format": schema,
                "options": {"num_predict": 60, "temperature": 0}}  # fmt: skip
    return call(router, "POST", path, body)


@pytest.mark.parametrize(("inner", "dropped"), _DROPPED, ids=lambda value: str(value)[:50])
def test_what_only_narrows_is_dropped_and_named(
    fleet: RouterProcess, inner: dict[str, Any], dropped: list[str]
) -> None:
    reply = _ask(fleet, "/api/chat", _wrapped(inner))
    assert reply.status == 200, reply.body
    named = reply.headers.get("x-ignored-fields", "").split(",") if dropped else []
    assert named == [f"format.properties.v.{path}" for path in dropped]
    assert "x-ignored-fields" not in reply.headers or dropped
    assert set(json.loads(reply.json()["message"]["content"])) == {"v"}


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/responses", "/v1/messages"])
def test_the_other_apis_name_it_too(fleet: RouterProcess, path: str) -> None:
    reply = _ask(fleet, path, _wrapped({"type": "string", "format": "path"}))
    assert reply.status == 200, reply.body
    assert reply.headers["x-ignored-fields"].endswith("properties.v.format")


@pytest.mark.parametrize(
    "schema",
    [
        {"$ref": "#"},
        {"$defs": {"A": {"$ref": "#/$defs/B"}, "B": {"$ref": "#/$defs/A"}}, "$ref": "#/$defs/A"},
        _wrapped({"$ref": "#/properties/v"}),
        {"type": "object", "properties": {f"p{number}": {"type": "string"} for number in range(800)}},
    ],
    ids=lambda value: str(value)[:40],
)
@pytest.mark.parametrize("path", ["/api/chat", "/v1/chat/completions", "/v1/responses", "/v1/messages"])
def test_what_only_fails_when_it_is_followed_is_refused_before_a_token(
    fleet: RouterProcess, path: str, schema: dict[str, Any]
) -> None:
    reply = _ask(fleet, path, schema)
    assert (reply.status, b"cannot be enforced" in reply.body, b"state" in reply.body) == (400, True, False), reply.body


@pytest.mark.parametrize("strict", [True, False])
def test_parameters_that_cannot_be_followed_are_refused_of_strict_tools_only(
    fleet: RouterProcess, strict: bool
) -> None:
    parameters = {"type": "object", "properties": {"a": {"$ref": "#/properties/a"}}, "required": ["a"]}
    tool = {"type": "function", "function": {"name": "f", "strict": strict, "parameters": parameters}}
    reply = call(fleet, "POST", "/v1/chat/completions", {
        "model": "random", "messages": [{"role": "user", "content": "go"}], "tools": [tool], "max_tokens": 60,
        "tool_choice": "required", "temperature": 0,
    })  # fmt: skip
    assert reply.status == (400 if strict else 200), reply.body


@pytest.mark.parametrize(("kinds", "status"), [("object", 200), (["object"], 200), (["object", "null"], 200),
                                                ("array", 400), (["string"], 400)])  # fmt: skip
def test_a_strict_tool_holds_its_schema_or_is_refused(fleet: RouterProcess, kinds: Any, status: int) -> None:
    parameters = {**_wrapped({"const": 7}), "type": kinds}
    tool = {"type": "function", "function": {"name": "f", "strict": True, "parameters": parameters}}
    reply = call(fleet, "POST", "/v1/chat/completions", {
        "model": "random", "messages": [{"role": "user", "content": "go"}], "tools": [tool], "max_tokens": 60,
        "tool_choice": "required", "temperature": 0,
    })  # fmt: skip
    assert reply.status == status, reply.body
    if status == 200:
        (made,) = reply.json()["choices"][0]["message"]["tool_calls"]
        assert json.loads(made["function"]["arguments"]) == {"v": 7}


def test_names_of_definitions_may_have_brackets(fleet: RouterProcess) -> None:
    schema = {"$defs": {"Box[int]": _wrapped({"const": 3})}, "$ref": "#/$defs/Box[int]"}
    reply = _ask(fleet, "/api/chat", schema)
    assert reply.status == 200, reply.body
    assert json.loads(reply.json()["message"]["content"]) == {"v": 3}


@pytest.mark.parametrize(
    "inner", [{"not": {"type": "string"}}, {"type": "array", "contains": {"type": "integer"}},
              {"type": "object", "dependentRequired": {"a": ["b"]}}, {"type": "object", "unevaluatedProperties": False},
              {"type": "object", "if": {}, "then": {}}],
    ids=str,
)  # fmt: skip
def test_what_changes_the_shape_is_refused_by_name(fleet: RouterProcess, inner: dict[str, Any]) -> None:
    reply = _ask(fleet, "/api/chat", _wrapped(inner))
    assert reply.status == 400
    name = next(key for key in inner if key != "type")
    assert name in reply.json()["error"]


def test_a_schema_beside_json_object_holds(fleet: RouterProcess) -> None:
    reply = call(fleet, "POST", "/v1/chat/completions", {
        "model": "random", "messages": [{"role": "user", "content": "go"}], "max_tokens": 60,
        "response_format": {"type": "json_object", "schema": _wrapped({"type": "integer", "maximum": 9, "minimum": 0})},
    })  # fmt: skip
    assert set(json.loads(reply.json()["choices"][0]["message"]["content"])) == {"v"}


@pytest.mark.parametrize("strict", [True, False])
def test_a_forced_tool_may_have_such_parameters(fleet: RouterProcess, strict: bool) -> None:
    parameters = _wrapped({"type": "string", "format": "email", "pattern": _ZOD_EMAIL})
    tool = {"type": "function", "function": {"name": "f", "strict": strict, "parameters": parameters}}
    reply = call(fleet, "POST", "/v1/chat/completions", {
        "model": "random", "messages": [{"role": "user", "content": "go"}], "tools": [tool], "max_tokens": 100,
        "tool_choice": "required", "temperature": 0,
    })  # fmt: skip
    assert reply.status == 200, reply.body
    (made,) = reply.json()["choices"][0]["message"]["tool_calls"]
    assert "@" in json.loads(made["function"]["arguments"])["v"]
    assert ("properties.v.pattern" in reply.headers.get("x-ignored-fields", "")) == strict


def test_a_schema_beyond_all_bounds_is_refused_while_others_are_answered(fleet: RouterProcess) -> None:
    schema = {"type": "object", "properties": {f"property_{number}": {"type": "string"} for number in range(10_000)}}
    reply = _ask(fleet, "/v1/chat/completions", schema)
    assert (reply.status, "longer than" in reply.json()["error"]["message"]) == (400, True)


def _tools(count: int, **more: Any) -> list[dict[str, Any]]:
    """Tools whose parameters are 12 KB each."""
    parameters = {"type": "object", "properties": {f"property_{number}": {"type": "string"} for number in range(300)}}
    return [{"name": f"f{number}", "parameters": parameters, **more} for number in range(count)]


@pytest.mark.parametrize("path", ["/api/chat", "/v1/chat/completions", "/v1/responses", "/v1/messages"])
def test_the_schemas_of_strict_tools_are_bounded_together(fleet: RouterProcess, path: str) -> None:
    tools = _tools(200, strict=True)
    body: dict[str, Any] = {"model": "random", "max_tokens": 20, "messages": [{"role": "user", "content": "go"}]}
    if path == "/v1/messages":
        body["tools"] = [{"name": t["name"], "strict": True, "input_schema": t["parameters"]} for t in tools]
    elif path == "/v1/responses":
        body = {"model": "random", "input": "go", "tools": [{"type": "function", **tool} for tool in tools]}
    else:
        body["tools"] = [{"type": "function", "function": tool} for tool in tools]
    reply = call(fleet, "POST", path, body)
    assert reply.status == 400
    assert b"strict tools are longer than" in reply.body


@pytest.mark.parametrize(
    ("schema", "dropped"),
    [
        ({"type": "array", "items": {"type": "string"}, "maxItems": 2, "uniqueItems": False}, []),
        ({"type": "integer", "minimum": -(2**63), "maximum": 2**63 - 1}, ["minimum", "maximum"]),
        (
            {"type": "number", "minimum": -3.4028234663852886e38, "maximum": 3.4028234663852886e38},
            ["minimum", "maximum"],
        ),
        ({"type": "string", "maxLength": 10.0}, ["maxLength"]),
        (
            {"type": "object", "properties": {"a": {"type": "string", "maxLength": 3}}, "minProperties": 1},
            ["minProperties"],
        ),
    ],
)
def test_what_only_narrows_a_value_is_dropped_where_it_cannot_be_enforced(
    fleet: RouterProcess, schema: dict[str, Any], dropped: list[str]
) -> None:
    reply = _ask(fleet, "/v1/chat/completions", _wrapped(schema))
    assert reply.status == 200, reply.body
    named = reply.headers.get("x-ignored-fields", "")
    assert [name for name in dropped if f"properties.v.{name}" not in named] == []
    assert "maxLength" not in named or "maxLength" in dropped


def test_a_strict_tool_beside_one_that_cannot_be_enforced(fleet: RouterProcess) -> None:
    free = {
        "type": "object",
        "properties": {"a": {"type": "integer"}},
        "if": {"required": ["a"]},
        "then": {"required": []},
    }
    strict = {"type": "object", "properties": {}, "additionalProperties": False}
    tools = [
        {"type": "function", "function": {"name": "write", "strict": True, "parameters": strict}},
        {"type": "function", "function": {"name": "free", "parameters": free}},
    ]
    for choice in ("required", "auto"):
        body = {"model": "random", "messages": [{"role": "user", "content": "go"}], "tools": tools, "max_tokens": 60}
        reply = call(fleet, "POST", "/v1/chat/completions", {**body, "tool_choice": choice, "temperature": 0})
        assert reply.status == 200, reply.body
