"""Headers of safetensors files: sizes and shapes without reading a weight.

A file begins with the length of its header (8 bytes, little-endian) and the header as JSON; see
https://huggingface.co/docs/safetensors.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Final

import msgspec

__all__ = ["WeightFacts", "list_tensors", "read_weights"]

_LARGEST_HEADER: Final = 64 * 2**20


class _Tensor(msgspec.Struct):
    dtype: str
    shape: list[int]
    data_offsets: tuple[int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightFacts:
    """Of all files of a model together."""

    bytes: int
    parameters: int
    """Logical ones: packed integers count as the weights they hold."""
    dtype: str
    """The type of most bytes, in safetensors' words: ``BF16``, ``U32`` …"""


def read_weights(files: list[Path], bits: int | None) -> WeightFacts:
    """Sum up the headers; ``bits`` per quantised weight, None when nothing is quantised. Raises ``ValueError``."""
    total = parameters = 0
    by_dtype: dict[str, int] = {}
    for file in files:
        for name, tensor in _header(file).items():
            size = tensor.data_offsets[1] - tensor.data_offsets[0]
            total += size
            by_dtype[tensor.dtype] = by_dtype.get(tensor.dtype, 0) + size
            count = prod(tensor.shape)
            if bits and tensor.dtype == "U32":
                parameters += count * 32 // bits
            elif not name.endswith((".scales", ".biases")):
                parameters += count
    dtype = max(by_dtype, key=lambda name: by_dtype[name], default="")
    return WeightFacts(bytes=total, parameters=parameters, dtype=dtype)


def list_tensors(folder: Path) -> list[dict[str, object]]:
    """Name, type and shape of every weight of a model folder; opens its files."""
    return [
        {"name": name, "type": tensor.dtype, "shape": tensor.shape}
        for file in sorted(folder.glob("model*.safetensors"))
        for name, tensor in sorted(_header(file).items())
    ]


def _header(file: Path) -> dict[str, _Tensor]:
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if not 2 <= length <= _LARGEST_HEADER:
                raise ValueError(f"{file.name} is not a safetensors file")
            raw = msgspec.json.decode(stream.read(length), type=dict[str, msgspec.Raw])
            room = os.fstat(stream.fileno()).st_size - 8 - length
        tensors = {
            name: msgspec.json.decode(value, type=_Tensor) for name, value in raw.items() if name != "__metadata__"
        }
        for tensor in tensors.values():
            begin, end = tensor.data_offsets
            if not 0 <= begin <= end <= room:
                raise ValueError(f"{file.name} is cut short: its weights reach beyond its end")
        return tensors
    except (OSError, msgspec.DecodeError) as error:
        raise ValueError(f"{file.name} cannot be read as safetensors: {error}") from None
