"""Completions, embeddings, responses, models and the rest of OpenAI's list."""

from __future__ import annotations

import base64
import json
import math
import struct
from typing import Any

import openai
import pytest
from pydantic import BaseModel

from tests.support.http import Reply, call
from tests.support.router import RouterProcess
from tests.support.sse import read_frames
from tests.tiny_models.script import GREETING, WEATHER_TOOL

_FLAT_TOOL = {"type": "function", **WEATHER_TOOL["function"]}


class Person(BaseModel):
    name: str
    age: int


def _complete(router: RouterProcess, **body: Any) -> dict[str, Any]:
    reply = call(router, "POST", "/v1/completions", {"model": "demo", "max_tokens": 4, "temperature": 0, **body})
    assert reply.status == 200, reply.body
    data: dict[str, Any] = reply.json()
    return data


@pytest.mark.covers("O79", "T158", "T159")
def test_prompts_of_every_form(fleet: RouterProcess) -> None:
    for prompt, count in (("Hello", 1), (["Hello", "you", "x"], 3), ([300, 301], 1), ([[300, 301], [302]], 2)):
        answer = _complete(fleet, prompt=prompt)
        assert [choice["index"] for choice in answer["choices"]] == list(range(count)), prompt
        assert answer["usage"]["completion_tokens"] <= 4 * count
    alone = [_complete(fleet, prompt=text)["choices"][0]["text"] for text in ("Hello", "you")]
    pairs = _complete(fleet, prompt=["Hello", "you"], n=2)
    assert [choice["text"] for choice in pairs["choices"]] == [alone[0], alone[0], alone[1], alone[1]]
    assert pairs["usage"]["prompt_tokens"] == sum(
        _complete(fleet, prompt=text)["usage"]["prompt_tokens"] for text in ("Hello", "you")
    )


@pytest.mark.covers("O80", "O81", "O82")
def test_echo_with_and_without_log_probabilities(fleet: RouterProcess) -> None:
    prompt = "The harbour had been asleep"
    plain = _complete(fleet, prompt=prompt, echo=True)["choices"][0]
    assert plain["text"].startswith(prompt)
    assert plain["logprobs"] is None
    for stream in (False, True):
        body = {"model": "demo", "prompt": prompt, "echo": True, "logprobs": 1, "max_tokens": 3, "temperature": 0}
        reply = call(fleet, "POST", "/v1/completions", {**body, "stream": stream})
        parts = [f.data for f in read_frames(reply.body)[:-1]] if stream else [reply.json()]
        told = [part["choices"][0]["logprobs"] for part in parts if part["choices"][0]["logprobs"]]
        tokens = [token for part in told for token in part["tokens"]]
        logprobs = [value for part in told for value in part["token_logprobs"]]
        offsets = [value for part in told for value in part["text_offset"]]
        tops = [value for part in told for value in part["top_logprobs"]]
        assert len(tokens) == len(logprobs) == len(offsets) == len(tops)
        assert logprobs[0] is tops[0] is None
        assert all(value <= 0 for value in logprobs[1:])
        assert offsets == sorted(set(offsets))
        text = "".join(part["choices"][0]["text"] for part in parts)
        assert "".join(tokens) == text
        assert text == plain["text"][: len(text)]
        assert all(token in top for token, top in zip(tokens[1:], tops[1:], strict=True))
    scored = _complete(fleet, prompt=prompt, echo=True, logprobs=0, max_tokens=0)
    assert (scored["choices"][0]["text"], scored["usage"]["completion_tokens"]) == (prompt, 0)


@pytest.mark.covers("O81")
def test_a_prompt_that_is_scored_in_chunks_scores_the_same(fleet: RouterProcess) -> None:
    """More tokens than are read in one step; a prefix has the scores it has alone."""
    long = "The harbour had been asleep since the last boat. " * 60
    one = _complete(fleet, prompt=long, echo=True, logprobs=0, max_tokens=0)
    assert one["usage"]["prompt_tokens"] > 512
    short = _complete(fleet, prompt=long[: len(long) // 2], echo=True, logprobs=0, max_tokens=0)
    values = [answer["choices"][0]["logprobs"]["token_logprobs"][1:] for answer in (one, short)]
    for left, right in zip(values[0], values[1][:-2], strict=False):
        assert math.isclose(left, right, abs_tol=0.05)


@pytest.mark.covers("O83")
def test_a_model_with_the_tokens_for_it_fills_in(fleet: RouterProcess) -> None:
    body = {"model": "filler", "prompt": "def f(", "suffix": "return x", "max_tokens": 5}
    reply = call(fleet, "POST", "/v1/completions", body)
    assert reply.status == 200
    assert reply.json()["usage"]["completion_tokens"] == 5
    plain = call(fleet, "POST", "/v1/completions", {**body, "suffix": None}).json()["usage"]["prompt_tokens"]
    assert reply.json()["usage"]["prompt_tokens"] >= plain + 4, "the suffix and its markers are in the prompt"
    shown = call(fleet, "POST", "/api/show", {"model": "filler"}).json()
    assert "insert" in shown["capabilities"]
    generated = call(fleet, "POST", "/api/generate",
                     {"model": "filler", "prompt": "a", "suffix": "b", "stream": False, "options": {"num_predict": 2}})  # fmt: skip
    assert generated.json()["eval_count"] == 2


@pytest.mark.covers("O85", "T158")
def test_the_stream_of_a_completion(fleet: RouterProcess) -> None:
    body = {"model": "demo", "prompt": ["Hello", "you"], "max_tokens": 3, "stream": True,
            "stream_options": {"include_usage": True}}  # fmt: skip
    frames = read_frames(call(fleet, "POST", "/v1/completions", body).body)
    assert frames[-1].text == "[DONE]"
    assert frames[-2].data["usage"]["completion_tokens"] == 6
    reasons = [c["finish_reason"] for f in frames[:-2] for c in f.data["choices"] if c["finish_reason"]]
    assert reasons == ["length", "length"]


# ------------------------------------------------------------------------------------------------ embeddings


def _embed(router: RouterProcess, **body: Any) -> Reply:
    return call(router, "POST", "/v1/embeddings", {"model": "embedder", **body})


@pytest.mark.covers("O86", "O87", "O88", "T160")
def test_vectors_as_numbers_and_as_base64(fleet: RouterProcess) -> None:
    texts = ["one", "two words", "three"]
    plain = _embed(fleet, input=texts).json()
    packed = _embed(fleet, input=texts, encoding_format="base64").json()
    assert [entry["index"] for entry in plain["data"]] == [0, 1, 2]
    for left, right in zip(plain["data"], packed["data"], strict=True):
        data = base64.b64decode(right["embedding"])
        assert list(struct.unpack(f"<{len(data) // 4}f", data)) == left["embedding"]
        assert math.isclose(math.hypot(*left["embedding"]), 1, abs_tol=1e-3)
    for number, text in enumerate(texts):
        (alone,) = _embed(fleet, input=text).json()["data"]
        apart = max(abs(a - b) for a, b in zip(alone["embedding"], plain["data"][number]["embedding"], strict=True))
        assert apart < 1e-2, "the same alone or beside others"
    assert plain["usage"]["prompt_tokens"] == plain["usage"]["total_tokens"] > 3
    with openai.OpenAI(base_url=f"{fleet.url}/v1", api_key="x", max_retries=0) as client:
        found = client.embeddings.create(model="embedder", input=texts).data[1].embedding
    assert all(math.isclose(a, b, abs_tol=1e-6) for a, b in zip(found, plain["data"][1]["embedding"], strict=True))


@pytest.mark.covers("O89", "O90", "O91", "T160")
def test_what_cannot_be_embedded_is_refused(fleet: RouterProcess) -> None:
    size = len(_embed(fleet, input="x").json()["data"][0]["embedding"])
    cut = _embed(fleet, input="x", dimensions=16).json()["data"][0]["embedding"]
    assert (len(cut), round(math.hypot(*cut), 3)) == (16, 1.0)
    for more, param in (
        ({"input": ""}, "input"), ({"input": []}, "input"), ({}, "input"), ({"input": ["a", ""]}, "input"),
        ({"input": ["a", 1]}, "input"), ({"input": {"a": 1}}, "input"), ({"input": [99999]}, "input"),
        ({"input": ["x"] * 2049}, "input"), ({"input": "word " * 200}, "input"), ({"input": "x", "dimensions": 0}, "dimensions"),
        ({"input": "x", "dimensions": size + 1}, "dimensions"), ({"input": "x", "encoding_format": "hex"}, "encoding_format"),
        ({"input": "x", "model": "demo"}, "model"),
    ):  # fmt: skip
        reply = _embed(fleet, **more)
        assert (reply.status, reply.json()["error"]["param"]) == (400, param), more
    chat = call(fleet, "POST", "/v1/chat/completions",
                {"model": "embedder", "messages": [{"role": "user", "content": "hi"}]})  # fmt: skip
    assert (chat.status, chat.json()["error"]["message"]) == (400, '"embedder" does not support chat')
    assert _embed(fleet, input=[300, 301]).status == _embed(fleet, input=[[300], [301, 302]]).status == 200


# ------------------------------------------------------------------------------------------------- responses


def _respond(router: RouterProcess, **body: Any) -> Reply:
    return call(router, "POST", "/v1/responses", {"model": "demo", "input": "Hello!", **body})


@pytest.mark.covers("O92", "O93", "T161")
def test_a_response_and_its_items(fleet: RouterProcess) -> None:
    answer = _respond(fleet).json()
    assert (answer["object"], answer["status"], answer["error"]) == ("response", "completed", None)
    assert answer["output"][0]["content"][0]["type"] == "output_text"
    assert answer["output"][0]["content"][0]["text"] == GREETING
    usage = answer["usage"]
    assert usage["total_tokens"] == usage["input_tokens"] + usage["output_tokens"]
    assert usage["input_tokens_details"] == {"cached_tokens": 0}
    items = [{"role": "developer", "content": "You are a pirate."},
             {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Hello!"}], "id": "m1"}]  # fmt: skip
    assert _respond(fleet, input=items).json()["output"][0]["content"][0]["text"] == "Arr! What be your wish?"
    said = _respond(fleet, instructions="You are a pirate.").json()
    assert said["output"][0]["content"][0]["text"] == "Arr! What be your wish?"
    assert said["instructions"] == "You are a pirate."


@pytest.mark.covers("O94", "T162")
def test_the_events_of_a_response_in_order(fleet: RouterProcess) -> None:
    frames = read_frames(_respond(fleet, input="What is 17 + 25?", stream=True).body)
    events = [frame.data for frame in frames]
    assert [frame.event for frame in frames] == [event["type"] for event in events]
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    kinds = list(dict.fromkeys(event["type"] for event in events))
    assert kinds == [
        "response.created", "response.in_progress",
        "response.output_item.added", "response.reasoning_summary_part.added",
        "response.reasoning_summary_text.delta", "response.reasoning_summary_text.done",
        "response.reasoning_summary_part.done", "response.output_item.done",
        "response.content_part.added", "response.output_text.delta", "response.output_text.done",
        "response.content_part.done", "response.completed",
    ]  # fmt: skip
    final = events[-1]["response"]
    assert [item["type"] for item in final["output"]] == ["reasoning", "message"]
    deltas = "".join(e["delta"] for e in events if e["type"] == "response.output_text.delta")
    assert deltas == final["output"][1]["content"][0]["text"] == "17 + 25 = 42."
    assert len({final["id"], events[0]["response"]["id"]}) == 1


@pytest.mark.covers("O94", "O95", "O96", "O97", "T163")
def test_the_python_client_calls_a_tool_and_parses_a_format(fleet: RouterProcess) -> None:
    tools: Any = [{**_FLAT_TOOL, "strict": False}, {"type": "web_search"},
                  {"type": "namespace", "name": "mcp", "description": "", "tools": [{**_FLAT_TOOL, "name": "look"}]}]  # fmt: skip
    with openai.OpenAI(base_url=f"{fleet.url}/v1", api_key="x", max_retries=0) as client:
        ask: list[Any] = [{"role": "user", "content": "What is the weather in Paris?"}]
        with client.responses.stream(model="demo", input=ask, tools=tools) as stream:
            final = stream.get_final_response()
        (made,) = final.output
        assert made.type == "function_call"
        assert json.loads(made.arguments) == {"city": "Paris", "unit": "celsius"}
        ask += [made.model_dump(exclude_none=True, exclude={"parsed_arguments"}),
                {"type": "function_call_output", "call_id": made.call_id, "output": '{"temp": 18, "sky": "clear"}'}]  # fmt: skip
        second = client.responses.create(model="demo", input=ask, tools=tools[:1])
        assert second.output_text == "It is 18 degrees in Paris, and the sky is clear."
        parsed = client.responses.parse(model="demo", input="Give me a person as JSON.", text_format=Person)
        assert parsed.output_parsed == Person(name="Ada Lovelace", age=36)
        with client.responses.stream(model="demo", input="Hello!") as plain:
            assert plain.get_final_response().output_text == GREETING
        forced: Any = client.responses.create(
            model="demo", input="Hello!", tools=tools,
            tool_choice={"type": "function", "name": "mcp__look"}, max_output_tokens=200,
        )  # fmt: skip
        assert (forced.output[0].type, forced.output[0].name, forced.output[0].namespace) == (
            "function_call", "look", "mcp",
        )  # fmt: skip


@pytest.mark.covers("O98")
def test_fields_of_hosted_services_are_taken(fleet: RouterProcess) -> None:
    reply = _respond(fleet, include=["reasoning.encrypted_content"], store=False, prompt_cache_key="k",
                     client_metadata={"a": "b"}, input="What is 17 + 25?")  # fmt: skip
    assert (reply.status, reply.headers["x-ignored-fields"]) == (200, "prompt_cache_key,client_metadata")
    thought, said = reply.json()["output"]
    back = _respond(fleet, input=[{"role": "user", "content": "What is 17 + 25?"}, thought, said,
                                  {"role": "user", "content": "Hello!"}], store=False)  # fmt: skip
    assert back.status == 200


@pytest.mark.covers("O99")
def test_a_conversation_goes_on_from_what_is_kept(fleet: RouterProcess) -> None:
    first = _respond(fleet, input="My name is Ada.").json()
    second = _respond(fleet, input="What is my name?", previous_response_id=first["id"]).json()
    assert second["output"][0]["content"][0]["text"] == "Your name is Ada."
    assert second["previous_response_id"] == first["id"]
    frames = read_frames(_respond(fleet, input="Thank you!", previous_response_id=second["id"], stream=True).body)
    third = frames[-1].data["response"]
    assert third["output"][0]["content"][0]["text"] == "You are welcome, Ada."
    assert call(fleet, "GET", f"/v1/responses/{third['id']}").json() == third
    items = call(fleet, "GET", f"/v1/responses/{first['id']}/input_items").json()
    assert items["data"][0]["content"] == [{"type": "input_text", "text": "My name is Ada."}]
    unkept = _respond(fleet, store=False).json()
    gone = call(fleet, "DELETE", f"/v1/responses/{first['id']}").json()
    assert gone["deleted"] is True
    for missing in ("resp_nope", unkept["id"], first["id"]):
        refused = _respond(fleet, previous_response_id=missing)
        error = refused.json()["error"]
        assert (refused.status, error["param"], error["code"]) == (
            400, "previous_response_id", "previous_response_not_found",
        )  # fmt: skip
        assert call(fleet, "GET", f"/v1/responses/{missing}").status == 404
    assert _respond(fleet, input="What is my name?", previous_response_id=second["id"]).status == 200, "kept whole"


@pytest.mark.covers("O100")
@pytest.mark.parametrize("stream", [False, True])
def test_a_response_that_is_cut_is_incomplete(fleet: RouterProcess, stream: bool) -> None:
    reply = _respond(fleet, max_output_tokens=1, stream=stream)
    frames = read_frames(reply.body) if stream else []
    answer = frames[-1].data["response"] if stream else reply.json()
    assert (answer["status"], answer["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    assert not stream or frames[-1].event == "response.incomplete"


def test_the_tokens_of_a_response_are_counted_without_it(fleet: RouterProcess) -> None:
    counted = call(fleet, "POST", "/v1/responses/input_tokens", {"model": "demo", "input": "Hello!"}).json()
    assert counted == {
        "object": "response.input_tokens",
        "input_tokens": _respond(fleet).json()["usage"]["input_tokens"],
    }


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"input": None}, "input"), ({"input": []}, "input"), ({"input": [{"type": "nonsense"}]}, "input[0]"),
        ({"input": [{"role": "king", "content": "x"}]}, "input[0].role"), ({"background": True}, "background"),
        ({"conversation": "c"}, "conversation"), ({"truncation": "sometimes"}, "truncation"),
        ({"input": [{"role": "user", "content": [{"type": "input_file", "file_id": "f"}]}]}, "input[0].content[0]"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0]"), ({"top_logprobs": 21}, "top_logprobs"),
        ({"text": {"format": {"type": "json_schema", "schema": {"not": {}}}}}, "text.format"),
        ({"tool_choice": "required"}, "tool_choice"),
    ],
)  # fmt: skip
def test_bad_responses_are_refused(fleet: RouterProcess, body: Any, param: str) -> None:
    reply = _respond(fleet, **body)
    assert (reply.status, reply.json()["error"]["param"]) == (400, param)


# ---------------------------------------------------------------------------------------- models and transport


@pytest.mark.covers("O10", "O14", "T138", "T139", "T140")
def test_models_in_openais_shape(fleet: RouterProcess) -> None:
    listing = call(fleet, "GET", "/v1/models").json()
    assert listing["object"] == "list"
    assert {entry["id"] for entry in listing["data"]} >= {"demo:latest", "embedder:latest", "plain:latest"}
    assert all(isinstance(entry["created"], int) and entry["owned_by"] == "library" for entry in listing["data"])
    missing = call(fleet, "GET", "/v1/models/nosuch")
    assert (missing.status, missing.json()["error"]["type"]) == (404, "not_found_error")
    with openai.OpenAI(base_url=f"{fleet.url}/v1", api_key="x", max_retries=0) as client:
        assert len(list(client.models.list())) == len(listing["data"])
        assert client.models.retrieve("library/demo").id == "library/demo"


@pytest.mark.covers("O16", "O19")
def test_heads_and_ids(fleet: RouterProcess) -> None:
    head = call(fleet, "HEAD", "/v1/models")
    assert (head.status, head.body) == (200, b"")
    ids = [call(fleet, "GET", "/v1/models").headers[name] for name in ("x-request-id", "request-id") for _ in range(2)]
    assert len(set(ids)) == 4


@pytest.mark.covers("O17")
@pytest.mark.parametrize(("path", "kind"), [("/v1/chat/completions", "invalid_request_error"),
                                            ("/v1/messages", "request_too_large"), ("/v1/responses", "invalid_request_error")])  # fmt: skip
def test_a_body_that_is_too_long(fleet: RouterProcess, path: str, kind: str) -> None:
    reply = call(fleet, "POST", path, b'{"model":"' + b"a" * (33 * 2**20))
    assert (reply.status, reply.json()["error"]["type"]) == (413, kind)
