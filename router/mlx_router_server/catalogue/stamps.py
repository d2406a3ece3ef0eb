"""Modification times and inodes, by which a change of the models on the disk is noticed without opening a file."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

__all__ = ["Stamp", "digest_of", "is_loaded", "stamp", "stamps_below"]

Stamp = tuple[str, int, int]
"""A path, its modification time in nanoseconds, and its inode: a copy may keep the time of what it replaces."""

_LOADED: Final = (".json", ".safetensors", ".jinja", ".model", ".tiktoken")
_LOADED_NAMES: Final = frozenset({"merges.txt", "vocab.txt", "1_Pooling", "additional_chat_templates"})


def stamps_below(root: Path) -> list[Stamp]:
    """The times of a folder and of those in it, down to the snapshots of a Hugging Face cache."""
    stamps = stamp(root)
    for first in _subfolders(root):
        stamps += stamp(first)
        for second in _subfolders(first):
            stamps += stamp(second)
            if first.name.startswith("models--") and second.name == "snapshots":
                for snapshot in _subfolders(second):
                    stamps += stamp(snapshot)
    return stamps


def is_loaded(name: str) -> bool:
    """Whether a loader may read a file or folder of this name; a change of any other leaves a loaded model as it is."""
    return not name.startswith(".") and (name.endswith(_LOADED) or name in _LOADED_NAMES)


def digest_of(items: Iterable[Any]) -> str:
    """Sixteen hex digits that stand for the items, in whatever order they come."""
    return hashlib.sha256(repr(sorted(items)).encode()).hexdigest()[:16]


def stamp(path: Path) -> list[Stamp]:
    """The times of a folder and of the files in it: a file that is written in its place leaves the folder's alone."""
    stamps: list[Stamp] = []
    try:
        stamps.append(_of(str(path), path.stat()))
        with os.scandir(path) as entries:
            found = list(entries)
        stamps += [_of(entry.path, entry.stat()) for entry in found if _is_model_file(entry)]
        for folder in found:
            if is_loaded(folder.name) and _is_folder(folder):
                with os.scandir(folder.path) as entries:
                    stamps += [_of(entry.path, entry.stat()) for entry in entries]
    except NotADirectoryError:
        return stamps
    except OSError:
        return []
    return stamps


def _of(path: str, facts: os.stat_result) -> Stamp:
    return path, facts.st_mtime_ns, facts.st_ino


def _is_model_file(entry: os.DirEntry[str]) -> bool:
    try:
        return is_loaded(entry.name) and entry.is_file()
    except OSError:
        return False


def _subfolders(root: Path) -> list[Path]:
    try:
        with os.scandir(root) as entries:
            return [Path(entry.path) for entry in entries if _is_folder(entry)]
    except OSError:
        return []


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        return False
