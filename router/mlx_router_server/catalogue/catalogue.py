"""The models by their names, in memory: requests look here and never at a disk.

The index is built in a thread, at start and whenever a folder changed, and replaced whole.
"""

from __future__ import annotations

import asyncio
import difflib
import fnmatch
import logging
from collections.abc import Callable
from typing import Final

from mlx_router_server.catalogue.aliases import repository_of
from mlx_router_server.catalogue.entry import ModelEntry
from mlx_router_server.catalogue.index import DEMO_FOLDER, Facts, Index, IndexBuilder, Registered, Sources, Unservable
from mlx_router_server.catalogue.names import ModelName, parse_name
from mlx_router_server.catalogue.stamps import Stamp
from mlx_router_server.catalogue.store import Store
from mlx_router_shared.errors import InvalidRequest, ModelNotFound, Overloaded

__all__ = ["DEMO_FOLDER", "Catalogue", "Registered", "Sources", "Unservable"]

log = logging.getLogger(__name__)

_REFRESH_SECONDS: Final = 3.0
_READY_SECONDS: Final = 30.0
_NEAR: Final = 0.8


class Catalogue:
    """``start`` it, then ``resolve`` and ``entries`` at any time; both wait for the first look at the disk."""

    def __init__(self, sources: Sources, default_model: str = "", store: Store | None = None) -> None:
        self._builder = IndexBuilder(sources, store)
        self._default_model = default_model
        self._index = Index()
        self._generation = 0
        self._stamps: tuple[Stamp, ...] = ()
        self._building = asyncio.Lock()
        self._looked = asyncio.Event()
        self._refresher: asyncio.Task[None] | None = None

    async def start(self) -> None:
        self._refresher = asyncio.create_task(self._refresh_for_ever(), name="catalogue")

    async def reconfigure(self, sources: Sources, default_model: str) -> None:
        """Look elsewhere from now on; what was known stays until the new index is there."""
        async with self._building:
            before, self._builder.sources = self._builder.sources, sources
            try:
                self._index = await asyncio.to_thread(self._builder.build)
            except BaseException:
                self._builder.sources = before
                raise
            self._default_model = default_model
            self._generation += 1

    async def stop(self) -> None:
        if self._refresher is not None:
            self._refresher.cancel()
            await asyncio.gather(self._refresher, return_exceptions=True)

    async def wait_ready(self) -> None:
        """Wait until the disk was read once. Raises ``Overloaded`` when that takes too long."""
        try:
            async with asyncio.timeout(_READY_SECONDS):
                await self._looked.wait()
        except TimeoutError:
            raise Overloaded("the model folders are still being read; please try again") from None

    @property
    def generation(self) -> int:
        """Another number for each index."""
        return self._generation

    @property
    def ready(self) -> bool:
        return self._looked.is_set()

    def entries(self) -> list[ModelEntry]:
        """Every model, newest files first."""
        return list(self._index.listed)

    @property
    def unservable(self) -> dict[str, Unservable]:
        """Names of folders that look like models and cannot be served, with what they are and why."""
        return dict(self._index.unservable)

    def resolve(self, requested: str, may_see: Callable[[ModelEntry], bool] = lambda entry: True) -> ModelEntry:
        """The one rule for names, on all routes: a name of ours, an alias, the configured default for none or the word
        ``default``, a mapped foreign name. Raises ``InvalidRequest`` or ``ModelNotFound``."""
        if not requested.strip():
            if not self._default_model:
                raise InvalidRequest("model is required", param="model")
            requested = self._default_model
        entry = self.find(parse_name(requested))
        if entry is None and requested.strip().lower() == "default" and self._default_model:
            entry = self.find(parse_name(self._default_model))
        if entry is None:
            entry = self._find_mapped(requested)
        if entry is None:
            raise ModelNotFound(f"model '{requested}' not found{self._near(requested, may_see)}", param="model")
        return entry

    def _near(self, requested: str, may_see: Callable[[ModelEntry], bool]) -> str:
        """A word about names that may have been meant, of those that are listed to whoever asks."""
        names = [entry.name.display.removesuffix(":latest") for entry in self._index.entries.values() if may_see(entry)]
        close = difflib.get_close_matches(requested.strip().removesuffix(":latest"), names, n=2, cutoff=_NEAR)
        return f", did you mean {' or '.join(repr(name) for name in close)}?" if close else ""

    def find(self, name: ModelName) -> ModelEntry | None:
        """A model by its name or another name of it."""
        entry = self._index.entries.get(self._index.aliases.get(name.key, name.key))
        return entry or self._index.entries.get(name.plain.key)

    def find_exactly(self, name: ModelName) -> ModelEntry | None:
        """A model by its own name only."""
        return self._index.entries.get(name.key)

    def repository(self, name: ModelName) -> str | None:
        """The repository on the hub that a name stands for, whether it is here or not; None when it stands for none."""
        configured = {
            parse_name(said.name).key: said.repo for said in self._builder.sources.registered if said.repo is not None
        }
        return repository_of(name, {**self._builder.model_aliases, **configured})

    def note_facts(self, runner: str, *, has_tools: bool, has_thinking: bool) -> None:
        """Correct what is listed of the models that a worker serves by what it found when it loaded them."""
        digests = {entry.weights_digest for entry in self._index.entries.values() if entry.runner == runner}
        facts = Facts(has_tools=has_tools, has_thinking=has_thinking)
        if any(self._builder.facts.get(digest) != facts for digest in digests):
            self._builder.facts.update(dict.fromkeys(digests, facts))
            self._index = self._builder.corrected(self._index)
            self._generation += 1

    def _find_mapped(self, requested: str) -> ModelEntry | None:
        """A name of somebody else's, by the operator's patterns; never looked up anywhere."""
        name = requested.strip().lower()
        for pattern, ours in self._builder.sources.name_map:
            if fnmatch.fnmatchcase(name, pattern.lower()):
                return self.find(parse_name(ours))
        return None

    # --------------------------------------------------------------- refreshing

    async def _refresh_for_ever(self) -> None:
        reported = ""
        while True:
            try:
                await self.refresh()
                reported = ""
            except Exception as error:  # what was known stays; the next scan may succeed
                if (reason := f"{type(error).__name__}: {error}") != reported:
                    reported = reason
                    log.exception("event=catalogue_failed")
            await asyncio.sleep(_REFRESH_SECONDS)

    async def refresh(self) -> None:
        """Look again if a folder changed; the look itself happens in a thread, one at a time."""
        async with self._building:
            stamps = await asyncio.to_thread(self._builder.stamps)
            if stamps != self._stamps or not self._looked.is_set() or not self._builder.is_complete:
                index = await asyncio.to_thread(self._builder.build)
                before, self._index, self._stamps = self._index, index, stamps
                self._generation += 1
                self._looked.set()
                if before.entries.keys() != index.entries.keys():
                    log.info("event=catalogue models=%d unservable=%d", len(index.entries), len(index.unservable))
