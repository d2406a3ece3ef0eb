"""A LoRA adapter for any small model, with random weights that are large enough to change every answer."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.tuner.utils import linear_to_lora_layers
from mlx_lm.utils import load_model

__all__ = ["make_random_adapter"]


def make_random_adapter(base: Path, folder: Path, *, layers: int = 2, rank: int = 4, seed: int = 0) -> None:
    """Write ``adapter_config.json`` and ``adapters.safetensors`` as mlx-lm's own tuner writes them."""
    mx.random.seed(seed)
    parameters = {"rank": rank, "scale": 20.0, "dropout": 0.0}
    model, _ = load_model(base, lazy=True)
    model.freeze()
    linear_to_lora_layers(model, layers, parameters)
    weights = {name: mx.random.normal(array.shape) for name, array in tree_flatten(model.trainable_parameters())}
    folder.mkdir(parents=True)
    mx.save_safetensors(str(folder / "adapters.safetensors"), weights)
    config = {"fine_tune_type": "lora", "num_layers": layers, "lora_parameters": parameters}
    (folder / "adapter_config.json").write_text(json.dumps(config))
