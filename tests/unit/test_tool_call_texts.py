"""Calls of tools as models write them: the same from any split of the text, streamed and whole."""

from __future__ import annotations

import json
from functools import partial
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlx_lm.generate import TextStateMachine
from mlx_lm.tool_parsers import glm47, mistral, qwen3_coder

from mlx_router_shared.generation import TextDelta, ToolCallArguments, ToolCallDone, ToolCallStarted
from mlx_router_worker.text.answer import AnswerBuilder
from mlx_router_worker.text.json_calls import repairing, with_objects

_TOOL = {"type": "function", "function": {"name": "f", "parameters": {
    "type": "object", "properties": {"text": {"type": "string"}}}}}  # fmt: skip
_F = '{"name": "f", "arguments": '
_BODIES: dict[str, tuple[str, list[tuple[str, Any]]]] = {
    "zeros in front": (_F + '{"n": 007}}', [("f", {"n": 7})]),
    "plus": (_F + '{"n": +5, "m": [+1.5]}}', [("f", {"n": 5, "m": [1.5]})]),
    "bare point": (_F + '{"n": .5, "m": 5., "k": -.25e1}}', [("f", {"n": 0.5, "m": 5.0, "k": -2.5})]),
    "plain numbers": (_F + '{"n": -0.5, "m": 1e5, "k": 0, "j": 12}}', [("f", {"n": -0.5, "m": 1e5, "k": 0, "j": 12})]),
    "words": (_F + '{"a": True, "b": None, "c": -Infinity}}', [("f", {"a": True, "b": None, "c": None})]),
    "single quotes": ("{'name': 'f', 'arguments': {'a': 'a \"x\"', 'b': 'it\\'s'}}",
                      [("f", {"a": 'a "x"', "b": "it's"})]),
    "an apostrophe": (_F + '{"a": "it\\\'s it\'s"}}', [("f", {"a": "it's it's"})]),
    "too large": (_F + '{"n": 1e999, "m": -1.5e400}}', [("f", {"n": None, "m": None})]),
    "members behind": (_F + '{"n": 1}, "id": "c", "type": "function", "x": {"y": []}}', [("f", {"n": 1})]),
    "members behind, in a list": ("[" + _F + '{"n": 1}, "id": "c"}, ' + _F + '{"n": 2}, "id": "d"}]',
                                  [("f", {"n": 1}), ("f", {"n": 2})]),
    "no end of the first": (_F + '{"n": 1}\n' + _F + '{"n": 2}}', [("f", {"n": 1}), ("f", {"n": 2})]),
    "two calls": (_F + '{"n": 1}}\n' + _F + '{"n": 2}}', [("f", {"n": 1}), ("f", {"n": 2})]),
    "a list": ("[" + _F + '{"n": 1}}, ' + _F + '{"n": 2}}]', [("f", {"n": 1}), ("f", {"n": 2})]),
    "the second the other way round": (_F + '{"n": 1}} {"arguments": {"n": {"m": 2}}, "name": "g"}',
                                       [("f", {"n": 1}), ("g", {"n": {"m": 2}})]),
    "the first the other way round": ('{"arguments": {"n": 2}, "name": "g"} ' + _F + '{"n": 1}}',
                                      [("g", {"n": 2}), ("f", {"n": 1})]),
    "arguments as text": (_F + '"{\\"n\\": 1}"} ' + _F + '{"n": 2}}', [("f", {"n": 1}), ("f", {"n": 2})]),
    "other members": ('{"id": "c", "name": "f", "arguments": {"n": 1}}', [("f", {"n": 1})]),
    "in a list the other way round": ('[{"arguments": {"n": 2}, "name": "g"}, ' + _F + '{"n": 1}}]',
                                      [("g", {"n": 2}), ("f", {"n": 1})]),
}  # fmt: skip


def _read(body: str, sizes: list[int], *, incremental: bool) -> tuple[list[tuple[str, Any]], str]:
    builder = AnswerBuilder(stops=[], parse_tool=json.loads, tool_markers=("<t>", "</t>"), json_calls=True,
                            incremental=incremental)  # fmt: skip
    events, at = [], 0
    while at < len(body):
        size = sizes[at % len(sizes)]
        events += builder.feed([("tool", body[at : at + size])])
        at += size
    events += builder.feed([("normal", "")]) + builder.finish(cut=False)
    if incremental:
        begun = [event.name for event in events if isinstance(event, ToolCallStarted)]
        texts = [""] * len(begun)
        for event in events:
            if isinstance(event, ToolCallArguments):
                texts[event.index] += event.text
        calls = [(name, json.loads(text)) for name, text in zip(begun, texts, strict=True)]
    else:
        calls = [(event.name, json.loads(event.arguments)) for event in events if isinstance(event, ToolCallDone)]
    return calls, "".join(event.text for event in events if isinstance(event, TextDelta))


@pytest.mark.parametrize(("body", "calls"), _BODIES.values(), ids=_BODIES)
@pytest.mark.parametrize("incremental", [False, True])
def test_what_models_write_is_read(body: str, calls: list[tuple[str, Any]], incremental: bool) -> None:
    for sizes in ([1], [len(body)], [2, 3, 5]):
        assert _read(body, sizes, incremental=incremental) == (calls, "")


@given(st.sampled_from(list(_BODIES.values())), st.lists(st.integers(1, 9), min_size=1, max_size=5), st.booleans())
def test_it_is_the_same_however_the_text_is_split(
    case: tuple[str, list[tuple[str, Any]]], sizes: list[int], incremental: bool
) -> None:
    assert _read(case[0], sizes, incremental=incremental) == (case[1], "")


@pytest.mark.parametrize("incremental", [False, True])
def test_what_is_no_call_beside_one_is_shown(incremental: bool) -> None:
    calls, text = _read(_F + '{"n": 1}} {"nothing": 5} ' + _F + '{"n": 2}}', [3], incremental=incremental)
    assert calls == [("f", {"n": 1}), ("f", {"n": 2})]
    assert '"nothing": 5' in text


_MISTRAL = {
    "header": 'f[ARGS]{"text": "a\nb \\d", "n": 1,}',
    "list": '[{"name": "f", "arguments": {"text": "a\nb \\d", "n": 1}}]}',
}


@pytest.mark.parametrize("body", _MISTRAL.values(), ids=_MISTRAL)
def test_json_in_the_calls_of_another_family_is_repaired(body: str) -> None:
    builder = AnswerBuilder(stops=[], parse_tool=repairing(lambda text: mistral.parse_tool_call(text, [])))
    events = builder.feed([("tool", body), ("normal", "")])
    (done,) = [event for event in events if isinstance(event, ToolCallDone)]
    assert (done.name, json.loads(done.arguments)) == ("f", {"text": "a\nb \\d", "n": 1})


_MACHINE = TextStateMachine({"normal": [("<tool_call>", "tool")], "tool": [("</tool_call>", "normal")]})
_FORMS: dict[str, tuple[Any, str]] = {
    "json": (json.loads, '{{"name": "f", "arguments": {{"text": "{}"}}}}'),
    "glm": (partial(glm47.parse_tool_call, tools=[_TOOL]), "f<arg_key>text</arg_key><arg_value>{}</arg_value>"),
    "qwen3-coder": (
        partial(qwen3_coder.parse_tool_call, tools=[_TOOL]),
        "\n<function=f>\n<parameter=text>\n{}\n</parameter>\n</function>\n",
    ),
}


def _split(parse: Any, text: str, size: int, *, incremental: bool = False, cut: bool = False) -> tuple[list[Any], str]:
    """The calls and the text of an answer that mlx-lm splits into kinds."""
    builder = AnswerBuilder(stops=[], parse_tool=parse, tool_markers=("<tool_call>", "</tool_call>"),
                            json_calls=parse is json.loads, incremental=incremental)  # fmt: skip
    state, events = _MACHINE.make_state("normal"), []
    for at in range(0, len(text), size):
        state, pieces = _MACHINE.split(state, text[at : at + size])
        events += builder.feed(pieces)
    state, rest, kind = _MACHINE.flush(state)
    events += builder.feed([(kind, rest)]) + builder.finish(cut=cut)
    calls = [(event.name, json.loads(event.arguments)) for event in events if isinstance(event, ToolCallDone)]
    return calls, "".join(event.text for event in events if isinstance(event, TextDelta))


@pytest.mark.parametrize("form", _FORMS)
@pytest.mark.parametrize("size", [1, 3, 7, 1000])
@pytest.mark.parametrize(
    "value",
    ["use </tool_call> now", "</tool_call>", "x </tool_call> y <tool_call> z", "x <tool_call>5</tool_call> y",
     "a </tool_call> b </tool_call> c", "the tag <arg_value> and <parameter=x>", "it's"],
)  # fmt: skip
def test_markers_inside_an_argument_are_part_of_it(form: str, size: int, value: str) -> None:
    parse, written = _FORMS[form]
    call = f"<tool_call>{written.format(value)}</tool_call>"
    assert _split(parse, call + call + " done", size) == ([("f", {"text": value})] * 2, "done")


def test_a_value_that_is_never_closed_ends_with_its_call() -> None:
    parse = _FORMS["qwen3-coder"][0]
    body = "<tool_call><function=f>\n<parameter=text>\nabc\n</function>\n</tool_call> done"
    assert _split(parse, body, 5) == ([("f", {})], "done")
    body = "<tool_call>f<arg_key>text</arg_key><arg_value>abc</tool_call> done"
    assert _split(_FORMS["glm"][0], body, 5)[1] == "done"


@pytest.mark.parametrize("size", [1, 4, 1000])
def test_an_apostrophe_in_plain_text_opens_no_string(size: int) -> None:
    text = "<tool_call>I don't know</tool_call>Hello there, answer"
    assert _split(json.loads, text, size) == ([], text)
    call = f'<tool_call>{_F}{{"n": 1}}}} it\'s done</tool_call> and more'
    calls, shown = _split(json.loads, call, size)
    assert (calls, shown.split()) == ([("f", {"n": 1})], ["it's", "doneand", "more"]), (
        "white space at a call is dropped"
    )


@pytest.mark.parametrize("rest", [' {"name": "f", "argu', ' {"name": "f", "arguments": {"n": 22', " {"])
def test_of_a_call_that_a_limit_cuts_nothing_is_shown(rest: str) -> None:
    text = f'<tool_call>{_F}{{"n": 1}}}}{rest}'
    for incremental in (False, True):
        assert _split(json.loads, text, 3, incremental=incremental, cut=True) == ([("f", {"n": 1})], "")


@pytest.mark.parametrize("depth", [400, 2000, 50_000])
def test_brackets_of_any_depth_raise_nothing(depth: int) -> None:
    deep = "[" * depth + "]" * depth
    for body in (f'{{"arguments": {{"a": {deep}}}, "name": "f"}}', f'{_F}{{"a": {deep}}}}}', f'{{"a": {deep}}}'):
        for incremental in (False, True):
            _split(json.loads, f"<tool_call>{body}</tool_call>", 10_000, incremental=incremental)


def test_a_long_number_takes_no_time() -> None:
    body = f'{_F}{{"n": {"0" * 50_000}x}}}}'
    assert _split(json.loads, f"<tool_call>{body}</tool_call>", 1000)[0] == []


def test_objects_that_a_family_writes_as_text_are_objects() -> None:
    schema = {"type": "object", "properties": {"todo": {"type": "array"}, "text": {"type": "string"}}}
    tools = [{"type": "function", "function": {"name": "f", "parameters": schema}}]
    written = {"todo": '[{"a": "x\ny"}]', "text": "[1]"}
    body = "f" + "".join(f"<arg_key>{k}</arg_key><arg_value>{v}</arg_value>" for k, v in written.items())
    parsed = glm47.parse_tool_call(body, tools)
    assert with_objects(parsed, tools) == {"name": "f", "arguments": {"todo": [{"a": "x\ny"}], "text": "[1]"}}
    assert with_objects("no call", tools) == "no call"
