"""OpenAI's API over a real socket, named by the numbers of the conformance list."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest

from tests.support.http import call
from tests.support.router import RouterProcess
from tests.tiny_models.script import GREETING, WEATHER_TOOL

_CHAT = "/v1/chat/completions"
_PNG = "data:image/png;base64,iVBORw0KGgo="  # no more than its first bytes


def _body(**more: Any) -> dict[str, Any]:
    return {"model": "demo", "messages": [{"role": "user", "content": "hi"}], **more}


def _frames(data: bytes) -> list[Any]:
    assert data.endswith(b"\n\n")
    texts = [frame.removeprefix(b"data: ") for frame in data[:-2].split(b"\n\n")]
    return [text if text == b"[DONE]" else json.loads(text) for text in texts]


@pytest.mark.req("R42")
@pytest.mark.covers("O3", "O4", "O22", "O23", "O24", "O28", "O31", "O38", "O39", "O48", "O49", "O63", "O129", "T148")
@pytest.mark.parametrize(
    ("body", "status", "param", "text"),
    [
        (b"", 400, None, "EOF"),
        (b"{", 400, None, "not JSON"),
        (b"[]", 400, None, "JSON object"),
        (_body(model=None), 400, "model", "model is required"),
        (_body(messages=None), 400, "messages", "is too short - 'messages'"),
        (_body(messages=[]), 400, "messages", "is too short - 'messages'"),
        (_body(messages=[{"role": "king", "content": ""}]), 400, "messages[0].role", "unknown role"),
        (_body(messages=[{"role": "user", "content": 5}]), 400, "messages[0].content", "Expected"),
        (_body(messages=[{"role": "user"}]), 400, "messages[0].content", "invalid message content type"),
        (_body(model="nosuch"), 404, "model", "model 'nosuch' not found"),
        (_body(model="../x"), 400, "model", "invalid model name"),
        (_body(temperature=3), 400, "temperature", "between 0 and 2"),
        (_body(top_p=2), 400, "top_p", "between 0 and 1"),
        (_body(presence_penalty=9), 400, "presence_penalty", "between -2 and 2"),
        (_body(n=0), 400, "n", "between 1 and 64"),
        (_body(n=65), 400, "n", "between 1 and 64"),
        (_body(top_logprobs=2), 400, "top_logprobs", "needs logprobs"),
        (_body(logprobs=True, top_logprobs=21), 400, "top_logprobs", "between 0 and 20"),
        (_body(logit_bias={"x": 1}), 400, "logit_bias", "token ids"),
        (_body(logit_bias={"99999": 1}), 400, "logit_bias", "vocabulary"),
        (_body(response_format={"type": "yaml"}), 400, "response_format.type", "unknown format"),
        (_body(response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": {"not": {}}}}), 400,
         "response_format", "Unimplemented keys"),
        (_body(tool_choice="required"), 400, "tool_choice", "needs tools"),
        (_body(tools=[WEATHER_TOOL], tool_choice={"type": "custom", "custom": {"name": "x"}}), 400, "tool_choice",
         "not supported"),
        (_body(functions=[{"name": "x"}]), 400, "functions", "use tools"),
        (_body(tools=[WEATHER_TOOL], tool_choice={"type": "function", "function": {"name": "x"}}), 400, "tool_choice",
         "not among the tools"),
        (_body(tools=[{"type": "custom", "function": {"name": "x"}}]), 400, "tools[0].type", "not supported"),
        (_body(reasoning_effort="bogus"), 400, "reasoning_effort", "invalid reasoning value"),
        (_body(messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,"}}]}]), 400,
         "messages[0].content[0]", "invalid image input"),
        (_body(messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]}]), 400,
         "messages[0].content[0]", "image URLs are not currently supported"),
        (_body(messages=[{"role": "user", "content": [{"type": "text", "text": "x"},
                                                      {"type": "image_url", "image_url": {"url": _PNG}}]}]), 400,
         "messages[0].content[1]", "demo:latest does not support images"),
        (_body(messages=[{"role": "user", "content": [{"type": "x"}]}]), 400, "messages[0].content[0]",
         "invalid message format"),
        (_body(audio={"voice": "x"}), 400, "audio", "text only"),
        (_body(keep_alive="5 parsecs"), 400, "keep_alive", "time:"),
        (_body(options={"top_k": "x"}), 400, "options.top_k", "integer"),
        (_body(messages=[{"role": "user", "content": "word " * 5000}]), 400, None, "exceeds the model's maximum"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_in_openais_shape(
    demo_router: RouterProcess, body: Any, status: int, param: str | None, text: str
) -> None:
    reply = call(demo_router, "POST", _CHAT, body)
    error = reply.json()["error"]
    assert (reply.status, set(error)) == (status, {"message", "type", "param", "code"})
    assert error["type"] == ("not_found_error" if status == 404 else "invalid_request_error")
    assert error["param"] == param
    assert text in error["message"]
    assert not any(word in error["message"].lower() for word in ("overloaded", "busy", "rate limit"))


@pytest.mark.covers("O25", "O43")
def test_25_43_codes_that_clients_act_on(demo_router: RouterProcess) -> None:
    with openai.OpenAI(base_url=demo_router.url + "/v1", api_key="x", max_retries=0) as client:
        with pytest.raises(openai.NotFoundError) as missing:
            client.chat.completions.create(model="nosuch", messages=[{"role": "user", "content": "hi"}])
        assert missing.value.code == "model_not_found"
        with pytest.raises(openai.BadRequestError) as long:
            client.chat.completions.create(model="demo", messages=[{"role": "user", "content": "word " * 5000}])
        assert long.value.code == "context_length_exceeded"


@pytest.mark.covers("O7", "O8")
def test_7_8_unknown_url_and_method(demo_router: RouterProcess) -> None:
    unknown = call(demo_router, "GET", "/v1/nonsense")
    assert (unknown.status, unknown.json()["error"]["code"]) == (404, "unknown_url")
    wrong = call(demo_router, "GET", _CHAT)
    assert (wrong.status, wrong.json()["error"]["code"]) == (405, "method_not_supported")
    assert "POST" in wrong.headers["allow"]


@pytest.mark.covers("O5", "O6", "O45")
def test_5_6_45_unknown_fields_and_nulls(demo_router: RouterProcess) -> None:
    nulls = dict.fromkeys(("max_tokens", "stop", "temperature", "tools", "seed", "n", "stream", "logprobs", "user"))
    ignored = {"foo": 1, "user": "u", "metadata": {}, "store": False, "service_tier": "auto", "verbosity": "low",
               "stream_options": {"include_usage": True}, "tools": [], "stop": ["", ""]}  # fmt: skip
    for more in (nulls, ignored):
        assert call(demo_router, "POST", _CHAT, _body(**more)).status == 200


@pytest.mark.covers("O10", "O14")
def test_10_14_models(demo_router: RouterProcess) -> None:
    listing = call(demo_router, "GET", "/v1/models").json()
    (entry,) = listing["data"]
    assert (listing["object"], entry["object"], entry["id"], entry["owned_by"]) == (
        "list",
        "model",
        "demo:latest",
        "library",
    )
    assert isinstance(entry["created"], int)
    for path in ("demo", "library/demo", "library%2Fdemo:latest", "registry.ollama.ai/library/demo"):
        assert call(demo_router, "GET", f"/v1/models/{path}").status == 200, path
    missing = call(demo_router, "GET", "/v1/models/org/nosuch")
    assert (missing.status, missing.json()["error"]["code"]) == (404, "model_not_found")


@pytest.mark.covers("O21", "O27", "O30")
def test_21_27_30_chat(demo_router: RouterProcess) -> None:
    plain = call(demo_router, "POST", _CHAT, _body()).json()
    assert plain["id"].startswith("chatcmpl-")
    assert plain["choices"][0]["message"] == {"role": "assistant", "content": GREETING, "refusal": None}
    parts = [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]
    split = call(demo_router, "POST", _CHAT, _body(messages=[{"role": "user", "content": parts}])).json()
    assert split["usage"]["prompt_tokens"] == plain["usage"]["prompt_tokens"]
    short = call(demo_router, "POST", _CHAT, _body(max_completion_tokens=2, max_tokens=5)).json()
    assert (short["choices"][0]["finish_reason"], short["usage"]["completion_tokens"]) == ("length", 2)


@pytest.mark.covers("O26")
def test_26_developer_and_scattered_system_messages(demo_router: RouterProcess) -> None:
    messages = [{"role": "developer", "content": "You are a pirate."}, {"role": "user", "content": "Hello!"}]
    answer = call(demo_router, "POST", _CHAT, _body(messages=messages)).json()
    assert answer["choices"][0]["message"]["content"] == "Arr! What be your wish?"


@pytest.mark.covers("O41", "O42")
def test_41_42_reasoning(demo_router: RouterProcess) -> None:
    sum_ = _body(messages=[{"role": "user", "content": "What is 17 + 25?"}])
    high = call(demo_router, "POST", _CHAT, {**sum_, "reasoning_effort": "high"}).json()["choices"][0]["message"]
    assert high["reasoning_content"] == high["reasoning"] != ""
    assert high["content"] == "17 + 25 = 42."
    none = call(demo_router, "POST", _CHAT, {**sum_, "reasoning_effort": "none"}).json()["choices"][0]["message"]
    assert "reasoning_content" not in none


@pytest.mark.covers("O50", "O51")
def test_50_51_tool_choice_none_and_one_call_at_most(demo_router: RouterProcess) -> None:
    clock = {"type": "function", "function": {"name": "get_time", "description": "Local time of a city", "parameters":
             {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}}}  # fmt: skip
    ask = _body(
        messages=[{"role": "user", "content": "Weather and time in Oslo, please."}], tools=[WEATHER_TOOL, clock]
    )
    both = call(demo_router, "POST", _CHAT, ask).json()["choices"][0]["message"]["tool_calls"]
    assert [c["function"]["name"] for c in both] == ["get_weather", "get_time"]
    assert [c["index"] for c in both] == [0, 1]
    assert both[0]["id"] != both[1]["id"]
    one = call(demo_router, "POST", _CHAT, {**ask, "parallel_tool_calls": False}).json()["choices"][0]["message"]
    assert len(one["tool_calls"]) == 1
    none = call(demo_router, "POST", _CHAT, {**ask, "tool_choice": "none"}).json()["choices"][0]["message"]
    assert "tool_calls" not in none


@pytest.mark.covers("O66-O70")
def test_66_to_70_the_shape_of_a_stream(demo_router: RouterProcess) -> None:
    body = _body(messages=[{"role": "user", "content": "Say hello in many languages."}], stream=True)
    reply = call(demo_router, "POST", _CHAT, {**body, "stream_options": {"include_usage": True}})
    assert reply.headers["content-type"].startswith("text/event-stream")
    frames = _frames(reply.body)
    assert frames[-1] == b"[DONE]"
    chunks = frames[:-1]
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert {(c["id"], c["created"], c["model"], c["object"]) for c in chunks} == {
        (chunks[0]["id"], chunks[0]["created"], "demo", "chat.completion.chunk")
    }
    reasons = [c["choices"][0]["finish_reason"] for c in chunks[:-1]]
    assert [reason for reason in reasons if reason] == ["stop"]
    assert reasons[-1] == "stop"
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] > 10
    text = "".join(c["choices"][0]["delta"].get("content", "") for c in chunks[:-1])
    assert "👩‍🚀" in text
    whole = call(demo_router, "POST", _CHAT, {**body, "stream": False}).json()
    assert whole["choices"][0]["message"]["content"] == text
    assert all("usage" not in frame for frame in _frames(call(demo_router, "POST", _CHAT, body).body)[:-1])


@pytest.mark.covers("O82", "O83", "O84")
@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"prompt": ""}, "prompt"),
        ({"prompt": [1, "a"]}, "prompt"),
        ({"prompt": ["a", [1]]}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [99999]}, "prompt"),
        ({"prompt": "a", "suffix": "b"}, "suffix"),
        ({"prompt": "a", "best_of": 2}, "best_of"),
        ({"prompt": "a", "best_of": 2, "stream": True}, "best_of"),
        ({"prompt": ["a"] * 33, "n": 2}, "n"),
        ({"prompt": "a", "logprobs": 6}, "logprobs"),
    ],
)
def test_82_83_84_completions_refuse_what_they_cannot_do(demo_router: RouterProcess, body: Any, param: str) -> None:
    reply = call(demo_router, "POST", "/v1/completions", {"model": "demo", **body})
    assert (reply.status, reply.json()["error"]["param"]) == (400, param)


@pytest.mark.covers("O79")
def test_79_a_prompt_of_token_ids(demo_router: RouterProcess) -> None:
    for prompt in ([300, 301, 302], [[300, 301, 302]], ["hi"]):
        reply = call(demo_router, "POST", "/v1/completions", {"model": "demo", "prompt": prompt})
        assert reply.status == 200, prompt
        assert reply.json()["usage"]["completion_tokens"] <= 16
