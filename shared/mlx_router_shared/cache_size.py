"""How much memory a conversation needs, from a model's config.json alone, by the kinds of layers it has.

The router plans loads with it, and the worker admits requests by it until it has measured the caches themselves. Where
a config leaves something open the larger answer is taken.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

__all__ = [
    "CACHE_COPIES",
    "PROCESS_BYTES",
    "SHORTEST_CHUNK",
    "CacheSize",
    "WorkSize",
    "estimate_cache",
    "estimate_work",
]

SHORTEST_CHUNK: Final = 32
"""Tokens of a prompt that a worker processes at once when memory or time is short."""
CACHE_COPIES: Final = 2
"""Old and new buffers of a conversation's caches exist side by side while they grow or its batch changes."""
PROCESS_BYTES: Final = 120 * 2**20
"""Of a process with mlx-lm imported and a tokenizer loaded."""
_LARGEST: Final = 2**40
_MOST_LAYERS: Final = 10_000
_HALF: Final = 2  # bytes of a cache element: caches are kept in half precision
_SINGLE: Final = 4
_CHUNK_TOKENS: Final = 512  # of a prompt, processed at once, on top of a window
_SLOT_ROUNDING: Final = 256  # slots are allocated in steps of this many
_SLIDING: Final = ("sliding_attention", "chunked_attention")
_LINEAR: Final = ("linear_attention", "mamba", "mamba2", "recurrent")


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheSize:
    """Of one conversation, in bytes."""

    per_token: int = 0
    """Of the layers that keep every token."""
    sliding_per_token: int = 0
    """Of the layers that keep the last ``window`` tokens."""
    window: int = 0
    fixed: int = 0
    """Of the layers whose state has one size."""

    def bytes_for(self, tokens: int) -> int:
        """With so many tokens in it, as they are allocated."""
        slots = -(-tokens // _SLOT_ROUNDING) * _SLOT_ROUNDING
        sliding = min(slots, self.window + _CHUNK_TOKENS)  # while a prompt is read, a chunk comes on top
        return self.per_token * slots + self.sliding_per_token * sliding + self.fixed


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkSize:
    """Of the activations while a chunk of a prompt is processed, in bytes."""

    per_token: int = 0
    """For each token of the chunk."""
    per_score: int = 0
    """For each token of the chunk and each token before it."""

    def bytes_for(self, chunk: int, length: int = 0) -> int:
        """With so many tokens in the chunk, of a row that is ``length`` tokens long at its end."""
        return chunk * self.per_token + chunk * max(length, chunk) * self.per_score


def estimate_cache(config: dict[str, Any]) -> CacheSize:
    """``config`` is that of the text model."""
    layers = min(_number(config, "num_hidden_layers", "n_layer", "n_layers"), _MOST_LAYERS)
    if (latent := _number(config, "kv_lora_rank")) and "linear_attn_config" not in config:
        return CacheSize(per_token=layers * (latent + _number(config, "qk_rope_head_dim")) * _HALF)
    kinds = _layer_kinds(config, layers)
    one = _attention_bytes(config)
    window = _number(config, "sliding_window", "attention_chunk_size", "window_size")
    sliding = kinds.count("sliding") if window else 0
    return CacheSize(
        per_token=(kinds.count("full") + kinds.count("sliding") - sliding) * one,
        sliding_per_token=sliding * one,
        window=window if sliding else 0,
        fixed=kinds.count("linear") * _state_bytes(config),
    )


def estimate_work(config: dict[str, Any], *, fused_attention: bool = True) -> WorkSize:
    """``fused_attention``: whether the device computes attention without keeping its scores, as Metal and CUDA do."""
    hidden = _number(config, "hidden_size", "n_embd", "d_model")
    inner = _number(config, "intermediate_size", "moe_intermediate_size") or 4 * hidden
    heads = _number(config, "num_attention_heads", "n_head")
    return WorkSize(
        per_token=(4 * hidden + 2 * inner) * _SINGLE,
        per_score=0 if fused_attention else 2 * heads * _SINGLE,
    )


def _attention_bytes(config: dict[str, Any]) -> int:
    """Keys and values of one token in one layer."""
    heads = _number(config, "num_attention_heads", "n_head") or 1
    kv_heads = _number(config, "num_key_value_heads") or heads
    head_dim = _number(config, "head_dim") or _number(config, "hidden_size", "n_embd") // heads
    return 2 * kv_heads * head_dim * _HALF


def _layer_kinds(config: dict[str, Any], layers: int) -> list[str]:
    """``full``, ``sliding`` or ``linear`` for each layer."""
    listed = config.get("layer_types") or config.get("layers_block_type")
    if isinstance(listed, list) and listed:
        return [_kind(str(name)) for name in listed]
    model_type = str(config.get("model_type", ""))
    if interval := _number(config, "full_attention_interval"):  # Qwen3-Next and its kin
        return ["full" if (layer + 1) % interval == 0 else "linear" for layer in range(layers)]
    if model_type.startswith("gemma3"):
        pattern = _number(config, "sliding_window_pattern") or 6
        return ["full" if layer % pattern == pattern - 1 else "sliding" for layer in range(layers)]
    if model_type == "gpt_oss" or model_type.startswith("gemma2"):
        return ["sliding" if layer % 2 == 0 else "full" for layer in range(layers)]
    if model_type in ("mamba", "mamba2", "rwkv7"):
        return ["linear"] * layers
    return ["full"] * layers


def _kind(name: str) -> str:
    if name in _SLIDING:
        return "sliding"
    return "linear" if name in _LINEAR or "mamba" in name else "full"


def _state_bytes(config: dict[str, Any]) -> int:
    """The recurrent state and the convolution's tail of one layer."""
    value_heads = _number(config, "linear_num_value_heads")
    if value_heads:
        key_dim, value_dim = _number(config, "linear_key_head_dim"), _number(config, "linear_value_head_dim")
        channels = 2 * _number(config, "linear_num_key_heads") * key_dim + value_heads * value_dim
        tail = (_number(config, "linear_conv_kernel_dim") or 4) - 1
        return value_heads * key_dim * value_dim * _SINGLE + channels * tail * _HALF
    hidden = _number(config, "hidden_size", "d_model")
    inner = _number(config, "num_heads", "mamba_num_heads") * _number(config, "head_dim", "mamba_head_dim")
    inner = inner or _number(config, "intermediate_size") or (_number(config, "expand") or 2) * hidden
    state = _number(config, "state_size", "ssm_state_size", "mamba_d_state") or 16
    tail = (_number(config, "conv_kernel", "mamba_d_conv") or 4) - 1
    groups = _number(config, "n_groups", "mamba_n_groups") or 1
    return inner * state * _SINGLE + (inner + 2 * groups * state) * tail * _HALF


def _number(config: dict[str, Any], *names: str) -> int:
    """The first of these that is a positive whole number of a sane size; 0 without one."""
    for name in names:
        value = config.get(name)
        if isinstance(value, int) and not isinstance(value, bool) and 0 < value <= _LARGEST:
            return value
    return 0
