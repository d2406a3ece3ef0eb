"""The bytes of one token: it may be part of a character, and then has no text of its own; or be no token at all."""

from __future__ import annotations

import re
from functools import cache
from typing import Any, Final

__all__ = ["is_token", "token_bytes"]

_BYTE_PIECE: Final = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def is_token(tokenizer: Any, token: int, vocabulary: int) -> bool:
    """Whether an id stands for something. A model's matrices are often wider than its tokenizer's table: ``vocabulary``
    is their width, and the ids beyond the table are nothing that could be written."""
    return 0 <= token < vocabulary and tokenizer.convert_ids_to_tokens(token) is not None


def token_bytes(piece: str | None, *, byte_level: bool) -> bytes:
    """UTF-8, maybe part of a character, of a piece as the vocabulary writes it; None, for an id that it has nothing
    for, is no bytes.

    ``byte_level``: the vocabulary writes each byte as one printable character (GPT-2); otherwise as SentencePiece does,
    with ``▁`` for a blank and ``<0x0A>`` for a single byte.
    """
    if piece is None:
        return b""
    if byte_level:
        table = _byte_of_character()
        if all(character in table for character in piece):
            return bytes(table[character] for character in piece)
        return piece.encode()  # an added token, written as it is
    if match := _BYTE_PIECE.fullmatch(piece):
        return bytes([int(match[1], 16)])
    return piece.replace("▁", " ").encode()


@cache
def _byte_of_character() -> dict[str, int]:
    """GPT-2's table: printable bytes stand for themselves, the others for characters from 256 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    table = {chr(byte): byte for byte in printable}
    others = (byte for byte in range(256) if chr(byte) not in table)
    table.update({chr(256 + number): byte for number, byte in enumerate(others)})
    return table
