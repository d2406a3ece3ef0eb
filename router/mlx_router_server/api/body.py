"""The body of a request: read within its limits, decompressed, and parsed without stopping the event loop."""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Final, TypeVar

from starlette.requests import Request

from mlx_router_server.api.server import server_of
from mlx_router_shared.errors import InvalidRequest

__all__ = ["BodyTooLarge", "BodyTooSlow", "UnsupportedEncoding", "body_parts", "parse_body", "read_body"]

_SMALL_BYTES: Final = 16 * 2**10
"""A body up to this size is parsed on the event loop: that takes less than handing it to a thread."""
_MOST_CONTAINERS: Final = 400_000
"""Objects and arrays in a body, and members of objects. The decoder holds the interpreter's lock for about 0.5 ms per
1,000 of them."""
_MOST_MEMBERS: Final = 64
"""Of a gzip body: each costs a copy of what follows it."""
_WINDOW_BITS: Final = {"gzip": 31, "x-gzip": 31, "deflate": 15}

Parsed = TypeVar("Parsed")


class BodyTooLarge(InvalidRequest):
    """The body is longer than any request needs to be; status 413."""


class BodyTooSlow(InvalidRequest):
    """A body stopped arriving; status 408."""


class UnsupportedEncoding(InvalidRequest):
    """A Content-Encoding that is not known here; status 415."""


async def parse_body(request: Request, parse: Callable[[bytes], Parsed]) -> Parsed:
    """Read the body and parse it, a large one in a thread. Raises what ``read_body`` and ``parse`` raise."""
    body = await read_body(request)
    if len(body) <= _SMALL_BYTES:
        return parse(body)
    return await asyncio.get_running_loop().run_in_executor(server_of(request).parsers, _parse_large, body, parse)


def _parse_large(body: bytes, parse: Callable[[bytes], Parsed]) -> Parsed:
    if body.count(b"{") + body.count(b"[") > _MOST_CONTAINERS:
        raise BodyTooLarge(f"the body holds more than {_MOST_CONTAINERS} objects and arrays")
    if body.count(b'":') - body.count(b'\\":') > _MOST_CONTAINERS:  # JSON in a string has escaped quotes
        raise BodyTooLarge(f"the body holds more than {_MOST_CONTAINERS} members of objects")
    return parse(body)


async def read_body(request: Request) -> bytes:
    """Return the body, decompressed. Raises ``BodyTooLarge`` without keeping more than the limit in memory,
    ``BodyTooSlow`` and ``UnsupportedEncoding``."""
    limit = server_of(request).settings.max_body_bytes
    announced = request.headers.get("content-length", "")
    if announced.isdigit() and int(announced) > limit:
        raise _too_large(limit)
    parts, size = [], 0
    async with aclosing(body_parts(request)) as stream:
        async for part in stream:
            size += len(part)
            if size > limit:
                raise _too_large(limit)
            parts.append(part)
    body = b"".join(parts)
    encodings = [name.strip().lower() for name in request.headers.get("content-encoding", "").split(",")]
    encodings = [name for name in encodings if name not in ("", "identity")]
    if not encodings:
        return body
    return await asyncio.get_running_loop().run_in_executor(
        server_of(request).parsers, _decompress, body, encodings, limit
    )


def _decompress(body: bytes, encodings: list[str], limit: int) -> bytes:
    for name in reversed(encodings):  # in the order in which they were applied
        if name not in _WINDOW_BITS:
            raise UnsupportedEncoding(f"Content-Encoding {name!r} is not supported: gzip, deflate or none")
        bits = _WINDOW_BITS[name]
        if name == "deflate" and body[:1] and body[0] & 0x0F != 8:
            bits = -15  # without zlib's header, as some clients send it
        decoded = b""
        for _ in range(_MOST_MEMBERS):
            decompressor = zlib.decompressobj(bits)
            try:
                decoded += decompressor.decompress(body, limit + 1 - len(decoded))
            except zlib.error as error:
                raise InvalidRequest(f"the body is not {name} as its Content-Encoding says: {error}") from None
            if len(decoded) > limit:
                raise _too_large(limit)
            if not decompressor.eof:
                raise InvalidRequest(f"the {name} body is cut off")
            body = decompressor.unused_data
            if not body:
                break
            if name == "deflate":
                raise InvalidRequest("something follows the end of the deflate body")
        else:
            raise InvalidRequest(f"the {name} body has more than {_MOST_MEMBERS} members")
        body = decoded
    return body


async def body_parts(request: Request) -> AsyncGenerator[bytes, None]:
    """Yield a body as it arrives, as it is; raises ``BodyTooSlow`` when nothing arrives for too long."""
    limit = server_of(request).settings.request_timeout_seconds or None
    async with aclosing(request.stream()) as stream:
        while True:
            try:
                async with asyncio.timeout(limit):
                    part = await anext(stream)
            except StopAsyncIteration:
                return
            except TimeoutError:
                raise BodyTooSlow(f"nothing more of the body arrived within {limit:g} s") from None
            yield part


def _too_large(limit: int) -> BodyTooLarge:
    return BodyTooLarge(f"the body is longer than {limit} bytes, the limit that max_body_bytes sets")
