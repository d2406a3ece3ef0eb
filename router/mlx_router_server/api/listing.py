"""Lists of models, fast: clients ask for them at every turn, and of hundreds of models only a state ever changes.

Each model is rendered once for each state that it is seen in; a list is then put together from bytes. Everything is
forgotten when the catalogue has looked again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from mlx_router_server.catalogue.entry import ModelEntry
from mlx_router_server.lifecycle.states import State

__all__ = ["Listing"]


class Listing:
    """One list's; ``render`` gives the JSON of one model."""

    def __init__(self, render: Callable[[ModelEntry, State], bytes]) -> None:
        self._render = render
        self._generation = -1
        self._rendered: dict[tuple[str, State], bytes] = {}

    def join(self, models: Iterable[tuple[ModelEntry, State]], generation: int) -> bytes:
        """The items of a JSON array, without its brackets."""
        if generation != self._generation:
            self._generation = generation
            self._rendered.clear()
        parts = []
        for entry, state in models:
            key = (entry.name.key, state)
            part = self._rendered.get(key)
            if part is None:
                part = self._rendered[key] = self._render(entry, state)
            parts.append(part)
        return b",".join(parts)
