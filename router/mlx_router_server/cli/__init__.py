"""The command line. One file per group of commands; ``main`` is what ``mlx-router`` runs."""

try:
    from mlx_router_server.cli.main import main
except KeyboardInterrupt:  # ctrl-C before the command has begun
    raise SystemExit(130) from None

__all__ = ["main"]
