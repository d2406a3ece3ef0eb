"""The router: one address, no model state. It never imports mlx, mlx_lm, transformers or the worker's package."""
