"""Images as they come in requests: base64 or data URLs, never an address to fetch."""

from __future__ import annotations

import base64
import binascii
from typing import Final

from mlx_router_shared.errors import InvalidRequest, UnsupportedCapability

__all__ = ["image_from_base64", "image_from_url"]

_MAGIC: Final = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"GIF87a", b"GIF89a", b"RIFF")


def image_from_base64(text: str, param: str) -> bytes:
    """The file; raises ``InvalidRequest`` in Ollama's words."""
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise InvalidRequest("illegal base64 data in an image", param=param) from None
    if not data.startswith(_MAGIC):
        raise InvalidRequest("invalid image input: not a PNG, JPEG, GIF or WebP file", param=param)
    return data


def image_from_url(url: str, param: str) -> bytes:
    """The file in a ``data:`` URL; other addresses are refused, because fetching them would be a request of ours."""
    if not url.startswith("data:"):
        raise UnsupportedCapability(
            "image URLs are not currently supported, please use base64 encoded data instead", param=param
        )
    head, comma, body = url.partition(",")
    if not comma or not head.endswith(";base64"):
        raise InvalidRequest("invalid image input", param=param)
    return image_from_base64(body, param)
