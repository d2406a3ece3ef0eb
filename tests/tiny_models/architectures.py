"""Tiny models with random float32 weights of the architectures whose caches differ from each other."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import mlx.core as mx
from mlx.utils import tree_map_with_path

from tests.tiny_models.tokenizer import build_tokenizer
from tests.tiny_models.weights import new_model, save_model

__all__ = ["ARCHITECTURES", "make_architecture"]

_COMMON: Final[dict[str, Any]] = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
_GROUPED: Final[dict[str, Any]] = {**_COMMON, "num_key_value_heads": 2}

ARCHITECTURES: Final[dict[str, dict[str, Any]]] = {
    "qwen3": {**_GROUPED, "num_hidden_layers": 3, "rms_norm_eps": 1e-6, "rope_theta": 1e4, "head_dim": 32,
              "max_position_embeddings": 4096, "tie_word_embeddings": False},
    "llama": {**_GROUPED, "num_hidden_layers": 3, "rms_norm_eps": 1e-6, "max_position_embeddings": 4096},
    # Layers with a window of 24 tokens beside layers without.
    "gemma3_text": {**_GROUPED, "num_hidden_layers": 4, "head_dim": 32, "sliding_window": 24,
                    "sliding_window_pattern": 2, "query_pre_attn_scalar": 32, "max_position_embeddings": 4096},
    # The same with attention sinks and experts.
    "gpt_oss": {**_GROUPED, "intermediate_size": 64, "num_hidden_layers": 4, "num_local_experts": 4,
                "num_experts_per_tok": 2, "head_dim": 32, "sliding_window": 24, "rope_theta": 150000,
                "rope_scaling": None, "max_position_embeddings": 4096},
    # Gated delta layers beside attention, and experts.
    "qwen3_next": {**_GROUPED, "num_hidden_layers": 4, "linear_num_value_heads": 4, "linear_num_key_heads": 2,
                   "linear_key_head_dim": 32, "linear_value_head_dim": 32, "linear_conv_kernel_dim": 4,
                   "num_experts": 4, "num_experts_per_tok": 2, "decoder_sparse_step": 1,
                   "shared_expert_intermediate_size": 64, "mlp_only_layers": [], "moe_intermediate_size": 64,
                   "rms_norm_eps": 1e-6, "rope_theta": 1e4, "partial_rotary_factor": 0.5,
                   "max_position_embeddings": 4096, "head_dim": 32, "full_attention_interval": 2,
                   "norm_topk_prob": True},
    "mamba2": {"num_heads": 4, "head_dim": 32, "hidden_size": 64, "intermediate_size": 128, "state_size": 16,
               "num_hidden_layers": 3, "layer_norm_epsilon": 1e-5, "conv_kernel": 4, "n_groups": 1,
               "use_bias": False, "use_conv_bias": True, "tie_word_embeddings": True,
               "time_step_limit": [0.0, 1e9], "time_step_rank": "auto", "max_position_embeddings": 4096},
    # Short convolutions beside attention.
    "lfm2": {**_GROUPED, "num_hidden_layers": 4, "max_position_embeddings": 4096, "norm_eps": 1e-5,
             "conv_bias": False, "conv_L_cache": 3, "block_dim": 64, "block_multiple_of": 32,
             "block_ffn_dim_multiplier": 1.0, "block_auto_adjust_ff_dim": False, "block_ff_dim": 128,
             "full_attn_idxs": [1, 3]},
    # State space and attention in each layer.
    "falcon_h1": {**_GROUPED, "head_dim": 32, "mamba_d_head": 32, "mamba_d_ssm": 128, "mamba_d_state": 16,
                  "mamba_n_heads": 4, "num_hidden_layers": 3, "max_position_embeddings": 4096},
    # Latent attention and experts.
    "deepseek_v3": {**_COMMON, "moe_intermediate_size": 64, "num_hidden_layers": 3, "num_key_value_heads": 4,
                    "n_shared_experts": 1, "n_routed_experts": 4, "kv_lora_rank": 32, "q_lora_rank": 32,
                    "qk_rope_head_dim": 16, "v_head_dim": 32, "qk_nope_head_dim": 32, "num_experts_per_tok": 2,
                    "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "max_position_embeddings": 4096},
    # Chunked attention of 64 tokens, whose caches cannot be batched.
    "llama4": {"text_config": {**_GROUPED, "intermediate_size": 64, "attention_bias": False,
                               "attention_chunk_size": 64, "head_dim": 32, "interleave_moe_layer_step": 1,
                               "intermediate_size_mlp": 128, "max_position_embeddings": 4096,
                               "model_type": "llama4_text", "num_experts_per_tok": 1, "num_hidden_layers": 4,
                               "num_local_experts": 2, "rms_norm_eps": 1e-5, "rope_scaling": None,
                               "rope_theta": 1e4, "use_qk_norm": True}},
}  # fmt: skip


def make_architecture(folder: Path, name: str, *, seed: int = 0, **changes: Any) -> Path:
    """Write a model of that architecture into ``folder`` and return the folder; ``changes`` are fields of its config.

    Matrices are larger than training would begin with, so that tokens far back decide which one is next, and states
    decay slowly: a model that forgets at once would hide a wrong cache.
    """
    tokenizer = build_tokenizer(folder)
    size = {"vocab_size": tokenizer.get_vocab_size()}
    config = {"model_type": name, "eos_token_id": tokenizer.token_to_id("<|im_end|>"), **ARCHITECTURES[name], **changes}
    if "text_config" in config:
        config["text_config"] = {**config["text_config"], **size}
    else:
        config |= size
    model = new_model(config, seed)
    model.set_dtype(mx.float32)
    model.update(tree_map_with_path(_livelier, model.parameters()))
    save_model(folder, model, config, tokenizer)
    return folder


def _livelier(path: str, array: mx.array) -> mx.array:
    name = path.rpartition(".")[2]
    if name == "A_log":
        return mx.full(array.shape, -3.0)
    return 2 * array if array.ndim > 1 and "conv" not in path else array
