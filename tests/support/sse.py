"""Server-sent events, taken apart."""

from __future__ import annotations

import json
from typing import Any

__all__ = ["Frame", "read_frames"]


class Frame:
    """One event: its name, if it has one, and its data."""

    def __init__(self, text: str) -> None:
        self.event = ""
        data = []
        for line in text.split("\n"):
            name, _, value = line.partition(": ")
            if name == "event":
                self.event = value
            elif name == "data":
                data.append(value)
        self.text = "\n".join(data)

    @property
    def data(self) -> Any:
        return json.loads(self.text)


def read_frames(body: bytes) -> list[Frame]:
    """Every frame of a whole stream, comments left out."""
    assert body.endswith(b"\n\n"), body[-200:]
    parts = body.decode().removesuffix("\n\n").split("\n\n")
    return [Frame(part) for part in parts if not part.startswith(":")]
