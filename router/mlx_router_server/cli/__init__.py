"""The command line. One file per group of commands; ``main`` is what ``mlx-router`` runs."""

from mlx_router_server.cli.main import main

__all__ = ["main"]
