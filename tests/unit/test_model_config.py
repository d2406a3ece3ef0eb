"""What is read from ``config.json`` under the names that architectures use."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import pytest

from mlx_router_shared.model_config import context_tokens, text_config


@pytest.mark.parametrize(
    ("config", "tokens"),
    [
        ({"model_type": "qwen3", "max_position_embeddings": 40960}, 40960),
        ({"model_type": "gpt2", "n_positions": 1024, "n_ctx": 512}, 1024),
        ({"model_type": "dbrx", "max_seq_len": 32768}, 32768),
        ({"model_type": "chatglm", "seq_length": 8192}, 8192),
        ({"model_type": "olmo", "max_sequence_length": 2048}, 2048),
        ({"model_type": "gemma3", "text_config": {"model_type": "gemma3_text"}}, 32768),
        ({"model_type": "internvl_chat", "llm_config": {"max_position_embeddings": 12288}}, 12288),
        ({"model_type": "gptj"}, 2048),
        ({"model_type": "llama"}, 4096),
        ({"model_type": "../../etc/passwd"}, 4096),
        ({"model_type": 3}, 4096),
        ({"max_position_embeddings": None, "n_positions": "many", "seq_length": 10**30, "n_ctx": 7}, 7),
        ({"max_position_embeddings": True}, 4096),
        ({"text_config": [], "max_position_embeddings": 100.0}, 100),
    ],
)
def test_the_context_is_found_under_its_architectures_name(config: dict[str, Any], tokens: int) -> None:
    assert context_tokens(config) == tokens


@pytest.mark.parametrize("model_type", ["gemma3_text", "gptj", "qwen2", "phi3", "falcon_h1"])
def test_defaults_are_those_of_mlx_lm(model_type: str) -> None:
    fields = import_module(f"mlx_lm.models.{model_type}").ModelArgs.__dataclass_fields__
    name = next(name for name in ("max_position_embeddings", "n_positions") if name in fields)
    assert context_tokens({"model_type": model_type}) == fields[name].default


def test_the_part_about_language() -> None:
    assert text_config({"a": 1}) == {"a": 1}
    assert text_config({"text_config": None, "language_config": {"b": 2}}) == {"b": 2}
