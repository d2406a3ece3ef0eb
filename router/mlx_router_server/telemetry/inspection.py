"""The last requests with their bodies and answers, in memory and bounded, for the operator who asked for it."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Any, Final

from mlx_router_shared.errors import ModelNotFound

__all__ = ["Inspected", "Inspection"]

_MOST_BYTES: Final = 256 * 2**10  # of a body, and of an answer
_MOST_LOGGED: Final = 4096


@dataclass(slots=True)
class Part:
    """The beginning of something long, and how long it was."""

    data: bytearray = field(default_factory=bytearray)
    size: int = 0

    def add(self, more: bytes) -> None:
        self.size += len(more)
        if len(self.data) < _MOST_BYTES:
            self.data += more[: _MOST_BYTES - len(self.data)]

    def beginning(self) -> str:
        """For a line of a log."""
        return self.data[:_MOST_LOGGED].decode("utf-8", "replace")

    def shown(self) -> dict[str, Any]:
        return {"bytes": self.size, "cut": self.size > len(self.data), "text": self.data.decode("utf-8", "replace")}


@dataclass(slots=True, kw_only=True)
class Inspected:
    """One request; filled while it is answered."""

    request: str
    at: float
    """Wall clock, seconds since 1970."""
    method: str
    path: str
    headers: list[tuple[str, str]]
    status: int | None = None
    seconds: float | None = None
    """None while it is being answered."""
    body: Part = field(default_factory=Part)
    answer: Part = field(default_factory=Part)

    def summary(self) -> dict[str, Any]:
        names = ("request", "at", "method", "path", "status", "seconds")
        sizes = {"body_bytes": self.body.size, "answer_bytes": self.answer.size}
        return {name: getattr(self, name) for name in names} | sizes

    def whole(self) -> dict[str, Any]:
        return self.summary() | {
            "headers": dict(self.headers), "body": self.body.shown(), "answer": self.answer.shown(),
        }  # fmt: skip


class Inspection:
    """What is kept. ``keep`` 0 keeps nothing and forgets what there was."""

    def __init__(self) -> None:
        self._kept: deque[Inspected] = deque(maxlen=0)

    def configure(self, keep: int) -> None:
        self._kept = deque(list(self._kept)[-keep:] if keep else [], maxlen=keep)

    def add(self, inspected: Inspected) -> None:
        self._kept.append(inspected)

    def newest_first(self) -> list[Inspected]:
        return list(reversed(self._kept))

    def find(self, request: str) -> Inspected:
        """Raises ``ModelNotFound``, whose status is 404."""
        for inspected in self._kept:
            if inspected.request == request:
                return inspected
        raise ModelNotFound(f"request '{request}' is not among the last that were kept", param="request")
