"""Which architectures the installed mlx-lm and mlx-vlm can run, found without importing them (and so mlx)."""

from __future__ import annotations

import ast
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Final

__all__ = ["ENCODERS", "has_vlm", "servable_architectures", "vision_architectures"]

ENCODERS: Final = frozenset({"bert", "xlm-roberta", "xlm_roberta", "modernbert"})
"""Encoders that mlx-vlm has; rerankers are built on the same."""
# Embedders, detectors and segmenters among mlx-vlm's models with a vision part.
_NOT_FOR_CHAT: Final = frozenset(
    {"siglip", "colidefics3", "colqwen2_5", "rfdetr", "rt_detr_v2", "sam3", "sam3_1", "sam3d_body"}
)


@cache
def servable_architectures() -> frozenset[str]:
    """The ``model_type`` values that mlx-lm has a module for, its renamed ones included; empty when it is missing."""
    spec = find_spec("mlx_lm")  # finds a top-level package without running it
    if spec is None or spec.origin is None:
        return frozenset()
    package = Path(spec.origin).parent
    modules = {path.stem for path in (package / "models").glob("*.py") if not path.stem.startswith("_")}
    return frozenset(modules | set(_renamed_to(package / "utils.py")))


def _renamed_to(source: Path) -> dict[str, str]:
    """``MODEL_REMAPPING``, a literal in the utils.py of both packages: other names of model types to theirs."""
    try:
        tree = ast.parse(source.read_text(encoding="utf-8"))
    except (OSError, SyntaxError):
        return {}
    for node in tree.body:
        if isinstance(node, ast.Assign) and any(
            isinstance(target, ast.Name) and target.id == "MODEL_REMAPPING" for target in node.targets
        ):
            names = ast.literal_eval(node.value)
            return names if isinstance(names, dict) else {}
    return {}


@cache
def has_vlm() -> bool:
    """Whether mlx-vlm is there: it comes with the extras ``encoders`` and ``vision``."""
    return find_spec("mlx_vlm") is not None


@cache
def vision_architectures() -> frozenset[str]:
    """The ``model_type`` values of chat models that mlx-vlm can show images to, its renamed ones included."""
    spec = find_spec("mlx_vlm")
    if spec is None or spec.origin is None:
        return frozenset()
    package = Path(spec.origin).parent
    found = set()
    for init in (package / "models").glob("*/__init__.py"):
        text = init.read_text(encoding="utf-8", errors="replace")
        sees = "VisionModel" in text and "LanguageModel" in text
        if sees and not init.parent.name.endswith("_embedding") and init.parent.name not in _NOT_FOR_CHAT:
            found.add(init.parent.name)
    renamed = _renamed_to(package / "utils.py")
    return frozenset(found | {old for old, new in renamed.items() if new in found})
