"""What the program is made of: nothing comes in unseen, nothing is run when it is installed, and the versions that are
declared are the versions that are tested."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from mlx_router_server.settings import Settings
from mlx_router_server.settings_layers import load_settings
from tests.meta.count import FLOOR, check_count
from tests.meta.render_docs import ROOT

_PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
_CONFIGS = sorted((ROOT / "tests" / "meta" / "configs").glob("*.toml"))
_ALLOWED = {
    line.split("#")[0].strip()
    for line in (ROOT / "tests" / "meta" / "dependencies.txt").read_text().splitlines()
    if line.split("#")[0].strip()
}


def _resolved(name: str, extras: frozenset[str], seen: set[tuple[str, frozenset[str]]]) -> set[str]:
    """Everything that an installation brings along, on this machine."""
    if (name, extras) in seen:
        return set()
    seen.add((name, extras))
    found = {name}
    for text in importlib.metadata.requires(name) or []:
        requirement = Requirement(text)
        marker = requirement.marker
        if marker is not None and not any(marker.evaluate({"extra": extra}) for extra in extras or {""}):
            continue
        try:
            importlib.metadata.distribution(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            continue  # for another platform, as a marker of its own says
        found |= _resolved(canonicalize_name(requirement.name), frozenset(requirement.extras), seen)
    return found


@pytest.mark.req("R34")
def test_nothing_is_installed_that_is_not_on_the_list() -> None:
    """A new line in dependencies.txt is a decision that a reviewer sees."""
    resolved = _resolved("mlx-router-server", frozenset(), set())
    assert len(resolved) > 20
    assert resolved - _ALLOWED == set()


@pytest.mark.req("R34")
def test_installing_runs_no_code_of_ours() -> None:
    assert _PROJECT["build-system"]["build-backend"] == "hatchling.build"
    assert "hooks" not in _PROJECT["tool"]["hatch"].get("build", {})
    for target in _PROJECT["tool"]["hatch"]["build"]["targets"].values():
        assert "hooks" not in target
    assert not list(ROOT.glob("setup.py")) + list(ROOT.glob("hatch_build.py")) + list(ROOT.glob("*.pth"))
    assert "Private :: Do Not Upload" in _PROJECT["project"]["classifiers"]


@pytest.mark.req("R34")
def test_dependencies_are_bounded_and_few() -> None:
    names = [Requirement(text).name for text in _PROJECT["project"]["dependencies"]]
    assert len(set(names)) <= 16
    for text in _PROJECT["project"]["dependencies"]:
        assert Requirement(text).specifier, text


@pytest.mark.req("R37")
def test_the_declared_versions_are_those_that_are_tested() -> None:
    declared = {
        text.rpartition(" ")[2] for text in _PROJECT["project"]["classifiers"] if re.search(r":: 3\.\d+$", text)
    }
    makefile = (ROOT / "Makefile").read_text()
    match = re.search(r"^PYTHONS \?= (.*)$", makefile, re.MULTILINE)
    assert match is not None
    assert set(match[1].split()) == declared
    assert _PROJECT["project"]["requires-python"] == f">={min(declared, key=lambda text: int(text.split('.')[1]))}"
    assert "test-versions" in (ROOT / ".ci" / "run").read_text()


@pytest.mark.req("R38")
@pytest.mark.parametrize(
    ("output", "status", "complaint"),
    [
        (f"{FLOOR} tests collected in 3.2s", 0, ""),
        (f"{FLOOR + 500}/{FLOOR + 900} tests collected (400 deselected) in 3.2s", 0, ""),
        (f"{FLOOR - 1} tests collected in 3.2s", 0, "fewer"),
        (f"{FLOOR - 1}/{FLOOR + 9} tests collected (10 deselected) in 3.2s", 0, "fewer"),
        (f"{FLOOR} tests collected, 1 error in 3.2s", 2, "error"),
        ("no tests collected in 0.1s", 5, "error"),
        ("nonsense", 0, "no count"),
    ],
)
def test_the_number_of_tests_only_grows(output: str, status: int, complaint: str) -> None:
    assert complaint in check_count(output, status)
    assert bool(complaint) == bool(check_count(output, status))


@pytest.mark.req("R38")
def test_a_warning_fails_a_test_and_ci_counts() -> None:
    """Among them coroutines that nobody awaits and sockets that nobody closes."""
    assert _PROJECT["tool"]["pytest"]["ini_options"]["filterwarnings"] == ["error"]
    assert re.search(r"^check:.*\bcount\b", (ROOT / "Makefile").read_text(), re.MULTILINE)


@pytest.mark.req("R43")
@pytest.mark.parametrize(
    "path", sorted((ROOT / "tests" / "meta" / "configs").glob("*.toml")), ids=lambda path: path.name
)
def test_configurations_of_earlier_versions_still_load(path: Path) -> None:
    """Each release leaves one behind; what it said is what holds."""
    settings = load_settings({}, {"MLX_ROUTER_HOME": "/nonexistent"}, path)
    assert isinstance(settings, Settings)
    said = tomllib.loads(path.read_text())
    for name in said.keys() - {"version", "models", "name_map", "model_aliases"}:
        assert settings.origins[name] == str(path)
    assert set(settings.models) == set(said.get("models", {}))


@pytest.mark.req("R43")
def test_new_abilities_are_off_or_safe_by_default() -> None:
    settings = Settings()
    assert not settings.allow_download
    assert not settings.insecure_bind
    assert not settings.strict
    assert settings.host == "127.0.0.1"
    assert (ROOT / "CHANGELOG.md").read_text().startswith("# Changes")
    assert _CONFIGS


@pytest.mark.req("R24")
@pytest.mark.parametrize(
    "path",
    sorted(path for folder in ("router", "worker", "shared") for path in (ROOT / folder).rglob("*.py")),
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_no_module_of_ours_is_imported_lazily(path: Path) -> None:
    """A name that is missing has to fail when the program starts, not when the line is reached. Only the command line
    imports the server when it starts one."""
    tree = ast.parse(path.read_text())
    allowed = "mlx_router_server.cli.start" if path.parts[-2:] == ("cli", "main.py") else None
    for function in ast.walk(tree):
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
            for node in ast.walk(function):
                if isinstance(node, ast.ImportFrom) and node.module != allowed:
                    assert not (node.module or "").startswith("mlx_router_"), f"{path.name}:{node.lineno}"


_NUMBER = re.compile(
    r"\d\s?(?:ms|tokens/s|tok/s)\b|\d\s?(?:x|times) (?:faster|slower)|\d\s?% (?:faster|slower|of the speed)"
)
_GENERATED = {"benchmarks.md", "benchmarks-swaps.md", "cli.md"}


def _paragraphs() -> list[tuple[str, str]]:
    found = []
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        if path.name in _GENERATED:
            continue
        for section in re.split(r"^(?=## )", path.read_text(), flags=re.MULTILINE):
            if _NUMBER.search(section):
                found.append((path.name, section))
    return found


@pytest.mark.req("R36")
def test_figures_say_where_they_come_from() -> None:
    """A section with a figure of speed names the command that measured it and the file with machine and date."""
    sections = _paragraphs()
    assert any(name == "README.md" for name, _ in sections)
    for name, section in sections:
        title = section.splitlines()[0]
        assert "make bench" in section, f"{name}, {title}: which command measured it?"
        assert "benchmarks" in section, f"{name}, {title}: in which file are machine and date?"


@pytest.mark.req("R36")
@pytest.mark.parametrize("name", ["benchmarks.md", "benchmarks-swaps.md"])
def test_result_files_name_command_machine_versions_and_date(name: str) -> None:
    text = (ROOT / "docs" / name).read_text()
    assert re.search(r"\b2\d{3}-\d\d-\d\d\b", text)
    assert "make bench" in text
    assert re.search(r"\d+ cores?", text)
    assert re.search(r"mlx[- ]?\w* \d+\.\d+", text)
