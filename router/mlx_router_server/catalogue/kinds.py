"""What kind of model a folder holds, by its content; names are no evidence.

For folders that can be served the capabilities say more; this is for the words in lists, and for telling what those are
that cannot be served.
"""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import Any, Final

__all__ = ["Kind", "foreign_kind"]

_LARGEST: Final = 32 * 2**20
_HEARS: Final = ("ForSpeechSeq2Seq", "ForCTC", "ForAudioClassification", "ForRNNT", "ForTDT")
_SPEAKS: Final = ("TextToSpeech", "ForTextToWaveform", "VitsModel", "BarkModel", "ForTextToSpectrogram")
_AUDIO_IN_TYPES: Final = frozenset(
    {"whisper", "wav2vec2", "hubert", "moonshine", "parakeet", "canary", "seamless_m4t", "speech_to_text"}
)
_AUDIO_OUT_TYPES: Final = frozenset(
    {"kokoro", "vits", "bark", "speecht5", "parler_tts", "csm", "dia", "outetts", "xtts", "melo_tts", "musicgen"}
)
_IMAGE_TYPES: Final = frozenset({"flux", "stable-diffusion", "sdxl", "unet"})


class Kind(StrEnum):
    """What a model is for."""

    CHAT = "chat"
    COMPLETION = "completion"
    """Text that goes on; it has no template for conversations."""
    VISION_CHAT = "vision-chat"
    EMBEDDING = "embedding"
    RERANKER = "reranker"
    AUDIO_IN = "audio-in"
    AUDIO_OUT = "audio-out"
    IMAGE = "image"
    ADAPTER = "adapter"
    """Weights that go on top of another model."""
    DRAFT = "draft"
    """A head that guesses for another model; it answers nothing by itself."""
    UNKNOWN = "unknown"


def foreign_kind(folder: Path) -> Kind:
    """The kind of a folder whose model cannot be served as text, else ``UNKNOWN``."""
    if (folder / "model_index.json").is_file():
        return Kind.IMAGE
    config = _read(folder / "config.json")
    if config is None:
        return Kind.ADAPTER if (folder / "adapter_config.json").is_file() else Kind.UNKNOWN
    listed = config.get("architectures")
    classes = [str(name) for name in listed] if isinstance(listed, list) else []
    model_type = str(config.get("model_type", "")).lower()
    if any("Eagle" in name or "Medusa" in name for name in classes) or "speculators_config" in config:
        return Kind.DRAFT
    if model_type in _AUDIO_OUT_TYPES or any(mark in name for name in classes for mark in _SPEAKS):
        return Kind.AUDIO_OUT
    if model_type in _AUDIO_IN_TYPES or "audio_config" in config or "audio_encoder" in config:
        return Kind.AUDIO_IN
    if any(name.endswith(_HEARS) for name in classes) or _has_ears(folder):
        return Kind.AUDIO_IN
    if model_type in _IMAGE_TYPES:
        return Kind.IMAGE
    return Kind.UNKNOWN


def _has_ears(folder: Path) -> bool:
    """A preprocessor of sound, whatever the model calls itself."""
    config = _read(folder / "preprocessor_config.json")
    return config is not None and ("feature_extractor_type" in config and "sampling_rate" in config)


def _read(path: Path) -> dict[str, Any] | None:
    try:
        if path.stat().st_size > _LARGEST:
            return None
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return data if isinstance(data, dict) else None
