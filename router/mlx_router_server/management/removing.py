"""Removing a model: what only it needs, and nothing that another one or another program may need without a word."""

from __future__ import annotations

import asyncio
import logging
import shutil
import time
from pathlib import Path
from typing import Final

from mlx_router_server.catalogue.entry import ModelEntry
from mlx_router_server.catalogue.names import parse_name
from mlx_router_server.catalogue.store import Manifest
from mlx_router_server.management.models import Models, just_removed, manifest_among
from mlx_router_shared.errors import InvalidRequest
from mlx_router_shared.jobs import OURS

__all__ = ["Remover"]

log = logging.getLogger(__name__)

_WHOSE: Final = {
    "config": "the configuration names it",
    "demo": "it comes with mlx-router; demo_model = false leaves it out",
    "folder": "it lies in a folder of models_dirs; remove its files there",
}


class Remover:
    """Removes one model at a time, between other changes."""

    def __init__(self, models: Models) -> None:
        self._models = models

    async def remove(self, entry: ModelEntry, *, force: bool) -> int:
        """Remove a model and what only it needs; returns the bytes that are free again.

        Raises ``InvalidRequest`` for files that others need or that are not ours to remove; ``force`` stands for the
        word that files of the Hugging Face cache that another program fetched may go.
        """
        async with self._models.changing:
            manifests, _ = await asyncio.to_thread(self._models.store.manifests)
            if entry.source == "created":
                freed = await self._delete_created(entry, manifests)
            elif entry.source == "hub":
                freed = await self._delete_repository(entry, manifests, force=force)
            else:
                raise InvalidRequest(f"model '{entry.name.display}' cannot be deleted here: {_WHOSE[entry.source]}")
        await self._models.catalogue.refresh()
        log.info("event=deleted model=%r freed_bytes=%d", entry.name.display, freed)
        return freed

    async def _delete_created(self, entry: ModelEntry, manifests: list[Manifest]) -> int:
        own = manifest_among(manifests, entry)
        others = [manifest for manifest in manifests if manifest is not own]
        shared = {folder for other in others for folder in (other.weights, other.adapter)}
        folders = [
            self._models.store.weights_folder(name)
            for name in (own.weights, own.adapter)
            if name and name not in shared
        ]
        freed = sum([await asyncio.to_thread(_size, folder) for folder in folders])
        await asyncio.to_thread(self._models.store.drop, own.name)
        base = self._models.catalogue.find_exactly(parse_name(own.base)) if own.by_pull else None
        if base is not None and base.source == "hub" and not self._needed(base, others):
            record = (await asyncio.to_thread(self._models.store.pulled)).get(_repository(base))
            # The short name stood for what was pulled by it; it goes along if nobody else has asked for it.
            if record is not None and not record.by_name and await asyncio.to_thread(_is_ours, base):
                freed += await self._remove_repository(base)
        return freed

    async def _delete_repository(self, entry: ModelEntry, manifests: list[Manifest], *, force: bool) -> int:
        if needed := self._needed(entry, [manifest for manifest in manifests if not manifest.by_pull]):
            raise InvalidRequest(
                f"model '{entry.name.display}' is needed by {', '.join(needed)}: delete that first", param="model"
            )
        if not force and not await asyncio.to_thread(_is_ours, entry):
            raise InvalidRequest(
                f"model '{entry.name.display}' was not pulled by this server, and other programs may use its files in "
                'the Hugging Face cache: delete it all the same with "force": true (mlx-router rm --force)',
                param="force",
            )
        for manifest in manifests:
            if manifest.by_pull and parse_name(manifest.base).key == entry.name.key:
                await asyncio.to_thread(self._models.store.drop, manifest.name)
        return await self._remove_repository(entry)

    def _needed(self, entry: ModelEntry, manifests: list[Manifest]) -> list[str]:
        """Models that lie on this one, or entries of the configuration that name its repository."""
        created = [manifest.name for manifest in manifests
                   if manifest.base and parse_name(manifest.base).key == entry.name.key]  # fmt: skip
        configured = [
            other.name.display
            for other in self._models.catalogue.entries()
            if other.source == "config" and other.path == entry.path
        ]
        return sorted({*created, *configured})

    async def _remove_repository(self, entry: ModelEntry) -> int:
        folder = _folder_of(entry)
        if self._models.cache is None or folder.parent != self._models.cache or not folder.name.startswith("models--"):
            raise InvalidRequest(
                f"model '{entry.name.display}' lies outside of the cache of downloads; remove its files there",
                param="model",
            )
        freed = await asyncio.to_thread(_size, folder / "blobs")
        gone = folder.with_name(f".deleting-{folder.name}-{time.monotonic_ns()}")
        try:
            await asyncio.to_thread(folder.rename, gone)  # gone in one step, whatever happens next
        except FileNotFoundError:
            raise just_removed(entry) from None
        await asyncio.to_thread(shutil.rmtree, gone, ignore_errors=True)
        await asyncio.to_thread(self._models.store.forget_pulled, _repository(entry))
        return freed


def _folder_of(entry: ModelEntry) -> Path:
    return entry.path.parent.parent  # <repository>/snapshots/<revision>


def _is_ours(entry: ModelEntry) -> bool:
    """Whether this server brought the first of it. The mark goes with the files, whoever removes them."""
    return (_folder_of(entry) / OURS).exists()


def _repository(entry: ModelEntry) -> str:
    return f"{entry.name.namespace}/{entry.name.model}".lower()


def _size(folder: Path) -> int:
    return sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
