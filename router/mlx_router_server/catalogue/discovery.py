"""Where models lie: extra folders, and the Hugging Face cache in place. Nothing is moved, copied or fetched."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Found", "discover_folders", "discover_hub", "hub_cache"]


@dataclass(frozen=True, slots=True)
class Found:
    """A folder that looks like a model, under the name that its place gives it."""

    name: str
    path: Path
    source: str
    root: Path | None = None
    """Whatever its files are links to has to lie below; None for a folder that the operator named."""

    def strays(self) -> str:
        """The first of its files that is a link to somewhere else; empty when there is none."""
        if self.root is None:
            return ""
        for path in sorted(self.path.iterdir()):
            try:
                if not _inside(path, self.root):
                    return path.name
            except (OSError, RuntimeError):  # a link to itself
                return path.name
        return ""


def hub_cache(environment: dict[str, str]) -> Path:
    """The cache folder, by the same variables as huggingface_hub (which is slow to import)."""
    if path := environment.get("HF_HUB_CACHE") or environment.get("HUGGINGFACE_HUB_CACHE"):
        return Path(path).expanduser()
    home = environment.get("HF_HOME")
    if home is None:
        home = os.path.join(environment.get("XDG_CACHE_HOME", "~/.cache"), "huggingface")
    return Path(home).expanduser() / "hub"


def discover_hub(cache: Path) -> Iterator[Found]:
    """``models--org--name/snapshots/<revision>``: the revision that ``refs/main`` names, else the newest."""
    for repository in _folders(cache):
        kind, _, rest = repository.name.partition("--")
        if kind != "models" or not rest:
            continue
        snapshot = _snapshot(repository)
        if snapshot is not None and _inside(snapshot, repository):
            yield Found(rest.replace("--", "/", 1), snapshot, "hub", cache)


def _snapshot(repository: Path) -> Path | None:
    snapshots = repository / "snapshots"
    try:
        revision = (repository / "refs" / "main").read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        revision = ""
    if revision and "/" not in revision and (snapshots / revision).is_dir():
        return snapshots / revision
    return max(_folders(snapshots), key=lambda path: path.stat().st_mtime, default=None)


def discover_folders(root: Path) -> Iterator[Found]:
    """``<root>/model`` and ``<root>/org/model``; a folder is a model when it holds a config.json."""
    for first in _folders(root):
        if not _inside(first, root):
            continue
        if (first / "config.json").is_file():
            yield Found(first.name, first, "folder", root)
            continue
        for second in _folders(first):
            if (second / "config.json").is_file() and _inside(second, root):
                yield Found(f"{first.name}/{second.name}", second, "folder", root)


def _folders(root: Path) -> list[Path]:
    try:
        return sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    except OSError:
        return []


def _inside(path: Path, root: Path) -> bool:
    """A link that leads out of its root is not followed."""
    return path.resolve().is_relative_to(root.resolve())
