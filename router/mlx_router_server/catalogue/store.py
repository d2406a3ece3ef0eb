"""What this server keeps of models: those that were created or copied, uploaded files, and what was pulled at which
revision.

It lies in the home folder. A name is never part of a path: files are called by hashes. Every file is written beside its
place and moved there, so that a crash leaves the old or the new one. The functions touch the disk and are called in
threads; two calls never write the same file at once, because each change goes through the router's management room.

    store/manifests/<hash of the name>.json   one for each created model
    store/weights/<id>/                       weights that were made here, by quantising or from uploaded files
    store/blobs/sha256-<hex>                  uploaded files
    store/pulled.json                         repositories that were pulled, with their revisions
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Final

import msgspec
from msgspec import Struct, field

from mlx_router_server.catalogue.names import parse_name
from mlx_router_server.catalogue.overlay import Overlay
from mlx_router_server.files import replace_file
from mlx_router_shared.errors import InvalidRequest

__all__ = ["BLOB", "Manifest", "Pulled", "Store"]

BLOB: Final = re.compile(r"sha256[:-]([0-9a-f]{64})")
_WEIGHTS: Final = re.compile(r"[0-9a-f]{8,64}")
_FILE_NAME: Final = re.compile(r"(?:1_Pooling/)?[A-Za-z0-9_][A-Za-z0-9_.-]{0,120}", re.ASCII)
_STALE_SECONDS: Final = 3600.0
_LARGEST: Final = 16 * 2**20


class Manifest(Struct, frozen=True, kw_only=True):
    """A model that was created here."""

    version: int = 1
    name: str
    """As it was spelt; with its tag."""
    base: str = ""
    """The model whose weights it uses, with its tag; empty where it has weights of its own."""
    weights: str = ""
    """The folder of its own weights, below ``store/weights``."""
    adapter: str = ""
    """A folder below ``store/weights`` with an adapter."""
    overlay: Overlay = field(default_factory=Overlay)
    created_at: float = 0.0
    by_pull: bool = False
    """It is the name by which its base was pulled, and goes when that goes."""


class Pulled(Struct, frozen=True, kw_only=True):
    """A repository that this server was told to pull."""

    repository: str
    revision: str
    pulled_at: float = 0.0
    by_name: bool = False
    """It was pulled by its own name, and not only by a short one."""


class Store:
    """One home folder's; None of its methods waits for another."""

    def __init__(self, home: Path) -> None:
        self.root = home / "store"
        self._manifests = self.root / "manifests"
        self._weights = self.root / "weights"
        self._blobs = self.root / "blobs"

    def prepare(self) -> None:
        """Make the folders; remove what uploads and jobs left unfinished long ago, and files that no model uses."""
        self.make_folders()
        self._remove_unused(weights.name for weights in self._weights.iterdir() if _is_old(weights))
        unused = [blob for blob in self._blobs.glob("sha256-*") if blob.stat().st_nlink == 1]
        for left in (*unused, *self._blobs.glob(".upload-*"), *self._weights.glob(".making-*")):
            try:
                if _is_old(left):
                    shutil.rmtree(left) if left.is_dir() else left.unlink()
            except OSError:
                continue

    # ---------------------------------------------------------------- manifests

    def make_folders(self) -> None:
        """Create the folders that do not exist. Raises ``OSError``."""
        for folder in (self._manifests, self._weights, self._blobs):
            folder.mkdir(parents=True, exist_ok=True)

    def manifests(self) -> tuple[list[Manifest], dict[str, str]]:
        """All of them, and the files that are none, with the reason."""
        found, broken = [], {}
        for path in sorted(self._manifests.glob("*.json")):
            try:
                manifest = msgspec.json.decode(_read(path), type=Manifest)
                parse_name(manifest.name)
                if not manifest.weights:
                    parse_name(manifest.base)
                for folder in (manifest.weights, manifest.adapter):
                    if folder and not _WEIGHTS.fullmatch(folder):
                        raise ValueError(f"{folder!r} is no folder of this store")
                found.append(manifest)
            except (OSError, ValueError, msgspec.MsgspecError, InvalidRequest) as error:
                broken[path.name] = str(error)
        return found, broken

    def put(self, manifest: Manifest) -> None:
        """Keep it, and remove the weights of the one that it replaces if none needs them. Raises ``OSError``."""
        self.make_folders()
        path = self._manifest_path(manifest.name)
        before = _folders_of(path)
        replace_file(path, msgspec.json.format(msgspec.json.encode(manifest)))
        self._remove_unused(before)

    def drop(self, name: str) -> None:
        """Forget a created model, and remove the weights that none of the others needs."""
        path = self._manifest_path(name)
        folders = _folders_of(path)
        path.unlink()
        self._remove_unused(folders)

    def remove_weights(self, names: Iterable[str]) -> None:
        """Of folders that were finished for a model that was not made after all."""
        self._remove_unused(names)

    def _remove_unused(self, names: Iterable[str]) -> None:
        """Those that no manifest names; none at all while there is a manifest that cannot be read."""
        names = [name for name in names if _WEIGHTS.fullmatch(name)]
        found, broken = self.manifests() if names else ([], {})
        if broken:
            return
        used = {folder for manifest in found for folder in (manifest.weights, manifest.adapter)}
        for name in names:
            if name not in used:
                shutil.rmtree(self.weights_folder(name), ignore_errors=True)

    def _manifest_path(self, name: str) -> Path:
        return self._manifests / (hashlib.sha256(parse_name(name).key.encode()).hexdigest()[:32] + ".json")

    # ------------------------------------------------------------------ weights

    def weights_folder(self, name: str) -> Path:
        return self._weights / name

    def begin_weights(self) -> Path:
        """A folder to make weights in; ``finish_weights`` gives it its name."""
        self._weights.mkdir(parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(prefix=".making-", dir=self._weights))

    def finish_weights(self, folder: Path, identity: str) -> str:
        """Keep what was made, under a name that follows from ``identity``; what was there under it is replaced."""
        name = hashlib.sha256(identity.encode()).hexdigest()[:32]
        target = self.weights_folder(name)
        if target.exists():
            shutil.rmtree(target)
        folder.chmod(0o755)
        folder.rename(target)
        return name

    def check_files(self, files: dict[str, str], param: str) -> None:
        """Names and digests of uploaded files; raises ``InvalidRequest``."""
        for name, digest in files.items():
            if not _FILE_NAME.fullmatch(name) or ".." in name:
                raise InvalidRequest(f"{name[:80]!r} cannot be the name of a file here", param=param)
            if not self.blob_path(digest).is_file():
                raise InvalidRequest(f"the file {name!r} was not uploaded: POST /api/blobs/{digest}", param=param)

    def assemble(self, files: dict[str, str]) -> Path:
        """A folder of uploaded files, which were checked. Nothing is copied."""
        folder = self.begin_weights()
        try:
            for name, digest in files.items():
                (folder / name).parent.mkdir(exist_ok=True)
                os.link(self.blob_path(digest), folder / name)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        return folder

    # -------------------------------------------------------------------- blobs

    def blob_path(self, digest: str) -> Path:
        """Raises ``InvalidRequest`` for what is no digest."""
        match = BLOB.fullmatch(digest)
        if match is None:
            raise InvalidRequest("invalid digest format")
        return self._blobs / f"sha256-{match[1]}"

    def free_bytes(self) -> int:
        """Room on the disk that the store is on."""
        return shutil.disk_usage(self.root if self.root.exists() else self.root.parent).free

    # ------------------------------------------------------------------- pulled

    def pulled(self) -> dict[str, Pulled]:
        """By repository, in lower case; empty where the file is missing or broken."""
        try:
            records = msgspec.json.decode(_read(self.root / "pulled.json"), type=list[Pulled])
        except (OSError, ValueError, msgspec.MsgspecError):
            return {}
        return {record.repository.lower(): record for record in records}

    def note_pulled(self, repository: str, revision: str) -> None:
        """Raises ``OSError``."""
        records = self.pulled()
        known = records.get(repository.lower())
        record = Pulled(repository=repository, revision=revision, pulled_at=time.time(),
                        by_name=known is not None and known.by_name)  # fmt: skip
        self._write_pulled({**records, repository.lower(): record})

    def note_pulled_by_name(self, repository: str) -> None:
        """Of one that was noted before. Raises ``OSError``."""
        records = self.pulled()
        if (known := records.get(repository.lower())) is not None:
            self._write_pulled({**records, repository.lower(): msgspec.structs.replace(known, by_name=True)})

    def forget_pulled(self, repository: str) -> None:
        records = self.pulled()
        if records.pop(repository.lower(), None) is not None:
            self._write_pulled(records)

    def _write_pulled(self, records: dict[str, Pulled]) -> None:
        replace_file(self.root / "pulled.json", msgspec.json.format(msgspec.json.encode(list(records.values()))))


def _is_old(path: Path) -> bool:
    return time.time() - path.stat().st_mtime > _STALE_SECONDS


def _folders_of(manifest: Path) -> list[str]:
    try:
        found = msgspec.json.decode(_read(manifest), type=Manifest)
    except (OSError, ValueError, msgspec.MsgspecError):
        return []
    return [folder for folder in (found.weights, found.adapter) if folder]


def _read(path: Path) -> bytes:
    if path.stat().st_size > _LARGEST:
        raise ValueError(f"{path.name} is too large")
    return path.read_bytes()
