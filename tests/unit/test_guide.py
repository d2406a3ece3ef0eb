"""What a guide allows, step by step, with the demo model's vocabulary and no model."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_router_server.catalogue.catalogue import DEMO_FOLDER
from mlx_router_shared.generation import Tool
from mlx_router_worker.text.grammar import Grammars
from mlx_router_worker.text.guide import AllBut, Allowed, Guide, Markers, as_mask
from mlx_router_worker.text.schemas import answer_grammar, call_grammar

_TEXT = (DEMO_FOLDER / "tokenizer.json").read_text(encoding="utf-8")
_IDS: dict[str, int] = {token["content"]: token["id"] for token in json.loads(_TEXT)["added_tokens"]}
_END = [_IDS["<|im_end|>"], _IDS["<|endoftext|>"]]
_MARKERS = Markers(
    think_start=[_IDS["<think>"]], think_end=[_IDS["</think>"]],
    call_start=[_IDS["<tool_call>"]], call_end=[_IDS["</tool_call>"]],
)  # fmt: skip
_SCHEMA = json.dumps({"type": "object", "properties": {"name": {"type": "string"}, "n": {"type": "integer"}},
                      "required": ["name", "n"], "additionalProperties": False})  # fmt: skip
_NESTED = json.dumps({"type": "object", "properties": {"a": {"type": "array", "minItems": 2, "items": {"$ref": "#"}},
                                                       "s": {"type": "string", "minLength": 3}}, "required": ["s"]})  # fmt: skip


@pytest.fixture(scope="module")
def grammars() -> Grammars:
    return Grammars(_TEXT, _END)


def _permits(allowed: Allowed, token: int) -> bool:
    mask = as_mask(allowed, 1024)
    return mask is None or bool(mask[token])


def _write(guide: Guide, grammars: Grammars, text: str) -> None:
    for token in grammars.tokenizer.tokenize_str(text, parse_special=True):
        assert _permits(guide.allowed(), token), (text, grammars.tokenizer.decode_str([token]))
        guide.take(token)


def _random_walk(guide: Guide, seed: int, budget: int) -> list[int]:
    """Draws like a model that knows nothing, until the end token or the budget."""
    random = np.random.default_rng(seed)
    drawn: list[int] = []
    while len(drawn) < budget:
        mask = as_mask(guide.allowed(), 1024)
        choices = np.flatnonzero(mask) if mask is not None else np.arange(256)
        token = int(random.choice(choices))
        drawn.append(token)
        guide.take(token)
        assert not guide.broken
        if token in _END:
            break
    return drawn


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(40, 200), st.sampled_from([_SCHEMA, _NESTED, '{"type":"object"}']))
def test_a_walk_at_random_ends_as_json_within_its_budget(seed: int, budget: int, schema: str) -> None:
    made = Grammars(_TEXT, _END)
    guide = Guide(markers=_MARKERS, end_tokens=_END, budget=budget, text=made.follow(answer_grammar(schema)))
    drawn = _random_walk(guide, seed, budget)
    if schema == _NESTED and drawn[-1] not in _END:
        return  # one token can open a list that has to hold two objects: there is no room for that any more
    assert drawn[-1] in _END, "it came to an end"
    value = json.loads(made.tokenizer.decode_bytes(drawn[:-1]).decode("utf-8", "replace"))
    assert isinstance(value, dict)
    assert schema != _SCHEMA or set(value) == {"name", "n"}


def test_thinking_is_free_and_ends_when_the_answer_needs_the_room(grammars: Grammars) -> None:
    guide = Guide(
        markers=_MARKERS, end_tokens=_END, budget=100, text=grammars.follow(answer_grammar(_SCHEMA)), may_think=True
    )
    assert _permits(guide.allowed(), _IDS["<think>"])
    assert not _permits(guide.allowed(), _IDS["<tool_call>"])
    _write(guide, grammars, "<think>")
    assert isinstance(guide.allowed(), AllBut)
    assert not _permits(guide.allowed(), _END[0]), "the turn cannot end before there is an answer"
    word = grammars.tokenizer.tokenize_str(" water")[0]
    for _ in range(98):
        if guide.allowed() == [_IDS["</think>"]]:
            break
        guide.take(word)
        guide.take(word + 1)
    assert guide.allowed() == [_IDS["</think>"]]
    assert guide.cut
    _write(guide, grammars, "</think>")
    assert not _permits(guide.allowed(), _IDS["<think>"]), "once"


def test_a_budget_for_thinking_is_kept(grammars: Grammars) -> None:
    guide = Guide(markers=_MARKERS, end_tokens=_END, budget=1000, is_thinking=True, max_thinking_tokens=3)
    for token in (300, 301, 302):
        assert _permits(guide.allowed(), token)
        guide.take(token)
    assert guide.allowed() == [_IDS["</think>"]]
    guide.take(_IDS["</think>"])
    assert guide.allowed() is None
    assert not guide.cut
    guide.take(300)
    assert guide.idle, "nothing has to be watched any more"


def test_a_forced_call_begins_with_its_marker_and_holds_its_schema(grammars: Grammars) -> None:
    tool = Tool(name="get", parameters=json.dumps({"type": "object", "properties": {"u": {"$ref": "#/$defs/k"}},
                                                   "required": ["u"], "$defs": {"k": {"enum": ["x", "y"]}}}))  # fmt: skip
    lead = [_IDS["<tool_call>"], *grammars.tokenizer.tokenize_str("\n")]
    guide = Guide(markers=_MARKERS, end_tokens=_END, budget=100, lead=lead, text=grammars.follow(call_grammar([tool])))
    assert guide.allowed() == [_IDS["<tool_call>"]]
    _write(guide, grammars, '<tool_call>\n{"name": "get", "arguments": {"u": "')
    assert not _permits(guide.allowed(), grammars.tokenizer.tokenize_str("z")[0])
    _write(guide, grammars, 'y"')
    drawn = _random_walk(guide, 1, 90)
    assert drawn[-1] in _END


def test_a_call_of_its_own_choice_is_held_to_strict_tools_and_others_may_follow(grammars: Grammars) -> None:
    strict = Tool(name="get", strict=True, parameters='{"type":"object","properties":{"u":{"enum":["x"]}},"required":["u"],'
                                                      '"additionalProperties":false}')  # fmt: skip
    grammar = call_grammar([strict, Tool(name="any")])
    guide = Guide(markers=_MARKERS, end_tokens=_END, budget=500, call=lambda: grammars.follow(grammar))
    _write(guide, grammars, "Let me see.<tool_call>")
    _write(guide, grammars, '{"name": "get", "arguments": {"u": "x"}}')
    assert guide.allowed() == [_IDS["</tool_call>"]]
    _write(guide, grammars, "</tool_call> And <tool_call>")
    _write(guide, grammars, '{"name": "any", "arguments": {"what": ["ever"]}}')


def test_with_a_schema_a_call_may_stand_in_for_the_answer(grammars: Grammars) -> None:
    guide = Guide(
        markers=_MARKERS, end_tokens=_END, budget=500, text=grammars.follow(answer_grammar(_SCHEMA)), call=lambda: None
    )
    assert _permits(guide.allowed(), _IDS["<tool_call>"])
    assert not _permits(guide.allowed(), _END[0])
    _write(guide, grammars, '<tool_call>{"name": anything</tool_call>')
    assert _permits(guide.allowed(), _END[0]), "the turn may end with its calls"
    assert _permits(guide.allowed(), grammars.tokenizer.tokenize_str("{")[0])


def test_a_model_that_goes_round_in_circles_is_brought_to_an_end(grammars: Grammars) -> None:
    guide = Guide(markers=_MARKERS, end_tokens=_END, budget=100_000, text=grammars.follow(answer_grammar(_SCHEMA)))
    _write(guide, grammars, '{"name": "')
    letter = grammars.tokenizer.tokenize_str("w")[0]
    written = 0
    while not guide.cut:
        _write(guide, grammars, "wv"[written % 2])
        written += 1
    assert 40 < written <= 48
    assert guide.cut
    assert not _permits(guide.allowed(), letter)
    assert len(_random_walk(guide, 0, 50)) < 30


def test_a_mask_is_as_wide_as_the_models_vocabulary() -> None:
    for allowed in ([3], AllBut((3,)), np.array([False, False, False, True])):
        mask: Any = as_mask(allowed, 6)
        assert mask.shape == (6,)
        assert mask[3] == (not isinstance(allowed, AllBut))
    assert as_mask(None, 6) is None
