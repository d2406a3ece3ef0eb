"""Models with random weights, of any size, made at test time."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable
from pathlib import Path

import mlx.core as mx
from mlx_lm.utils import quantize_model

from tests.tiny_models.tokenizer import CHAT_TEMPLATE, VOCABULARY, build_tokenizer
from tests.tiny_models.weights import model_config, new_model, save_model

__all__ = ["make_random_model", "parse_size"]

_WIDTHS = (64, 128, 256, 512, 1024, 2048, 4096)


def parse_size(text: str) -> int:
    """``"8MB"`` -> 8000000; K, M and G are decimal."""
    match = re.fullmatch(r"\s*([\d.]+)\s*([KMG]?)B?\s*", text.upper())
    if match is None:
        raise argparse.ArgumentTypeError(f"not a size: {text}")
    return int(float(match[1]) * {"": 1, "K": 10**3, "M": 10**6, "G": 10**9}[match[2]])


def make_random_model(
    folder: Path,
    *,
    size_bytes: int,
    seed: int = 0,
    bits: int = 0,
    architecture: str = "qwen3",
    shard_bytes: int = 0,
    context: int = 32768,
    chat_template: str | None = CHAT_TEMPLATE,
    more_markers: tuple[str, ...] = (),
    vocabulary: int = VOCABULARY,
    more_texts: Iterable[str] = (),
    padding: int = 0,
) -> Path:
    """Write a model of about ``size_bytes`` of weights into ``folder`` and return the folder.

    ``bits=0`` gives bfloat16; otherwise affine quantisation in groups of 64 with float32 scales, because a quantised
    matmul in half precision is 8 to 40 times slower on a CPU. ``padding``: rows of its matrices beyond the tokenizer's
    table, as large models have them.
    """
    tokenizer = build_tokenizer(folder, chat_template, more_markers, vocabulary, more_texts)
    dtype = "float32" if bits else "bfloat16"
    width = 4 if dtype == "float32" else 2
    bytes_per_weight = (bits + 16 * width / 64) / 8 if bits else width
    parameters = size_bytes / bytes_per_weight
    vocabulary = tokenizer.get_vocab_size()
    hidden = _WIDTHS[0]
    for candidate in _WIDTHS:
        per_layer = 2 * candidate**2 + 2 * candidate * (candidate // 2) + 9 * candidate**2
        if parameters - vocabulary * candidate >= 3 * per_layer:
            hidden = candidate
    head_dim = min(64, hidden // 4)
    heads = hidden // head_dim
    kv_heads = max(heads // 2, 1)
    per_layer = 2 * hidden**2 + 2 * hidden * kv_heads * head_dim + 9 * hidden**2
    layers = max(round((parameters - vocabulary * hidden) / per_layer), 1)
    config = model_config(
        architecture, tokenizer, hidden=hidden, layers=layers, intermediate=3 * hidden, heads=heads,
        kv_heads=kv_heads, head_dim=head_dim, context=context, dtype=dtype,
    )  # fmt: skip
    config["vocab_size"] += padding
    model = new_model(config, seed)
    model.set_dtype(getattr(mx, dtype))
    if bits:
        model, config = quantize_model(model, config, 64, bits)
    save_model(folder, model, config, tokenizer, shard_bytes=shard_bytes)
    return folder


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--size", type=parse_size, default=8_000_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--bits", type=int, default=0, choices=(0, 2, 3, 4, 5, 6, 8))
    parser.add_argument("--architecture", default="qwen3", choices=("qwen3", "qwen2", "llama", "smollm3"))
    options = parser.parse_args()
    print(make_random_model(options.folder, size_bytes=options.size, seed=options.seed, bits=options.bits,
                            architecture=options.architecture))  # fmt: skip
