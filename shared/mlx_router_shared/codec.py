"""Bytes to messages and back: the only place that knows the encoding. No sockets here.

MessagePack by `msgpack` carries the plain data; `msgspec` turns it into typed messages and refuses whatever does not
fit. Every message has a size ceiling, because a length is read from the peer before anything is allocated.
"""

from __future__ import annotations

from typing import Any, Final

import msgpack
import msgspec

from mlx_router_shared.errors import ProtocolError
from mlx_router_shared.forking import FromForkServer, ToForkServer
from mlx_router_shared.jobs import Job, JobEvent
from mlx_router_shared.protocol import Bootstrap, FromWorker, ToWorker

__all__ = [
    "MAX_MESSAGE_BYTES",
    "decode_bootstrap",
    "decode_from_fork_server",
    "decode_from_worker",
    "decode_job",
    "decode_job_event",
    "decode_to_fork_server",
    "decode_to_worker",
    "encode",
    "encode_bootstrap",
    "encode_forking",
    "encode_job",
    "encode_job_event",
]

MAX_MESSAGE_BYTES: Final = 64 * 2**20
_DUMP_BYTES: Final = 48


def encode(message: ToWorker | FromWorker) -> bytes:
    """The bytes of a message; raises ``ProtocolError`` when they would exceed the ceiling."""
    data: bytes = msgpack.packb(msgspec.to_builtins(message, builtin_types=(bytes,)), use_bin_type=True)
    if len(data) > MAX_MESSAGE_BYTES:
        raise ProtocolError(
            f"a {type(message).__name__} message of {len(data)} bytes exceeds the limit of {MAX_MESSAGE_BYTES}"
        )
    return data


def decode_to_worker(data: bytes) -> ToWorker:
    """A message from the router; raises ``ProtocolError`` with a shortened dump of what came instead."""
    return _decode(data, ToWorker)  # type: ignore[no-any-return]  # msgspec types unions as Any


def decode_from_worker(data: bytes) -> FromWorker:
    """A message from a worker; raises ``ProtocolError`` with a shortened dump of what came instead."""
    return _decode(data, FromWorker)  # type: ignore[no-any-return]  # msgspec types unions as Any


def _decode(data: bytes, kind: Any) -> Any:
    if len(data) > MAX_MESSAGE_BYTES:
        raise ProtocolError(f"a message of {len(data)} bytes exceeds the limit of {MAX_MESSAGE_BYTES}")
    try:
        plain = msgpack.unpackb(data, raw=False, strict_map_key=False)
        return msgspec.convert(plain, kind)
    except (msgspec.ValidationError, msgpack.UnpackException, ValueError, TypeError, RecursionError) as error:
        dump = data[:_DUMP_BYTES].hex() + ("…" if len(data) > _DUMP_BYTES else "")
        raise ProtocolError(f"not a message of this protocol: {error} ({len(data)} bytes: {dump})") from None


def encode_forking(message: ToForkServer | FromForkServer) -> bytes:
    """Return the bytes of a message to or from a fork server."""
    data: bytes = msgpack.packb(msgspec.to_builtins(message))
    return data


def decode_to_fork_server(data: bytes) -> ToForkServer:
    """Return a message from the router; raises ``ProtocolError``."""
    return _decode(data, ToForkServer)  # type: ignore[no-any-return]  # msgspec types unions as Any


def decode_from_fork_server(data: bytes) -> FromForkServer:
    """Return a message from a fork server; raises ``ProtocolError``."""
    return _decode(data, FromForkServer)  # type: ignore[no-any-return]  # msgspec types unions as Any


def encode_bootstrap(bootstrap: Bootstrap) -> bytes:
    """The line that a worker reads from its standard input."""
    return msgspec.json.encode(bootstrap) + b"\n"


def decode_bootstrap(line: bytes) -> Bootstrap:
    """The other way round; raises ``ProtocolError``."""
    try:
        return msgspec.json.decode(line, type=Bootstrap)
    except (msgspec.DecodeError, msgspec.ValidationError) as error:
        raise ProtocolError(f"not a bootstrap line: {error}") from None


def encode_job(job: Job) -> bytes:
    """The line that a job reads from its standard input."""
    return msgspec.json.encode(job) + b"\n"


def decode_job(line: bytes) -> Job:
    """The other way round; raises ``ProtocolError``."""
    return _decode_line(line, Job)  # type: ignore[no-any-return]  # msgspec types unions as Any


def encode_job_event(event: JobEvent) -> bytes:
    """A line that a job writes to its standard output."""
    return msgspec.json.encode(event) + b"\n"


def decode_job_event(line: bytes) -> JobEvent:
    """The other way round; raises ``ProtocolError``."""
    return _decode_line(line, JobEvent)  # type: ignore[no-any-return]  # msgspec types unions as Any


def _decode_line(line: bytes, kind: Any) -> Any:
    try:
        return msgspec.json.decode(line, type=kind)
    except msgspec.MsgspecError as error:
        raise ProtocolError(f"not a line of a job: {error}") from None
