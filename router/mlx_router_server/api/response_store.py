"""What /v1/responses keeps, so that a later request can go on from an earlier one: in memory, bounded in every way."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import msgspec

from mlx_router_shared.generation import Message

__all__ = ["ResponseStore", "Stored"]

_MOST_BYTES: Final = 64 * 2**20


@dataclass(frozen=True, slots=True)
class Stored:
    """A response as it was sent, and the conversation up to its end, without instructions."""

    owner: str
    """The digest of the key that made it; empty where no keys are asked for."""
    model_names: tuple[str, ...]
    """All names of the model that made it."""
    response: dict[str, Any]
    messages: list[Message]
    input_items: list[dict[str, Any]]
    until: float
    size: int


class ResponseStore:
    """Owned by the server. The oldest goes first when there are too many, or too much."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._stored: OrderedDict[str, Stored] = OrderedDict()
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._stored)

    def put(
        self, response: dict[str, Any], messages: list[Message], input_items: list[dict[str, Any]], *,
        most: int, seconds: float, owner: str = "", model_names: tuple[str, ...] = (),
    ) -> None:  # fmt: skip
        """Keep a response for so long, and at most so many of them; one that is too large alone is not kept."""
        if most <= 0:
            return
        # As JSON: MessagePack has no numbers as large as a schema may hold.
        size = len(msgspec.msgpack.encode(messages)) + sum(len(msgspec.json.encode(p)) for p in (response, input_items))
        if size > _MOST_BYTES:
            return
        self._forget_old(most - 1, _MOST_BYTES - size)
        self._stored[response["id"]] = Stored(
            owner, model_names, response, messages, input_items, self._now() + seconds, size
        )
        self._bytes += size

    def get(self, response_id: str, owner: str = "") -> Stored | None:
        """The response of that owner; those of others do not exist for it."""
        stored = self._stored.get(response_id)
        if stored is None or stored.owner != owner or stored.until <= self._now():
            return None
        return stored

    def delete(self, response_id: str, owner: str = "") -> bool:
        """Whether it was there."""
        known = self.get(response_id, owner) is not None
        if known:
            self._drop(response_id)
        return known

    def _forget_old(self, most: int, most_bytes: int) -> None:
        now = self._now()
        for response_id in [name for name, stored in self._stored.items() if stored.until <= now]:
            self._drop(response_id)
        while self._stored and (len(self._stored) > most or self._bytes > most_bytes):
            self._drop(next(iter(self._stored)))

    def _drop(self, response_id: str) -> None:
        stored = self._stored.pop(response_id, None)
        if stored is not None:
            self._bytes -= stored.size
