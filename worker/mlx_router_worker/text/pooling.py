"""From the states of a text to its vector: what the model's sentence-transformers files say, and how texts share steps.

Pure arithmetic on numpy; the states come from an engine.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

__all__ = ["Kind", "Pooling", "batches", "finished", "read_pooling"]

Kind = Literal["lasttoken", "mean", "cls", "max"]


@dataclass(frozen=True, slots=True)
class Pooling:
    """Which states make the vector, and whether it gets unit length."""

    kind: Kind = "lasttoken"
    normalize: bool = True


def read_pooling(folder: Path, default: Kind = "lasttoken") -> Pooling:
    """``modules.json`` and the pooling module's ``config.json``; raises ``ValueError`` for a way that is not known."""
    modules = _read(folder / "modules.json")
    if not isinstance(modules, list):
        pooling = _read(folder / "1_Pooling" / "config.json")
        return Pooling(_kind(pooling, default) if isinstance(pooling, dict) else default)
    kinds = [str(module.get("type", "")).rsplit(".", 1)[-1] for module in modules if isinstance(module, dict)]
    paths = [str(module.get("path", "")) for module in modules if isinstance(module, dict)]
    kind = default
    for name, path in zip(kinds, paths, strict=True):
        if name == "Pooling" and path and ".." not in path and not Path(path).is_absolute():
            pooling = _read(folder / path / "config.json")
            kind = _kind(pooling, default) if isinstance(pooling, dict) else default
    return Pooling(kind, "Normalize" in kinds)


def _kind(config: dict[str, Any], default: Kind) -> Kind:
    modes: dict[str, Kind] = {
        "pooling_mode_lasttoken": "lasttoken",
        "pooling_mode_mean_tokens": "mean",
        "pooling_mode_cls_token": "cls",
        "pooling_mode_max_tokens": "max",
    }
    said = [name for name, value in config.items() if name.startswith("pooling_mode_") and value is True]
    if not said:
        return default
    if len(said) > 1 or said[0] not in modes:
        raise ValueError(f"the pooling {' and '.join(said)} is not supported")
    return modes[said[0]]


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None


def batches(lengths: Sequence[int], most_tokens: int) -> list[int]:
    """Which inputs to compute next: the first that waits, and those of about its length, up to ``most_tokens`` with
    padding. Never empty when there is an input."""
    first = lengths[0]
    by_nearness = sorted(range(len(lengths)), key=lambda at: (at != 0, abs(lengths[at] - first), at))
    chosen: list[int] = []
    longest = 0
    for at in by_nearness:
        longest_then = max(longest, lengths[at])
        if chosen and longest_then * (len(chosen) + 1) > most_tokens:
            break
        chosen.append(at)
        longest = longest_then
    return chosen


def finished(matrix: NDArray[np.float32], dimensions: int | None, normalize: bool) -> NDArray[np.float32]:
    """Vectors, one a row, cut to ``dimensions`` and with unit length if wanted; cut vectors always get unit length."""
    cut = dimensions is not None and dimensions < matrix.shape[1]
    if cut:
        matrix = matrix[:, :dimensions]
    if normalize or cut:
        lengths = np.linalg.norm(matrix, axis=1, keepdims=True)
        matrix = matrix / np.maximum(lengths, np.finfo(np.float32).tiny)
    return np.ascontiguousarray(matrix, dtype="<f4")
