"""Which sampling parameters hold when the client, the model's author and the API each said something, or nothing."""

from __future__ import annotations

import json
from pathlib import Path

from mlx_router_shared.generation import Sampling

__all__ = ["first_said", "read_generation_config"]


def first_said(*choices: Sampling) -> Sampling:
    """Field by field the first that is not None."""
    said = {}
    for name in Sampling.__struct_fields__:
        values = [getattr(choice, name) for choice in choices]
        said[name] = next((value for value in values if value not in (None, {})), values[-1])
    return Sampling(**said)


def read_generation_config(path: Path) -> Sampling:
    """The model author's sampling defaults, which mlx-lm does not read."""
    try:
        config = json.loads((path / "generation_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return Sampling()
    if not isinstance(config, dict):
        return Sampling()
    if config.get("do_sample") is False:
        return Sampling(temperature=0.0)

    def number(name: str) -> float | None:
        value = config.get(name)
        return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None

    top_k = number("top_k")
    return Sampling(
        temperature=number("temperature"),
        top_p=number("top_p"),
        top_k=int(top_k) if top_k is not None else None,
        min_p=number("min_p"),
        repeat_penalty=number("repetition_penalty"),
    )
