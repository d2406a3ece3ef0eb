"""The index of promises and their tests: CI fails when a promise has no test, or a test names none that exists."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests.meta.render_docs import ROOT
from tests.meta.requirements import LATER, REQUIREMENTS, marked_tests

_TESTS = marked_tests(ROOT)
_OPEN_TO_ROUTES = {"keepalive", "memory", "spec", "states", "views"}


@pytest.mark.req("R35")
@pytest.mark.parametrize("number", sorted(set(REQUIREMENTS) - LATER))
def test_every_promise_in_force_has_a_test(number: str) -> None:
    assert _TESTS.get(number), f"no test is marked with {number}: {REQUIREMENTS[number]}"


@pytest.mark.req("R35")
def test_every_mark_names_a_promise() -> None:
    assert set(_TESTS) <= set(REQUIREMENTS)
    assert set(REQUIREMENTS) == {f"R{number}" for number in range(1, 53)}


@pytest.mark.req("R39")
@pytest.mark.parametrize(
    "path", sorted((ROOT / "router" / "mlx_router_server" / "api").glob("*.py")), ids=lambda path: path.name
)
def test_routes_know_words_of_the_lifecycle_and_none_of_its_workings(path: Path) -> None:
    """Specs, states and views are open to everybody; the machine, its books and its rooms to the supervisor alone."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("mlx_router_server.lifecycle"):
            assert (node.module or "").rpartition(".")[2] in _OPEN_TO_ROUTES, f"{path.name}: {node.module}"
