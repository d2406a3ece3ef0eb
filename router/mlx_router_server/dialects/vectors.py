"""Vectors as numbers: they cross the wire as little-endian float32."""

from __future__ import annotations

import sys
from array import array

__all__ = ["floats"]


def floats(vector: bytes) -> list[float]:
    """The components of one vector."""
    values = array("f")
    values.frombytes(vector)
    if sys.byteorder == "big":
        values.byteswap()
    return values.tolist()
