"""The part of Go's text templates that prompts are written in, for ``template`` of /api/generate.

Fields (``.System``, ``.Prompt``, ``.Response``, ``.Messages`` with ``.Role`` and ``.Content``), ``if``, ``else if``,
``range``, ``eq``, ``ne``, ``and``, ``or``, ``not``, ``len``, string literals, comments and the ``-`` that trims white
space. Anything else is refused by name. The text of a template is data of a request: nothing of it is ever executed,
and its nesting, its steps and what it makes are bounded, since a few nested ranges make any amount of text.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from mlx_router_shared.errors import InvalidRequest

__all__ = ["render_prompt", "render_template"]

_WORD: Final = re.compile(r'\s*("(?:[^"\\]|\\.)*"|`[^`]*`|\(|\)|[^\s()]+)')
_NUMBER: Final = re.compile(r"-?[0-9]{1,18}")
_MOST_CHARACTERS: Final = 100_000
_DEEPEST: Final = 20
_MOST_STEPS: Final = 100_000
_MOST_OUTPUT: Final = 16 * 2**20  # characters


@dataclass(slots=True)
class _Run:
    """One rendering: the values at the root, and how much has been done."""

    root: dict[str, Any]
    steps: int = 0
    made: int = 0

    def join(self, nodes: list[Node], dot: Any) -> str:
        self.steps += len(nodes) + 1
        if self.steps > _MOST_STEPS:
            raise _error("it takes too many steps")
        return "".join([node(dot, self) for node in nodes])

    def shown(self, text: str) -> str:
        self.made += len(text)
        if self.made > _MOST_OUTPUT:
            raise _error("it makes too much text")
        return text


Node = Callable[[Any, _Run], str]
"""Renders itself for the dot."""
Value = Callable[[Any, _Run], Any]
"""What an expression is for the dot."""


def render_prompt(template: str, system: str, prompt: str) -> str:
    """The prompt of one exchange, up to where the model answers."""
    messages = [{"Role": "system", "Content": system}] if system else []
    values = {
        "System": system, "Prompt": prompt, "Response": "", "Suffix": "", "Tools": [],
        "Messages": [*messages, {"Role": "user", "Content": prompt}],
    }  # fmt: skip
    return render_template(template, values)


def render_template(template: str, values: dict[str, Any]) -> str:
    """Raises ``InvalidRequest`` for what is not understood."""
    if len(template) > _MOST_CHARACTERS:
        raise _error("it is too long")
    nodes, _ = _parse(_tokens(template), 0, (), 0)
    return _Run(values).join(nodes, values)


def _error(text: str) -> InvalidRequest:
    return InvalidRequest(f"template error: {text}", param="template")


def _tokens(template: str) -> list[tuple[str, str]]:
    """(``text``, …) and (``action``, …), trimmed as the dashes say."""
    out: list[tuple[str, str]] = []
    at, trim = 0, False
    while (opened := template.find("{{", at)) >= 0:
        closed = template.find("}}", opened)
        if closed < 0:
            raise _error("an action is not closed")
        text, action = template[at:opened], template[opened + 2 : closed]
        text = text.lstrip() if trim else text
        before, trim = action[:1] == "-" and action[1:2].isspace(), action[-1:] == "-" and action[-2:-1].isspace()
        action = action[before : len(action) - trim].strip()
        out.append(("text", text.rstrip() if before else text))
        if not action.startswith("/*"):
            out.append(("action", action))
        at = closed + 2
    out.append(("text", template[at:].lstrip() if trim else template[at:]))
    return out


def _parse(tokens: list[tuple[str, str]], at: int, ends: tuple[str, ...], depth: int) -> tuple[list[Node], int]:
    """Nodes up to one of ``ends``; the index of that."""
    if depth > _DEEPEST:
        raise _error("it is nested too deeply")
    nodes: list[Node] = []
    while at < len(tokens):
        kind, text = tokens[at]
        word = text.partition(" ")[0]
        if kind == "text":
            nodes.append(_constant(text))
        elif word in ends:
            return nodes, at
        elif word == "if":
            node, at = _parse_if(tokens, at, depth)
            nodes.append(node)
        elif word == "range":
            node, at = _parse_range(tokens, at, depth)
            nodes.append(node)
        elif word in ("else", "end", "with", "define", "template", "block", "break", "continue") or ":=" in text:
            raise _error(f"{text!r} is not supported here")
        else:
            nodes.append(_shown(_expression(text)))
        at += 1
    if ends:
        raise _error("an if or range is not ended")
    return nodes, at


def _parse_if(tokens: list[tuple[str, str]], at: int, depth: int) -> tuple[Node, int]:
    condition = _expression(tokens[at][1].removeprefix("else").strip().removeprefix("if").strip())
    then, at = _parse(tokens, at + 1, ("else", "end"), depth + 1)
    otherwise: list[Node] = []
    if tokens[at][1].split() == ["else"]:
        otherwise, at = _parse(tokens, at + 1, ("end",), depth + 1)
    elif tokens[at][1] != "end":
        node, at = _parse_if(tokens, at, depth + 1)
        otherwise = [node]

    def render(dot: Any, run: _Run) -> str:
        return run.join(then if condition(dot, run) else otherwise, dot)

    return render, at


def _parse_range(tokens: list[tuple[str, str]], at: int, depth: int) -> tuple[Node, int]:
    over = _expression(tokens[at][1].removeprefix("range").strip())
    body, at = _parse(tokens, at + 1, ("end",), depth + 1)

    def render(dot: Any, run: _Run) -> str:
        items = over(dot, run)
        if not isinstance(items, list):
            raise _error("range needs a list")
        return "".join([run.join(body, item) for item in items])

    return render, at


def _constant(text: str) -> Node:
    return lambda dot, run: run.shown(text)


def _shown(value: Value) -> Node:
    def render(dot: Any, run: _Run) -> str:
        found = value(dot, run)
        return run.shown(found if isinstance(found, str) else "" if found is None else str(found).lower())

    return render


def _expression(text: str) -> Value:
    words: list[str] = []
    at = 0
    while at < len(text):
        match = _WORD.match(text, at)
        if match is None:
            break
        words.append(match[1])
        at = match.end()
    if not words:
        raise _error("an action is empty")
    if words.count("(") > _DEEPEST:
        raise _error("it is nested too deeply")
    value, rest = _call(words)
    if rest:
        raise _error(f"{text!r} is not supported")
    return value


def _call(words: list[str]) -> tuple[Value, list[str]]:
    """A function with its arguments, or one value."""
    name, rest = words[0], words[1:]
    if name not in _FUNCTIONS:
        return _value(words)
    arguments: list[Value] = []
    while rest and rest[0] != ")":
        argument, rest = _value(rest)
        arguments.append(argument)
    function = _FUNCTIONS[name]
    return (lambda dot, run: function([argument(dot, run) for argument in arguments])), rest


def _value(words: list[str]) -> tuple[Value, list[str]]:
    word, rest = words[0], words[1:]
    if word == "(":
        inner, rest = _call(rest) if rest else (None, rest)
        if inner is None or not rest or rest[0] != ")":
            raise _error("a bracket is not closed")
        return inner, rest[1:]
    if word[0] in '"`':
        constant = word[1:-1].replace('\\"', '"').replace("\\n", "\n") if word[0] == '"' else word[1:-1]
        return (lambda dot, run: constant), rest
    if word in ("true", "false"):
        return (lambda dot, run: word == "true"), rest
    if _NUMBER.fullmatch(word):
        return (lambda dot, run: int(word)), rest
    path = word.removeprefix("$").split(".")
    if path[0] or not (word == "." or all(part.isidentifier() for part in path[1:])):
        raise _error(f"{word!r} is not supported")
    from_root = word.startswith("$")

    def look(dot: Any, run: _Run) -> Any:
        value = run.root if from_root else dot
        for part in path[1:]:
            if part:
                value = value.get(part, "") if isinstance(value, dict) else ""
        return value

    return look, rest


def _first_true(values: list[Any]) -> Any:
    return next((value for value in values if value), values[-1] if values else False)


def _first_false(values: list[Any]) -> Any:
    return next((value for value in values if not value), values[-1] if values else False)


_FUNCTIONS: Final[dict[str, Callable[[list[Any]], Any]]] = {
    "eq": lambda values: len(values) > 1 and any(values[0] == other for other in values[1:]),
    "ne": lambda values: len(values) > 1 and values[0] != values[1],
    "and": _first_false,
    "or": _first_true,
    "not": lambda values: not (values and values[0]),
    "len": lambda values: len(values[0]) if values and isinstance(values[0], list | str) else 0,
}
