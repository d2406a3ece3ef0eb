"""What importing does, and what a running router has imported."""

from __future__ import annotations

import ast
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

from mlx_router_server.app import create_app, create_app_from_environment
from mlx_router_server.settings import Settings
from mlx_router_server.version import __version__
from tests.support.router import running_router
from tests.tiny_models.script import GREETING

_ROOT = Path(__file__).parents[2]
_PACKAGES = {"router": "mlx_router_server", "worker": "mlx_router_worker", "shared": "mlx_router_shared"}


def _modules() -> list[str]:
    found = []
    for folder, package in _PACKAGES.items():
        path = str(_ROOT / folder / package)
        found += [package, *(m.name for m in pkgutil.walk_packages([path], f"{package}."))]
    return [name for name in found if not name.endswith("__main__")]


@pytest.mark.req("R18", "R24")
def test_importing_every_module_starts_nothing() -> None:
    code = """
import importlib, os, sys, threading
before = set(os.listdir("/dev/fd"))
for name in sys.argv[1:]:
    importlib.import_module(name)
assert threading.active_count() == 1, threading.enumerate()
assert set(os.listdir("/dev/fd")) == before, "a descriptor was opened"
print("mlx" in sys.modules)
"""
    brings_mlx = ("mlx_router_worker.engines.", "mlx_router_worker.generation.", "mlx_router_worker.fork_server")
    names = [name for name in _modules() if not name.startswith(brings_mlx)]
    assert len(names) > 50
    done = subprocess.run(
        [sys.executable, "-P", "-c", code, *names], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout) == (0, "False\n"), done.stderr


@pytest.mark.req("R34")
def test_a_running_router_has_imported_neither_mlx_nor_transformers(home: Path) -> None:
    python = [sys.executable, "-P", "-X", "importtime"]
    with running_router(home, python=python) as router:
        assert router.generate("demo", prompt="Hello!")["response"] == GREETING
        imported = {
            line.rpartition("|")[2].strip().partition(".")[0] for line in router.lines if "import time:" in line
        }
    assert {"starlette", "uvicorn", "zmq"} <= imported
    assert not imported & {"mlx", "mlx_lm", "transformers", "numpy", "tokenizers", "mlx_router_worker"}
    assert not imported & {"huggingface_hub", "rich", "argcomplete"}, "they are for jobs and for commands"


def test_a_folder_of_the_user_is_not_imported_from(home: Path, tmp_path: Path) -> None:
    """A queue.py beside the user must not be taken for the standard one, by the router or by its workers."""
    for name in ("worker.py", "queue.py", "mlx.py", "shared/__init__.py", "worker/__init__.py", "router/__init__.py"):
        path = tmp_path / name if name != "worker/__init__.py" else tmp_path / "sub" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("raise SystemExit('imported from the folder of the user')\n")
    with running_router(home, cwd=tmp_path) as router:
        assert router.generate("demo", prompt="Hello!")["response"] == GREETING


@pytest.mark.req("R22")
@pytest.mark.parametrize(
    "path", sorted(p for f, n in _PACKAGES.items() for p in (_ROOT / f / n).rglob("*.py")), ids=str
)
def test_no_module_keeps_mutable_state(path: Path) -> None:
    """Module-level names are constants: in capitals, final, private types, or the few that tools need."""
    for node in ast.parse(path.read_text()).body:
        targets = (
            node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        )
        for target in targets:
            assert isinstance(target, ast.Name), ast.dump(target)
            name = target.id
            constant = name.isupper() or name in ("__all__", "__version__", "log") or name.lstrip("_")[:1].isupper()
            assert constant, f"{path.name}: {name}"
    if path.name == "__main__.py":
        body = [node for node in ast.parse(path.read_text()).body if not isinstance(node, ast.Expr | ast.ImportFrom)]
        assert len(body) == 1, "one call and nothing else"


@pytest.mark.req("R22")
def test_the_console_command_and_the_factory_are_the_same_program(monkeypatch: pytest.MonkeyPatch) -> None:
    script = Path(sys.executable).with_name("mlx-router")
    done = subprocess.run([str(script), "version"], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.startswith(f"mlx-router {__version__}\n")
    monkeypatch.setenv("MLX_ROUTER_HOME", "/nonexistent")
    made, built = create_app_from_environment(), create_app(Settings())
    assert [getattr(r, "path", "") for r in made.routes] == [getattr(r, "path", "") for r in built.routes]
