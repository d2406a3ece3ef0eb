"""Conversations in the forms that chat templates take: found by probing, and nothing of them is lost.

The templates here are small ones with the quirks of real ones. ``make templates DIR=…`` renders conversations through
every template of a folder.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
from jinja2.exceptions import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from mlx_router_shared.generation import Message, Role, ToolCall
from mlx_router_worker.text.conversation import conversation_forms
from mlx_router_worker.text.losses import count_lost_words
from mlx_router_worker.text.prompt import template_messages
from mlx_router_worker.text.template_traits import TemplateTraits, probe_template
from tests.templates.__main__ import check_template

_TURNS = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% for c in m.tool_calls or [] %}" \
         "[{{ c.id }} {{ c.function.name }} {{ c.function.arguments | tojson }}]{% endfor %}{% endfor %}"  # fmt: skip
_TAKES_ALL = _TURNS
_NO_SYSTEM = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + _TURNS
)
_ALTERNATES = (
    "{% set ns = namespace(at=0) %}{% for m in messages %}{% if m.role in ('user', 'assistant') and not m.tool_calls %}"
    "{% if (m.role == 'user') != (ns.at % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% set ns.at = ns.at + 1 %}{% endif %}{% endfor %}" + _TURNS
)
_SHORT_IDS = (
    "{% for m in messages %}{% for c in m.tool_calls or [] %}{% if c.id | length != 9 %}"
    "{{ raise_exception('ids have length 9') }}{% endif %}{% endfor %}"
    "{% if m.role == 'tool' and m.tool_call_id | length != 9 %}"
    "{{ raise_exception('ids have length 9') }}{% endif %}{% endfor %}" + _TURNS
)
_ONE_CALL = (
    "{% for m in messages %}{% if m.tool_calls and m.tool_calls | length > 1 %}{{ raise_exception('one call') }}"
    "{% endif %}{% endfor %}" + _TURNS
)
_ONLY_FIRST_SYSTEM = (
    "{% if messages[0].role == 'system' %}{{ messages[0].content }}{% endif %}"
    "{% for m in messages if m.role != 'system' %}<{{ m.role }}>{{ m.content }}{% endfor %}"
)
_DROPS_SYSTEM = "{% for m in messages if m.role != 'system' %}<{{ m.role }}>{{ m.content }}{% endfor %}"
_CALLS_OR_TEXT = (
    "{% for m in messages %}<{{ m.role }}>{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% else %}{{ m.content }}"
    "{% endif %}{% endfor %}"
)
_FIRST_CALL_HAS_TEXT = (
    "{% set ns = namespace(first=true) %}{% for m in messages %}<{{ m.role }}>"
    "{% if ns.first or not m.tool_calls %}{{ m.content }}{% endif %}"
    "{% if m.tool_calls %}{% set ns.first = false %}{{ m.tool_calls | tojson }}{% endif %}{% endfor %}"
)
_SYSTEM_IN_LAST_USER = (
    "{% if messages[0].role == 'system' %}{% set s = messages[0].content %}{% endif %}"
    "{% for m in messages if m.role != 'system' %}<{{ m.role }}>"
    "{% if loop.last and m.role == 'user' %}{{ s }}{% endif %}"
    "{{ m.content }}{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% endif %}{% endfor %}"
)
_NEEDS_TOOLS = "{% for t in tools %}{{ t | tojson }}{% endfor %}" + _TURNS
_NO_EMPTY = "{% for m in messages if not m.tool_calls %}{{ m.content[0] + m.content[1:] }}{% endfor %}"
_TYPED = "{% for m in messages %}<{{ m.role }}>{% for p in m.content if p.type %}{{ p.text }}{% endfor %}{% endfor %}"
_NO_TOOLS = (
    "{% for m in messages %}{% if m.role not in ('system', 'user', 'assistant') %}{{ raise_exception('role') }}"
    "{% endif %}<{{ m.role }}>{{ m.content }}{% endfor %}"
)
_RESULTS_BEHIND_CALLS = (
    "{% for m in messages %}{% if m.role != 'tool' %}<{{ m.role }}>{{ m.content }}{% if m.tool_calls %}"
    "{{ m.tool_calls | tojson }}{% set ns = namespace(open=true) %}{% for r in messages[loop.index:] %}"
    "{% if r.role != 'tool' %}{% set ns.open = false %}{% elif ns.open %}{{ r.content }}{% endif %}{% endfor %}"
    "{% endif %}{% endif %}{% endfor %}"
)
_LAST_CALL_DROPPED = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% if m.tool_calls and not loop.last %}"
    "{{ m.tool_calls | tojson }}{% endif %}{% endfor %}"
)
_TEMPLATES = {
    "results behind calls": _RESULTS_BEHIND_CALLS, "the last call is dropped": _LAST_CALL_DROPPED,
    "takes all": _TAKES_ALL, "no system": _NO_SYSTEM, "alternates": _ALTERNATES, "short ids": _SHORT_IDS,
    "one call": _ONE_CALL, "only the first system": _ONLY_FIRST_SYSTEM, "drops system": _DROPS_SYSTEM,
    "calls or text": _CALLS_OR_TEXT, "typed": _TYPED, "no tools": _NO_TOOLS, "mistral": _ALTERNATES + _SHORT_IDS[:0],
    "the first call has text": _FIRST_CALL_HAS_TEXT, "system in the last user": _SYSTEM_IN_LAST_USER,
    "needs tools": _NEEDS_TOOLS, "no empty turns": _NO_EMPTY,
    "calls or text, alternating": _ALTERNATES.replace(_TURNS, _CALLS_OR_TEXT),
}  # fmt: skip


def _raise(message: str) -> None:
    raise TemplateError(message)


def _render(template: str, messages: list[dict[str, Any]], **arguments: Any) -> str:
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = _raise
    return environment.from_string(template).render(messages=messages, **arguments)


def _probe(template: str) -> TemplateTraits:
    return probe_template(lambda messages, **arguments: _render(template, messages, **arguments))


def _turn(role: str, content: str, **more: Any) -> Message:
    return Message(role=Role(role), content=content, **more)


def _call(number: int) -> ToolCall:
    return ToolCall(id=f"call_{number:020}", name=f"FUN{number}", arguments=json.dumps({"a": f"ARG{number}"}))


_ROUND = [_turn("assistant", "", tool_calls=[_call(1)]), _turn("tool", "RES1", tool_call_id=_call(1).id)]
_CONVERSATIONS: dict[str, list[Message]] = {
    "plain": [_turn("user", "U1"), _turn("assistant", "A1"), _turn("user", "U2")],
    "system": [_turn("system", "S1"), _turn("user", "U1")],
    "several systems": [_turn("system", "S1"), _turn("user", "U1"), _turn("assistant", "A1"), _turn("system", "S2"),
                        _turn("user", "U2")],
    "only a system": [_turn("system", "S1")],
    "greeting": [_turn("assistant", "A1"), _turn("user", "U1")],
    "system and greeting": [_turn("system", "S1"), _turn("assistant", "A1"), _turn("user", "U1")],
    "users in a row": [_turn("user", "U1"), _turn("user", "U2"), _turn("assistant", "A1"), _turn("user", "U3")],
    "assistants in a row": [_turn("user", "U1"), _turn("assistant", "A1"), _turn("assistant", "A2"),
                            _turn("user", "U2")],
    "an empty answer": [_turn("user", "U1"), _turn("assistant", ""), _turn("user", "U2")],
    "two calls with text": [_turn("user", "U1"), _turn("assistant", "A1", tool_calls=[_call(1)]), _ROUND[1],
                            _turn("assistant", "A2", tool_calls=[_call(2)]),
                            _turn("tool", "RES2", tool_call_id=_call(2).id)],
    "system and call": [_turn("system", "S1"), _turn("user", "U1"), *_ROUND],
    "call": [_turn("user", "U1"), *_ROUND],
    "call and more": [_turn("system", "S1"), _turn("user", "U1"), *_ROUND, _turn("assistant", "A1"),
                      _turn("user", "U2")],
    "text beside a call": [_turn("user", "U1"), _turn("assistant", "A1", tool_calls=[_call(1)]), _ROUND[1]],
    "two calls": [_turn("user", "U1"), _turn("assistant", "", tool_calls=[_call(1), _call(2)]),
                  _turn("tool", "RES2", tool_call_id=_call(2).id), _turn("tool", "RES1", tool_call_id=_call(1).id)],
    "calls without ids": [_turn("user", "U1"), _turn("assistant", "", tool_calls=[ToolCall(name="FUN1")]),
                          _turn("tool", "RES1"), _turn("assistant", "A1"), _turn("user", "U2")],
}  # fmt: skip


@pytest.mark.parametrize("name", _TEMPLATES)
@pytest.mark.parametrize("conversation", _CONVERSATIONS)
def test_every_conversation_is_rendered_and_nothing_of_it_is_lost(name: str, conversation: str) -> None:
    template, messages = _TEMPLATES[name], _CONVERSATIONS[conversation]
    traits = _probe(template)
    form, style = next(conversation_forms(messages, traits))
    more: dict[str, Any] = {"tools": []} if traits.empty_tools else {}
    shown = _render(template, template_messages(form, traits, style), **more)
    for message in messages:
        assert message.content in shown
        for call in message.tool_calls:
            assert call.name in shown
            assert "ARG" not in call.arguments or call.arguments[7:11] in shown


@pytest.mark.parametrize(
    "template",
    [
        *_TEMPLATES.values(),
        "{% for t in xml_tools or [] %}{{ t | tojson }}{% endfor %}" + _TURNS,
        "{% if tools %}{{ raise_exception('no tools') }}{% endif %}" + _TURNS,
        "{% if tools %}you have tools{% endif %}" + _TURNS,
        "{% for m in messages if m.role == 'system' %}{{ tools | tojson }}{% endfor %}" + _TURNS,
    ],
)
def test_forty_conversations_with_tools_and_without_lose_nothing(template: str) -> None:
    assert check_template(template) == []


def test_tools_are_given_in_the_argument_that_shows_them() -> None:
    assert _probe(_NEEDS_TOOLS).tools == "tools"
    assert _probe("{% for t in xml_tools or [] %}{{ t | tojson }}{% endfor %}" + _TURNS).tools == "xml_tools"
    in_system = "{% for m in messages if m.role == 'system' %}{{ tools | tojson }}{% endfor %}" + _TURNS
    assert (_probe(in_system).tools, _probe(in_system).tools_need_system) == ("tools", True)
    assert _probe("{% if tools %}you have tools{% endif %}" + _TURNS).tools == ""
    assert not _probe(_RESULTS_BEHIND_CALLS).results_apart


@pytest.mark.parametrize(
    ("prompt", "lost"),
    [("say hello to Ann", 0), ("say hello", 1), ("say &quot;hello&quot; to Ann", 0), ("Ann", 2), ("", 3)],
)
def test_lost_words_are_counted(prompt: str, lost: int) -> None:
    assert count_lost_words(prompt, [_turn("user", ' say "hello" to Ann\n')]) == lost


def test_what_templates_leave_out_or_write_otherwise_is_not_lost() -> None:
    calls = [ToolCall(name="f", arguments=json.dumps({"a": None, "b": [True, {"c": "inner"}], "d": 15000}))]
    messages = [_turn("assistant", "<think>thought</think>", tool_calls=calls)]
    assert count_lost_words("None True inner 15,000", messages) == 0
    assert count_lost_words("None True 15,000", messages) == 1
    assert count_lost_words("", [_turn("assistant", "", tool_calls=[ToolCall(name="f", arguments="[" * 100_000)])]) == 0
    assert count_lost_words("用户：你好世界", [_turn("user", "你好世界")]) == 0
    assert count_lost_words("用户：", [_turn("user", "你好世界")]) == 1
    assert count_lost_words("x", [_turn("user", " ".join(f"word{n}" for n in range(1000)))]) == 50


def test_traits_are_what_the_templates_do() -> None:
    assert _probe(_TAKES_ALL) == TemplateTraits(tools="")
    assert not _probe(_NO_SYSTEM).system_first
    assert not _probe(_ALTERNATES).consecutive_turns
    assert not _probe(_ALTERNATES).assistant_first
    short = _probe(_SHORT_IDS).calls
    assert short is not None
    assert short.short_ids
    one = _probe(_ONE_CALL).calls
    assert one is not None
    assert one.one_at_a_time
    only = _probe(_ONLY_FIRST_SYSTEM)
    assert (only.system_first, only.system_anywhere) == (True, False)
    assert not _probe(_CALLS_OR_TEXT).text_beside_calls
    assert _probe(_TYPED).typed_content
    assert _probe(_NO_TOOLS).calls is None


@pytest.mark.parametrize("switch", ["enable_thinking", "thinking"])
def test_the_switch_for_thinking_is_found(switch: str) -> None:
    assert _probe(_TURNS + "{% if " + switch + " %}<think>{% endif %}").thinking_switch == switch
    assert _probe(_TURNS).thinking_switch == ""
    assert _probe(_TURNS + "{{ reasoning_effort }}").effort == "reasoning_effort"


def test_a_template_that_always_raises_is_left_as_it_is() -> None:
    assert _probe("{{ raise_exception('never') }}") == TemplateTraits()
