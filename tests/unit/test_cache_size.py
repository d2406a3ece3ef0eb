"""Cache sizes from a config alone, against what mlx-lm allocates for these architectures."""

from __future__ import annotations

from typing import Any

import pytest

from mlx_router_shared.cache_size import CacheSize, estimate_cache, estimate_work

_QWEN3_8B = {"model_type": "qwen3", "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8,
             "head_dim": 128, "hidden_size": 4096, "intermediate_size": 12288}  # fmt: skip
_GEMMA3_27B = {"model_type": "gemma3_text", "num_hidden_layers": 62, "num_attention_heads": 32,
               "num_key_value_heads": 16, "head_dim": 128, "hidden_size": 5376, "sliding_window": 1024,
               "sliding_window_pattern": 6}  # fmt: skip
_GPT_OSS_20B = {"model_type": "gpt_oss", "num_hidden_layers": 24, "num_attention_heads": 64, "num_key_value_heads": 8,
                "head_dim": 64, "hidden_size": 2880, "sliding_window": 128,
                "layer_types": ["sliding_attention", "full_attention"] * 12}  # fmt: skip
_DEEPSEEK_V3 = {"model_type": "deepseek_v3", "num_hidden_layers": 61, "kv_lora_rank": 512, "qk_rope_head_dim": 64,
                "num_attention_heads": 128, "hidden_size": 7168}  # fmt: skip
_QWEN3_NEXT = {"model_type": "qwen3_next", "num_hidden_layers": 48, "full_attention_interval": 4,
               "num_attention_heads": 16, "num_key_value_heads": 2, "head_dim": 256, "hidden_size": 2048,
               "linear_num_value_heads": 32, "linear_num_key_heads": 16, "linear_key_head_dim": 128,
               "linear_value_head_dim": 128, "linear_conv_kernel_dim": 4}  # fmt: skip
_MAMBA2_130M = {"model_type": "mamba2", "num_hidden_layers": 24, "hidden_size": 768, "num_heads": 24, "head_dim": 64,
                "state_size": 128, "conv_kernel": 4, "n_groups": 1, "expand": 2}  # fmt: skip


@pytest.mark.req("R13")
@pytest.mark.parametrize(
    ("config", "per_token", "sliding_per_token", "window"),
    [
        (_QWEN3_8B, 147_456, 0, 0),
        (_GEMMA3_27B, 81_920, 52 * 8192, 1024),
        (_GPT_OSS_20B, 24_576, 24_576, 128),
        (_DEEPSEEK_V3, 61 * 1152, 0, 0),
        (_QWEN3_NEXT, 24_576, 0, 0),
        (_MAMBA2_130M, 0, 0, 0),
    ],
    ids=["qwen3", "gemma3", "gpt-oss", "deepseek-v3", "qwen3-next", "mamba2"],
)
def test_bytes_per_token_by_kind_of_layer(
    config: dict[str, Any], per_token: int, sliding_per_token: int, window: int
) -> None:
    """Figures measured by building the models without weights (see the architecture document)."""
    size = estimate_cache(config)
    assert (size.per_token, size.sliding_per_token, size.window) == (per_token, sliding_per_token, window)


@pytest.mark.parametrize(("config", "megabytes"), [(_QWEN3_NEXT, 77), (_MAMBA2_130M, 19.1)])
def test_recurrent_layers_have_a_state_of_one_size(config: dict[str, Any], megabytes: float) -> None:
    assert estimate_cache(config).fixed / 1e6 == pytest.approx(megabytes, rel=0.05)


def test_slots_are_rounded_up_and_windows_hold_a_chunk_more() -> None:
    size = CacheSize(per_token=10, sliding_per_token=7, window=100, fixed=3)
    assert size.bytes_for(1) == 10 * 256 + 7 * 256 + 3
    assert size.bytes_for(10_000) == 10 * 10_240 + 7 * 612 + 3


@pytest.mark.parametrize(
    "config", [{}, {"num_hidden_layers": "many"}, {"num_hidden_layers": 2, "sliding_window": None}]
)
def test_a_config_that_says_nothing_is_no_error(config: dict[str, Any]) -> None:
    assert estimate_cache(config).bytes_for(4096) == 0
    assert estimate_work(config).bytes_for(512) == 0
