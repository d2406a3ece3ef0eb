"""Sentence encoders and rerankers with random weights, in the layouts of the real ones; needs neither torch nor mlx.

The same arguments write the same files. The vocabularies are made by hand, so that nothing depends on a trainer.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

__all__ = ["make_encoder", "make_reranker"]

WORDS = (
    "the a an of in on to and is are was not it you we they hello world cat dog sat mat sea ship harbour light "
    "paris france capital city weather sun rain snow tree river bread compass map note blue green red old new "
    "what which who when where why how many one two three small large quick slow query document answer good bad"
).split()
CHARS = [chr(c) for c in range(33, 127)] + list("äöüßéèñçàøå") + list("абвгдежзиклмнопрст")


def _write(path: Path, data: Any) -> None:
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _tokenizer(folder: Path, kind: str, context: int) -> Any:
    """A vocabulary made by hand (so nothing depends on a trainer), in the layout each family really uses."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    config: dict[str, Any] = {"model_max_length": context, "clean_up_tokenization_spaces": False}
    if kind == "bert":
        special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
        lower = [c for c in CHARS if c == c.lower()]
        pieces = dict.fromkeys(special + lower + ["##" + c for c in lower] + WORDS + ["##s", "##ing", "##ed", "##er"])
        tok = Tokenizer(models.WordPiece({p: i for i, p in enumerate(pieces)}, unk_token="[UNK]"))
        tok.normalizer = normalizers.BertNormalizer(lowercase=True)
        tok.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        tok.decoder = decoders.WordPiece()
        single, pair = "[CLS] $A [SEP]", "[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1"
        roles = dict(pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]", mask_token="[MASK]")
        # transformers 5 builds the normaliser of a BertTokenizer from these keys, not from tokenizer.json
        config |= {
            "tokenizer_class": "BertTokenizer",
            "do_lower_case": True,
            "strip_accents": None,
            "tokenize_chinese_chars": True,
        }
    elif kind == "xlm-roberta":
        special = ["<s>", "<pad>", "</s>", "<unk>"]
        pieces = dict.fromkeys(special + ["\u2581"] + CHARS + ["\u2581" + w for w in WORDS] + ["<mask>"])
        scores = [(p, 0.0 if p in special else -2.0 if len(p) > 1 else -6.0) for p in pieces]
        tok = Tokenizer(models.Unigram(scores, unk_id=3, byte_fallback=False))
        tok.normalizer = normalizers.NFKC()
        tok.pre_tokenizer = pre_tokenizers.Metaspace(replacement="\u2581", prepend_scheme="always")
        tok.decoder = decoders.Metaspace(replacement="\u2581", prepend_scheme="always")
        special += ["<mask>"]
        single, pair = "<s> $A </s>", "<s> $A </s> </s> $B </s>"
        roles = dict(
            bos_token="<s>",
            eos_token="</s>",
            cls_token="<s>",
            sep_token="</s>",
            unk_token="<unk>",
            pad_token="<pad>",
            mask_token="<mask>",
        )
        config["tokenizer_class"] = "XLMRobertaTokenizer"
    elif kind == "modernbert":
        special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        vocab = {p: i for i, p in enumerate(special + alphabet)}
        merges = []
        for word in WORDS:  # each word with its space becomes one token
            left = "\u0120"
            for c in word:
                if left + c not in vocab:
                    vocab[left + c] = len(vocab)
                    merges.append((left, c))
                left += c
        tok = Tokenizer(models.BPE(vocab, merges))
        tok.normalizer = normalizers.NFC()
        tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tok.decoder = decoders.ByteLevel()
        single, pair = "[CLS] $A [SEP]", "[CLS] $A [SEP] $B [SEP]"
        roles = dict(pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]", mask_token="[MASK]")
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
        config["model_input_names"] = ["input_ids", "attention_mask"]  # as the real ModernBERT has it
    else:
        raise ValueError(kind)
    tok.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    first, last = single.split()[0], single.split()[-1]
    tok.post_processor = processors.TemplateProcessing(
        single=single, pair=pair, special_tokens=[(t, tok.token_to_id(t)) for t in (first, last)]
    )
    tok.save(str(folder / "tokenizer.json"))
    _write(folder / "tokenizer_config.json", {**config, **roles})
    return tok


def _weights(kind: str, c: dict[str, Any], rng: Any, labels: int | None) -> dict[str, Any]:
    """Names and shapes as Hugging Face checkpoints have them. labels None: an encoder."""

    h, inter = c["hidden_size"], c["intermediate_size"]
    w: dict[str, Any] = {}
    prefix = "" if labels is None else {"bert": "bert.", "xlm-roberta": "roberta.", "modernbert": "model."}[kind]

    def matrix(name: str, n_out: int, n_in: int, bias: bool = True, scale: float = 1.0) -> None:
        w[name + ".weight"] = rng.standard_normal((n_out, n_in)) * (scale / math.sqrt(n_in))
        if bias:
            w[name + ".bias"] = rng.standard_normal(n_out) * 0.02

    def norm(name: str, bias: bool = True) -> None:
        w[name + ".weight"] = 1 + rng.standard_normal(h) * 0.05
        if bias:
            w[name + ".bias"] = rng.standard_normal(h) * 0.02

    def table(name: str, n: int) -> None:
        w[name + ".weight"] = rng.standard_normal((n, h)) * 0.5

    if kind == "modernbert":
        table(prefix + "embeddings.tok_embeddings", c["vocab_size"])
        norm(prefix + "embeddings.norm", bias=False)
        for i in range(c["num_hidden_layers"]):
            p = f"{prefix}layers.{i}."
            if i:
                norm(p + "attn_norm", bias=False)
            matrix(p + "attn.Wqkv", 3 * h, h, bias=False)
            matrix(p + "attn.Wo", h, h, bias=False)
            norm(p + "mlp_norm", bias=False)
            matrix(p + "mlp.Wi", 2 * inter, h, bias=False)
            matrix(p + "mlp.Wo", h, inter, bias=False)
        norm(prefix + "final_norm", bias=False)
        if labels is not None:
            matrix("head.dense", h, h, bias=False)
            norm("head.norm", bias=False)
            matrix("classifier", labels, h, scale=2.0)
        return w
    table(prefix + "embeddings.word_embeddings", c["vocab_size"])
    table(prefix + "embeddings.position_embeddings", c["max_position_embeddings"])
    table(prefix + "embeddings.token_type_embeddings", c["type_vocab_size"])
    norm(prefix + "embeddings.LayerNorm")
    for i in range(c["num_hidden_layers"]):
        p = f"{prefix}encoder.layer.{i}."
        for part in ("query", "key", "value"):
            matrix(p + "attention.self." + part, h, h)
        matrix(p + "attention.output.dense", h, h)
        norm(p + "attention.output.LayerNorm")
        matrix(p + "intermediate.dense", inter, h)
        matrix(p + "output.dense", h, inter)
        norm(p + "output.LayerNorm")
    if labels is None or kind == "bert":
        matrix(prefix + "pooler.dense", h, h)
    if labels is not None and kind == "bert":
        matrix("classifier", labels, h, scale=2.0)
    if labels is not None and kind == "xlm-roberta":
        matrix("classifier.dense", h, h)
        matrix("classifier.out_proj", labels, h, scale=2.0)
    return w


def _make(
    folder: Path, kind: str, *, labels: int | None, seed: int, hidden: int, layers: int, heads: int, context: int,
    dtype: str, local_attention: int,
) -> Path:  # fmt: skip
    import numpy as np
    from safetensors.numpy import save

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tok = _tokenizer(folder, kind, context)
    name = {"bert": "Bert", "xlm-roberta": "XLMRoberta", "modernbert": "ModernBert"}[kind]
    pad = tok.token_to_id("<pad>" if kind == "xlm-roberta" else "[PAD]")
    config: dict[str, Any] = {
        "architectures": [name + ("Model" if labels is None else "ForSequenceClassification")],
        "model_type": kind,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": 2 * hidden,
        "vocab_size": tok.get_vocab_size(),
        "pad_token_id": pad,
        "torch_dtype": dtype,
    }
    if kind == "modernbert":
        config |= {
            "max_position_embeddings": context,
            "norm_eps": 1e-5,
            "norm_bias": False,
            "attention_bias": False,
            "mlp_bias": False,
            "classifier_bias": False,
            "classifier_pooling": "mean",
            "classifier_activation": "gelu",
            "hidden_activation": "gelu",
            "global_attn_every_n_layers": 3,
            "local_attention": local_attention,
            "global_rope_theta": 160000.0,
            "local_rope_theta": 10000.0,
            "position_embedding_type": "absolute",
            "cls_token_id": tok.token_to_id("[CLS]"),
            "sep_token_id": tok.token_to_id("[SEP]"),
        }
    else:
        xlm = kind == "xlm-roberta"
        config |= {  # XLM-R counts positions from pad_token_id + 1, so it has two rows more than its context
            "max_position_embeddings": context + 2 if xlm else context,
            "type_vocab_size": 1 if xlm else 2,
            "layer_norm_eps": 1e-5 if xlm else 1e-12,
            "hidden_act": "gelu",
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
            "position_embedding_type": "absolute",
        }
    if labels is not None:
        config["id2label"] = {str(i): f"LABEL_{i}" for i in range(labels)}
        config["label2id"] = {f"LABEL_{i}": i for i in range(labels)}
    _write(folder / "config.json", config)
    w = _weights(kind, config, np.random.default_rng(seed), labels)
    w = {k: np.ascontiguousarray(v, dtype=dtype) for k, v in w.items()}
    (folder / "model.safetensors").write_bytes(save(w, metadata={"format": "pt"}))
    return folder


def make_encoder(
    folder: Path, kind: str = "bert", *, pooling: str = "mean", normalize: bool = True, seed: int = 0, hidden: int = 32,
    layers: int = 4, heads: int = 4, context: int = 128, dtype: str = "float32", local_attention: int = 16,
) -> Path:  # fmt: skip
    """An encoder with the side files of sentence-transformers: they say how to pool and whether to normalise."""
    folder = _make(
        folder,
        kind,
        labels=None,
        seed=seed,
        hidden=hidden,
        layers=layers,
        heads=heads,
        context=context,
        dtype=dtype,
        local_attention=local_attention,
    )
    modules = [("", "Transformer"), ("1_Pooling", "Pooling")] + [("2_Normalize", "Normalize")] * normalize
    _write(
        folder / "modules.json",
        [
            {"idx": i, "name": str(i), "path": path, "type": "sentence_transformers.models." + name}
            for i, (path, name) in enumerate(modules)
        ],
    )
    _write(folder / "sentence_bert_config.json", {"max_seq_length": context, "do_lower_case": False})
    (folder / "1_Pooling").mkdir(exist_ok=True)
    modes = {"cls": "cls_token", "mean": "mean_tokens", "max": "max_tokens", "lasttoken": "lasttoken"}
    _write(
        folder / "1_Pooling" / "config.json",
        {
            "word_embedding_dimension": hidden,
            **{"pooling_mode_" + v: k == pooling for k, v in modes.items()},
            "pooling_mode_mean_sqrt_len_tokens": False,
            "pooling_mode_weightedmean_tokens": False,
            "include_prompt": True,
        },
    )
    return folder


def make_reranker(
    folder: Path, kind: str = "bert", *, labels: int = 1, seed: int = 0, hidden: int = 32, layers: int = 4,
    heads: int = 4, context: int = 128, dtype: str = "float32", local_attention: int = 16,
) -> Path:  # fmt: skip
    """A cross-encoder: sequence classification, one label unless told otherwise."""
    return _make(
        folder,
        kind,
        labels=labels,
        seed=seed,
        hidden=hidden,
        layers=layers,
        heads=heads,
        context=context,
        dtype=dtype,
        local_attention=local_attention,
    )
