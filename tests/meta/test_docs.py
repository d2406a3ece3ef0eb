"""The documents say what the code does."""

from __future__ import annotations

import argparse
import re
import tomllib
from pathlib import Path

import pytest

from mlx_router_server.app import create_app
from mlx_router_server.cli.main import build_parser
from mlx_router_server.settings import Settings, describe_settings, load_settings
from mlx_router_server.version import __version__
from tests.meta.render_docs import EXAMPLE, ROOT, rendered_documents

_DOCUMENTS = rendered_documents()


@pytest.mark.parametrize("path", sorted(_DOCUMENTS), ids=lambda path: path.name)
def test_rendered_parts_are_up_to_date(path: Path) -> None:
    assert path.read_text(encoding="utf-8") == _DOCUMENTS[path], "run: make docs"


def test_the_documents_with_rendered_parts_are_there() -> None:
    names = {path.name for path in _DOCUMENTS}
    assert names == {"protocol.md", "states.md", "settings.md", "requirements.md", EXAMPLE.name}


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
        path = getattr(route, "path", "").replace("{name:path}", "{name}")
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
