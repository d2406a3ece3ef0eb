"""The index of all models, in memory: requests look here and never at a disk.

Sources, in this order; the first to give a name keeps it: the configuration, the bundled demo model, extra folders,
the Hugging Face cache. The index is rebuilt in a thread, at start and whenever a folder changed, and replaced whole.
"""

from __future__ import annotations

import asyncio
import difflib
import fnmatch
import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from mlx_router_server.catalogue.discovery import Found, discover_folders, discover_hub
from mlx_router_server.catalogue.entry import ModelEntry, ModelFiles
from mlx_router_server.catalogue.inspect import NotServable, inspect_folder
from mlx_router_server.catalogue.names import parse_name
from mlx_router_shared.errors import InvalidRequest, MlxRouterError, ModelNotFound

__all__ = ["DEMO_FOLDER", "Catalogue", "Registered", "Sources"]

log = logging.getLogger(__name__)

DEMO_FOLDER: Final = Path(__file__).parent / "demo"
_REFRESH_SECONDS: Final = 3.0
_NEAR: Final = 0.8


@dataclass(frozen=True, slots=True, kw_only=True)
class Registered:
    """A model named by the operator: where it lies, and what else it is called."""

    name: str
    path: Path | None = None
    repo: str | None = None
    aliases: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Sources:
    """Where to look."""

    demo: bool = True
    registered: tuple[Registered, ...] = ()
    folders: tuple[Path, ...] = ()
    hub: Path | None = None
    name_map: tuple[tuple[str, str], ...] = ()
    """Patterns of foreign names to names of ours; the first that fits counts."""


@dataclass(frozen=True, slots=True)
class _Index:
    entries: dict[str, ModelEntry] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)
    unservable: dict[str, str] = field(default_factory=dict)


class Catalogue:
    """``start`` it, then ``resolve`` and ``entries`` at any time; both wait for the first look at the disk."""

    def __init__(self, sources: Sources, default_model: str = "") -> None:
        self._sources = sources
        self._default_model = default_model
        self._index = _Index()
        self._stamps: tuple[tuple[str, int], ...] = ()
        self._inspected: dict[tuple[Path, tuple[tuple[str, int, int], ...]], ModelFiles | str] = {}
        self._looked = asyncio.Event()
        self._refresher: asyncio.Task[None] | None = None

    async def start(self) -> None:
        self._refresher = asyncio.create_task(self._refresh_for_ever(), name="catalogue")

    async def reconfigure(self, sources: Sources, default_model: str) -> None:
        """Look elsewhere from now on; what was known stays until the new index is there."""
        self._sources, self._default_model = sources, default_model
        index = await asyncio.to_thread(self._build)
        self._index = index

    async def stop(self) -> None:
        if self._refresher is not None:
            self._refresher.cancel()
            await asyncio.gather(self._refresher, return_exceptions=True)

    async def wait_ready(self) -> None:
        """Until the disk was looked at once."""
        await self._looked.wait()

    @property
    def ready(self) -> bool:
        return self._looked.is_set()

    def entries(self) -> list[ModelEntry]:
        """Every model, newest files first."""
        return sorted(self._index.entries.values(), key=lambda entry: entry.files.modified_at, reverse=True)

    @property
    def unservable(self) -> dict[str, str]:
        """Names of folders that look like models and cannot be served, with the reason."""
        return dict(self._index.unservable)

    def resolve(self, requested: str, may_see: Callable[[ModelEntry], bool] = lambda entry: True) -> ModelEntry:
        """The one rule for names, on all routes: a name of ours, an alias, the configured default for none or the word
        ``default``, a mapped foreign name. Raises ``InvalidRequest`` or ``ModelNotFound``."""
        if not requested.strip():
            if not self._default_model:
                raise InvalidRequest("model is required", param="model")
            requested = self._default_model
        entry = self._find(requested)
        if entry is None and requested.strip().lower() == "default" and self._default_model:
            entry = self._find(self._default_model)
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

    def _find(self, name: str) -> ModelEntry | None:
        key = parse_name(name).key
        return self._index.entries.get(self._index.aliases.get(key, key))

    def _find_mapped(self, requested: str) -> ModelEntry | None:
        """A name of somebody else's, by the operator's patterns; never looked up anywhere."""
        name = requested.strip().lower()
        for pattern, ours in self._sources.name_map:
            if fnmatch.fnmatchcase(name, pattern.lower()):
                return self._find(ours)
        return None

    # --------------------------------------------------------------- refreshing

    async def _refresh_for_ever(self) -> None:
        while True:
            try:
                await self.refresh()
            except Exception:
                log.exception("event=catalogue_failed")  # what was known stays; the next look may go well
            await asyncio.sleep(_REFRESH_SECONDS)

    async def refresh(self) -> None:
        """Look again if a folder changed; the look itself happens in a thread."""
        stamps = await asyncio.to_thread(self._read_stamps)
        if stamps != self._stamps or not self._looked.is_set():
            index = await asyncio.to_thread(self._build)
            before, self._index, self._stamps = self._index, index, stamps
            self._looked.set()
            if before.entries.keys() != index.entries.keys():
                log.info("event=catalogue models=%d unservable=%d", len(index.entries), len(index.unservable))

    def _read_stamps(self) -> tuple[tuple[str, int], ...]:
        """Modification times of the folders in which models come and go: a few system calls, no file is opened."""
        return tuple(sorted(self._stamps_below()))

    def _stamps_below(self) -> Iterator[tuple[str, int]]:
        roots = [*self._sources.folders] + ([self._sources.hub] if self._sources.hub else [])
        for root in roots:
            yield from _stamp(root)
            for first in _subfolders(root):
                yield from _stamp(first)
                for second in _subfolders(first):
                    yield from _stamp(second)
                    if first.name.startswith("models--") and second.name == "snapshots":
                        for snapshot in _subfolders(second):
                            yield from _stamp(snapshot)
        for registered in self._sources.registered:
            if registered.path is not None:
                yield from _stamp(registered.path)

    def _build(self) -> _Index:
        index = _Index()
        for found in self._found():
            try:
                name = parse_name(found.name)
            except InvalidRequest:
                index.unservable[found.name] = "the name of its folder cannot be a model's name"
                continue
            if name.key in index.entries:
                continue
            files = self._inspect(found)
            if isinstance(files, str):
                index.unservable[found.name] = files
            else:
                index.entries[name.key] = ModelEntry(name=name, path=found.path, source=found.source, files=files)
        for registered in self._sources.registered:
            target = parse_name(registered.name).key
            if target in index.entries:
                for alias in registered.aliases:
                    index.aliases.setdefault(parse_name(alias).key, target)
        return index

    def _found(self) -> Iterator[Found]:
        hub = list(discover_hub(self._sources.hub)) if self._sources.hub is not None else []
        by_repo = {found.name.lower(): found for found in hub}
        for registered in self._sources.registered:
            if registered.path is not None:
                yield Found(registered.name, registered.path, "config")
            elif registered.repo is not None and (found := by_repo.get(registered.repo.lower())) is not None:
                yield Found(registered.name, found.path, "config")
        if self._sources.demo:
            yield Found("demo", DEMO_FOLDER, "demo")
        for folder in self._sources.folders:
            yield from discover_folders(folder)
        yield from hub

    def _inspect(self, found: Found) -> ModelFiles | str:
        """The facts, or why there are none; read again only when a file changed."""
        try:
            listing = tuple(sorted((p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in found.path.iterdir()))
        except OSError as error:
            return f"its folder cannot be read: {error.strerror}"
        known = self._inspected.get((found.path, listing))
        if known is None:
            try:
                known = inspect_folder(found.path)
                if known.engine == "fake" and found.source != "config":
                    known = "a script of the fake engine is served only where the configuration names it"
            except NotServable as error:
                known = str(error)
            except (OSError, MlxRouterError) as error:
                known = f"its files cannot be read: {error}"
            self._inspected[(found.path, listing)] = known
        return known


def _stamp(path: Path) -> Iterator[tuple[str, int]]:
    try:
        yield str(path), path.stat().st_mtime_ns
    except OSError:
        return


def _subfolders(root: Path) -> list[Path]:
    try:
        with os.scandir(root) as entries:
            return [Path(entry.path) for entry in entries if entry.is_dir()]
    except OSError:
        return []
