"""Entry point of ``python -P -m mlx_router_worker``."""

from mlx_router_worker.process import main

if __name__ == "__main__":
    main()
