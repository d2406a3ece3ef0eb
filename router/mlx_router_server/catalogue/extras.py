"""The packages that some kinds of models need, and how they are installed."""

from __future__ import annotations

import shlex
import sys
from importlib.metadata import PackageNotFoundError, requires
from importlib.util import find_spec
from pathlib import Path
from typing import Final

__all__ = ["install_command"]

_DISTRIBUTION: Final = "mlx-router-server"


def install_command(extra: str) -> str:
    """Return the command that brings an extra's packages into this very installation: the package index need not know
    this program, and a bare ``pip`` may belong to another environment."""
    try:
        wanted = requires(_DISTRIBUTION) or []
    except PackageNotFoundError:
        wanted = []
    marks = (f"extra == '{extra}'", f'extra == "{extra}"')
    packages = [line.partition(";")[0].strip() for line in wanted if any(mark in line for mark in marks)]
    names = " ".join(shlex.quote(package) for package in packages or [f"{_DISTRIBUTION}[{extra}]"])
    prefix = Path(sys.prefix)
    if "pipx" in prefix.parts:
        return f"pipx inject {prefix.name} {names}"
    if find_spec("pip") is None:
        return f"uv pip install --python {shlex.quote(sys.executable)} {names}"
    return f"{shlex.quote(sys.executable)} -m pip install {names}"
