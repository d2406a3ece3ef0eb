"""Models that this machine or engine cannot run as they are: a sentence, and no worker that dies."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import pytest

from mlx_router_shared.errors import UnsupportedCapability
from mlx_router_worker.generation.guides import Guides
from tests.support.http import call
from tests.support.router import running_router
from tests.tiny_models.tokenizer import build_tokenizer
from tests.tiny_models.weights import new_model, save_model


def _make_mixture(folder: Path, dtype: mx.Dtype) -> None:
    tokenizer = build_tokenizer(folder)
    config: dict[str, Any] = {
        "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "hidden_size": 64, "num_hidden_layers": 1,
        "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32,
        "num_experts": 4, "num_experts_per_tok": 2, "decoder_sparse_step": 1, "mlp_only_layers": [],
        "moe_intermediate_size": 32, "rms_norm_eps": 1e-6, "vocab_size": tokenizer.get_vocab_size(),
        "max_position_embeddings": 512, "rope_theta": 10000.0, "tie_word_embeddings": True, "norm_topk_prob": True,
        "bos_token_id": tokenizer.token_to_id("<|endoftext|>"), "eos_token_id": tokenizer.token_to_id("<|im_end|>"),
    }  # fmt: skip
    model = new_model(config, 1)
    model.set_dtype(dtype)
    save_model(folder, model, config, tokenizer)


@pytest.mark.slow
def test_experts_that_a_cpu_cannot_compute_are_refused_at_load(home: Path, tmp_path: Path) -> None:
    _make_mixture(tmp_path / "half", mx.bfloat16)
    _make_mixture(tmp_path / "whole", mx.float32)
    with running_router(home, "--models-dir", str(tmp_path)) as router:
        body = {"model": "whole", "prompt": "x", "options": {"num_predict": 2}, "stream": False}
        assert call(router, "POST", "/api/generate", body).status == 200
        half = call(router, "POST", "/api/generate", {**body, "model": "half"})
        if mx.default_device().type != mx.cpu:
            assert half.status == 200
            return
        assert half.status == 500
        assert "its experts have weights in bfloat16, which MLX computes on a GPU only" in half.json()["error"]
        assert "quantized or a float32 version" in half.json()["error"]


def test_a_tokenizer_without_a_json_file_cannot_enforce_a_format(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedCapability, match=r"no tokenizer\.json"):
        Guides(SimpleNamespace(eos_token_ids=[0]), tmp_path).follow("{}")
