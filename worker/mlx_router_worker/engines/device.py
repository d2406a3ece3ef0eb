"""What MLX computes on, asked without computing anything."""

from __future__ import annotations

import mlx.core as mx

__all__ = ["is_cpu_only"]


def is_cpu_only() -> bool:
    """Return whether MLX uses no GPU in this process. Runs no MLX operation."""
    return mx.default_device().type == mx.cpu
