"""What a worker makes of a model's text, and of a conversation."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_router_shared.generation import Event, Message, ReasoningDelta, Role, TextDelta, Tool, ToolCall, ToolCallDone
from mlx_router_worker.text.answer import AnswerBuilder
from mlx_router_worker.text.conversation import merge_system, merge_turns
from mlx_router_worker.text.prompt import droppable, template_messages, template_tools, without
from mlx_router_worker.text.stop_strings import StopStrings


@given(st.text("abX", max_size=30), st.lists(st.text("abX", min_size=1, max_size=4), max_size=3), st.data())
def test_stop_strings_cut_the_same_however_the_text_is_split(text: str, stops: list[str], data: st.DataObject) -> None:
    places = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    expected = text[: min(places)[1]] if places else text
    matcher = StopStrings(stops)
    shown, met, at = "", None, 0
    while at < len(text) and met is None:
        size = data.draw(st.integers(1, 4))
        piece, met = matcher.feed(text[at : at + size])
        shown += piece
        at += size
        assert expected.startswith(shown), "text was shown that had to be held back"
    if met is None:
        shown += matcher.flush()
    assert shown == expected
    assert (met is not None) == bool(places)


def _join(events: list[Event]) -> tuple[str, str, list[tuple[str, str]]]:
    text = "".join(event.text for event in events if isinstance(event, TextDelta))
    thought = "".join(event.text for event in events if isinstance(event, ReasoningDelta))
    return text, thought, [(event.name, event.arguments) for event in events if isinstance(event, ToolCallDone)]


def _play(builder: AnswerBuilder, *batches: list[tuple[str, str]], cut: bool = False) -> Any:
    events: list[Event] = []
    for batch in batches:
        events += builder.feed(batch)
    events += builder.finish(cut=cut)
    return _join(events)


def test_thinking_is_apart_and_its_edges_are_bare() -> None:
    builder = AnswerBuilder(stops=[])
    played = _play(
        builder,
        [("reasoning", "\nA sum")],
        [("reasoning", ".\n")],
        [("reasoning", ""), ("normal", "\n\n4")],
        [("normal", "2\n")],
    )
    assert played == ("42\n", "A sum.", [])


def test_stop_strings_leave_thinking_alone() -> None:
    builder = AnswerBuilder(stops=["."])
    assert _play(builder, [("reasoning", "a.b")], [("normal", "c.d")]) == ("c", "a.b", [])
    assert builder.stop_string == "."


def test_calls_are_parsed_whole_and_the_blanks_around_them_dropped() -> None:
    builder = AnswerBuilder(stops=[], parse_tool=json.loads, make_id=lambda: "call_1")
    text, _, calls = _play(
        builder,
        [("normal", "Both.\n")],
        [("tool", '\n{"name": "f", "argu'), ("tool", 'ments": {"é": 1}}\n')],
        [("normal", "\n"), ("tool", '{"name": "g", "arguments": "{}"}')],
        [("normal", "")],
    )
    assert (text, calls) == ("Both.", [("f", '{"é": 1}'), ("g", "{}")])
    assert builder.finish_reason == "tool_calls"


@pytest.mark.parametrize("body", ["not json", "[1]", '{"name": 5}', '{"name": "f", "arguments": [1]}'])
def test_what_is_no_call_is_shown_as_it_was_written(body: str) -> None:
    builder = AnswerBuilder(stops=[], parse_tool=json.loads, tool_markers=("<t>", "</t>"))
    assert _play(builder, [("normal", "x ")], [("tool", body)], [("normal", " y")]) == (f"x <t>{body}</t> y", "", [])
    assert builder.finish_reason == "stop"


def test_a_call_that_was_cut_off_is_text() -> None:
    builder = AnswerBuilder(stops=[], parse_tool=json.loads, tool_markers=("<t>", "</t>"))
    assert _play(builder, [("tool", '{"name": "f", "arg')], cut=True) == ('<t>{"name": "f", "arg', "", [])


def test_without_tools_nothing_is_held_back_or_parsed() -> None:
    builder = AnswerBuilder(stops=[], tool_markers=("<t>", "</t>"))
    assert builder.feed([("normal", "a ")]) == [TextDelta(text="a ")]
    assert _play(builder, [("tool", "{}"), ("normal", "")])[0] == "<t>{}</t>"


def _message(role: str, content: str = "", **more: Any) -> Message:
    return Message(role=Role(role), content=content, **more)


def test_a_tool_result_gets_the_name_of_the_call_it_answers() -> None:
    calls = [ToolCall(id="1", name="f"), ToolCall(id="2", name="g", arguments='{"x": 1}')]
    messages = [
        _message("assistant", tool_calls=calls),
        _message("tool", "r2", tool_call_id="2"),
        _message("tool", "r1"),
    ]
    out = template_messages(messages)
    assert [entry.get("name") for entry in out] == [None, "g", "f"]
    assert out[0]["tool_calls"][1]["function"]["arguments"] == {"x": 1}


def test_arguments_that_are_no_json_are_passed_on_as_text() -> None:
    (entry,) = template_messages([_message("assistant", tool_calls=[ToolCall(name="f", arguments="{oops")])])
    assert entry["tool_calls"][0]["function"]["arguments"] == "{oops"


def test_tools_get_openais_shape() -> None:
    (tool,) = template_tools([Tool(name="f", description="d", parameters='{"b": 1, "a": 2}')])
    assert list(tool["function"]["parameters"]) == ["b", "a"]


def test_merging_puts_all_system_text_in_front() -> None:
    messages = [_message("user", "1"), _message("system", "a"), _message("user", "2"), _message("system", "b")]
    merged = merge_turns(merge_system(messages))
    assert [(m.role.value, m.content) for m in merged] == [("system", "a\n\nb"), ("user", "1\n\n2")]


def test_the_oldest_turn_goes_first_and_the_last_never() -> None:
    messages = [
        _message("system", "s"),
        _message("assistant", tool_calls=[ToolCall(name="f")]),
        _message("tool", "r"),
        _message("user", "last"),
    ]
    assert droppable(messages) == [[1, 2]], "a call with its result"
    shorter = without(messages, [[1, 2]])
    assert [m.content for m in shorter] == ["s", "last"]
    assert droppable(shorter) == []
    assert without(messages, []) == messages


def test_an_exchange_is_left_out_whole_and_its_system_turns_are_kept() -> None:
    messages = [_message(*turn) for turn in (("user", "1"), ("system", "s"), ("assistant", "2"), ("user", "3"))]
    parts = droppable(messages)
    left = [[m.content for m in without(messages, parts[:count])] for count in range(len(parts) + 1)]
    assert left == [["1", "s", "2", "3"], ["s", "3"]]


def test_of_the_last_exchange_calls_go_with_their_results() -> None:
    call = [ToolCall(id="i", name="f")]
    messages = [_message("user", "task"), *([_message("assistant", tool_calls=call), _message("tool", "r")] * 3)]
    assert droppable(messages) == [[1, 2], [3, 4]], "the model has to answer to the last result"


def test_a_run_of_user_turns_is_dropped_one_by_one_up_to_the_last() -> None:
    """As a conversation has them whose answers were stopped before they began."""
    user, answer, system = _message("user", "u"), _message("assistant", "a"), _message("system", "s")
    assert droppable([user, user, user]) == [[0], [1]]
    assert droppable([system, user, answer, user, system, user]) == [[1, 2], [3]]
    assert droppable([user]) == []
    assert droppable([answer, user, user]) == [[0], [1]]
