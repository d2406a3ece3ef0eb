"""Model classes, configurations and the files of a model folder, for the trainer and for random models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.utils import _get_classes
from tokenizers import Tokenizer

from tests.tiny_models.tokenizer import write_json

__all__ = ["model_config", "new_model", "save_model"]

_ARCHITECTURES = {
    "qwen3": "Qwen3ForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "llama": "LlamaForCausalLM",
    "smollm3": "SmolLM3ForCausalLM",
}


def model_config(
    architecture: str,
    tokenizer: Tokenizer,
    *,
    hidden: int,
    layers: int,
    intermediate: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    context: int,
    dtype: str,
) -> dict[str, Any]:
    """A ``config.json`` in the transformers layout."""
    config: dict[str, Any] = {
        "architectures": [_ARCHITECTURES[architecture]],
        "model_type": architecture,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "intermediate_size": intermediate,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "rms_norm_eps": 1e-6,
        "vocab_size": tokenizer.get_vocab_size(),
        "max_position_embeddings": context,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "torch_dtype": dtype,
        "bos_token_id": tokenizer.token_to_id("<|endoftext|>"),
        "eos_token_id": tokenizer.token_to_id("<|im_end|>"),
    }
    if architecture != "qwen2":
        config["head_dim"] = head_dim
    return config


def new_model(config: dict[str, Any], seed: int) -> nn.Module:
    """A model with random weights; the same seed gives the same weights."""
    mx.random.seed(seed)
    model_class, args_class = _get_classes(config)
    model: nn.Module = model_class(args_class.from_dict(config))
    return model


def save_model(
    folder: Path, model: nn.Module, config: dict[str, Any], tokenizer: Tokenizer, *, shard_bytes: int = 0
) -> int:
    """Write weights, index, config and generation config. Returns the bytes of weights.

    ``shard_bytes=0`` writes one file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("model*.safetensors*"):
        old.unlink()
    weights: dict[str, mx.array] = dict(tree_flatten(model.parameters()))
    total = sum(array.nbytes for array in weights.values())
    shards: list[dict[str, mx.array]] = [{}]
    size = 0
    for name in sorted(weights):
        array = weights[name]
        if shard_bytes and shards[-1] and size + array.nbytes > shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = array
        size += array.nbytes
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        mx.save_safetensors(str(folder / file), shard, metadata={"format": "mlx"})
        weight_map.update(dict.fromkeys(shard, file))
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    write_json(folder / "model.safetensors.index.json", index)
    write_json(folder / "config.json", dict(sorted(config.items())))
    end, pad = config["eos_token_id"], tokenizer.token_to_id("<|endoftext|>")
    write_json(folder / "generation_config.json", {"eos_token_id": [end, pad], "pad_token_id": pad, "do_sample": False})
    return total
