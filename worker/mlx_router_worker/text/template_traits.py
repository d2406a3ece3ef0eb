"""What a chat template accepts and what it leaves out, found by rendering marked conversations with it once.

Templates raise for conversations that other models take ("System role not supported", "roles must alternate"), and some
pass over a turn without a word. Each probe is a short conversation whose turns hold words that stand nowhere else; what
is missing from the rendered text has been lost.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

__all__ = ["CallStyle", "Render", "TemplateTraits", "probe_template", "show_functions"]

Render = Callable[..., str]
"""Messages in OpenAI's shape, and arguments by name, to the text of the prompt; raises whatever the template raises."""

_SYSTEM: Final = "qzsysa"
_OTHER_SYSTEM: Final = "qzsysb"
_USER: Final = "qzusra"
_OTHER_USER: Final = "qzusrb"
_ASSISTANT: Final = "qzasta"
_OTHER_ASSISTANT: Final = "qzastb"
_FUNCTION: Final = "qzfunc"
_ARGUMENT: Final = "qzarg"
_RESULT: Final = "qzres"
_THINKING_SWITCHES: Final = ("enable_thinking", "thinking", "reasoning", "think")
_TOOL_ARGUMENTS: Final = ("tools", "xml_tools")
_EFFORTS: Final = ("reasoning_effort", "thinking_effort")
_TOOL: Final = {
    "type": "function",
    "function": {
        "name": _FUNCTION,
        "description": "",
        "parameters": {"type": "object", "properties": {"a": {"type": "string", "description": ""}}},
    },
}


@dataclass(frozen=True, slots=True, kw_only=True)
class CallStyle:
    """The form in which a template takes calls of tools and their results."""

    short_ids: bool = False
    """Identifiers have nine letters and digits, as Mistral's templates demand."""
    text_arguments: bool = False
    """The arguments of a call are JSON text instead of an object."""
    one_at_a_time: bool = False
    """A turn holds one call at most."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TemplateTraits:
    """The defaults describe a template that takes everything."""

    system_first: bool = True
    """A system turn at the front is shown."""
    system_alone: bool = True
    """A system turn is shown in a conversation without a turn of the user."""
    system_anywhere: bool = True
    """Further system turns are shown, wherever they stand."""
    consecutive_turns: bool = True
    """Turns of one role may follow each other."""
    assistant_first: bool = True
    """The assistant may begin."""
    calls: CallStyle | None = CallStyle()
    """None: calls and results can only be shown as text."""
    results_apart: bool = True
    """Results are shown even if they do not directly follow their call."""
    text_beside_calls: bool = True
    """The text of a turn that also has calls is shown."""
    empty_answers: bool = True
    """A turn of the assistant may be empty."""
    empty_tools: bool = False
    """The list of tools has to be there, even if it is empty."""
    tools: str = "tools"
    """The argument by which the tools are shown; empty if they can only be described in a system turn."""
    tools_need_system: bool = False
    """Tools are shown only where there is a system turn."""
    functions: str = ""
    """Where the template wants the tools as JSON text: ``argument`` or ``role``, both named ``functions``; empty if it
    takes them as a list."""
    typed_content: bool = False
    """The content of a turn has to be a list of parts."""
    thinking_switch: str = ""
    """The argument by which thinking is turned on and off; empty if there is none."""
    effort: str = ""
    """The argument that says how hard to think; empty if there is none."""


def probe_template(render: Render) -> TemplateTraits:
    """Find the traits of a template, by some twenty renderings of a few turns."""
    return _Probe(render).traits()


class _Probe:
    def __init__(self, render: Render) -> None:
        self._render = render
        self._typed = self._empty_tools = False
        self._functions = ""

    def traits(self) -> TemplateTraits:
        if not self._find_basics():
            return TemplateTraits()  # it cannot be probed: conversations are rendered as they come
        calls = self._calls()
        tools, tools_need_system = self._tools()
        system_first = self._shows([_turn("system", _SYSTEM), _user(_USER)], _SYSTEM, _USER) and (
            calls is None or self._shows_round(calls, system=_SYSTEM, ends=True)
        )
        several = [_turn("system", _SYSTEM), _turn("system", _OTHER_SYSTEM), _user(_USER)]
        later = [_turn("system", _SYSTEM), _user(_USER), _assistant(_ASSISTANT), _turn("system", _OTHER_SYSTEM),
                 _user(_OTHER_USER)]  # fmt: skip
        users = [_user(_USER), _user(_OTHER_USER)]
        assistants = [_user(_USER), _assistant(_ASSISTANT), _assistant(_OTHER_ASSISTANT), _user(_OTHER_USER)]
        empty = [_user(_USER), _assistant(""), _user(_OTHER_USER)]
        return TemplateTraits(
            system_first=system_first,
            system_alone=self._shows([_turn("system", _SYSTEM)], _SYSTEM),
            system_anywhere=system_first
            and self._shows(several, _SYSTEM, _OTHER_SYSTEM)
            and self._shows(later, _SYSTEM, _OTHER_SYSTEM, _OTHER_USER),
            consecutive_turns=self._shows(users, _USER, _OTHER_USER)
            and self._shows(assistants, _ASSISTANT, _OTHER_ASSISTANT),
            assistant_first=self._shows([_assistant(_ASSISTANT), _user(_USER)], _ASSISTANT, _USER),
            calls=calls,
            results_apart=calls is not None and self._shows_round(calls, between=_OTHER_ASSISTANT),
            text_beside_calls=calls is not None and self._shows_round(calls, text=_ASSISTANT),
            empty_answers=self._text(empty) is not None,
            empty_tools=self._empty_tools,
            tools=tools,
            tools_need_system=tools_need_system,
            functions=self._functions,
            typed_content=self._typed,
            thinking_switch=next((name for name in _THINKING_SWITCHES if self._differs(name, True, False)), ""),
            effort=next((name for name in _EFFORTS if self._differs(name, "low", "high")), ""),
        )

    def _find_basics(self) -> bool:
        """Find the form in which a turn of the user is shown at all; False if none is found."""
        for self._functions in ("", "argument", "role"):
            for self._empty_tools in (False, True):
                for self._typed in (False, True):
                    if self._shows([_user(_USER)], _USER):
                        return True
        return False

    def _calls(self) -> CallStyle | None:
        for short_ids in (False, True):
            for text_arguments in (False, True):
                style = CallStyle(short_ids=short_ids, text_arguments=text_arguments)
                if self._shows_round(style):
                    if self._shows_round(style, count=2):
                        return style
                    return CallStyle(short_ids=short_ids, text_arguments=text_arguments, one_at_a_time=True)
        return None

    def _shows_round(
        self, style: CallStyle, *, count: int = 1, text: str = "", system: str = "", between: str = "",
        ends: bool = False,
    ) -> bool:  # fmt: skip
        """Whether a turn with ``count`` calls, their results and what follows are shown. With ``text`` the turn has
        some too, and a second one follows; with ``between`` a turn of the user stands before the results; with ``ends``
        the results are the last turns."""
        messages = [_turn("system", system)] if system else []
        messages.append(_user(_USER))
        wanted = [_FUNCTION, system, text]
        for number, said in enumerate([text, f"{text}again"] if text else [""]):
            numbers = range(2 * number, 2 * number + count)
            messages.append({**_assistant(said), "tool_calls": [self._call(style, n) for n in numbers]})
            messages += [_user(between)] if between else []
            messages += [{**_turn("tool", f"{_RESULT}{n}"), "tool_call_id": _id(style, n), "name": _FUNCTION}
                         for n in numbers]  # fmt: skip
            wanted += [said, *(f"{_ARGUMENT}{n}" for n in numbers), *(f"{_RESULT}{n}" for n in numbers)]
        if not ends:
            messages += [_assistant(_OTHER_ASSISTANT), _user(_OTHER_USER)]
            wanted.append(_OTHER_USER)
        shown = self._text(messages, tools=[_TOOL])
        return shown is not None and all(word in shown for word in wanted)

    @staticmethod
    def _call(style: CallStyle, number: int) -> dict[str, Any]:
        arguments = {"a": f"{_ARGUMENT}{number}"}
        return {
            "id": _id(style, number),
            "type": "function",
            "function": {
                "name": _FUNCTION, "arguments": json.dumps(arguments) if style.text_arguments else arguments,
            },
        }  # fmt: skip

    def _tools(self) -> tuple[str, bool]:
        """The argument by which tools are shown, and whether that needs a system turn."""
        for before in ([], [_turn("system", _SYSTEM)]):
            for name in _TOOL_ARGUMENTS:
                shown = self._text([*before, _user(_USER)], **{name: [_TOOL]})
                if shown is not None and _FUNCTION in shown:
                    return name, bool(before)
        return "", False

    def _differs(self, name: str, one: Any, other: Any) -> bool:
        first, second = (self._text([_user(_USER)], **{name: value}) for value in (one, other))
        return first is not None and second is not None and first != second

    def _shows(self, messages: list[dict[str, Any]], *words: str) -> bool:
        shown = self._text(messages)
        return shown is not None and all(word in shown for word in words)

    def _text(self, messages: list[dict[str, Any]], **arguments: Any) -> str | None:
        """The prompt; None if the template raises."""
        if self._typed:
            messages = [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in messages]
        if self._empty_tools:
            arguments.setdefault("tools", [])
        messages, more = show_functions(self._functions, messages, arguments.get("tools") or [])
        try:
            return self._render(messages, **arguments, **more)
        except Exception:  # templates raise whatever their authors chose
            return None


def show_functions(
    how: str, messages: list[dict[str, Any]], tools: list[dict[str, Any]]
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Return the messages and further template arguments, for a template that is shown its tools as ``functions``.

    ``how`` is ``TemplateTraits.functions``; a turn of that role goes behind a leading system turn.
    """
    if how == "argument":
        return messages, {"functions": json.dumps(tools), "datetime": ""}
    if how == "role":
        start = 1 if messages and messages[0]["role"] == "system" else 0
        turn = {"role": "functions", "content": json.dumps(tools)}
        return [*messages[:start], turn, *messages[start:]], {}
    return messages, {}


def _id(style: CallStyle, number: int) -> str:
    return f"qzcall00{number}" if style.short_ids else f"call_qz0123456789{number}"


def _turn(role: str, text: str) -> dict[str, Any]:
    return {"role": role, "content": text}


def _user(text: str) -> dict[str, Any]:
    return _turn("user", text)


def _assistant(text: str) -> dict[str, Any]:
    return _turn("assistant", text)
