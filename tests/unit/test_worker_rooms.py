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
from mlx_router_worker.text.partial_call import PartialCall
from mlx_router_worker.text.pooling import Pooling, batches, finished, read_pooling
from mlx_router_worker.text.token_bytes import token_bytes

_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.text(max_size=5), _JSON, max_size=4), st.text(min_size=1, max_size=8), st.data())
def test_a_call_is_told_the_same_however_it_is_cut(
    arguments: dict[str, object], name: str, data: st.DataObject
) -> None:
    text = json.dumps({"name": name, "arguments": arguments}, ensure_ascii=data.draw(st.booleans()), indent=data.draw(
        st.sampled_from([None, 2])))  # fmt: skip
    call, told, at = PartialCall(), "", 0
    while at < len(text):
        size = data.draw(st.integers(1, 9))
        told += call.feed(text[at : at + size])
        at += size
    assert (call.name, call.complete, told) == (name, True, call.arguments)
    assert json.loads(told) == arguments


@pytest.mark.parametrize(
    "text", ['{"arguments": {}, "name": "x"}', '{"name": "x"}', "no call", '{"name": "x", "arguments": "y"}']
)
def test_a_call_of_another_shape_is_never_begun(text: str) -> None:
    call = PartialCall()
    assert call.feed(text) == ""
    assert call.name is None


def _builder(**more: object) -> AnswerBuilder:
    return AnswerBuilder(stops=[], parse_tool=json.loads, make_id=lambda: "call_1", incremental=True, **more)  # type: ignore[arg-type]


def test_pieces_of_a_call_and_then_the_whole_are_told() -> None:
    builder = _builder()
    events = [
        e for piece in ('{"name": "f", "arg', 'uments": {"a"', ": 1}", "}") for e in builder.feed([("tool", piece)])
    ]
    events += builder.feed([("normal", "")])
    assert events == [
        ToolCallStarted(index=0, id="call_1", name="f"), ToolCallArguments(index=0, text='{"a"'),
        ToolCallArguments(index=0, text=": 1}"), ToolCallDone(index=0, id="call_1", name="f", arguments='{"a": 1}'),
    ]  # fmt: skip


def test_a_told_call_that_turns_out_to_be_none_is_an_error_and_a_cut_one_is_told_by_the_reason() -> None:
    builder = _builder()
    builder.feed([("tool", '{"name": "f", "arguments": {"a": nonsense}}')])
    (failure,) = builder.feed([("normal", "")])
    assert isinstance(failure, Failure)
    assert builder.failed
    cut = _builder()
    cut.feed([("tool", '{"name": "f", "arguments": {"a": 1')])
    assert cut.finish(cut=True) == []


def test_a_forced_call_needs_no_marker_and_only_so_many_are_made() -> None:
    forced = AnswerBuilder(stops=["1"], parse_tool=json.loads, forced=True, make_id=lambda: "i")
    assert forced.feed([("normal", ' {"name": "f", "arguments": {"a": 1}}')]) == []
    assert forced.finish(cut=False) == [ToolCallDone(index=0, id="i", name="f", arguments='{"a": 1}')]
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
