"""What ``config.json`` says about a language model, under whichever names its architecture uses."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

__all__ = ["context_tokens", "text_config"]

_TEXT_CONFIGS: Final = ("text_config", "llm_config", "language_config")
_CONTEXT_NAMES: Final = (
    "max_position_embeddings",
    "n_positions",
    "max_sequence_length",
    "max_seq_len",
    "max_seq_length",
    "seq_length",
    "model_max_length",
    "n_ctx",
)
_DEFAULT_CONTEXT: Final = 4096
_MOST_CONTEXT: Final = 2**31


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of a configuration that is about the language model; models that see or hear have one of its own."""
    for name in _TEXT_CONFIGS:
        part = config.get(name)
        if isinstance(part, dict):
            return part
    return config


def context_tokens(config: Mapping[str, Any]) -> int:
    """Return the longest prompt and answer in tokens that a model was made for.

    What its configuration leaves out is the default of its architecture in mlx-lm, or else 4,096.
    """
    text = text_config(config)
    for part in (text, config):
        for name in _CONTEXT_NAMES:
            value = part.get(name)
            if isinstance(value, int | float) and not isinstance(value, bool) and 1 <= value < _MOST_CONTEXT:
                return int(value)
    for part in (text, config):
        model_type = part.get("model_type")
        if isinstance(model_type, str) and (default := _architecture_default(model_type)):
            return default
    return _DEFAULT_CONTEXT


@lru_cache(maxsize=256)
def _architecture_default(model_type: str) -> int:
    """Read from the source of mlx-lm without importing it, which the router does not; 0 where it has none."""
    package = find_spec("mlx_lm")
    if package is None or not package.submodule_search_locations or not model_type.isidentifier():
        return 0
    source = Path(package.submodule_search_locations[0]) / "models" / f"{model_type}.py"
    try:
        module = ast.parse(source.read_text(encoding="utf-8"))
    except (OSError, ValueError, SyntaxError):
        return 0
    for statement in module.body:
        if isinstance(statement, ast.ClassDef) and statement.name == "ModelArgs":
            for field in statement.body:
                if (
                    isinstance(field, ast.AnnAssign)
                    and isinstance(field.target, ast.Name)
                    and field.target.id in _CONTEXT_NAMES
                    and isinstance(field.value, ast.Constant)
                    and isinstance(field.value.value, int)
                ):
                    return field.value.value
    return 0
