"""Kept states of prompts, so that none is processed from its beginning again. Pure: no module here imports mlx."""
