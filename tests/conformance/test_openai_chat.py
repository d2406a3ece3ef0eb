"""Chat completions beyond the plain answer: choices, log probabilities, tools that are forced, formats, streams."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest
from pydantic import BaseModel

from tests.support.http import Reply, call
from tests.support.router import RouterProcess
from tests.support.sse import read_frames
from tests.tiny_models.script import CLOCK_TOOL, GREETING, WEATHER_TOOL

_CHAT = "/v1/chat/completions"
_WEATHER = [{"role": "user", "content": "What is the weather in Paris?"}]
_BOTH = [{"role": "user", "content": "Weather and time in Oslo, please."}]
_STRICT = {"type": "object", "properties": {"city": {"type": "string"}, "unit": {"enum": ["c", "f"]}},
           "required": ["city", "unit"], "additionalProperties": False}  # fmt: skip


class Person(BaseModel):
    name: str
    age: int


def _ask(router: RouterProcess, **body: Any) -> Reply:
    return call(router, "POST", _CHAT, {"model": "demo", "messages": [{"role": "user", "content": "hi"}], **body})


def _choice(router: RouterProcess, **body: Any) -> dict[str, Any]:
    reply = _ask(router, **body)
    assert reply.status == 200, reply.body
    choice: dict[str, Any] = reply.json()["choices"][0]
    return choice


@pytest.mark.covers("O21", "O29", "T141", "T145", "T146")
def test_the_shape_of_a_whole_answer_and_both_limits(fleet: RouterProcess) -> None:
    answer = _ask(fleet).json()
    assert set(answer) == {"id", "object", "created", "model", "system_fingerprint", "choices", "usage"}
    assert (answer["object"], answer["model"]) == ("chat.completion", "demo")
    usage = answer["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert len(answer["id"]) >= len("chatcmpl-") + 24
    for field in ("max_tokens", "max_completion_tokens"):
        short = _ask(fleet, **{field: 1}).json()
        assert (short["choices"][0]["finish_reason"], short["usage"]["completion_tokens"]) == ("length", 1)


@pytest.mark.covers("O32", "O33", "O69", "T073")
def test_greedy_and_seeded_answers_repeat_themselves_streamed_or_not(fleet: RouterProcess) -> None:
    for more in ({"temperature": 0}, {"temperature": 1, "seed": 7}):
        body = {"model": "random", "max_tokens": 20, **more}
        first = _choice(fleet, **body)["message"]["content"]
        assert _choice(fleet, **body)["message"]["content"] == first
        frames = read_frames(_ask(fleet, **body, stream=True).body)
        deltas = [frame.data["choices"][0]["delta"] for frame in frames[:-1]]
        assert "".join(delta.get("content", "") for delta in deltas) == first
    one, other = (_choice(fleet, model="random", max_tokens=20, temperature=1, seed=seed) for seed in (1, 2))
    assert one["message"]["content"] != other["message"]["content"]


@pytest.mark.covers("O34", "O35", "O74", "T072", "T147")
@pytest.mark.parametrize("stop", ["demo", "emo mod", ["zzz", "model"], [], "", ["", "How"]])
def test_stop_strings_never_show(fleet: RouterProcess, stop: Any) -> None:
    words = [text for text in ([stop] if isinstance(stop, str) else stop) if text]
    places = [GREETING.find(word) for word in words if word in GREETING]
    expected = GREETING[: min(places)] if places else GREETING
    assert _choice(fleet, stop=stop)["message"]["content"] == expected
    frames = read_frames(_ask(fleet, stop=stop, stream=True).body)
    shown = "".join(frame.data["choices"][0]["delta"].get("content", "") for frame in frames[:-1])
    assert shown == expected
    assert frames[-2].data["choices"][0]["finish_reason"] == "stop"


@pytest.mark.covers("O36")
def test_n_answers_come_side_by_side(fleet: RouterProcess) -> None:
    reply = _ask(fleet, model="random", n=3, max_tokens=8, temperature=1, seed=3).json()
    assert [choice["index"] for choice in reply["choices"]] == [0, 1, 2]
    texts = [choice["message"]["content"] for choice in reply["choices"]]
    assert len(set(texts)) == 3, "each has a seed of its own"
    assert reply["usage"]["completion_tokens"] == 24
    assert reply["usage"]["prompt_tokens"] == _ask(fleet, model="random", max_tokens=1).json()["usage"]["prompt_tokens"]
    body = _ask(fleet, model="random", n=3, max_tokens=8, temperature=1, seed=3, stream=True).body
    streamed = ["", "", ""]
    reasons = []
    for frame in read_frames(body)[:-1]:
        (choice,) = frame.data["choices"]
        streamed[choice["index"]] += choice["delta"].get("content", "")
        reasons += [choice["index"]] if choice["finish_reason"] else []
    assert streamed == texts
    assert sorted(reasons) == [0, 1, 2]


@pytest.mark.covers("O37", "O70", "T157")
def test_log_probabilities_one_a_token_and_their_bytes_are_the_text(fleet: RouterProcess) -> None:
    ask = {"messages": [{"role": "user", "content": "Say hello in many languages."}], "logprobs": True}
    answer = _ask(fleet, **ask, top_logprobs=2).json()
    entries = answer["choices"][0]["logprobs"]["content"]
    text = answer["choices"][0]["message"]["content"]
    assert len(entries) == answer["usage"]["completion_tokens"]
    assert b"".join(bytes(entry["bytes"]) for entry in entries).decode() == text
    assert any(bytes(entry["bytes"]).decode("utf-8", "replace") == "\ufffd" for entry in entries), "parts of characters"
    assert all(len(entry["top_logprobs"]) == 2 and entry["logprob"] <= 0 for entry in entries)
    frames = read_frames(_ask(fleet, **ask, stream=True).body)[:-1]
    streamed = [e for f in frames if (p := f.data["choices"][0]["logprobs"]) for e in p["content"]]
    assert [entry["bytes"] for entry in streamed] == [entry["bytes"] for entry in entries]
    assert all(entry["top_logprobs"] == [] for entry in streamed)


@pytest.mark.covers("O37", "O74")
def test_tokens_that_a_stop_string_cuts_off_are_not_told(fleet: RouterProcess) -> None:
    choice = _choice(fleet, stop="model of", logprobs=True)
    told = b"".join(bytes(entry["bytes"]) for entry in choice["logprobs"]["content"]).decode()
    assert choice["message"]["content"] == GREETING[: GREETING.index("model of")]
    assert told.startswith(choice["message"]["content"].rstrip())
    assert "of" not in told


@pytest.mark.covers("O40")
def test_a_bias_forces_a_token(fleet: RouterProcess) -> None:
    encoded = _ask(fleet, max_tokens=1, logprobs=True).json()["choices"][0]["message"]["content"]
    forced = _choice(fleet, max_tokens=3, logit_bias={"300": 100}, temperature=0)["message"]["content"]
    assert not forced.startswith(encoded)
    assert forced == forced[: len(forced) // 3] * 3


@pytest.mark.covers("O42", "O44")
def test_effort_without_thinking_and_stream_options_without_stream_are_taken(fleet: RouterProcess) -> None:
    assert _ask(fleet, model="plain", reasoning_effort="high", max_tokens=2).status == 200
    assert _ask(fleet, stream_options={"include_usage": True}).status == 200


@pytest.mark.covers("O46", "O47", "O54", "T151")
@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "get_time"}},
                                    {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [
                                        {"type": "function", "function": {"name": "get_weather"}}]}}])  # fmt: skip
@pytest.mark.parametrize("model", ["demo", "random"])
def test_a_forced_tool_is_called_by_any_model_streamed_or_not(fleet: RouterProcess, model: str, choice: Any) -> None:
    tools = [WEATHER_TOOL, CLOCK_TOOL]
    names = {"required": {"get_weather", "get_time"}}.get(choice if isinstance(choice, str) else "", set())
    if isinstance(choice, dict):
        names = {"get_time"} if choice["type"] == "function" else {"get_weather"}
    body = {"model": model, "tools": tools, "tool_choice": choice, "max_tokens": 150, "temperature": 1}
    whole = _choice(fleet, **body)
    (made,) = whole["message"]["tool_calls"]
    assert made["function"]["name"] in names
    assert isinstance(json.loads(made["function"]["arguments"])["city"], str)
    assert whole["finish_reason"] in ("tool_calls", "length"), "length when the model had to be brought to an end"
    assert whole["message"]["content"] is None
    name, arguments = "", ""
    for frame in read_frames(_ask(fleet, **body, stream=True).body)[:-1]:
        for part in frame.data["choices"][0]["delta"].get("tool_calls", []):
            assert part["index"] == 0
            assert ("id" in part) == ("name" in part["function"]) == ("type" in part), "once"
            name += part["function"].get("name", "")
            arguments += part["function"]["arguments"]
    assert name in names
    assert isinstance(json.loads(arguments)["city"], str)


@pytest.mark.slow
@pytest.mark.covers("O54")
def test_strict_arguments_validate_in_twenty_of_twenty(fleet: RouterProcess) -> None:
    tool = {"type": "function", "function": {"name": "f", "strict": True, "parameters": _STRICT}}
    body = {"model": "random", "tools": [tool], "tool_choice": "required", "max_tokens": 120, "temperature": 1}
    for choice in _ask(fleet, **body, n=20).json()["choices"]:
        arguments = json.loads(choice["message"]["tool_calls"][0]["function"]["arguments"])
        assert set(arguments) == {"city", "unit"}
        assert arguments["unit"] in ("c", "f")


@pytest.mark.covers("O50", "O51", "O52", "O53", "O71", "O72", "T097", "T101", "T103")
def test_calls_side_by_side_one_at_most_and_none(fleet: RouterProcess) -> None:
    tools = [WEATHER_TOOL, CLOCK_TOOL]
    frames = read_frames(_ask(fleet, messages=_BOTH, tools=tools, stream=True).body)[:-1]
    calls: dict[int, str] = {}
    ids = set()
    for frame in frames:
        for part in frame.data["choices"][0]["delta"].get("tool_calls", []):
            calls[part["index"]] = calls.get(part["index"], "") + part["function"]["arguments"]
            ids |= {part["id"]} if "id" in part else set()
    assert {index: json.loads(text) for index, text in calls.items()} == {0: {"city": "Oslo"}, 1: {"city": "Oslo"}}
    assert len(ids) == 2
    one = _choice(fleet, messages=_BOTH, tools=tools, parallel_tool_calls=False)
    assert (len(one["message"]["tool_calls"]), one["finish_reason"]) == (1, "tool_calls")
    none = _choice(fleet, messages=_BOTH, tools=tools, tool_choice="none")
    assert "tool_calls" not in none["message"]
    assert _ask(fleet, tools=[]).status == 200
    assert _ask(fleet, tools=[{"type": "function", "function": {"name": "f"}}]).status == 200
    refused = _ask(fleet, model="plain", tools=tools)
    assert (refused.status, "plain:latest does not support tools" in refused.json()["error"]["message"]) == (400, True)
    free = _choice(fleet, model="random", tools=tools, max_tokens=20, temperature=0)
    assert (free["finish_reason"], "tool_calls" in free["message"]) == ("length", False), "offered and not needed"


@pytest.mark.covers("O55", "O56", "T100", "T152", "T154")
@pytest.mark.parametrize(
    "content",
    [
        '{"temp": 18, "sky": "clear"}',
        [{"type": "text", "text": '{"temp": 18, '}, {"type": "text", "text": '"sky": "clear"}'}],
    ],
)
@pytest.mark.parametrize("call_id", ["c1", "unknown", None])
def test_the_result_of_a_tool_is_seen(fleet: RouterProcess, content: Any, call_id: str | None) -> None:
    arguments = '{"city": "Paris", "unit": "celsius"}'
    made = {"id": "c1", "type": "function", "function": {"name": "get_weather", "arguments": arguments}}
    messages = [*_WEATHER, {"role": "assistant", "content": None, "tool_calls": [made]},
                {"role": "tool", "tool_call_id": call_id, "content": content}]  # fmt: skip
    choice = _choice(fleet, messages=messages, tools=[WEATHER_TOOL])
    assert choice["message"]["content"] == "It is 18 degrees in Paris, and the sky is clear."


@pytest.mark.covers("O58", "O60")
def test_the_python_helpers_for_calls_and_for_formats(fleet: RouterProcess) -> None:
    with openai.OpenAI(base_url=f"{fleet.url}/v1", api_key="x", max_retries=0) as client:
        messages: Any = _WEATHER
        tools: Any = [{**WEATHER_TOOL, "function": {**WEATHER_TOOL["function"], "strict": True, "parameters": _STRICT}}]
        with client.chat.completions.stream(model="demo", messages=messages, tools=tools) as stream:
            done = [event for event in stream if event.type == "tool_calls.function.arguments.done"]
        assert json.loads(done[0].arguments)["city"] == "Paris"
        ask: Any = [{"role": "user", "content": "Give me a person as JSON."}]
        parsed = client.chat.completions.parse(model="demo", messages=ask, response_format=Person)
        assert parsed.choices[0].message.parsed == Person(name="Ada Lovelace", age=36)
        with client.chat.completions.stream(model="demo", messages=ask, response_format=Person) as typed:
            assert typed.get_final_completion().choices[0].message.parsed == Person(name="Ada Lovelace", age=36)


@pytest.mark.covers("O59", "O61", "O62", "T150")
@pytest.mark.parametrize(
    "form",
    [
        {"type": "json_object"},
        {"type": "json_schema", "json_schema": {"name": "p", "schema": Person.model_json_schema()}},
        {"type": "json_schema", "json_schema": {"name": "p", "strict": True, "schema": {
            "$schema": "https://json-schema.org/draft/2020-12/schema", "type": "object", "required": ["a", "b"],
            "properties": {"a": {"$ref": "#/$defs/k"}, "b": {"anyOf": [{"type": "null"}, {"type": "array",
                           "items": {"type": "array", "items": {"type": "integer"}}}]}},
            "$defs": {"k": {"enum": ["x", "y"]}}, "additionalProperties": False}}},
    ],
)  # fmt: skip
def test_a_format_holds_in_ten_of_ten(fleet: RouterProcess, form: dict[str, Any]) -> None:
    body = {"model": "random", "response_format": form, "temperature": 1, "max_tokens": 120}
    for choice in _ask(fleet, **body, n=10).json()["choices"]:
        value = json.loads(choice["message"]["content"])
        assert isinstance(value, dict)
        if form["type"] == "json_schema" and "$defs" in form["json_schema"]["schema"]:
            assert value["a"] in ("x", "y")
        elif form["type"] == "json_schema":
            Person.model_validate(value)


@pytest.mark.covers("O64")
def test_a_format_that_has_no_room_is_cut_and_says_so(fleet: RouterProcess) -> None:
    with openai.OpenAI(base_url=f"{fleet.url}/v1", api_key="x", max_retries=0) as client:
        ask: Any = [{"role": "user", "content": "Give me a person as JSON."}]
        with pytest.raises(openai.LengthFinishReasonError):
            client.chat.completions.parse(model="demo", messages=ask, response_format=Person, max_tokens=3)


@pytest.mark.covers("O41", "O73", "T155")
def test_thinking_comes_before_the_content_and_under_both_names(fleet: RouterProcess) -> None:
    ask = {"messages": [{"role": "user", "content": "What is 17 + 25?"}]}
    frames = read_frames(_ask(fleet, **ask, stream=True).body)[1:-2]
    kinds = ["content" if "content" in f.data["choices"][0]["delta"] else "reasoning" for f in frames]
    assert kinds == sorted(kinds, reverse=True)
    assert set(kinds) == {"content", "reasoning"}
    for frame in frames:
        delta = frame.data["choices"][0]["delta"]
        assert delta.get("reasoning") == delta.get("reasoning_content")
        assert "think>" not in str(delta)
    for off in ({"reasoning_effort": "none"}, {"thinking": {"type": "disabled"}}, {"reasoning": {"effort": "none"}}):
        assert "reasoning" not in _choice(fleet, **ask, **off)["message"]


@pytest.mark.covers("O41", "O60", "T111")
def test_a_format_binds_the_answer_and_leaves_thinking_free(fleet: RouterProcess) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": {
        "type": "object", "properties": {"sum": {"type": "integer"}}, "required": ["sum"],
        "additionalProperties": False}}}  # fmt: skip
    ask = {"messages": [{"role": "user", "content": "What is 17 + 25?"}], "response_format": form, "max_tokens": 200}
    thought = _choice(fleet, **ask)["message"]
    assert thought["reasoning"].startswith("The user wants a sum.")
    assert isinstance(json.loads(thought["content"])["sum"], int)
    bare = _choice(fleet, **ask, reasoning_effort="none")["message"]
    assert isinstance(json.loads(bare["content"])["sum"], int)


@pytest.mark.covers("O66", "O67", "O68", "T142", "T143", "T144")
def test_the_frames_of_a_stream(fleet: RouterProcess) -> None:
    frames = read_frames(_ask(fleet, stream=True, stream_options={"include_usage": True}).body)
    assert frames[-1].text == "[DONE]"
    chunks = [frame.data for frame in frames[:-1]]
    assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
    assert len({(chunk["id"], chunk["created"]) for chunk in chunks}) == 1
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks[:-1]].count("stop") == 1
    assert (chunks[-2]["choices"][0]["delta"], chunks[-1]["choices"]) == ({}, [])
    assert chunks[-1]["usage"]["total_tokens"] > 0


@pytest.mark.covers("O1", "O2", "O5", "O6", "O45")
def test_bodies_are_read_whatever_they_are_called(fleet: RouterProcess) -> None:
    body = json.dumps({"model": "demo", "messages": [{"role": "user", "content": "hi"}], "foo": 1, "user": "u"})
    for headers in ({}, {"content_type": "application/x-www-form-urlencoded"}, {"content_type": "text/plain"}):
        reply = call(fleet, "POST", _CHAT, body.encode(), **headers)
        assert (reply.status, reply.headers["x-ignored-fields"]) == (200, "foo,user")


@pytest.mark.covers("O20")
def test_streams_are_not_compressed(fleet: RouterProcess) -> None:
    body = {"model": "demo", "messages": [{"role": "user", "content": "hi"}], "stream": True}
    reply = call(fleet, "POST", _CHAT, body, accept_encoding="gzip, br, zstd")
    assert "content-encoding" not in reply.headers
    assert reply.headers["cache-control"] == "no-cache"
    assert reply.body.startswith(b"data: ")
