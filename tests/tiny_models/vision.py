"""A Qwen2-VL with random weights, of about 1 MB, and pictures to show it; needs neither torch nor mlx.

The layout is that of the Hugging Face checkpoint; the same arguments write the same files.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

__all__ = ["make_qwen2_vl", "png"]

SPECIAL = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
]

# The template of Qwen2-VL, shortened: content is text, or parts of type text, image, image_url, video.
CHAT_TEMPLATE = """\
{%- for m in messages -%}
{%- if loop.first and m.role != 'system' -%}{{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' -}}{%- endif -%}
{{- '<|im_start|>' + m.role + '\\n' -}}
{%- if m.content is string -%}{{- m.content -}}
{%- else -%}
{%- for part in m.content -%}
{%- if part.type in ('image', 'image_url') or 'image' in part or 'image_url' in part -%}{{- '<|vision_start|><|image_pad|><|vision_end|>' -}}
{%- elif part.type == 'video' or 'video' in part -%}{{- '<|vision_start|><|video_pad|><|vision_end|>' -}}
{%- elif 'text' in part -%}{{- part.text -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""

WORDS = (
    "the a of in is and to what do you see picture image red green blue describe this me one word hello system "
    "user assistant helpful are You"
).split()


def _write(path: Path, data: Any) -> None:
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def make_qwen2_vl(
    folder: Path, *, seed: int = 0, hidden: int = 64, layers: int = 3, heads: int = 4, kv_heads: int = 2,
    vision: int = 48, depth: int = 2, context: int = 4096, dtype: str = "float32", max_side: int = 112,
) -> Path:  # fmt: skip
    """Write the model into ``folder`` and return the folder."""
    import numpy as np
    from safetensors.numpy import save
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)

    vocab = {p: i for i, p in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    merges = []
    for word in WORDS:
        for left, rest in ((word[0], word[1:]), ("\u0120", word)):
            for c in rest:
                if left + c not in vocab:
                    vocab[left + c] = len(vocab)
                    merges.append((left, c))
                left += c
    tok = Tokenizer(models.BPE(vocab, merges))
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    tok.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL])
    tok.save(str(folder / "tokenizer.json"))
    ids = {t: tok.token_to_id(t) for t in SPECIAL}
    _write(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
            "bos_token": None,
            "clean_up_tokenization_spaces": False,
            "model_max_length": context,
            "chat_template": CHAT_TEMPLATE,
        },
    )
    size = tok.get_vocab_size()
    half = hidden // heads // 2  # mrope sections (time, height, width) add up to half a head
    section = [half - 2 * (half // 3), half // 3, half // 3]
    config = {
        "architectures": ["Qwen2VLForConditionalGeneration"],
        "model_type": "qwen2_vl",
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "intermediate_size": 2 * hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "rms_norm_eps": 1e-6,
        "vocab_size": size,
        "max_position_embeddings": context,
        "rope_theta": 10000.0,
        "rope_scaling": {"type": "mrope", "mrope_section": section},
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "torch_dtype": dtype,
        "bos_token_id": ids["<|endoftext|>"],
        "eos_token_id": ids["<|im_end|>"],
        "image_token_id": ids["<|image_pad|>"],
        "video_token_id": ids["<|video_pad|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
        "vision_end_token_id": ids["<|vision_end|>"],
        "vision_token_id": ids["<|vision_pad|>"],
        "vision_config": {  # mlp_ratio must be an integer: transformers refuses 2.0
            "model_type": "qwen2_vl",
            "depth": depth,
            "embed_dim": vision,
            "hidden_size": hidden,
            "num_heads": 4,
            "mlp_ratio": 2,
            "in_channels": 3,
            "in_chans": 3,
            "patch_size": 14,
            "spatial_patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "hidden_act": "quick_gelu",
        },
    }
    _write(folder / "config.json", config)
    _write(
        folder / "generation_config.json",
        {
            "eos_token_id": [ids["<|im_end|>"], ids["<|endoftext|>"]],
            "pad_token_id": ids["<|endoftext|>"],
        },
    )
    _write(
        folder / "preprocessor_config.json",
        {
            "image_processor_type": "Qwen2VLImageProcessor",
            "processor_class": "Qwen2VLProcessor",
            "min_pixels": 56 * 56,
            "max_pixels": max_side * max_side,
            "patch_size": 14,
            "temporal_patch_size": 2,
            "merge_size": 2,
            "image_mean": [0.48145466, 0.4578275, 0.40821073],
            "image_std": [0.26862954, 0.26130258, 0.27577711],
        },
    )

    rng = np.random.default_rng(seed)
    w: dict[str, Any] = {}

    def matrix(name: str, n_out: int, n_in: int, bias: bool = True, scale: float = 1.0) -> None:
        w[name + ".weight"] = rng.standard_normal((n_out, n_in)) * (scale / math.sqrt(n_in))
        if bias:
            w[name + ".bias"] = rng.standard_normal(n_out) * 0.02

    def norm(name: str, n: int, bias: bool = True) -> None:
        w[name + ".weight"] = np.ones(n)
        if bias:
            w[name + ".bias"] = np.zeros(n)

    w["visual.patch_embed.proj.weight"] = rng.standard_normal((vision, 3, 2, 14, 14)) / math.sqrt(3 * 2 * 14 * 14)
    for i in range(depth):
        p = f"visual.blocks.{i}."
        norm(p + "norm1", vision)
        norm(p + "norm2", vision)
        matrix(p + "attn.qkv", 3 * vision, vision)
        matrix(p + "attn.proj", vision, vision)
        matrix(p + "mlp.fc1", 2 * vision, vision)
        matrix(p + "mlp.fc2", vision, 2 * vision)
    norm("visual.merger.ln_q", vision)
    matrix("visual.merger.mlp.0", 4 * vision, 4 * vision)
    matrix("visual.merger.mlp.2", hidden, 4 * vision)
    head = hidden // heads
    w["model.embed_tokens.weight"] = rng.standard_normal((size, hidden)) * 0.5
    for i in range(layers):
        p = f"model.layers.{i}."
        matrix(p + "self_attn.q_proj", heads * head, hidden, scale=2.0)
        matrix(p + "self_attn.k_proj", kv_heads * head, hidden, scale=2.0)
        matrix(p + "self_attn.v_proj", kv_heads * head, hidden, scale=2.0)
        matrix(p + "self_attn.o_proj", hidden, heads * head, bias=False, scale=2.0)
        matrix(p + "mlp.gate_proj", 2 * hidden, hidden, bias=False)
        matrix(p + "mlp.up_proj", 2 * hidden, hidden, bias=False)
        matrix(p + "mlp.down_proj", hidden, 2 * hidden, bias=False)
        norm(p + "input_layernorm", hidden, bias=False)
        norm(p + "post_attention_layernorm", hidden, bias=False)
    norm("model.norm", hidden, bias=False)
    w = {k: np.ascontiguousarray(v, dtype=dtype) for k, v in w.items()}
    (folder / "model.safetensors").write_bytes(save(w, metadata={"format": "pt"}))
    return folder


def png(color: tuple[int, int, int] = (255, 0, 0), size: tuple[int, int] = (64, 64)) -> bytes:
    """A plain PNG as bytes, with no imaging library."""
    import struct
    import zlib

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    width, height = size
    rows = (b"\0" + bytes(color) * width) * height
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
