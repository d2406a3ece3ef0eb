"""The command line as a user runs it, in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from tests.support.router import RouterProcess

__all__ = ["command", "command_on"]


def command(
    *arguments: str,
    port: int | None = None,
    text: str = "",
    home: Path = Path("/nonexistent"),
    environment: dict[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """``mlx-router`` with these arguments, ``text`` on its standard input, and no settings but those of ``home``."""
    environment = {**os.environ, "MLX_ROUTER_HOME": str(home), **(environment or {})}
    if port is not None:
        environment["MLX_ROUTER_PORT"] = str(port)
    return subprocess.run(
        [sys.executable, "-P", "-m", "mlx_router_server", *arguments],
        input=text, capture_output=True, text=True, timeout=60, env=environment, check=False,
    )  # fmt: skip


def command_on(router: RouterProcess, *arguments: str, **more: Any) -> subprocess.CompletedProcess[str]:
    """A command that talks to this router; ``more`` as for ``command``."""
    return command(*arguments, port=urlsplit(router.url).port, **more)
