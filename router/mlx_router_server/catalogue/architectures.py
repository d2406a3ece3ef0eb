"""Which architectures the installed mlx-lm can run, found without importing it: it would bring in mlx."""

from __future__ import annotations

import ast
from functools import cache
from importlib.util import find_spec
from pathlib import Path

__all__ = ["servable_architectures"]


@cache
def servable_architectures() -> frozenset[str]:
    """The ``model_type`` values that mlx-lm has a module for, its renamed ones included; empty when it is missing."""
    spec = find_spec("mlx_lm")  # finds a top-level package without running it
    if spec is None or spec.origin is None:
        return frozenset()
    package = Path(spec.origin).parent
    modules = {path.stem for path in (package / "models").glob("*.py") if not path.stem.startswith("_")}
    return frozenset(modules | _renamed(package / "utils.py"))


def _renamed(source: Path) -> set[str]:
    """The keys of ``MODEL_REMAPPING``, a literal in mlx_lm/utils.py."""
    try:
        tree = ast.parse(source.read_text(encoding="utf-8"))
    except (OSError, SyntaxError):
        return set()
    for node in tree.body:
        if isinstance(node, ast.Assign) and any(
            isinstance(target, ast.Name) and target.id == "MODEL_REMAPPING" for target in node.targets
        ):
            names = ast.literal_eval(node.value)
            return set(names) if isinstance(names, dict) else set()
    return set()
