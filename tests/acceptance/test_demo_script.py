"""The demo model's whole script, with real weights, through the official clients over real sockets."""

from __future__ import annotations

import json
import re
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import ollama
import openai
import pytest

from mlx_router_server.cli.client import ApiError
from tests.support.router import RouterProcess
from tests.tiny_models.script import FALLBACK, GREETING, LONG_STORY, WEATHER_TOOL, Conversation, conversations

_CALL = re.compile(r"\n?<tool_call>\n(.*?)\n</tool_call>", re.DOTALL)


def expected(case: Conversation) -> tuple[str, str, list[dict[str, Any]]]:
    """Content, thinking and calls of a scripted answer."""
    thought, _, rest = case.answer.rpartition("</think>")
    calls = [json.loads(body) for body in _CALL.findall(rest)]
    return _CALL.sub("", rest).strip() if thought or calls else rest, thought.removeprefix("<think>").strip(), calls


@pytest.fixture(scope="module")
def ollama_client(demo_router: RouterProcess) -> Any:
    client = ollama.Client(host=demo_router.url, timeout=30)
    yield client
    client._client.close()  # it has no close of its own


@pytest.fixture(scope="module")
def openai_client(demo_router: RouterProcess) -> Any:
    with openai.OpenAI(base_url=demo_router.url + "/v1", api_key="x", timeout=30, max_retries=0) as client:
        yield client


def _ollama_messages(case: Conversation) -> list[dict[str, Any]]:
    return [
        {**{k: v for k, v in m.items() if k != "name"}, **({"tool_name": m["name"]} if "name" in m else {})}
        for m in case.messages
    ]


def _openai_messages(case: Conversation) -> list[dict[str, Any]]:
    """Arguments as text, and the result by the id of its call."""
    messages = json.loads(json.dumps(case.messages))
    for message in messages:
        for call in message.get("tool_calls", []):
            call["function"]["arguments"] = json.dumps(call["function"]["arguments"])
        if message["role"] == "tool":
            del message["name"]
            message["tool_call_id"] = "call_1"
    return messages  # type: ignore[no-any-return]  # what json gives back is Any


@pytest.mark.covers("T172")
@pytest.mark.req("R41")
def test_the_whole_script_through_the_ollama_client_at_once(ollama_client: Any) -> None:
    """Every answer word for word while all of them are generated in one batch."""

    def ask(case: Conversation) -> tuple[str, str, list[dict[str, Any]]]:
        answer = ollama_client.chat(
            "demo", messages=_ollama_messages(case), tools=case.tools or None, think=case.thinking
        ).message
        calls = [{"name": c.function.name, "arguments": c.function.arguments} for c in answer.tool_calls or []]
        return answer.content, answer.thinking or "", calls

    cases = conversations()
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(ask, cases))
    for case, answer in zip(cases, answers, strict=True):
        assert answer == expected(case), case.name


@pytest.mark.req("R41")
def test_the_whole_script_through_the_openai_client_as_streams(openai_client: Any) -> None:
    def ask(case: Conversation) -> tuple[str, str, list[dict[str, Any]]]:
        text = thought = ""
        calls: list[dict[str, Any]] = []
        more = {"tools": case.tools} if case.tools else {}
        for chunk in openai_client.chat.completions.create(
            model="demo", messages=_openai_messages(case), stream=True,
            extra_body={"chat_template_kwargs": {"enable_thinking": case.thinking}}, **more,
        ):  # fmt: skip
            delta = chunk.choices[0].delta
            text += delta.content or ""
            thought += getattr(delta, "reasoning_content", None) or ""
            for call in delta.tool_calls or []:
                if call.index == len(calls):
                    calls.append({"name": call.function.name, "arguments": ""})
                calls[call.index]["arguments"] += call.function.arguments
        return text, thought, [{**call, "arguments": json.loads(call["arguments"])} for call in calls]

    cases = conversations()
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(ask, cases))
    for case, answer in zip(cases, answers, strict=True):
        assert answer == expected(case), case.name


def test_the_long_answer_comes_token_by_token(ollama_client: Any) -> None:
    parts = [part.response for part in ollama_client.generate("demo", "Tell me a long story.", stream=True)]
    assert "".join(parts) == LONG_STORY
    assert len(parts) > 250
    assert max(map(len, parts)) < 40


def test_strangers_get_the_fallback(ollama_client: Any) -> None:
    assert ollama_client.generate("demo", "xyzzy").response == FALLBACK


def test_a_tool_round_trip_with_the_openai_client(openai_client: Any) -> None:
    messages: list[Any] = [{"role": "user", "content": "What is the weather in Paris?"}]
    first = openai_client.chat.completions.create(model="demo", messages=messages, tools=[WEATHER_TOOL])
    assert first.choices[0].finish_reason == "tool_calls"
    (call,) = first.choices[0].message.tool_calls
    assert json.loads(call.function.arguments) == {"city": "Paris", "unit": "celsius"}
    messages += [
        first.choices[0].message,
        {
            "role": "tool",
            "tool_call_id": call.id,
            "content": [{"type": "text", "text": '{"temp": 18, "sky": "clear"}'}],
        },
    ]
    second = openai_client.chat.completions.create(model="demo", messages=messages, tools=[WEATHER_TOOL])
    assert second.choices[0].message.content == "It is 18 degrees in Paris, and the sky is clear."


def test_the_openai_stream_helper_puts_an_answer_together(openai_client: Any) -> None:
    with openai_client.chat.completions.stream(
        model="demo", messages=[{"role": "user", "content": "hi"}], stream_options={"include_usage": True}
    ) as stream:
        whole = stream.get_final_completion()
    assert whole.choices[0].message.content == GREETING
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens


def test_sampling_with_a_seed_repeats_itself(ollama_client: Any) -> None:
    options = {"temperature": 3.0, "seed": 7, "num_predict": 40, "top_k": 0, "top_p": 1.0}
    first = ollama_client.generate("demo", "hi", options=options).response
    assert ollama_client.generate("demo", "hi", options=options).response == first
    with ThreadPoolExecutor(4) as pool:
        seeds = range(20, 24)
        answers = pool.map(lambda seed: ollama_client.generate("demo", "hi", options={**options, "seed": seed}), seeds)
        others = [answer.response for answer in answers]
    assert len({first, *others}) == 5


def test_logit_bias_and_penalties_have_an_effect(openai_client: Any) -> None:
    question: Any = [{"role": "user", "content": "hi"}]
    plain = openai_client.chat.completions.create(model="demo", messages=question, logprobs=True, top_logprobs=2)
    tokens = plain.choices[0].logprobs.content
    assert b"".join(bytes(token.bytes) for token in tokens).decode() == GREETING
    assert len(tokens) == plain.usage.completion_tokens
    assert all(token.logprob <= 0 and len(token.top_logprobs) == 2 for token in tokens)
    biased = openai_client.chat.completions.create(
        model="demo", messages=question, logit_bias={"400": 100}, max_tokens=5
    )
    assert biased.choices[0].message.content != GREETING[: len(biased.choices[0].message.content)]
    penalised = openai_client.chat.completions.create(model="demo", messages=question, presence_penalty=2)
    assert penalised.choices[0].finish_reason == "stop"


@pytest.mark.parametrize("stop", [" demo", "emo mod", "Hello! I am the demo model of mlx-router. How can I help?"])
def test_stop_strings_cut_also_inside_tokens(openai_client: Any, stop: str) -> None:
    answer = openai_client.chat.completions.create(
        model="demo", messages=[{"role": "user", "content": "hi"}], stop=stop
    )
    assert answer.choices[0].message.content == GREETING[: GREETING.index(stop)]
    assert answer.choices[0].finish_reason == "stop"


def test_text_completion_continues_the_prompt(openai_client: Any) -> None:
    prompt = f"<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n{GREETING[:20]}"
    answer = openai_client.completions.create(model="demo", prompt=prompt, max_tokens=50)
    assert answer.choices[0].text == GREETING[20:]
    parts = list(openai_client.completions.create(model="demo", prompt=prompt, max_tokens=3, stream=True,
                                                  stream_options={"include_usage": True}))  # fmt: skip
    assert parts[-2].choices[0].finish_reason == "length"
    assert parts[-1].usage.completion_tokens == 3


def test_a_long_conversation_is_truncated_and_says_so(demo_router: RouterProcess) -> None:
    """T088, T095: the oldest turns go, the answer tells how many, and without leave it is refused."""
    turns = [{"role": "user", "content": "My name is Ada."}, {"role": "assistant", "content": "Nice to meet you, Ada."}]
    messages = [*(turns * 8), {"role": "user", "content": "Hello!"}]
    body = {"model": "demo", "messages": messages, "options": {"num_ctx": 30}, "stream": False}
    answer = demo_router.client.post("/api/chat", body)
    assert answer["prompt_eval_count"] < 30
    assert answer["truncated_messages"] >= 14
    with pytest.raises(ApiError, match=r"exceeds the model's maximum context length \(30 tokens\)"):
        demo_router.client.post("/api/chat", {**body, "truncate": False})
