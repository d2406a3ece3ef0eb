"""Where models lie: extra folders, and the Hugging Face cache in place. Nothing is moved, copied or fetched."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from mlx_router_server.files import expanded

__all__ = ["Found", "discover_folders", "discover_hub", "hub_cache"]


_WEIGHTS: Final = (".safetensors", ".gguf", ".npz")
_STRAY: Final = "it is a link that leads out of the folder: name the folder that it leads to in models_dirs"
_TOO_DEEP: Final = "nested too deeply: models_dirs hold MODEL or ORG/MODEL; add the folder above it to models_dirs"
_MODEL_MARKS: Final = ("adapter_config.json", "model_index.json", "fake.json")


@dataclass(frozen=True, slots=True)
class Found:
    """A folder that looks like a model, under the name that its place gives it."""

    name: str
    path: Path
    source: str
    root: Path | None = None
    """Whatever its files are links to has to lie below; None for a folder that the operator named."""
    problem: str = ""
    """Why it cannot be served, if that is known without reading its files."""

    def strays(self) -> str:
        """The first of its files that is a link to somewhere else; empty when there is none."""
        if self.root is None:
            return ""
        own = sorted(self.path.iterdir())
        below = [
            path for folder in own if folder.is_dir() and not folder.is_symlink() for path in sorted(folder.iterdir())
        ]
        strays = (path for path in [*own, *below] if not _inside(path, self.root))
        return next((str(path.relative_to(self.path)) for path in strays), "")


def hub_cache(environment: dict[str, str]) -> Path:
    """The cache folder, by the same variables as huggingface_hub (which is slow to import)."""
    if path := environment.get("HF_HUB_CACHE") or environment.get("HUGGINGFACE_HUB_CACHE"):
        return expanded(path)
    home = environment.get("HF_HOME")
    if home is None:
        home = os.path.join(environment.get("XDG_CACHE_HOME", "~/.cache"), "huggingface")
    return expanded(home) / "hub"


def discover_hub(cache: Path) -> Iterator[Found]:
    """``models--org--name/snapshots/<revision>``: the revision that ``refs/main`` names, else the newest."""
    for entry in _entries(cache):
        kind, _, rest = entry.name.partition("--")
        if kind != "models" or not rest:
            continue
        name, repository = rest.replace("--", "/", 1), Path(entry.path)
        try:
            if entry.is_dir() and (snapshot := _snapshot(repository)) is not None:
                inside = _inside(snapshot, repository)
                problem = "" if inside else "its snapshot is a link that leads out of its repository"
                yield Found(name, snapshot, "hub", cache, problem)
        except OSError as error:
            yield Found(name, repository, "hub", cache, _unreadable(error))


def _snapshot(repository: Path) -> Path | None:
    snapshots = repository / "snapshots"
    reference = repository / "refs" / "main"
    try:
        revision = reference.read_text(encoding="ascii").strip() if reference.is_file() else ""
    except (OSError, ValueError):
        revision = ""
    if revision and "/" not in revision and (snapshots / revision).is_dir():
        return snapshots / revision
    if not snapshots.exists():
        return None  # nothing of it has been downloaded
    folders = [entry for entry in os.scandir(snapshots) if not entry.name.startswith(".") and entry.is_dir()]
    newest = max(folders, key=lambda entry: entry.stat().st_mtime, default=None)
    return Path(newest.path) if newest is not None else None


def discover_folders(root: Path) -> Iterator[Found]:
    """``<root>/model`` and ``<root>/org/model``; ``root`` itself, if it is a model. A folder is a model when it holds a
    config.json; one that only looks like a model is listed with the reason why it is none."""
    try:
        if (root / "config.json").is_file():
            yield Found(root.name, root, "folder", root)
            return
        root.stat()
        entries = _entries(root)
    except OSError as error:
        yield Found(str(root), root, "folder", root, _unreadable(error))
        return
    for entry in entries:
        yield from _discover_folder(entry, entry.name, root, depth=2)


def _discover_folder(entry: os.DirEntry[str], name: str, root: Path, depth: int) -> Iterator[Found]:
    path = Path(entry.path)
    try:
        if not _inside(path, root):
            if _leads_to_folder(path):
                yield Found(name, path, "folder", root, _STRAY)
            return
        if not entry.is_dir():
            return
        if (path / "config.json").is_file():
            yield Found(name, path, "folder", root)
            return
        below = _entries(path)
    except OSError as error:
        yield Found(name, path, "folder", root, _unreadable(error))
        return
    if any(child.name in _MODEL_MARKS or child.name.endswith(_WEIGHTS) for child in below):
        yield Found(name, path, "folder", root)  # the reason, or what it is instead, is found by reading it
        return
    for child in below:
        if depth > 1:
            yield from _discover_folder(child, f"{name}/{child.name}", root, depth - 1)
        elif _looks_like_model(path / child.name):
            yield Found(f"{name}/{child.name}", path / child.name, "folder", root, _TOO_DEEP)


def _looks_like_model(folder: Path) -> bool:
    """Whether a folder holds a configuration and weights; False for one that cannot be read."""
    try:
        names = os.listdir(folder)
    except OSError:
        return False
    return "config.json" in names and any(name.endswith(_WEIGHTS) for name in names)


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    """What is in a folder by name, hidden entries left out; none if there is no such folder. Raises ``OSError``."""
    try:
        with os.scandir(folder) as entries:
            return sorted((entry for entry in entries if not entry.name.startswith(".")), key=lambda e: e.name)
    except (FileNotFoundError, NotADirectoryError):
        return []


def _unreadable(error: OSError) -> str:
    return f"its folder cannot be read: {error.strerror or error}"


def _leads_to_folder(path: Path) -> bool:
    """Whether a link leads to a folder, or to itself: a link to a file is no model."""
    try:
        return path.resolve(strict=True).is_dir()
    except FileNotFoundError:
        return False
    except (OSError, RuntimeError):
        return True


def _inside(path: Path, root: Path) -> bool:
    """Whether a path lies below a root once all links are followed; a link to itself lies nowhere."""
    try:
        return path.resolve().is_relative_to(root.resolve())
    except (OSError, RuntimeError):
        return False
