"""Entry point of ``python -P -m mlx_router_server``."""

from mlx_router_server.cli import main

if __name__ == "__main__":
    main()
