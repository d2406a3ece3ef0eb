"""``python -m tests.templates DIR``: forty conversations through every chat template of a folder.

Reports what raises and what is lost: a word of the client's that is not in the prompt. Exits with 1 if there is any.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from mlx_router_server.catalogue.catalogue import DEMO_FOLDER
from mlx_router_shared.errors import MlxRouterError
from mlx_router_shared.generation import GenerationRequest, Message, Role, Tool, ToolCall
from mlx_router_worker.text.renderer import PromptRenderer

_TOOLS = [
    Tool(name=name, description=f"the tool {name}", parameters=json.dumps({
        "type": "object", "properties": {"city": {"type": "string", "description": "a city"}}, "required": ["city"]}))
    for name in ("weather", "clock")
]  # fmt: skip


def _turn(role: str, content: str = "", *calls: ToolCall, **more: Any) -> Message:
    return Message(role=Role(role), content=content, tool_calls=list(calls), **more)


def _call(number: int, name: str = "weather", call_id: str | None = None) -> ToolCall:
    known = f"call_{number:024x}" if call_id is None else call_id
    return ToolCall(id=known, name=name, arguments=json.dumps({"city": f"Qzcity{number}"}))


def _result(number: int, call_id: str | None = None) -> Message:
    known = f"call_{number:024x}" if call_id is None else call_id
    return _turn("tool", f"qzresult{number}", tool_call_id=known or None)


def _u(number: int) -> Message:
    return _turn("user", f"qzuser{number}")


def _a(number: int, *calls: ToolCall) -> Message:
    return _turn("assistant", f"qzassistant{number}", *calls)


def _s(number: int) -> Message:
    return _turn("system", f"qzsystem{number}")


_PLAIN: dict[str, list[Message]] = {
    "one user": [_u(1)],
    "three turns": [_u(1), _a(1), _u(2)],
    "nine turns": [m for n in range(4) for m in (_u(n), _a(n))] + [_u(9)],
    "system": [_s(1), _u(1)],
    "system and turns": [_s(1), _u(1), _a(1), _u(2)],
    "two systems in front": [_s(1), _s(2), _u(1)],
    "system in the middle": [_s(1), _u(1), _a(1), _s(2), _u(2)],
    "system at the end": [_u(1), _a(1), _u(2), _s(1)],
    "system only in the middle": [_u(1), _a(1), _s(1), _u(2)],
    "only a system": [_s(1)],
    "greeting": [_a(1), _u(1)],
    "system and greeting": [_s(1), _a(1), _u(1), _a(2), _u(2)],
    "users in a row": [_u(1), _u(2), _u(3)],
    "assistants in a row": [_u(1), _a(1), _a(2), _u(2)],
    "system and users in a row": [_s(1), _u(1), _u(2), _a(1), _u(3), _u(4)],
    "an empty answer": [_u(1), _turn("assistant"), _u(2)],
    "characters": [_turn("user", "qzuser1 ünï 😀 {{ x }} {% y %} <b>"), _a(1), _u(2)],
    "an answer at the end": [_u(1), _a(1)],
    "calls without tools": [_u(1), _turn("assistant", "", _call(1)), _result(1), _u(2)],
    "many lines": [_turn("user", "qzuser1\n\nqzuser2\n```py\nqzuser3\n```")],
}
_WITH_TOOLS: dict[str, list[Message]] = {
    "tools, no call": [_u(1)],
    "tools and system": [_s(1), _u(1)],
    "a call": [_u(1), _turn("assistant", "", _call(1)), _result(1)],
    "a call and an answer": [_u(1), _turn("assistant", "", _call(1)), _result(1), _a(1), _u(2)],
    "text beside a call": [_u(1), _a(1, _call(1)), _result(1), _a(2), _u(2)],
    "two calls": [_u(1), _turn("assistant", "", _call(1), _call(2, "clock")), _result(1), _result(2), _a(1), _u(2)],
    "results in another order": [_u(1), _turn("assistant", "", _call(1), _call(2)), _result(2), _result(1)],
    "two rounds": [_u(1), _turn("assistant", "", _call(1)), _result(1), _turn("assistant", "", _call(2)), _result(2)],
    "calls without ids": [_u(1), _turn("assistant", "", _call(1, call_id="")), _result(1, ""), _a(1), _u(2)],
    "an agent": [_s(1), _u(1), _a(1, _call(1)), _result(1), _a(2, _call(2)), _result(2), _a(3), _u(2)],
    "a greeting before tools": [_s(1), _a(1), _u(1), _turn("assistant", "", _call(1)), _result(1)],
    "a user between call and result": [_u(1), _turn("assistant", "", _call(1)), _u(2), _result(1)],
    "an answer between call and result": [_u(1), _turn("assistant", "", _call(1)), _a(1), _result(1), _u(2)],
    "a result without a call": [_u(1), _a(1), _result(1), _u(2)],
    "a system between call and result": [_s(1), _u(1), _turn("assistant", "", _call(1)), _s(2), _result(1), _u(2)],
    "three calls": [_u(1), _turn("assistant", "", *map(_call, (1, 2, 3))), _result(1), _result(3), _result(2), _u(2)],
    "a missing result": [_u(1), _turn("assistant", "", _call(1), _call(2)), _result(2), _u(2)],
    "no result": [_u(1), _turn("assistant", "", _call(1)), _u(2)],
    "a call at the end": [_u(1), _turn("assistant", "", _call(1))],
    "a user after a result": [_u(1), _turn("assistant", "", _call(1)), _result(1), _u(2)],
}


class _Tokenizer:
    """The demo's tokenizer with another template, as far as the renderer needs it."""

    has_chat_template = True
    bos_token = None

    def __init__(self, template: str) -> None:
        self._inner = AutoTokenizer.from_pretrained(str(DEMO_FOLDER))
        self._template = template

    def get_vocab(self) -> dict[str, int]:
        vocabulary: dict[str, int] = self._inner.get_vocab()
        return vocabulary

    def encode(self, text: str, **arguments: Any) -> Any:
        return self._inner.encode(text, **arguments)

    def apply_chat_template(self, messages: list[dict[str, Any]], **arguments: Any) -> Any:
        return self._inner.apply_chat_template(messages, chat_template=self._template, **arguments, return_dict=False)


def _missing(shown: str, messages: list[Message], tools: list[Tool]) -> list[str]:
    """Words of the client's that are not in the prompt."""
    words = [word for message in messages for word in message.content.split() if word.startswith("qz")]
    words += [text for m in messages for c in m.tool_calls for text in (c.name, json.loads(c.arguments)["city"])]
    words += [text for tool in tools for text in (tool.name, tool.description)]
    return [word for word in words if word not in shown]


def check_template(template: str) -> list[str]:
    """What raises and what is lost, a line each."""
    renderer = PromptRenderer(_Tokenizer(template), 1_000_000, 10**9)
    problems = []
    for offered, conversations in (([], _PLAIN), (_TOOLS, _WITH_TOOLS)):
        for name, messages in conversations.items():
            for thinking in (None, False) if name == "three turns" else (None,):
                request = GenerationRequest(messages=messages, tools=offered, thinking=thinking)
                try:
                    shown = renderer.count(request)[1]
                except MlxRouterError as error:
                    problems.append(f"{name}: raises: {error.message}")
                    continue
                if missing := _missing(shown, messages, offered):
                    problems.append(f"{name}: lost: {' '.join(missing)}")
    return problems


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    files = sorted(parser.parse_args().folder.glob("*.jinja"))
    total = 0
    for file in files:
        problems = check_template(file.read_text(encoding="utf-8"))
        total += len(problems)
        for problem in problems:
            print(f"{file.name}: {problem}")
    count = len(_PLAIN) + len(_WITH_TOOLS)
    print(f"{len(files)} templates, {count} conversations each, {total} problems")
    return 1 if total or not files else 0


if __name__ == "__main__":
    sys.exit(main())
