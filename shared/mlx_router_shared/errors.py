"""Stable error codes and the one exception tree.

Codes cross the wire, exceptions do not: a worker sends a code and a sentence, the router raises the class that the
code names. Each API maps codes to its own shapes and statuses in one table; nobody raises HTTP errors below `api`.

    MlxRouterError
    ├── InvalidRequest              what was sent can never work
    │   ├── UnsupportedCapability   this model cannot do that
    │   ├── ContextLengthExceeded   the prompt is longer than the context
    │   └── PreviousResponseMissing what a request goes on from is not kept
    ├── Unauthenticated             no key, or one that is nobody's
    ├── Forbidden                   this caller may not do that
    ├── NotFound                    there is nothing at that address
    │   └── ModelNotFound           the name is nobody's
    ├── ModelTooLarge               would not fit, even alone
    ├── Unavailable                 may work later: carries the seconds after which to try again
    │   ├── Overloaded              a queue is full
    │   ├── WaitedTooLong           no room came free in time
    │   ├── Busy                    others are in the way, and the operator wants nobody to wait
    │   ├── MemoryPinned            the room is held by pinned models
    │   ├── MemoryPressure          the machine is short of memory
    │   ├── BackingOff              the last load failed a moment ago
    │   └── ShuttingDown            the router is leaving
    ├── InsufficientStorage         the disk has no room for it
    ├── LoadFailed                  the worker could not load the model
    ├── WorkerDied                  the worker's process ended while it was needed
    ├── EngineFailed                the engine raised while it generated
    └── ProtocolError               bytes that are not a message
"""

from __future__ import annotations

from enum import StrEnum
from typing import ClassVar

__all__ = [
    "BackingOff",
    "Busy",
    "ContextLengthExceeded",
    "EngineFailed",
    "ErrorCode",
    "Forbidden",
    "InsufficientStorage",
    "InvalidRequest",
    "LoadFailed",
    "MemoryPinned",
    "MemoryPressure",
    "MlxRouterError",
    "ModelNotFound",
    "ModelTooLarge",
    "NotFound",
    "Overloaded",
    "PreviousResponseMissing",
    "ProtocolError",
    "ShuttingDown",
    "Unauthenticated",
    "Unavailable",
    "UnsupportedCapability",
    "WaitedTooLong",
    "WorkerDied",
    "error_from_code",
]


class ErrorCode(StrEnum):
    """What went wrong, in words that stay the same from release to release."""

    INTERNAL = "internal"
    INVALID_REQUEST = "invalid_request"
    UNSUPPORTED_CAPABILITY = "unsupported_capability"
    CONTEXT_LENGTH_EXCEEDED = "context_length_exceeded"
    PREVIOUS_RESPONSE_MISSING = "previous_response_not_found"
    UNAUTHENTICATED = "invalid_api_key"
    FORBIDDEN = "forbidden"
    NOT_FOUND = "not_found"
    MODEL_NOT_FOUND = "model_not_found"
    MODEL_TOO_LARGE = "model_too_large"
    UNAVAILABLE = "unavailable"
    OVERLOADED = "overloaded"
    WAITED_TOO_LONG = "waited_too_long"
    BUSY = "busy"
    MEMORY_PINNED = "memory_pinned"
    MEMORY_PRESSURE = "memory_pressure"
    BACKING_OFF = "backing_off"
    SHUTTING_DOWN = "shutting_down"
    INSUFFICIENT_STORAGE = "insufficient_storage"
    LOAD_FAILED = "load_failed"
    WORKER_DIED = "worker_died"
    ENGINE_FAILED = "engine_failed"
    PROTOCOL = "protocol"


class MlxRouterError(Exception):
    """Base of all errors of this project; the message is one sentence for the person who made the request."""

    code: ClassVar[ErrorCode] = ErrorCode.INTERNAL

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        """The request field at fault, as the client wrote it, or None."""


class InvalidRequest(MlxRouterError):
    """The request can never work as it is."""

    code = ErrorCode.INVALID_REQUEST


class UnsupportedCapability(InvalidRequest):
    """The model, or this server, cannot do what was asked."""

    code = ErrorCode.UNSUPPORTED_CAPABILITY


class ContextLengthExceeded(InvalidRequest):
    """The prompt, of so many ``tokens``, does not fit the context, of ``limit``; 0 where that is not known."""

    code = ErrorCode.CONTEXT_LENGTH_EXCEEDED

    def __init__(self, message: str, *, param: str | None = None, tokens: int = 0, limit: int = 0) -> None:
        super().__init__(message, param=param)
        self.tokens = tokens
        self.limit = limit


class PreviousResponseMissing(InvalidRequest):
    """The response that a request wants to go on from is not, or no longer, kept."""

    code = ErrorCode.PREVIOUS_RESPONSE_MISSING


class Unauthenticated(MlxRouterError):
    """A key is wanted, and none came or one that is not valid."""

    code = ErrorCode.UNAUTHENTICATED


class Forbidden(MlxRouterError):
    """Whoever asks may not do that, and another key or a setting would be needed."""

    code = ErrorCode.FORBIDDEN


class NotFound(MlxRouterError):
    """What an address names does not exist."""

    code = ErrorCode.NOT_FOUND


class ModelNotFound(NotFound):
    """No model of that name is known here."""

    code = ErrorCode.MODEL_NOT_FOUND


class ModelTooLarge(MlxRouterError):
    """The model would not fit the memory budget even alone; nothing was evicted for it."""

    code = ErrorCode.MODEL_TOO_LARGE


class Unavailable(MlxRouterError):
    """Not now; ``retry_after_seconds`` says when to ask again."""

    code = ErrorCode.UNAVAILABLE

    def __init__(self, message: str, *, retry_after_seconds: int = 1) -> None:
        super().__init__(message)
        self.retry_after_seconds = retry_after_seconds


class Overloaded(Unavailable):
    """A queue is full."""

    code = ErrorCode.OVERLOADED


class WaitedTooLong(Unavailable):
    """No room came free within the time limit of the queue."""

    code = ErrorCode.WAITED_TOO_LONG


class Busy(Unavailable):
    """Something else would have to end first, and by the operator's ``busy_policy`` nobody waits for it."""

    code = ErrorCode.BUSY


class MemoryPinned(Unavailable):
    """The memory that is needed belongs to pinned models."""

    code = ErrorCode.MEMORY_PINNED


class MemoryPressure(Unavailable):
    """Other programs need the machine's memory; nothing new is loaded until it is back."""

    code = ErrorCode.MEMORY_PRESSURE


class BackingOff(Unavailable):
    """The model failed a moment ago and is not tried again yet."""

    code = ErrorCode.BACKING_OFF


class ShuttingDown(Unavailable):
    """The router is leaving and takes no new work."""

    code = ErrorCode.SHUTTING_DOWN


class InsufficientStorage(MlxRouterError):
    """The disk has no room for what was to be written; nothing was."""

    code = ErrorCode.INSUFFICIENT_STORAGE


class LoadFailed(MlxRouterError):
    """A worker could not load the model."""

    code = ErrorCode.LOAD_FAILED


class WorkerDied(MlxRouterError):
    """The worker's process ended while a request needed it."""

    code = ErrorCode.WORKER_DIED


class EngineFailed(MlxRouterError):
    """The engine raised while it generated."""

    code = ErrorCode.ENGINE_FAILED


class ProtocolError(MlxRouterError):
    """Bytes that are not a message of this protocol version."""

    code = ErrorCode.PROTOCOL


def _tree(root: type[MlxRouterError]) -> dict[str, type[MlxRouterError]]:
    """The classes by their codes; one that has its code from its parent is the parent's business."""
    found = {root.code.value: root} if "code" in root.__dict__ else {}
    for child in root.__subclasses__():
        found.update(_tree(child))
    return found


def error_from_code(code: str, message: str) -> MlxRouterError:
    """The exception that ``code`` names; a code from a newer peer becomes the base class."""
    return _tree(MlxRouterError).get(code, MlxRouterError)(message)
