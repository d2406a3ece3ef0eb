"""A parrot: a tiny model that answers every prompt with a text of one's choice, token by token.

It shows what becomes of a model's exact output. Tokens are one-hot vectors that pass through a layer which adds
nothing, and the last matrix is a table of successors. So the next token depends on the current one alone, and the
pieces of an answer have to differ from each other.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from tokenizers import pre_tokenizers

from tests.tiny_models.tokenizer import CHAT_TEMPLATE, build_tokenizer, write_json

__all__ = ["make_parrot"]

_END = "<|im_end|>"


def make_parrot(
    folder: Path,
    pieces: list[str],
    *,
    chat_template: str | None = CHAT_TEMPLATE,
    markers: tuple[str, ...] = (),
    ends: bool = True,
    tokenizer_config: dict[str, Any] | None = None,
    generation_config: dict[str, Any] | None = None,
    config: dict[str, Any] | None = None,
) -> Path:
    """Write a model that answers with ``pieces``, one token each, and return the folder.

    A piece that is a marker of the tokenizer (``<think>``, ``<tool_call>``, one of ``markers``) is that token. With
    ``ends=False`` the answer begins again after its last piece. The keys of the configurations are added to the files.
    """
    if len(set(pieces)) != len(pieces):
        raise ValueError("a parrot's pieces have to differ from each other")
    build_tokenizer(folder, chat_template, markers)
    answer, vocabulary, end = _add_pieces(folder / "tokenizer.json", pieces)
    if tokenizer_config:
        file = folder / "tokenizer_config.json"
        write_json(file, {**json.loads(file.read_text(encoding="utf-8")), **tokenizer_config})
    successors = np.full(vocabulary, answer[0])
    successors[answer] = [*answer[1:], end if ends else answer[0]]
    table = np.zeros((vocabulary, vocabulary), np.float32)
    table[successors, np.arange(vocabulary)] = 1.0
    _write_model(folder, table, {"eos_token_id": end, **(config or {})})
    write_json(
        folder / "generation_config.json", {"eos_token_id": end, "do_sample": False, **(generation_config or {})}
    )
    return folder


def _add_pieces(file: Path, pieces: list[str]) -> tuple[list[int], int, int]:
    """Give each piece a token; returns their ids, the size of the vocabulary and the id that ends a turn."""
    data = json.loads(file.read_text(encoding="utf-8"))
    markers = {token["content"] for token in data["added_tokens"]}
    vocabulary: dict[str, int] = data["model"]["vocab"]
    encoder = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    written = {}
    for piece in pieces:
        if piece not in markers:
            ((written[piece], _),) = encoder.pre_tokenize_str(piece)
            vocabulary.setdefault(written[piece], len(vocabulary))
    # Added tokens come after the model's vocabulary, in their order, whatever the file says of their ids.
    for number, token in enumerate(data["added_tokens"]):
        token["id"] = len(vocabulary) + number
    added = {token["content"]: token["id"] for token in data["added_tokens"]}
    file.write_text(json.dumps(data, ensure_ascii=False), encoding="utf-8")
    ids = [added[piece] if piece in added else vocabulary[written[piece]] for piece in pieces]
    return ids, len(vocabulary) + len(added), added[_END]


def _write_model(folder: Path, table: np.ndarray, more: dict[str, Any]) -> None:
    width = len(table)
    weights = {
        "model.embed_tokens.weight": mx.eye(width),
        "model.norm.weight": mx.ones((width,)),
        "lm_head.weight": mx.array(table),
    }
    layer = "model.layers.0."
    for name, rows, columns in (
        ("self_attn.q_proj", 4, width), ("self_attn.k_proj", 4, width), ("self_attn.v_proj", 4, width),
        ("self_attn.o_proj", width, 4), ("mlp.gate_proj", 4, width), ("mlp.up_proj", 4, width),
        ("mlp.down_proj", width, 4),
    ):  # fmt: skip
        weights[f"{layer}{name}.weight"] = mx.zeros((rows, columns))
    for name in ("input_layernorm", "post_attention_layernorm"):
        weights[f"{layer}{name}.weight"] = mx.ones((width,))
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "mlx"})
    write_json(
        folder / "config.json",
        {
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": width, "num_hidden_layers": 1,
            "intermediate_size": 4, "num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 4,
            "rms_norm_eps": 1e-6, "vocab_size": width, "max_position_embeddings": 32768, "rope_theta": 10000.0,
            "tie_word_embeddings": False, "torch_dtype": "float32", **more,
        },
    )  # fmt: skip
