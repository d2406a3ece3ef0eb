"""Vectors as numbers: they cross the wire as little-endian float32."""

from __future__ import annotations

import sys
from array import array

import msgspec

__all__ = ["as_json"]


def as_json(vector: bytes) -> msgspec.Raw:
    """One vector as a list in JSON. One at a time, because writing a whole answer at once would hold up everybody."""
    values = array("f")
    values.frombytes(vector)
    if sys.byteorder == "big":
        values.byteswap()
    return msgspec.Raw(msgspec.json.encode(values.tolist()))
