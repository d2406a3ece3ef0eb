"""The documents say what the code does."""

from __future__ import annotations

import argparse
import re
import tomllib
from pathlib import Path

import pytest

from mlx_router_server.app import create_app
from mlx_router_server.cli.main import build_parser
from mlx_router_server.dialects.fields import FieldRules
from mlx_router_server.settings import Settings, describe_settings
from mlx_router_server.settings_layers import load_settings
from mlx_router_server.version import __version__
from tests.meta.checks import ALL_CHECKS, NOT_HERE, covered_checks
from tests.meta.render_docs import EXAMPLE, FIELD_RULES, ROOT, rendered_documents
from tests.meta.test_app import INFERENCE_ROUTES

_DOCUMENTS = rendered_documents()
_CHECKS = covered_checks(ROOT)


@pytest.mark.parametrize("path", sorted(_DOCUMENTS), ids=lambda path: path.name)
def test_rendered_parts_are_up_to_date(path: Path) -> None:
    assert path.read_text(encoding="utf-8") == _DOCUMENTS[path], "run: make docs"


def test_the_documents_with_rendered_parts_are_there() -> None:
    names = {path.name for path in _DOCUMENTS}
    assert names == {
        "protocol.md", "states.md", "settings.md", "requirements.md", "fields.md", "conformance.md", EXAMPLE.name,
        "mlx-router.service", "mlx-router-system.service", "org.mlx-router.server.agent.plist",
        "org.mlx-router.server.daemon.plist",
    }  # fmt: skip


@pytest.mark.parametrize("rules", FIELD_RULES, ids=lambda rules: rules.route)
def test_each_field_has_one_rule(rules: FieldRules) -> None:
    groups = [set(rules.honoured), set(rules.ignored), set(rules.refused)]
    assert sum(map(len, groups)) == len(set().union(*groups))
    assert set(rules.notes) <= groups[0], "a note is about a field that is honoured"


def test_each_route_with_a_body_has_rules_for_its_fields() -> None:
    paths = {path for rules in FIELD_RULES for path in re.findall(r"/[\w/]+", rules.route)}
    assert paths >= INFERENCE_ROUTES


@pytest.mark.parametrize("check", ALL_CHECKS)
def test_each_check_of_the_lists_has_a_test_or_a_reason(check: str) -> None:
    covered = _CHECKS.get(check, [])
    assert bool(covered) != (check in NOT_HERE), f"{check}: {covered or NOT_HERE.get(check, 'neither')}"


def test_each_mark_names_a_check() -> None:
    assert set(_CHECKS) <= set(ALL_CHECKS)


def test_the_example_configuration_holds_every_setting_at_its_default() -> None:
    data = tomllib.loads(EXAMPLE.read_text(encoding="utf-8"))
    assert set(data) == {"version", *(field.name for field in describe_settings())}
    assert load_settings({}, {"MLX_ROUTER_HOME": "/nonexistent"}, EXAMPLE) == Settings()


def test_the_change_log_knows_this_version() -> None:
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.search(rf"^## (\[Unreleased\]|{re.escape(__version__)})", text, re.MULTILINE)


def test_the_readme_lists_every_route() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for route in create_app(Settings()).routes:
        path = getattr(route, "path", "").replace(":path}", "}")
        assert f"`{path}`" in text, path


def test_the_readme_lists_every_command() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (actions,) = [action for action in build_parser()._actions if isinstance(action, argparse._SubParsersAction)]
    for command in actions.choices:
        if command not in ("serve", "ls"):  # other names of start and list
            assert f"`mlx-router {command}" in text, command


def test_links_between_documents_lead_somewhere() -> None:
    for path in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#]+)\)", path.read_text(encoding="utf-8")):
            if "://" not in target:
                assert (path.parent / target).exists(), f"{path.name}: {target}"
