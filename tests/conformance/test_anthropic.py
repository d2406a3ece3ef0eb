"""Anthropic's API over a real socket, by raw HTTP and by its own client."""

from __future__ import annotations

import base64
import json
import re
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import anthropic
import pytest
from pydantic import BaseModel

from tests.support.http import Reply, call
from tests.support.router import RouterProcess
from tests.support.sse import read_frames
from tests.tiny_models.script import CLOCK_TOOL, GREETING, LONG_STORY, WEATHER_TOOL

_WEATHER: dict[str, Any] = {"name": "get_weather", "description": WEATHER_TOOL["function"]["description"],
                            "input_schema": WEATHER_TOOL["function"]["parameters"]}  # fmt: skip
_CLOCK: dict[str, Any] = {"name": "get_time", "description": CLOCK_TOOL["function"]["description"],
                          "input_schema": CLOCK_TOOL["function"]["parameters"]}  # fmt: skip


class Person(BaseModel):
    name: str
    age: int


def _user(text: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": text}]


def _ask(
    router: RouterProcess, path: str = "/v1/messages", headers: dict[str, str] | None = None, **body: Any
) -> Reply:
    whole = {"model": "demo", "max_tokens": 200, "messages": _user("Hello!"), **body}
    return call(router, "POST", path, {k: v for k, v in whole.items() if v is not ...}, **(headers or {}))


def _answer(router: RouterProcess, **body: Any) -> dict[str, Any]:
    reply = _ask(router, **body)
    assert reply.status == 200, reply.body
    data: dict[str, Any] = reply.json()
    return data


def _input(answer: dict[str, Any]) -> int:
    """All tokens of the prompt: those that were kept are told apart from the others."""
    usage = answer["usage"]
    return int(usage["input_tokens"] + usage["cache_read_input_tokens"] + usage["cache_creation_input_tokens"])


def _text(answer: dict[str, Any]) -> str:
    return "".join(block["text"] for block in answer["content"] if block["type"] == "text")


@pytest.fixture(scope="module")
def client(fleet: RouterProcess) -> Any:
    with anthropic.Anthropic(base_url=fleet.url, api_key="x", max_retries=0, timeout=30) as made:
        yield made


@pytest.mark.covers("O103", "O111", "T164", "T165")
def test_a_message(fleet: RouterProcess) -> None:
    answer = _answer(fleet)
    assert re.fullmatch(r"msg_[0-9a-f]{24}", answer["id"])
    assert (answer["type"], answer["role"], answer["model"]) == ("message", "assistant", "demo")
    assert answer["content"] == [{"type": "text", "text": GREETING}]
    assert (answer["stop_reason"], answer["stop_sequence"]) == ("end_turn", None)
    assert _input(answer) > 5
    assert answer["usage"]["output_tokens"] > 5
    assert _answer(fleet, max_tokens=1)["stop_reason"] == "max_tokens"
    warm = _answer(fleet, max_tokens=0)
    assert (warm["content"], warm["stop_reason"]) == ([], "max_tokens")


@pytest.mark.covers("O9", "O104", "O105", "T167", "T169")
def test_errors_have_its_shape(fleet: RouterProcess, client: Any) -> None:
    for more, status, kind, text in (
        ({"model": ...}, 400, "invalid_request_error", "model is required"),
        ({"max_tokens": ...}, 400, "invalid_request_error", "max_tokens is required and must be positive"),
        ({"messages": ...}, 400, "invalid_request_error", "messages is required"),
        ({"messages": []}, 400, "invalid_request_error", "messages is required"),
        ({"model": "nosuch"}, 404, "not_found_error", "model 'nosuch' not found"),
        ({"messages": _user([{"type": "nonsense"}])}, 400, "invalid_request_error", "messages.0.content.0"),
        ({"messages": _user([{"type": "image", "source": {"type": "url", "url": "http://x"}}])}, 400,
         "invalid_request_error", "invalid image source type: url. Only base64 images are supported."),
        ({"messages": _user([{"type": "document", "source": {"type": "base64", "data": "x"}}])}, 400,
         "invalid_request_error", "source type 'base64'"),
        ({"messages": [{"role": "king", "content": "x"}]}, 400, "invalid_request_error", "unknown role"),
        ({"temperature": 3}, 400, "invalid_request_error", "between 0 and 2"),
        ({"tool_choice": {"type": "any"}}, 400, "invalid_request_error", "needs tools"),
        ({"tools": [_WEATHER], "tool_choice": {"type": "tool", "name": "x"}}, 400, "invalid_request_error", "not among"),
        ({"tools": [{"type": "bash_20250124", "name": "bash"}]}, 400, "invalid_request_error", "bash_20250124"),
        ({"mcp_servers": [{"url": "x"}]}, 400, "invalid_request_error", "MCP"),
        ({"output_config": {"format": {"type": "json_schema", "schema": {"not": {}}}}}, 400, "invalid_request_error",
         "Unimplemented keys"),
        ({"thinking": {"type": "enabled", "budget_tokens": "many"}}, 400, "invalid_request_error", "budget_tokens"),
        ({"thinking": {"type": "enabled", "budget_tokens": 2**64}}, 400, "invalid_request_error", "budget_tokens"),
        ({"model": "embedder"}, 400, "invalid_request_error", '"embedder" does not support chat'),
        ({"model": "plain", "tools": [_WEATHER]}, 400, "invalid_request_error", "does not support tools"),
    ):  # fmt: skip
        reply = _ask(fleet, **more)
        body = reply.json()
        assert (reply.status, body["type"], body["error"]["type"]) == (status, "error", kind), more
        assert text in body["error"]["message"], more
        assert body["request_id"] == reply.headers["request-id"]
        assert not any(word in body["error"]["message"].lower() for word in ("overloaded", "busy", "rate limit"))
    wrong = call(fleet, "GET", "/v1/messages")
    assert (wrong.status, wrong.json()["type"], wrong.headers["allow"]) == (405, "error", "POST")
    for body in (b"", b"{", b"[]"):
        assert call(fleet, "POST", "/v1/messages", body).json()["error"]["type"] == "invalid_request_error"
    with pytest.raises(anthropic.NotFoundError) as missing:
        client.messages.create(model="nosuch", max_tokens=5, messages=_user("hi"))
    assert missing.value.type == "not_found_error"
    assert str(missing.value.request_id).startswith("req_")


@pytest.mark.covers("O15", "O106", "O123")
def test_headers_versions_and_fields_of_the_hosted_service_are_taken(fleet: RouterProcess) -> None:
    for version in ("2023-06-01", "2026-10-21", "2099-01-01", ""):
        headers = {"anthropic_beta": "unknown-1,unknown-2", **({"anthropic_version": version} if version else {})}
        reply = _ask(fleet, "/v1/messages?beta=true", headers, temperature=0.5, metadata={"user_id": "u"},
                     context_management={"edits": []})  # fmt: skip
        assert (reply.status, reply.headers["x-ignored-fields"]) == (200, "metadata,context_management")


@pytest.mark.covers("O107", "O108")
def test_system_text_in_every_place(fleet: RouterProcess) -> None:
    blocks = [{"type": "text", "text": "x-anthropic-billing-header: cc_version=1;"},
              {"type": "text", "text": "You are a pirate.", "cache_control": {"type": "ephemeral"}}]  # fmt: skip
    plain = _answer(fleet, system="You are a pirate.")
    assert _text(plain) == "Arr! What be your wish?"
    assert _input(_answer(fleet, system=blocks)) == _input(plain)
    inside = [{"role": "system", "content": "You are a pirate."}, *_user("Hello!")]
    assert _text(_answer(fleet, messages=inside)) == "Arr! What be your wish?"
    after = [*_user("Hello!"), {"role": "system", "content": [{"type": "text", "text": "You are a pirate."}]}]
    assert _text(_answer(fleet, messages=after)) == "Arr! What be your wish?"


@pytest.mark.covers("O109")
def test_turns_are_merged_and_a_begun_answer_is_continued(fleet: RouterProcess) -> None:
    split = [*_user("My name"), *_user([{"type": "text", "text": "is Ada."}])]
    joined = _answer(fleet, messages=_user("My name\n\nis Ada."))
    assert _answer(fleet, messages=split)["usage"] == joined["usage"]
    begun = GREETING[:20]
    messages = [*_user("Hello!"), {"role": "assistant", "content": begun}]
    assert begun + _text(_answer(fleet, messages=messages)) == GREETING


@pytest.mark.covers("O110")
def test_a_stop_sequence_is_named(fleet: RouterProcess) -> None:
    answer = _answer(fleet, stop_sequences=["zzz", "model of"])
    assert (answer["stop_reason"], answer["stop_sequence"]) == ("stop_sequence", "model of")
    assert _text(answer) == GREETING[: GREETING.index("model of")]


@pytest.mark.slow
@pytest.mark.covers("O112", "O113", "O124", "T168")
def test_tools_called_forced_limited_and_deferred(fleet: RouterProcess) -> None:
    ask = _user("What is the weather in Paris?")
    answer = _answer(fleet, messages=ask, tools=[_WEATHER])
    (block,) = answer["content"]
    assert block == {"type": "tool_use", "id": block["id"], "name": "get_weather",
                     "input": {"city": "Paris", "unit": "celsius"}}  # fmt: skip
    assert block["id"].startswith("toolu_")
    assert answer["stop_reason"] == "tool_use"
    for choice, names in (
        ({"type": "any"}, {"get_weather", "get_time"}),
        ({"type": "tool", "name": "get_time"}, {"get_time"}),
    ):
        forced = _answer(fleet, model="random", tools=[_WEATHER, _CLOCK], tool_choice=choice)
        (only,) = forced["content"]
        assert only["name"] in names
        assert isinstance(only["input"]["city"], str)
    none = _answer(fleet, messages=ask, tools=[_WEATHER], tool_choice={"type": "none"})
    assert all(block["type"] == "text" for block in none["content"])
    both = _user("Weather and time in Oslo, please.")
    many = _answer(fleet, messages=both, tools=[_WEATHER, _CLOCK])
    assert [block["type"] for block in many["content"]] == ["text", "tool_use", "tool_use"]
    one = _answer(fleet, messages=both, tools=[_WEATHER, _CLOCK],
                  tool_choice={"type": "auto", "disable_parallel_tool_use": True})  # fmt: skip
    assert [block["type"] for block in one["content"]] == ["text", "tool_use"]
    deferred = _answer(
        fleet, messages=ask, tools=[{**_WEATHER, "defer_loading": True}, {"type": "web_search_20260101", "name": "w"}]
    )
    assert deferred["stop_reason"] == "end_turn"


@pytest.mark.covers("O114", "T168")
@pytest.mark.parametrize(
    ("result", "expected"),
    [
        ({"content": '{"temp": 18, "sky": "clear"}'}, "It is 18 degrees in Paris, and the sky is clear."),
        ({"content": [{"type": "text", "text": '{"temp": 18, "sky": "clear"}'}]},
         "It is 18 degrees in Paris, and the sky is clear."),
        ({"content": "no such city", "is_error": True}, None),
        ({}, None),
    ],
)  # fmt: skip
def test_results_of_tools(fleet: RouterProcess, result: dict[str, Any], expected: str | None) -> None:
    ask = _user("What is the weather in Paris?")
    first = _answer(fleet, messages=ask, tools=[_WEATHER])
    back = {"type": "tool_result", "tool_use_id": first["content"][0]["id"], **result}
    messages = [*ask, {"role": "assistant", "content": first["content"]}, *_user([back])]
    answer = _answer(fleet, messages=messages, tools=[_WEATHER])
    assert expected is None or _text(answer) == expected
    counted = call(
        fleet, "POST", "/v1/messages/count_tokens", {"model": "demo", "messages": messages, "tools": [_WEATHER]}
    )
    assert counted.json()["input_tokens"] == _input(answer)
    if result.get("is_error"):
        plain = [*messages[:-1], *_user([{**back, "is_error": False}])]
        assert _input(_answer(fleet, messages=plain, tools=[_WEATHER])) < _input(answer)


@pytest.mark.covers("O115", "O116", "T169")
def test_thinking(fleet: RouterProcess) -> None:
    ask = _user("What is 17 + 25?")
    thought = _answer(fleet, messages=ask, thinking={"type": "enabled", "budget_tokens": 1024}, max_tokens=2000)
    block, said = thought["content"]
    assert (block["type"], bool(block["signature"]), said["text"]) == ("thinking", True, "17 + 25 = 42.")
    back = [*ask, {"role": "assistant", "content": thought["content"]}, *_user("Hello!")]
    assert _ask(fleet, messages=back).status == 200
    assert [b["type"] for b in _answer(fleet, messages=ask)["content"]] == ["text"], "off unless asked for"
    hidden = _answer(fleet, messages=ask, thinking={"type": "adaptive", "display": "omitted"})
    assert (hidden["content"][0]["thinking"], bool(hidden["content"][0]["signature"])) == ("", True)
    for thinking in ({"type": "adaptive", "display": "updates"}, {"type": "disabled"}):
        assert _ask(fleet, messages=ask, thinking=thinking).status == 200
    assert _ask(fleet, model="plain", thinking={"type": "enabled", "budget_tokens": 1024}, max_tokens=3).status == 200
    short = _answer(fleet, messages=ask, thinking={"type": "enabled", "budget_tokens": 5}, max_tokens=300)
    assert 0 < len(short["content"][0]["thinking"].split()) <= 6, "a budget ends it"
    assert short["content"][-1]["type"] == "text"


@pytest.mark.slow
@pytest.mark.covers("O117")
def test_formats_and_effort(fleet: RouterProcess, client: Any) -> None:
    for seed in range(5):
        answer = _answer(fleet, model="random", options={"seed": seed},
                         output_config={"effort": "xhigh", "format": {"type": "json_schema", "schema": Person.model_json_schema()}})  # fmt: skip
        Person.model_validate_json(_text(answer))
    parsed = client.messages.parse(
        model="demo", max_tokens=200, messages=_user("Give me a person as JSON."), output_format=Person
    )
    assert parsed.parsed_output == Person(name="Ada Lovelace", age=36)


@pytest.mark.covers("O118", "O119", "T166")
def test_the_events_of_a_stream(fleet: RouterProcess, client: Any) -> None:
    thinking = {"type": "enabled", "budget_tokens": 1024}
    frames = read_frames(_ask(fleet, messages=_user("What is 17 + 25?"), thinking=thinking, stream=True).body)
    events = [frame.data for frame in frames]
    assert [frame.event for frame in frames] == [event["type"] for event in events]
    kinds = [event["type"] for event in events]
    assert list(dict.fromkeys(kinds)) == ["message_start", "content_block_start", "content_block_delta",
                                          "content_block_stop", "message_delta", "message_stop"]  # fmt: skip
    assert events[0]["message"]["usage"]["input_tokens"] > 0
    open_block, seen = None, []
    for event in events[1:-2]:
        if event["type"] == "content_block_start":
            assert open_block is None
            open_block = event["index"]
            seen.append(event["content_block"]["type"])
        assert event["index"] == open_block
        if event["type"] == "content_block_stop":
            open_block = None
    assert seen == ["thinking", "text"]
    deltas = [event["delta"]["type"] for event in events if event["type"] == "content_block_delta"]
    assert deltas[deltas.index("text_delta") - 1] == "signature_delta"
    assert events[-2]["delta"] == {"stop_reason": "end_turn", "stop_sequence": None}
    assert events[-2]["usage"]["output_tokens"] > 10
    with client.messages.stream(
        model="demo", max_tokens=200, messages=_user("What is the weather in Paris?"), tools=[_WEATHER]
    ) as stream:
        parts = [event.partial_json for event in stream if event.type == "input_json"]
        final = stream.get_final_message()
    assert len(parts) > 1, "told while it is written"
    assert final.content[0].input == json.loads("".join(parts)) == {"city": "Paris", "unit": "celsius"}
    assert (final.stop_reason, final.usage.output_tokens > 5) == ("tool_use", True)


@pytest.mark.covers("O122", "T171")
def test_tokens_are_counted_exactly_by_many_at_once_while_a_generation_runs(fleet: RouterProcess) -> None:
    bodies: list[dict[str, Any]] = [
        {"messages": _user("Hello!")},
        {"messages": _user("Hello!"), "system": "You are a pirate."},
        {"messages": _user("What is 17 + 25?"), "thinking": {"type": "enabled", "budget_tokens": 1024}},
        {"messages": _user("Weather and time in Oslo, please."), "tools": [_WEATHER, _CLOCK]},
        {"messages": [*_user("Hello!"), {"role": "assistant", "content": "Hello! I"}]},
    ]
    with ThreadPoolExecutor(26) as pool:
        story = pool.submit(_answer, fleet, messages=_user("Tell me a long story."), max_tokens=1000)
        path = "/v1/messages/count_tokens"
        asked = [pool.submit(call, fleet, "POST", path, {"model": "demo", **bodies[n % 5]}) for n in range(25)]
        counted = [reply.result(20).json()["input_tokens"] for reply in asked]
        assert _text(story.result(30)) == LONG_STORY
    used = [_input(_answer(fleet, **body)) for body in bodies]
    assert counted == used * 5


def test_counting_loads_no_model(fleet: RouterProcess) -> None:
    before = fleet.model("filler")["loads"]
    for name in ("filler", "plain"):
        reply = call(fleet, "POST", "/v1/messages/count_tokens", {"model": name, "messages": _user("hi")})
        assert reply.json()["input_tokens"] > 1
    assert fleet.model("filler")["loads"] == before
    for more, status in (({"model": "nosuch"}, 404), ({"messages": []}, 400), ({"model": "embedder"}, 400)):
        body = {"model": "demo", "messages": _user("hi"), **more}
        reply = call(fleet, "POST", "/v1/messages/count_tokens", body)
        assert (reply.status, reply.json()["type"]) == (status, "error")


@pytest.mark.covers("O130")
def test_the_sentence_that_claude_code_reads(fleet: RouterProcess) -> None:
    reply = _ask(fleet, messages=_user("word " * 5000))
    assert reply.status == 400
    assert re.fullmatch(r"prompt is too long: \d{4,5} tokens > 4096 maximum", reply.json()["error"]["message"])
    streamed = _ask(fleet, messages=_user("word " * 5000), stream=True)
    assert (streamed.status, streamed.json()) == (400, {**reply.json(), "request_id": streamed.headers["request-id"]})


@pytest.mark.covers("O11", "O12", "O13")
def test_models_in_its_shape_page_by_page(fleet: RouterProcess, client: Any) -> None:
    headers = {"anthropic_version": "2023-06-01"}
    listing = call(fleet, "GET", "/v1/models", **headers).json()
    assert listing["has_more"] is False
    assert (listing["first_id"], listing["last_id"]) == (listing["data"][0]["id"], listing["data"][-1]["id"])
    for entry in listing["data"]:
        assert (entry["type"], bool(entry["display_name"])) == ("model", True)
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", entry["created_at"])
    seen, after = [], ""
    for _ in range(len(listing["data"])):
        page = call(fleet, "GET", f"/v1/models?limit=1{after}", **headers).json()
        seen += [entry["id"] for entry in page["data"]]
        assert page["has_more"] == (len(seen) < len(listing["data"]))
        after = f"&after_id={page['last_id']}"
    assert seen == [entry["id"] for entry in listing["data"]]
    assert [model.id for model in client.models.list(limit=2)] == seen
    assert client.models.retrieve("demo").id == "demo"
    missing = call(fleet, "GET", "/v1/models/nosuch", **headers)
    assert (missing.status, missing.json()["error"]["type"]) == (404, "not_found_error")
    assert call(fleet, "GET", "/v1/models?limit=0", **headers).status == 400


def test_documents_are_read_and_images_need_a_model_that_sees(fleet: RouterProcess) -> None:
    text = {"type": "document", "title": "T", "source": {"type": "text", "media_type": "text/plain", "data": "Hello!"}}
    assert _ask(fleet, messages=_user([text])).status == 200
    png = base64.b64encode(b"\x89PNG\r\n\x1a\n").decode()
    image = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": png}}
    reply = _ask(fleet, messages=_user([image]))
    assert (reply.status, "does not support images" in reply.json()["error"]["message"]) == (400, True)


def test_a_browser_may_ask(fleet: RouterProcess) -> None:
    preflight = call(fleet, "OPTIONS", "/v1/messages", origin="http://localhost:3000")
    allowed = preflight.headers["access-control-allow-headers"]
    assert all(
        name in allowed for name in ("x-api-key", "anthropic-version", "anthropic-dangerous-direct-browser-access")
    )
