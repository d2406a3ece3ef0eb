"""How weights are packed, and whether mlx-lm can read that: the forms of ``mlx_lm.utils.load_model`` (0.32)."""

from __future__ import annotations

from typing import Any, Final

__all__ = ["quantized_bits", "why_unreadable"]

_ALWAYS: Final = frozenset({"bitnet", "mxfp4", "mxfp8", "fp8"})
_PACKED: Final = frozenset({"nvfp4-pack-quantized", "mxfp4-pack-quantized", "pack-quantized"})


def quantized_bits(config: dict[str, Any]) -> int | None:
    """Bits of a packed weight, where the configuration says so."""
    block = config.get("quantization") or config.get("quantization_config")
    bits = block.get("bits") if isinstance(block, dict) else None
    return bits if isinstance(bits, int) and not isinstance(bits, bool) and 1 <= bits <= 8 else None


def why_unreadable(config: dict[str, Any]) -> str:
    """Why mlx-lm cannot read these weights, in one sentence; empty when it can."""
    if "quantization" in config:
        block = config["quantization"]
        if isinstance(block, dict) and isinstance(block.get("group_size"), int) and isinstance(block.get("bits"), int):
            return ""
        return "its quantization block names no group_size and bits"
    text = config.get("text_config")
    block = config.get("quantization_config") or (text.get("quantization_config") if isinstance(text, dict) else None)
    if not block:
        return ""
    if not isinstance(block, dict) or not isinstance(method := block.get("quant_method"), str):
        return "its quantization_config names no quant_method"
    if method in _ALWAYS:
        return ""
    if method in ("awq", "gptq"):
        bits = block.get("bits", 4)
        return (
            "" if bits == 4 and not block.get("desc_act") else f"{method} weights can be read with 4 bits in order only"
        )
    if method == "compressed-tensors":
        form = block.get("format")
        return "" if form in _PACKED else f"compressed-tensors of the format {form!r} cannot be read"
    if method == "modelopt":
        settings = block.get("quantization", block)
        algorithm = settings.get("quant_algo") if isinstance(settings, dict) else None
        return "" if algorithm == "NVFP4" else f"modelopt weights of the kind {algorithm!r} cannot be read"
    return f"{method} weights cannot be read"
