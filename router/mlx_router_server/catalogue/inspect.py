"""Read what a model folder holds. The name of a folder is never evidence: only its content counts.

Everything here may come from a stranger's repository: files are capped in size, and whatever does not fit is a reason
in words, never an exception of another kind.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any, Final

from mlx_router_server.catalogue.architectures import (
    ENCODERS,
    has_vlm,
    servable_architectures,
    vision_architectures,
)
from mlx_router_server.catalogue.entry import Capability, ModelFiles
from mlx_router_server.catalogue.kinds import Kind, foreign_kind
from mlx_router_server.catalogue.quantization import quantized_bits, why_unreadable
from mlx_router_server.catalogue.safetensors import WeightFacts, list_tensors, read_weights
from mlx_router_shared.cache_size import CacheSize, WorkSize, estimate_cache, estimate_work
from mlx_router_shared.capabilities import (
    additional_templates,
    chat_capabilities,
    read_chat_template,
    read_tokenizer_config,
    template_for_tools,
)
from mlx_router_shared.infill import infill_format
from mlx_router_shared.model_config import context_tokens, text_config

__all__ = ["NotServable", "check_config", "inspect_folder", "read_json"]

_MOST_LAYERS: Final = 10_000
_LARGEST_NUMBER: Final = 2**40  # of anything that a configuration counts
_LARGEST_JSON: Final = 32 * 2**20
_LARGEST_TEXT: Final = 2 * 2**20
_UNPACKED_BITS: Final = {"BF16": "BF16", "F16": "F16", "F32": "F32"}
_DIGESTED: Final = ("config.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja")
_FOREIGN: Final = {
    Kind.ADAPTER: "it is an adapter and goes on top of a model: name it as `adapter` of one, or create one from both",
    Kind.DRAFT: "it is a draft head for another model and answers nothing by itself",
    Kind.AUDIO_IN: "it hears: audio is not served here",
    Kind.AUDIO_OUT: "it speaks: audio is not served here",
    Kind.IMAGE: "it makes images, which are not served here",
}


class NotServable(Exception):
    """Why the content of a folder is no model for us, in one sentence, and what it is instead."""

    def __init__(self, reason: str, kind: Kind = Kind.UNKNOWN) -> None:
        super().__init__(reason)
        self.kind = kind


def check_config(config: dict[str, Any]) -> tuple[str, bool]:
    """The model type, and whether the model sees images; raises ``NotServable``. Needs no weights: it is asked before
    gigabytes are downloaded."""
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        raise NotServable("config.json names no model_type")
    sees = "vision_config" in config and model_type in vision_architectures()
    if model_type not in servable_architectures() and model_type not in ENCODERS and not sees:
        raise NotServable(f"mlx-lm has no architecture {model_type!r}")
    if "model_file" in config:
        raise NotServable("it wants to run code of its own")
    for part in (config, config.get("text_config")):
        layers = part.get("num_hidden_layers") if isinstance(part, dict) else None
        if isinstance(layers, int) and layers > _MOST_LAYERS:
            raise NotServable("config.json speaks of more layers than any model has")
    if reason := why_unreadable(config):
        raise NotServable(reason)
    return model_type, sees


def inspect_folder(folder: Path, said: str = "") -> ModelFiles:
    """The facts of a model folder; raises ``NotServable``. ``said`` is what the operator takes it for, if not what its
    content tells: ``chat`` or ``embedding``."""
    if (folder / "fake.json").is_file():
        return _fake_files(folder)
    try:
        config = read_json(folder / "config.json")
        model_type, sees = check_config(config)
    except NotServable as error:
        kind = foreign_kind(folder)
        raise NotServable(_FOREIGN.get(kind, str(error)), kind) from None
    weight_files = _weight_files(folder)
    bits = quantized_bits(config)
    try:
        weights = read_weights(weight_files, bits)
    except ValueError as error:
        raise NotServable(str(error)) from None
    template = read_chat_template(folder)
    text = dict(text_config(config))
    engine, capabilities = _kind(folder, template, config, weight_files, sees, said)
    wants_extra = not has_vlm() and ("vision_config" in config or model_type in ENCODERS)
    return ModelFiles(
        engine=engine,
        extra=("encoders" if model_type in ENCODERS else "vision") if wants_extra else "",
        size_bytes=sum(path.stat().st_size for path in folder.iterdir() if path.is_file()),
        weights_bytes=weights.bytes,
        digest=_digest(folder, weight_files),
        modified_at=max(path.stat().st_mtime for path in [folder / "config.json", *weight_files]),
        family=model_type,
        parameters=weights.parameters,
        quantization=f"{bits}bit" if bits else _UNPACKED_BITS.get(weights.dtype, weights.dtype or "unknown"),
        context_tokens=context_tokens(config),
        cache=estimate_cache(text),
        work=estimate_work(text, fused_attention=sys.platform == "darwin"),
        capabilities=capabilities,
        info=_info(model_type, text, weights, context_tokens(config)),
        template=_default_template(template),
        license=_license(folder),
        parameters_text=_parameters(folder),
    )


def _fake_files(folder: Path) -> ModelFiles:
    """A script of the fake engine; it is served only where the configuration names it."""
    script = read_json(folder / "fake.json")
    digest = hashlib.sha256(str(folder).encode() + (folder / "fake.json").read_bytes()).hexdigest()
    memory = _number(script, "memory_bytes") or 0
    return ModelFiles(
        engine="fake",
        size_bytes=max((folder / "fake.json").stat().st_size, memory),
        weights_bytes=memory,
        digest=digest,
        modified_at=(folder / "fake.json").stat().st_mtime,
        family="fake",
        parameters=0,
        quantization="none",
        context_tokens=_number(script, "context_tokens") or 4096,
        cache=CacheSize(),
        work=WorkSize(),
        capabilities=_fake_capabilities(script.get("capabilities")),
        info={"general.architecture": "fake", "fake.context_length": _number(script, "context_tokens") or 4096},
    )


def read_json(path: Path) -> dict[str, Any]:
    """A file that may hold anything; raises ``NotServable`` unless it is an object of a sane size."""
    try:
        if path.stat().st_size > _LARGEST_JSON:
            raise NotServable(f"{path.name} is too large")
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise NotServable(f"there is no {path.name}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise NotServable(f"{path.name} cannot be read: {error}") from None
    if not isinstance(data, dict):
        raise NotServable(f"{path.name} is not a JSON object")
    return data


def _number(data: dict[str, Any], name: str) -> int | None:
    value = data.get(name)
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 < value <= _LARGEST_NUMBER else None


def _weight_files(folder: Path) -> list[Path]:
    """The files that mlx-lm will read; an index that names a missing shard means an unfinished download."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        shards = read_json(index).get("weight_map")
        named = set(shards.values()) if isinstance(shards, dict) else set()
        missing = sorted(str(name) for name in named if not (folder / str(name)).exists())
        if missing:
            raise NotServable(f"the weights are incomplete: {missing[0]} is missing")
    files = sorted(folder.glob("model*.safetensors"))
    if not files:
        raise NotServable("there are no safetensors weights")
    return files


def _default_template(template: Any) -> str:
    """The text that is shown as the model's template: of several named ones the default."""
    if isinstance(template, list):
        template = {item.get("name"): item.get("template") for item in template if isinstance(item, dict)}
    if isinstance(template, dict):
        template = template.get("default") or template_for_tools(template)
    return template if isinstance(template, str) else ""


def _kind(
    folder: Path, template: Any, config: dict[str, Any], weight_files: list[Path], sees: bool, said: str
) -> tuple[str, frozenset[Capability]]:
    """Which engine runs it, and what it can do; its content tells."""
    if config["model_type"] in ENCODERS:
        classes = config.get("architectures")
        if any(str(name).endswith("ForSequenceClassification") for name in _list(classes)):
            if _labels(weight_files) != 1:
                raise NotServable("it is a classifier, and only those with one label rank documents")
            return "rerank", frozenset({Capability.RERANK})
        return "encode", frozenset({Capability.EMBEDDING})
    capabilities = _capabilities(folder, template, said)
    if Capability.EMBEDDING in capabilities:
        return "embed", capabilities
    return ("vlm", capabilities | {Capability.VISION}) if sees else ("mlx", capabilities)


def _labels(weight_files: list[Path]) -> int:
    """The rows of a classifier's last layer: what a configuration says of them is often missing."""
    for folder in {path.parent for path in weight_files}:
        for tensor in list_tensors(folder):
            shape = tensor["shape"]
            if tensor["name"] in ("classifier.weight", "classifier.out_proj.weight") and isinstance(shape, list):
                return int(shape[0])
    return 0


def _capabilities(folder: Path, template: Any, said: str) -> frozenset[Capability]:
    pools = (folder / "1_Pooling" / "config.json").is_file() or (folder / "modules.json").is_file()
    if said == Kind.EMBEDDING or (pools and said != Kind.CHAT):
        return frozenset({Capability.EMBEDDING})
    found = {Capability.COMPLETION}
    vocabulary = _vocabulary(folder)
    can = chat_capabilities(template, vocabulary, read_tokenizer_config(folder))
    if can.tools:
        found.add(Capability.TOOLS)
    if can.thinking:
        found.add(Capability.THINKING)
    if infill_format(vocabulary or set()) is not None:
        found.add(Capability.INSERT)
    return frozenset(found)


def _fake_capabilities(said: object) -> frozenset[Capability]:
    """Those of its script, or all."""
    names = said if isinstance(said, list) and said else [capability.value for capability in Capability]
    return frozenset(Capability(name) for name in names if name in set(Capability))


def _vocabulary(folder: Path) -> set[str] | None:
    """The tokens of a model as text; None if there is no file that tells."""
    config = read_tokenizer_config(folder)
    try:
        tokenizer = read_json(folder / "tokenizer.json")
    except NotServable:
        return None
    decoder = config.get("added_tokens_decoder")
    added = [*(decoder.values() if isinstance(decoder, dict) else []), *_list(tokenizer.get("added_tokens"))]
    found = {str(token.get("content")) for token in added if isinstance(token, dict)}
    model = tokenizer.get("model")
    pieces = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(pieces, dict):
        found.update(pieces)
    elif isinstance(pieces, list):
        found.update(str(piece[0]) for piece in pieces if isinstance(piece, list) and piece)
    return found


def _list(value: object) -> list[Any]:
    return value if isinstance(value, list) else []


def _parameters(folder: Path) -> str:
    """Sampling defaults as Ollama's clients read them: a name, padded to 30 columns, and a value a line."""
    try:
        config = read_json(folder / "generation_config.json")
    except NotServable:
        return ""
    names = {"temperature": "temperature", "top_k": "top_k", "top_p": "top_p", "min_p": "min_p",
             "repetition_penalty": "repeat_penalty"}  # fmt: skip
    said = [(ours, config[theirs]) for theirs, ours in names.items() if isinstance(config.get(theirs), int | float)]
    return "\n".join(f"{name:<30} {value}" for name, value in said)


def _info(model_type: str, config: dict[str, Any], weights: WeightFacts, context: int) -> dict[str, str | int | float]:
    info: dict[str, str | int | float] = {
        "general.architecture": model_type,
        "general.parameter_count": weights.parameters,
        "general.file_type": weights.dtype,
        f"{model_type}.context_length": context,
    }
    for key, name in (
        ("embedding_length", "hidden_size"),
        ("block_count", "num_hidden_layers"),
        ("feed_forward_length", "intermediate_size"),
        ("attention.head_count", "num_attention_heads"),
        ("attention.head_count_kv", "num_key_value_heads"),
        ("vocab_size", "vocab_size"),
    ):
        if (value := _number(config, name)) is not None:
            info[f"{model_type}.{key}"] = value
    info["tokenizer.ggml.model"] = "huggingface"
    return info


def _license(folder: Path) -> str:
    for name in ("LICENSE", "LICENSE.txt", "LICENSE.md"):
        path = folder / name
        if path.is_file() and path.stat().st_size <= _LARGEST_TEXT:
            return path.read_text(encoding="utf-8", errors="replace")
    return ""


def _digest(folder: Path, weight_files: list[Path]) -> str:
    """Identifies the content without reading gigabytes: small files in full, weights by header, size and ends.

    In a hub cache the weights are links to blobs that are named by their hash, which settles it.
    """
    digest = hashlib.sha256()
    templates = [folder / "chat_template.json", *additional_templates(folder)]
    for path in [*(folder / name for name in _DIGESTED), *templates]:
        if path.is_file() and path.stat().st_size <= _LARGEST_JSON:  # a larger one is not read at all
            digest.update(path.name.encode() + b"\0" + path.read_bytes())
    tokenizers = [path for name in ("tokenizer.json", "tokenizer.model") if (path := folder / name).is_file()]
    for path in [*tokenizers, *weight_files]:
        size = path.stat().st_size
        digest.update(f"{path.name} {size} {path.resolve().name}\n".encode())
        with path.open("rb") as stream:
            digest.update(stream.read(65536))
            stream.seek(max(size - 65536, 0))
            digest.update(stream.read(65536))
    return digest.hexdigest()
