"""The smaller pure rooms of a worker: calls while they are written, bytes of tokens, pooling, filling in."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_router_shared.generation import Failure, TextDelta, ToolCallArguments, ToolCallDone, ToolCallStarted
from mlx_router_shared.infill import infill_format
from mlx_router_worker.text.answer import AnswerBuilder
from mlx_router_worker.text.json_calls import JsonCallReader, read_json
from mlx_router_worker.text.pooling import Pooling, batches, finished, read_pooling
from mlx_router_worker.text.token_bytes import token_bytes

_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


def _read(text: str, sizes: list[int]) -> list[tuple[str, str]]:
    """Name and arguments of each call, put together from its pieces."""
    reader, calls, at, number = JsonCallReader(), list[list[str]](), 0, 0
    while at < len(text):
        size = sizes[number % len(sizes)]
        pieces, rest = reader.feed(text[at : at + size])
        for piece in pieces:
            if piece.begins:
                calls.append([piece.name, ""])
            calls[-1][1] += piece.more
            assert calls[-1][1] == piece.arguments
        if rest or reader.is_balanced:
            reader = reader if not rest else JsonCallReader()
        at, number = at + size, number + 1
    return [(name, arguments) for name, arguments in calls]


@given(st.dictionaries(st.text(max_size=5), _JSON, max_size=4), st.text(min_size=1, max_size=8), st.data())
def test_a_call_is_told_the_same_however_it_is_cut(
    arguments: dict[str, object], name: str, data: st.DataObject
) -> None:
    text = json.dumps({"name": name, "arguments": arguments}, ensure_ascii=data.draw(st.booleans()), indent=data.draw(
        st.sampled_from([None, 2])))  # fmt: skip
    sizes = data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=5))
    assert _read(text, sizes) == _read(text, [len(text)])
    ((read_name, read_arguments),) = _read(text, sizes)
    assert (read_name, json.loads(read_arguments)) == (name, arguments)


_NEARLY: list[tuple[str, object]] = [
    ('{"a": "one\ntwo"}', {"a": "one\ntwo"}), ('{"a": "tab\there"}', {"a": "tab\there"}),
    (r'{"a": "\d+"}', {"a": r"\d+"}), (r'{"a": "C:\dir\new"}', {"a": "C:\\dir\new"}), (r'{"a": "\u12"}', {"a": r"\u12"}),
    (r'{"a": "\u00e9"}', {"a": "é"}), ('{"a": [1, 2,], }', {"a": [1, 2]}), ('{"a": True, "b": None}', {"a": True, "b": None}),
    ('{"a": "x"}}', {"a": "x"}), ('{"a": "\x01"}', {"a": "\x01"}), (r'{"a": "it\'s"}', {"a": "it's"}),
    ('{"a": "</tool_call>"}', {"a": "</tool_call>"}), ('{"a": "}{"}', {"a": "}{"}), ("{}", {}),
]  # fmt: skip


@pytest.mark.parametrize(("written", "meant"), _NEARLY, ids=lambda value: str(value)[:30])
def test_what_models_really_write_is_read_streamed_and_whole(written: str, meant: object) -> None:
    text = f'{{"name": "f", "arguments": {written}}}'
    for sizes in ([1], [3], [len(text)]):
        ((name, arguments), *_) = _read(text, sizes)
        assert (name, json.loads(arguments)) == ("f", meant)
    assert read_json(text)["arguments"] == meant


@pytest.mark.parametrize("between", ["\n", ", ", "", "}\n"])
def test_several_calls_in_one_block(between: str) -> None:
    builder = AnswerBuilder(stops=[], parse_tool=json.loads, json_calls=True, make_id=lambda: "i")
    call = '{"name": "f", "arguments": {"a": 1}}'
    events = builder.feed([("tool", call + between + call), ("normal", "")])
    assert [event.index for event in events if isinstance(event, ToolCallDone)] == [0, 1]


@pytest.mark.parametrize("incremental", [True, False])
@pytest.mark.parametrize("size", [1, 7, 1000])
def test_an_end_marker_inside_an_argument_is_part_of_it(incremental: bool, size: int) -> None:
    """As the state machine cuts it: the first marker ends the call for it, and the second is plain text."""
    builder = AnswerBuilder(stops=[], parse_tool=json.loads, json_calls=True, incremental=incremental,
                            tool_markers=("<tool_call>", "</tool_call>"), make_id=lambda: "i")  # fmt: skip
    rest = ' tag"}}\n</tool_call> and more'
    pieces = [("tool", '{"name": "f", "arguments": {"text": "use '), ("normal", "")]
    pieces += [("normal", rest[at : at + size]) for at in range(0, len(rest), size)]
    events = [event for piece in pieces for event in builder.feed([piece])] + builder.finish(cut=False)
    (done,) = [event for event in events if isinstance(event, ToolCallDone)]
    assert json.loads(done.arguments) == {"text": "use </tool_call> tag"}
    assert "".join(event.text for event in events if isinstance(event, TextDelta)).strip() == "and more"
    assert not builder.failed


@pytest.mark.parametrize(
    "text", ['{"arguments": {}, "title": "x"}', '{"name": 5}', "no call", '{"name": "x", "arguments": "y"}']
)
def test_what_is_no_call_is_never_begun(text: str) -> None:
    assert _read(text, [1]) == []


def _builder(**more: object) -> AnswerBuilder:
    return AnswerBuilder(stops=[], parse_tool=json.loads, make_id=lambda: "call_1", incremental=True, **more)  # type: ignore[arg-type]


def test_pieces_of_a_call_and_then_the_whole_are_told() -> None:
    builder = _builder()
    events = [
        e for piece in ('{"name": "f", "arg', 'uments": {"a"', ": 1}", "}") for e in builder.feed([("tool", piece)])
    ]
    assert builder.feed([("normal", "")]) == []
    assert events == [
        ToolCallStarted(index=0, id="call_1", name="f"), ToolCallArguments(index=0, text='{"a"'),
        ToolCallArguments(index=0, text=": 1}"), ToolCallDone(index=0, id="call_1", name="f", arguments='{"a": 1}'),
    ]  # fmt: skip


def test_a_told_call_that_turns_out_to_be_none_is_an_error_and_a_cut_one_is_told_by_the_reason() -> None:
    builder = _builder()
    failure = builder.feed([("tool", '{"name": "f", "arguments": {"a": nonsense}}')])[-1]
    assert isinstance(failure, Failure)
    assert builder.failed
    cut = _builder()
    cut.feed([("tool", '{"name": "f", "arguments": {"a": 1')])
    assert cut.finish(cut=True) == []


def test_a_forced_call_needs_no_marker_and_only_so_many_are_made() -> None:
    forced = AnswerBuilder(stops=["1"], parse_tool=json.loads, forced=True, make_id=lambda: "i")
    (done,) = forced.feed([("normal", ' {"name": "f", "arguments": {"a": 1}}')])
    assert done == ToolCallDone(index=0, id="i", name="f", arguments='{"a": 1}')
    assert forced.finish(cut=False) == []
    one = AnswerBuilder(stops=[], parse_tool=json.loads, max_calls=1)
    body = '{"name": "f", "arguments": {}}'
    events = one.feed([("tool", body), ("normal", ""), ("tool", body), ("normal", "more")])
    assert [type(event) for event in events] == [ToolCallDone]
    assert one.complete


def test_what_a_stop_string_holds_back_and_cuts_is_counted() -> None:
    builder = AnswerBuilder(stops=["END"])
    assert builder.feed([("normal", "some E")]) == [TextDelta(text="some ")]
    assert builder.held_characters == 1
    builder.feed([("normal", "ND and more")])
    assert (builder.stop_string, builder.cut_characters) == ("END", len("END and more"))


def test_bytes_of_tokens_in_both_kinds_of_vocabulary() -> None:
    assert token_bytes("Ġhello", byte_level=True) == b" hello"
    assert token_bytes("ðŁĺ", byte_level=True) == "😀".encode()[:3]
    assert token_bytes("<think>", byte_level=True) == b"<think>"
    assert token_bytes("▁hello", byte_level=False) == b" hello"
    assert token_bytes("<0xF0>", byte_level=False) == b"\xf0"


@given(st.lists(st.integers(1, 500), min_size=1, max_size=40), st.integers(1, 2000))
def test_batches_hold_the_oldest_and_keep_to_their_tokens(lengths: list[int], most: int) -> None:
    chosen = batches(lengths, most)
    assert 0 in chosen
    assert len(set(chosen)) == len(chosen)
    assert len(chosen) == 1 or max(lengths[at] for at in chosen) * len(chosen) <= most


def test_vectors_are_cut_and_get_unit_length() -> None:
    matrix = np.array([[3.0, 4.0, 12.0], [0.0, 0.0, 0.0]], np.float32)
    assert np.allclose(np.linalg.norm(finished(matrix, None, True), axis=1), [1, 0])
    assert np.allclose(finished(matrix, 2, False)[0], [0.6, 0.8])
    assert np.array_equal(finished(matrix, 3, False), matrix)


def test_pooling_is_read_from_the_models_own_files(tmp_path: Path) -> None:
    assert read_pooling(tmp_path) == Pooling("lasttoken", True)
    kinds = ["Transformer", "Pooling"]
    modules = [
        {"path": "1_Pooling" if k == "Pooling" else "", "type": f"sentence_transformers.models.{k}"} for k in kinds
    ]
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text(
        '{"pooling_mode_mean_tokens": true, "pooling_mode_cls_token": false}'
    )
    assert read_pooling(tmp_path) == Pooling("mean", False)
    (tmp_path / "1_Pooling" / "config.json").write_text('{"pooling_mode_weightedmean_tokens": true}')
    with pytest.raises(ValueError, match="weightedmean"):
        read_pooling(tmp_path)


def test_the_markers_for_filling_in() -> None:
    qwen = infill_format({"<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"})
    assert qwen is not None
    assert qwen.prompt("a", "b") == "<|fim_prefix|>a<|fim_suffix|>b<|fim_middle|>"
    codestral = infill_format({"[PREFIX]", "[SUFFIX]"})
    assert codestral is not None
    assert codestral.prompt("a", "b") == "[SUFFIX]b[PREFIX]a"
    assert infill_format({"<|fim_prefix|>"}) is None
