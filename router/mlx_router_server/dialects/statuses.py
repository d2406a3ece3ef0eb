"""One table from error codes to HTTP statuses, for all dialects."""

from __future__ import annotations

import copy
import re
from typing import Final

from mlx_router_shared.errors import ErrorCode, MlxRouterError, Unavailable

__all__ = ["for_the_public", "retry_after", "status_of"]

# Errors whose sentence may repeat what a library or a worker said; the others are written here.
_MAY_HOLD_PATHS: Final = frozenset(
    {ErrorCode.LOAD_FAILED, ErrorCode.WORKER_DIED, ErrorCode.ENGINE_FAILED, ErrorCode.BACKING_OFF, ErrorCode.BUSY,
     ErrorCode.WAITED_TOO_LONG, ErrorCode.MEMORY_PRESSURE, ErrorCode.INTERNAL, ErrorCode.PROTOCOL}
)  # fmt: skip
_PATH: Final = re.compile(r"(?<![\w/.])(?:~|[A-Za-z]:\\)?(?:/[^\s/'\"`<>|:,;()]+)+/([^\s/'\"`<>|:,;()]+)")

_STATUSES: Final[dict[ErrorCode, int]] = {
    ErrorCode.INVALID_REQUEST: 400,
    ErrorCode.UNSUPPORTED_CAPABILITY: 400,
    ErrorCode.CONTEXT_LENGTH_EXCEEDED: 400,
    ErrorCode.PREVIOUS_RESPONSE_MISSING: 400,
    ErrorCode.UNAUTHENTICATED: 401,
    ErrorCode.FORBIDDEN: 403,
    ErrorCode.NOT_FOUND: 404,
    ErrorCode.MODEL_NOT_FOUND: 404,
    ErrorCode.MODEL_TOO_LARGE: 500,
    ErrorCode.INSUFFICIENT_STORAGE: 507,
    ErrorCode.UNAVAILABLE: 503,
    ErrorCode.OVERLOADED: 503,
    ErrorCode.WAITED_TOO_LONG: 503,
    ErrorCode.BUSY: 503,
    ErrorCode.MEMORY_PINNED: 503,
    ErrorCode.MEMORY_PRESSURE: 503,
    ErrorCode.BACKING_OFF: 503,
    ErrorCode.SHUTTING_DOWN: 503,
}


def status_of(error: MlxRouterError) -> int:
    """The HTTP status of an error; everything that is not the client's doing is 500."""
    return _STATUSES.get(error.code, 500)


def retry_after(error: MlxRouterError) -> int | None:
    """Whole seconds for the ``Retry-After`` header; SDKs obey up to 60."""
    return max(1, min(error.retry_after_seconds, 60)) if isinstance(error, Unavailable) else None


def for_the_public(error: MlxRouterError) -> MlxRouterError:
    """The same error without the folders of this machine; the log and /admin/status have them."""
    if error.code not in _MAY_HOLD_PATHS:
        return error
    message = _PATH.sub(r"\1", error.message)
    if message == error.message:
        return error
    public = copy.copy(error)
    public.message = message
    return public
