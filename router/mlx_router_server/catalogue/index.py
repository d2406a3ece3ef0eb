"""The index of all models as it is made from the disk: what is there, what each of it is, and by which names it goes.

Sources, in this order; the first to give a name keeps it: the configuration, the bundled demo model, models that were
created here, extra folders, the Hugging Face cache. Runs in a thread; what it returns is never changed again.
"""

from __future__ import annotations

import logging
import os
import stat
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Final

from mlx_router_server.catalogue.adapters import adapter_bytes, adapter_digest
from mlx_router_server.catalogue.aliases import SHIPPED, keyed
from mlx_router_server.catalogue.discovery import Found, discover_folders, discover_hub
from mlx_router_server.catalogue.entry import Capability, ModelEntry, ModelFiles
from mlx_router_server.catalogue.inspect import NotServable, inspect_folder
from mlx_router_server.catalogue.kinds import Kind
from mlx_router_server.catalogue.names import ModelName, parse_name
from mlx_router_server.catalogue.overlay import NOTHING, Overlay
from mlx_router_server.catalogue.scans import BoundedScans, ScanTimeout
from mlx_router_server.catalogue.stamps import Stamp, digest_of, is_loaded, stamp, stamps_below
from mlx_router_server.catalogue.store import Manifest, Store
from mlx_router_shared.errors import InvalidRequest, MlxRouterError

__all__ = ["DEMO_FOLDER", "Facts", "Index", "IndexBuilder", "Registered", "Sources", "Unservable"]

DEMO_FOLDER: Final = Path(__file__).parent / "demo"

_SCAN_SECONDS: Final = 10.0
_HANGING: Final = -1
"""Stamp of a folder that timed out; when it answers again, the stamp changes and triggers a scan."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Registered:
    """A model named by the operator: where it lies, and what else it is called."""

    name: str
    path: Path | None = None
    repo: str | None = None
    aliases: tuple[str, ...] = ()
    adapter: Path | None = None
    overlay: Overlay = NOTHING
    kind: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sources:
    """Where to look."""

    demo: bool = True
    registered: tuple[Registered, ...] = ()
    folders: tuple[Path, ...] = ()
    hub: Path | None = None
    name_map: tuple[tuple[str, str], ...] = ()
    """Patterns of foreign names to names of ours; the first that fits counts."""
    model_aliases: tuple[tuple[str, str], ...] = ()
    """Short names to repositories, beside those that ship."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Unservable:
    """A folder that looks like a model and cannot be asked."""

    reason: str
    kind: Kind = Kind.UNKNOWN


@dataclass(frozen=True, slots=True)
class Index:
    entries: dict[str, ModelEntry] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)
    unservable: dict[str, Unservable] = field(default_factory=dict)
    listed: tuple[ModelEntry, ...] = ()
    """Newest first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What the worker of a model found out about it."""

    has_tools: bool
    has_thinking: bool


_Inspected = tuple[Path, str, tuple[tuple[str, int, int, int], ...]]
"""A folder, what the configuration says of its kind, and name, size, modification time and inode of each file."""


_Models = list[tuple[Found, ModelFiles | Unservable]]


class IndexBuilder:
    """Looks at the sources; files that have not changed are not read again."""

    def __init__(self, sources: Sources, store: Store | None) -> None:
        self.sources = sources
        self._store = store
        self.facts: dict[str, Facts] = {}
        """By the digest of the weights."""
        self._scans = BoundedScans(_SCAN_SECONDS)
        self.is_complete = True
        """Whether every folder answered in the last build; if not, the next refresh builds again without a change."""
        self._last_found: dict[str, _Models] = {}
        """By the name of a scan, what it found when its folder last answered."""
        self._inspected: dict[_Inspected, ModelFiles | Unservable] = {}
        self._seen: set[_Inspected] = set()
        """What the build that runs has used of it; the rest is of models that are gone."""

    @property
    def model_aliases(self) -> dict[str, str]:
        """Those of the configuration, by the keys of their names."""
        return keyed(dict(self.sources.model_aliases))

    def stamps(self) -> tuple[Stamp, ...]:
        """Stamps of the folders in which models come and go: a few system calls, no file is opened."""
        stamps: list[Stamp] = []
        if self._store is not None:
            stamps += [*stamp(self._store.root / "manifests"), *stamp(self._store.root / "pulled.json")]
        roots = [*self.sources.folders] + ([self.sources.hub] if self.sources.hub else [])
        for root in roots:
            try:
                stamps += self._scans.run(f"stamps {root}", partial(stamps_below, root))
            except ScanTimeout:
                stamps.append((str(root), _HANGING, 0))
        for registered in self.sources.registered:
            for path in filter(None, (registered.path, registered.adapter)):
                try:
                    stamps += self._scans.run(f"stamps {path}", partial(stamp, path))
                except ScanTimeout:
                    stamps.append((str(path), _HANGING, 0))
        return tuple(sorted(stamps))

    def build(self) -> Index:
        registered = {parse_name(said.name).key: said for said in self.sources.registered}
        self._seen = set()
        self.is_complete = True
        entries: dict[str, ModelEntry] = {}
        unservable: dict[str, Unservable] = {}
        for found, files in self._scanned(registered):
            try:
                name = parse_name(found.name)
            except InvalidRequest:
                reason = found.problem or "the name of its folder cannot be a model's name"
                unservable[found.name] = Unservable(reason=reason)
                continue
            if (known := entries.get(name.key)) is not None:
                if known.source == found.source and not _is_same_folder(known.path, found.path):
                    taken = found.name in (*known.name.spellings, *unservable)
                    unservable[str(found.path) if taken else found.name] = Unservable(
                        reason=f"its name is taken by {known.path}: rename one of them"
                    )
                continue
            if isinstance(files, Unservable):
                unservable[found.name] = files
                continue
            said = registered.get(name.key) or Registered(name=name.display)
            entry = ModelEntry(name=name, path=found.path, source=found.source, files=files)
            entries[name.key] = _with_registered(entry, said)
        self._add_created(entries, unservable)
        aliases = self._aliases(entries)
        by_target: dict[str, list[str]] = {}
        for short, target in aliases.items():
            by_target.setdefault(target, []).append(parse_name(short).display.removesuffix(":latest"))
        for target, shorts in by_target.items():
            entries[target] = replace(entries[target], aliases=tuple(sorted(shorts)))
        if self.is_complete:  # else a thread still reads, and what it has read is of use in the next build
            self._inspected = {key: files for key, files in self._inspected.items() if key in self._seen}
        told = {_printable(name): replace(found, reason=_printable(found.reason)) for name, found in unservable.items()}
        return self.corrected(Index(entries, aliases, told))

    def corrected(self, index: Index) -> Index:
        """The index with what workers have found out about the models."""
        entries = {key: self._with_facts(entry) for key, entry in index.entries.items()}
        listed = sorted(entries.values(), key=lambda entry: entry.files.modified_at, reverse=True)
        return Index(entries, index.aliases, index.unservable, tuple(listed))

    def _with_facts(self, entry: ModelEntry) -> ModelEntry:
        facts = self.facts.get(entry.weights_digest)
        if facts is None or entry.files.engine not in ("mlx", "vlm") or entry.overlay.template:
            return entry
        found = {Capability.TOOLS: facts.has_tools, Capability.THINKING: facts.has_thinking}
        kept = {capability for capability in entry.files.capabilities if found.get(capability, True)}
        capabilities = frozenset(kept | {capability for capability, has in found.items() if has})
        if capabilities == entry.files.capabilities:
            return entry
        return replace(entry, files=replace(entry.files, capabilities=capabilities))

    def _aliases(self, entries: dict[str, ModelEntry]) -> dict[str, str]:
        """Keys of names to keys of models: what the configuration says before what ships; a name of a model is none."""
        aliases: dict[str, str] = {}
        for registered in self.sources.registered:
            target = parse_name(registered.name).key
            if target in entries:
                for alias in registered.aliases:
                    aliases.setdefault(parse_name(alias).key, target)
        for short, repository in {**keyed(SHIPPED), **self.model_aliases}.items():
            try:
                target = parse_name(repository).key
            except InvalidRequest:
                continue
            if target in entries:
                aliases.setdefault(short, target)
        return {short: target for short, target in aliases.items() if short not in entries}

    def _add_created(self, entries: dict[str, ModelEntry], unservable: dict[str, Unservable]) -> None:
        """Models of the store: on the weights of others, or on their own."""
        if self._store is None:
            return
        manifests, broken = self._store.manifests()
        unservable.update({name: Unservable(reason=f"its manifest cannot be read: {why}")
                           for name, why in broken.items()})  # fmt: skip
        for manifest in manifests:
            name = parse_name(manifest.name)
            if name.key in entries:
                if entries[name.key].source in ("config", "demo"):
                    unservable[manifest.name] = Unservable(reason="the configuration has another model of that name")
                    continue
                unservable.pop(manifest.name, None)
            entry = self._created(manifest, name, entries)
            if isinstance(entry, Unservable):
                unservable[manifest.name] = entry
            else:
                entries[name.key] = entry

    def _created(self, manifest: Manifest, name: ModelName, entries: dict[str, ModelEntry]) -> ModelEntry | Unservable:
        assert self._store is not None
        adapter = self._store.weights_folder(manifest.adapter) if manifest.adapter else None
        base = None
        if manifest.weights:
            path = self._store.weights_folder(manifest.weights)
            files = self._inspect(Found(manifest.name, path, "created"), "")
            if isinstance(files, Unservable):
                return files
        else:
            known = entries.get(parse_name(manifest.base).key)
            if known is None:
                return Unservable(reason=f"the model that it was made from is not here: {manifest.base}")
            path, files, base = known.path, known.files, known.name
            adapter = adapter or known.adapter
        files = replace(
            files,
            digest=manifest.overlay.digest_over(files.digest),
            weights_digest=files.weights_digest or files.digest,
            modified_at=manifest.created_at,
            capabilities=_capabilities_with(manifest.overlay, files),
            template=manifest.overlay.template or files.template,
            license="\n\n".join(manifest.overlay.license) or files.license,
        )
        return ModelEntry(name=name, path=path, source="created", files=files, base=base, overlay=manifest.overlay,
                          adapter=adapter, adapter_bytes=adapter_bytes(adapter),
                          adapter_digest=adapter_digest(adapter))  # fmt: skip

    def _scanned(self, registered: dict[str, Registered]) -> Iterator[tuple[Found, ModelFiles | Unservable]]:
        """Every folder that looks like a model, with its facts, in the order of the sources.

        Each root is read within a limit of its own: a disk that does not answer hides no other, and the models that
        were known on it stay.
        """
        sources = self.sources

        def inspect_all(found: Iterable[Found], scan: str = "") -> _Models:
            models = []
            for each in found:
                models.append((each, self._inspect(each, _kind_of(each, registered))))
                self._scans.note_progress(scan)
            return models

        def scan(name: str, root: Path, discover: Callable[[], Iterable[Found]]) -> _Models:
            try:
                models = self._last_found[name] = self._scans.run(name, lambda: inspect_all(discover(), name))
                return models
            except ScanTimeout as error:
                self.is_complete = False
                problem = str(error)
                if known := self._last_found.get(name):
                    return known
            except OSError as error:
                problem = f"its folder cannot be read: {error.strerror or error}"
            return [(Found(str(root), root, "folder", root, problem), Unservable(reason=problem))]

        hub = scan("hub", sources.hub, partial(discover_hub, sources.hub)) if sources.hub is not None else []
        by_repo = {found.name.lower(): found for found, _ in hub}
        for said in sources.registered:
            if said.path is not None:
                named = Found(said.name, said.path, "config")
                found_here = scan(f"model {said.name}", said.path, partial(list, [named]))
                yield from ((replace(found, name=said.name), files) for found, files in found_here)
            elif said.repo is not None and (known := by_repo.get(said.repo.lower())) is not None:
                yield from inspect_all([Found(said.name, known.path, "config", problem=known.problem)])
        if sources.demo:
            yield from inspect_all([Found("demo", DEMO_FOLDER, "demo")])
        for folder in sources.folders:
            yield from scan(f"folder {folder}", folder, partial(discover_folders, folder))
        yield from hub

    def _inspect(self, found: Found, said: str) -> ModelFiles | Unservable:
        """The facts, or why there are none; read again only when a file changed."""
        if found.problem:
            return Unservable(reason=found.problem)
        try:
            stats = _stats(found.path)
        except OSError as error:
            return Unservable(reason=f"its folder cannot be read: {error.strerror or error}")
        for name, facts in stats.items():
            if not (stat.S_ISREG(facts.st_mode) or stat.S_ISDIR(facts.st_mode)):
                return Unservable(reason=f"its {name} is neither a file nor a folder")  # reading a pipe may block
        listing = tuple(sorted((name, facts.st_size, facts.st_mtime_ns, facts.st_ino) for name, facts in stats.items()))
        key = (found.path, said, listing)
        self._seen.add(key)
        known = self._inspected.get(key)
        if known is None:
            try:
                if stray := found.strays():
                    raise NotServable(f"its {stray} is a link that leads out of the folder")
                known = inspect_folder(found.path, said)
                if known.engine == "fake" and found.source != "config":
                    known = Unservable(
                        reason="a script of the fake engine is served only where the configuration names it"
                    )
            except NotServable as error:
                known = Unservable(reason=str(error), kind=error.kind)
            except (OSError, MlxRouterError) as error:
                known = Unservable(reason=f"its files cannot be read: {error}")
            except Exception as error:
                # Files of strangers, read by much code: whatever one of them does, the others are still served.
                log.exception("event=model_unreadable path=%r", str(found.path))
                known = Unservable(reason=f"its files make no sense: {type(error).__name__}: {error}")
            if isinstance(known, ModelFiles):
                known = replace(
                    known, stamp=digest_of(item for item in listing if is_loaded(item[0].rpartition("/")[2]))
                )
            self._inspected[key] = known
        return known


def _is_same_folder(one: Path, other: Path) -> bool:
    """Whether two paths lead to one folder, by a link or a case that the file system does not tell apart."""
    try:
        return one == other or one.samefile(other)
    except OSError:
        return False


def _stats(folder: Path) -> dict[str, os.stat_result]:
    """Of everything in a folder and in the folders in it, by relative path. Raises ``OSError``."""
    stats = {path.name: path.stat() for path in folder.iterdir()}
    for name, facts in list(stats.items()):
        if stat.S_ISDIR(facts.st_mode) and not name.startswith("."):
            stats |= {f"{name}/{path.name}": path.stat() for path in (folder / name).iterdir()}
    return stats


def _printable(text: str) -> str:
    """Return a name of the file system as text: bytes that are no UTF-8 are escaped."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _with_registered(entry: ModelEntry, said: Registered) -> ModelEntry:
    """What the configuration puts on top of a model: as a created one has it, but under the model's own name."""
    if said.overlay == NOTHING and said.adapter is None:
        return entry
    files = replace(entry.files, digest=said.overlay.digest_over(entry.files.digest), weights_digest=entry.files.digest)
    return replace(
        entry, files=files, overlay=said.overlay, adapter=said.adapter, adapter_bytes=adapter_bytes(said.adapter),
        adapter_digest=adapter_digest(said.adapter),
    )  # fmt: skip


def _capabilities_with(overlay: Overlay, files: ModelFiles) -> frozenset[Capability]:
    """A template of Ollama's kind knows neither this model's tools nor its thinking, and shows no images."""
    if not overlay.template:
        return files.capabilities
    return files.capabilities - {Capability.TOOLS, Capability.THINKING, Capability.VISION}


def _kind_of(found: Found, registered: dict[str, Registered]) -> str:
    """The kind that the configuration gives it, or an empty string."""
    try:
        said = registered.get(parse_name(found.name).key)
    except InvalidRequest:
        return ""
    return said.kind if said is not None else ""
