"""What a guide allows, step by step, with the demo model's vocabulary and no model."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_router_server.catalogue.catalogue import DEMO_FOLDER
from mlx_router_shared.errors import InvalidRequest
from mlx_router_shared.generation import Tool
from mlx_router_worker.text.grammar import Grammars
from mlx_router_worker.text.guide import AllBut, Allowed, Favourite, Guide, Markers, as_mask
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


def _always(token: int) -> Favourite:
    """A model that wants this token."""
    return lambda mask: token


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


@settings(max_examples=20, deadline=None)
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
    assert not guide.cut, "the answer itself is whole"
    _write(guide, grammars, "</think>")
    assert not _permits(guide.allowed(), _IDS["<think>"]), "once"


def test_a_line_break_behind_thinking_is_left_to_the_model(grammars: Grammars) -> None:
    """Models write one before their answer and before a call; a mask that forbids it takes them off their way."""
    (line_break,) = grammars.tokenizer.tokenize_str("\n")
    markers = Markers(think_start=_MARKERS.think_start, think_end=_MARKERS.think_end, call_start=_MARKERS.call_start,
                      call_end=_MARKERS.call_end, space=[line_break])  # fmt: skip
    guide = Guide(markers=markers, end_tokens=_END, budget=200, text=grammars.follow(answer_grammar(_SCHEMA)),
                  call=lambda: None, is_thinking=True)  # fmt: skip
    _write(guide, grammars, "a thought</think>")
    assert _permits(guide.allowed(), line_break)
    assert _permits(guide.allowed(), grammars.tokenizer.tokenize_str("{")[0])
    _write(guide, grammars, "\n")
    assert not _permits(guide.allowed(), line_break), "once"
    _write(guide, grammars, '<tool_call>{"name": 1</tool_call>')
    _write(guide, grammars, '{"name": "x", "n": 1}')
    assert guide.complete


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


_WAYS: list[tuple[dict[str, Any], str, int]] = [
    ({"email": {"type": "string", "format": "email"}}, '{"email": "', 12),
    ({"price": {"type": "number", "exclusiveMinimum": 0}}, '{"price": 0.', 6),
    ({"price": {"type": "number", "exclusiveMaximum": 0}}, '{"price": ', 6),
    ({"price": {"type": "number", "exclusiveMinimum": 0.5}}, '{"price": 0.', 6),
    ({"n": {"type": "integer", "minimum": 57, "maximum": 58}}, '{"n": ', 6),
    ({"n": {"type": "integer", "multipleOf": 7, "minimum": 1}}, '{"n": ', 6),
    ({"t": {"type": "string", "format": "duration"}}, '{"t": "', 10),
    ({"t": {"type": "string", "format": "date-time"}}, '{"t": "20', 30),
    ({"t": {"type": "string", "format": "uuid"}}, '{"t": "', 45),
    ({"t": {"type": "string", "format": "ipv4"}}, '{"t": "', 14),
    ({"t": {"type": "string", "pattern": "^[QX]{3}-Z$"}}, '{"t": "', 12),
    ({"t": {"type": "string", "pattern": "^\\u00e9+$"}}, '{"t": "', 8),
    ({"t": {"type": "string", "minLength": 20}}, '{"t": "', 30),
    ({"t": {"enum": ["alpha", "beta"]}}, '{"t": "', 12),
    ({"t": {"anyOf": [{"type": "null"}, {"type": "string", "pattern": "^a{9}$"}]}}, '{"t": ', 4),
    ({"t": {"type": "array", "items": {"type": "boolean"}, "minItems": 3}}, '{"t": [', 20),
    ({f"p{n}": {"type": "string"} for n in range(40)}, '{"p0": "', 400),
]  # fmt: skip


@pytest.mark.parametrize(("properties", "begun", "most"), _WAYS, ids=lambda value: str(value)[:50])
def test_there_is_a_short_way_out_of_every_value(
    grammars: Grammars, properties: dict[str, Any], begun: str, most: int
) -> None:
    """It ends as JSON that satisfies the schema, in about as many tokens as it takes."""
    schema = {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}
    follower = grammars.follow(answer_grammar(json.dumps(schema)))
    tokens = list(grammars.tokenizer.tokenize_str(begun))
    for token in tokens:
        follower.take(token)
    assert not follower.broken
    way = follower.way_out()
    assert way is not None
    assert len(way) <= most
    text = grammars.tokenizer.decode_bytes([*tokens, *way]).decode()
    jsonschema.validate(json.loads(text), schema, format_checker=jsonschema.FormatChecker())


_ANSWERS: list[tuple[dict[str, Any], str]] = [
    ({"email": {"type": "string", "format": "email"}}, '{"email": "ann@example.com"}'),
    ({"price": {"type": "number", "exclusiveMinimum": 0}}, '{"price": 2.75 }'),
    ({"grid": {"type": "array", "items": {"type": "integer"}}}, '{"grid": [' + ", ".join("0" * 64) + "]}"),
    ({"flags": {"type": "array", "items": {"type": "boolean"}}}, '{"flags": [' + ", ".join(["false"] * 40) + "]}"),
    ({"rule": {"type": "string"}}, '{"rule": "' + "=" * 120 + '"}'),
    ({"a": {"type": "array", "items": {"type": "array", "items": {"enum": [0, 1]}}}},
     '{"a": [' + ", ".join(["[0, 0, 0, 0]"] * 20) + "]}"),
    ({f"p{n}": {"type": "string"} for n in range(40)},
     "{" + ", ".join(f'"p{n}": "word {n}"' for n in range(40)) + "}"),
    ({"size": {"type": "integer"}, **{f"p{n}": {"type": "array", "items": {"type": "integer"}} for n in range(30)}},
     '{"size": 12' + "".join(f', "p{n}": [{n}, 0]' for n in range(30)) + "}"),
    # The way out is long while there is room for little more than it.
    ({f"p{n}": {"type": "string"} for n in range(40)},
     '{"p0":"ab"' + "".join(f',"p{n}":""' for n in range(1, 40)) + "}"),
    ({f"p{n}": {"type": "integer"} for n in range(40)},
     '{"p0":12' + "".join(f',"p{n}":{n % 10}' for n in range(1, 40)) + "}"),
    ({"n": {"type": "integer"}}, '{"n": ' + str(2**4000) + "}"),
]  # fmt: skip


@pytest.mark.parametrize(("properties", "answer"), _ANSWERS, ids=lambda value: str(value)[:40])
@pytest.mark.parametrize("spare", [0, 1, 2, 5, 20, 250])
def test_an_answer_that_ends_in_time_is_not_altered(
    grammars: Grammars, properties: dict[str, Any], answer: str, spare: int
) -> None:
    """However little of the budget it leaves: the model's own next token is the one that is allowed."""
    schema = {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}
    tokens = list(grammars.tokenizer.tokenize_str(answer))
    guide = Guide(markers=_MARKERS, end_tokens=_END, budget=len(tokens) + spare,
                  text=grammars.follow(answer_grammar(json.dumps(schema))))  # fmt: skip
    for token in tokens:
        allowed = guide.allowed(_always(token))
        assert _permits(allowed, token), grammars.tokenizer.decode_str([token])
        guide.take(token)
    assert guide.allowed() == _END
    assert not guide.cut


def test_an_answer_that_would_not_end_in_time_is_brought_to_its_end(grammars: Grammars) -> None:
    guide = Guide(markers=_MARKERS, end_tokens=_END, budget=60, text=grammars.follow(answer_grammar(_SCHEMA)))
    letters = grammars.tokenizer.tokenize_str("wv")
    drawn: list[int] = list(grammars.tokenizer.tokenize_str('{"name": "'))
    for token in drawn:
        guide.take(token)
    while drawn[-1] not in _END:
        favourite = letters[len(drawn) % 2]
        mask = as_mask(guide.allowed(_always(favourite)), 1024)
        drawn.append(favourite if mask is None or mask[favourite] else int(np.flatnonzero(mask)[0]))
        guide.take(drawn[-1])
    assert 50 <= len(drawn) - 1 <= 60, "the end token is not part of the text"
    assert guide.cut
    assert set(json.loads(grammars.tokenizer.decode_bytes(drawn[:-1]))) == {"name", "n"}


def test_a_number_that_does_not_end_is_ended(grammars: Grammars) -> None:
    guide = Guide(markers=_MARKERS, end_tokens=_END, budget=100_000, text=grammars.follow(answer_grammar(_SCHEMA)))
    _write(guide, grammars, '{"name": "x", "n": 1')
    seven = grammars.tokenizer.tokenize_str("7")[0]
    drawn = [seven]
    while drawn[-1] not in _END:
        mask = as_mask(guide.allowed(_always(seven)), 1024)
        drawn.append(seven if mask is None or mask[seven] else int(np.flatnonzero(mask)[-1]))
        guide.take(drawn[-1])
        assert len(drawn) < 5000
    text = grammars.tokenizer.decode_bytes(drawn[1:-1]).decode()
    assert 4000 < len(str(json.loads('{"name": "x", "n": 1' + text)["n"])) < 4300
    assert guide.cut


def test_a_mask_is_as_wide_as_the_models_vocabulary() -> None:
    for allowed in ([3], AllBut((3,)), np.array([False, False, False, True])):
        mask: Any = as_mask(allowed, 6)
        assert mask.shape == (6,)
        assert mask[3] == (not isinstance(allowed, AllBut))
    assert as_mask(None, 6) is None


def test_calls_of_tools_with_endless_parameters_are_not_enforced() -> None:
    """Compiling them would keep all other streams waiting."""
    properties = {f"property_{number}": {"type": "string"} for number in range(1000)}
    parameters = json.dumps({"type": "object", "properties": properties})
    assert call_grammar([Tool(name="one", parameters=parameters)])
    with pytest.raises(InvalidRequest, match="too much to enforce"):
        call_grammar([Tool(name=f"tool_{number}", parameters=parameters) for number in range(5)])
