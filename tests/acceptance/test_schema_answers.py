"""What becomes of an answer under a schema, with parrots that write an exact text."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.http import call
from tests.support.router import RouterProcess, running_router
from tests.tiny_models.parrot import make_parrot


def _object(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}


_GRID = [f"[{','.join(['0'] * 8)}]{' ' * (number % 2)}" for number in range(2)]
_CASES: dict[str, tuple[list[str], dict[str, Any]]] = {
    "email": (['{"email": ', '"ann@', "example", '.com"', "}"], _object(email={"type": "string", "format": "email"})),
    "price": (['{"price": ', "2.75", " }"], _object(price={"type": "number", "exclusiveMinimum": 0})),
    "debt": (['{"n": ', "-3", "}"], _object(n={"type": "integer", "exclusiveMaximum": 0})),
    "zeros": (['{"hourly": [', "0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, ", "0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0", "]}"],
              _object(hourly={"type": "array", "items": {"type": "integer"}})),
    "rule": (['{"rule": "', "=" * 40, "=" * 41, '"}'], _object(rule={"type": "string"})),
    "duration": (['{"t": "', "P1", "DT2H", '"}'], _object(t={"type": "string", "format": "duration"})),
}  # fmt: skip


@pytest.fixture(scope="module")
def router(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RouterProcess]:
    root = tmp_path_factory.mktemp("parrots")
    for name, (pieces, _) in _CASES.items():
        make_parrot(root / name, pieces)
    make_parrot(root / "endless", ['{"text": "', "on ", "and "], ends=False)
    with running_router(tmp_path_factory.mktemp("home"), "--models-dir", str(root)) as found:
        yield found


@pytest.mark.parametrize("name", _CASES)
@pytest.mark.parametrize("budget", [None, "exact", 1, 20, 256, 300])
def test_an_answer_that_ends_by_itself_is_the_models_own(router: RouterProcess, name: str, budget: Any) -> None:
    """With no limit, and with limits from exactly enough to plenty; a number is what the limit has to spare."""
    pieces, schema = _CASES[name]
    limit = None if budget is None else len(pieces) + (0 if budget == "exact" else budget)
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    messages = [{"role": "user", "content": "go"}]
    body = {"model": name, "messages": messages, "response_format": form, "max_tokens": limit}
    reply = call(router, "POST", "/v1/chat/completions", body).json()
    assert reply["choices"][0]["message"]["content"] == "".join(pieces)
    assert reply["choices"][0]["finish_reason"] == "stop"
    native = call(router, "POST", "/api/chat", {"model": name, "messages": messages, "format": schema, "stream": False,
                                                "options": {"num_predict": limit or -1}}).json()  # fmt: skip
    assert (native["message"]["content"], native["done_reason"]) == ("".join(pieces), "stop")


def test_an_answer_that_does_not_end_is_brought_to_its_end_within_the_limit(router: RouterProcess) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": _object(text={"type": "string"})}}
    reply = call(router, "POST", "/v1/chat/completions", {
        "model": "endless", "messages": [{"role": "user", "content": "go"}], "response_format": form, "max_tokens": 30,
    }).json()  # fmt: skip
    choice = reply["choices"][0]
    assert set(json.loads(choice["message"]["content"])) == {"text"}
    assert choice["finish_reason"] == "length", "the model would have written more"
    assert 25 <= reply["usage"]["completion_tokens"] <= 30
