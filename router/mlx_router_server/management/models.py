"""The one place that changes which models there are: pull, create, copy, delete.

Changes are made one after the other, in threads, and the catalogue has looked again before anybody hears that they are
done. Nothing here runs a model or reads a weight; quantising is a job of its own.
"""

from __future__ import annotations

import asyncio
import logging
import shutil
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from mlx_router_server.catalogue.catalogue import Catalogue
from mlx_router_server.catalogue.entry import ModelEntry
from mlx_router_server.catalogue.inspect import NotServable, inspect_folder
from mlx_router_server.catalogue.names import ModelName, parse_name
from mlx_router_server.catalogue.overlay import NOTHING, Overlay
from mlx_router_server.catalogue.store import Manifest, Store
from mlx_router_server.jobs.process import run_job
from mlx_router_server.management.pulls import Pulls
from mlx_router_server.telemetry.events import Happenings
from mlx_router_shared.errors import InvalidRequest, ModelNotFound, error_from_code
from mlx_router_shared.jobs import JobDone, JobEvent, JobFailed, JobStatus, PullJob, QuantizeJob

__all__ = ["Creation", "Models", "Quantization"]

log = logging.getLogger(__name__)

_ADAPTER: Final = frozenset({"adapter_config.json", "adapters.safetensors"})
_UNPACKED: Final = frozenset({"BF16", "F16", "F32"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantization:
    """How weights are to be packed; one scale for ``group_size`` of them."""

    bits: int
    group_size: int
    mode: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Creation:
    """A model to be made: from one that is here or can be pulled, or from uploaded files, with something on top."""

    name: ModelName
    base: str
    files: dict[str, str]
    """Names and digests."""
    adapter: dict[str, str]
    overlay: Overlay
    quantization: Quantization | None


class Models:
    """``cache`` is the Hugging Face cache; None where the operator wants it left alone."""

    def __init__(self, catalogue: Catalogue, store: Store, happenings: Happenings) -> None:
        self._catalogue = catalogue
        self._store = store
        self._pulls = Pulls(self._note_pulled, happenings)
        self._changing = asyncio.Lock()
        self.cache: Path | None = None
        self.streams = 4

    @property
    def store(self) -> Store:
        return self._store

    @property
    def pulls(self) -> Pulls:
        return self._pulls

    async def stop(self) -> None:
        await self._pulls.stop()

    # --------------------------------------------------------------------- pull

    def pull_job(self, name: ModelName) -> PullJob | None:
        """What is to be downloaded for a name; None when it is here and nobody's to fetch. Raises ``ModelNotFound`` or
        ``InvalidRequest``."""
        entry = self._catalogue.find(name)
        repository = self._catalogue.repository(name)
        fetched = entry is not None and self._is_of_hub(entry)
        if entry is not None and not fetched:
            return None
        if repository is None:
            raise ModelNotFound(
                f"pull model manifest: file does not exist: no MLX repository is known for {name.display!r}; name one "
                "as ORG/NAME, or add it to [model_aliases]",
                param="model",
            )
        if self.cache is None:
            raise InvalidRequest("hub_cache is off here, and that is where downloads go", param="model")
        return PullJob(repository=repository, cache=str(self.cache), streams=self.streams)

    def _is_of_hub(self, entry: ModelEntry) -> bool:
        """Whether its files are of the cache, whatever it is called; what was put on top of them is not fetched."""
        if entry.source == "hub":
            return True
        return entry.source == "created" and entry.overlay == NOTHING and self._in_cache(entry)

    def _in_cache(self, entry: ModelEntry) -> bool:
        return self.cache is not None and entry.path.is_relative_to(self.cache)

    async def pull(self, name: ModelName) -> AsyncGenerator[JobEvent, None]:
        """Fetch it, or what is new of it. Ends with ``JobDone``; raises what went wrong."""
        job = self.pull_job(name)
        if job is None:
            yield JobStatus(text="pulling manifest")
            yield JobDone()
            return
        async with aclosing(self._pulls.follow(job)) as events:
            async for event in events:
                if isinstance(event, JobFailed):
                    raise error_from_code(event.code, event.message)
                if isinstance(event, JobDone):
                    await self._note_name(name, job.repository)
                yield event

    async def _note_pulled(self, job: PullJob, done: JobDone) -> None:
        async with self._changing:
            await asyncio.to_thread(self._store.note_pulled, job.repository, done.revision)
        await self._catalogue.refresh()

    async def _note_name(self, name: ModelName, repository: str) -> None:
        """What was pulled by a short name is listed under it too, beside its own."""
        base = parse_name(repository)
        if name.key == base.key or self._catalogue.find_exactly(name) is not None:
            return
        manifest = Manifest(name=name.display, base=base.display, created_at=time.time(), by_pull=True)
        await self._put(manifest)

    async def _put(self, manifest: Manifest) -> None:
        async with self._changing:
            await asyncio.to_thread(self._store.put, manifest)
        await self._catalogue.refresh()

    # ------------------------------------------------------------------- create

    async def create(self, creation: Creation) -> AsyncGenerator[JobEvent, None]:
        """Ends with ``JobDone``; raises what went wrong, and then nothing is there that was not before."""
        self._check_free(creation.name)
        for files, param in ((creation.files, "files"), (creation.adapter, "adapters")):
            await asyncio.to_thread(self._store.check_files, files, param)
        if creation.adapter and not creation.adapter.keys() >= _ADAPTER:
            raise InvalidRequest("an adapter is adapter_config.json and adapters.safetensors", param="adapters")
        made: list[Path] = []
        try:
            if creation.files:
                yield JobStatus(text="assembling files")
                base = await self._from_files(creation, made)
            else:
                async with aclosing(self._pull_base(creation.base)) as events:
                    async for event in events:
                        yield event
                base = await self._from_model(creation)
            if creation.adapter:
                yield JobStatus(text="adding adapter")
                base = await self._with_adapter(base, creation, made)
            if creation.quantization is not None:
                async with aclosing(self._quantized(base, creation, creation.quantization, made)) as events:
                    async for event in events:
                        if isinstance(event, JobDone):
                            base = await self._with_weights(base, Path(event.path), made)
                        else:
                            yield event
            yield JobStatus(text="writing manifest")
            await self._put(base)
            yield JobDone()
        finally:
            for folder in made:
                await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)

    def _check_free(self, name: ModelName) -> None:
        """A created model may be made anew; anything else keeps its name."""
        there = self._catalogue.find_exactly(name)
        if there is not None and there.source != "created":
            raise InvalidRequest(
                f"{name.display!r} is the name of a model that was not created here ({there.source}); choose another",
                param="model",
            )

    async def _pull_base(self, base: str) -> AsyncGenerator[JobEvent, None]:
        """An absent base is fetched first, as an operator's pull would."""
        name = parse_name(base)
        if self._catalogue.find(name) is not None:
            return
        async with aclosing(self.pull(name)) as events:
            async for event in events:
                if not isinstance(event, JobDone):
                    yield event

    async def _from_model(self, creation: Creation) -> Manifest:
        """The manifest of something on top of a model; of one that is such itself, what it is on top of."""
        entry = self._catalogue.find(parse_name(creation.base))
        if entry is None:
            raise ModelNotFound(f"model '{creation.base}' not found", param="from")
        below = await self._manifest_of(entry)
        return Manifest(
            name=creation.name.display, base=below.base, weights=below.weights, adapter=below.adapter,
            overlay=creation.overlay.over(below.overlay), created_at=time.time(),
        )  # fmt: skip

    async def _manifest_of(self, entry: ModelEntry) -> Manifest:
        if entry.source != "created":
            return Manifest(name=entry.name.display, base=entry.name.display)
        manifests, _ = await asyncio.to_thread(self._store.manifests)
        return next(manifest for manifest in manifests if parse_name(manifest.name).key == entry.name.key)

    async def _from_files(self, creation: Creation, made: list[Path]) -> Manifest:
        folder = await asyncio.to_thread(self._store.assemble, creation.files)
        made.append(folder)
        return await self._with_weights(
            Manifest(name=creation.name.display, overlay=creation.overlay, created_at=time.time()), folder, made
        )

    async def _with_weights(self, manifest: Manifest, folder: Path, made: list[Path]) -> Manifest:
        """Keep the weights in a folder, if they are a model."""
        try:
            files = await asyncio.to_thread(inspect_folder, folder)
        except NotServable as error:
            raise InvalidRequest(f"these files are no model that can be served: {error}", param="files") from None
        if files.engine == "fake":
            raise InvalidRequest("a script of the fake engine is served only where the configuration names it")
        name = await asyncio.to_thread(
            self._store.finish_weights, folder, f"{parse_name(manifest.name).key} {files.digest}"
        )
        made.remove(folder)
        return Manifest(
            name=manifest.name, weights=name, adapter="", overlay=manifest.overlay, created_at=manifest.created_at
        )

    async def _with_adapter(self, manifest: Manifest, creation: Creation, made: list[Path]) -> Manifest:
        entry = self._catalogue.find(parse_name(creation.base)) if creation.base else None
        if entry is not None and entry.files.engine != "mlx":
            raise InvalidRequest("only models that generate text can have an adapter", param="adapters")
        folder = await asyncio.to_thread(self._store.assemble, creation.adapter)
        made.append(folder)
        identity = f"adapter {parse_name(manifest.name).key} {sorted(creation.adapter.items())}"
        name = await asyncio.to_thread(self._store.finish_weights, folder, identity)
        made.remove(folder)
        return Manifest(
            name=manifest.name, base=manifest.base, weights=manifest.weights, adapter=name, overlay=manifest.overlay,
            created_at=manifest.created_at,
        )  # fmt: skip

    async def _quantized(
        self, manifest: Manifest, creation: Creation, how: Quantization, made: list[Path]
    ) -> AsyncGenerator[JobEvent, None]:
        """In a process of its own. ``JobDone`` names the folder."""
        source, dtype, engine = await self._weights_of(manifest)
        if dtype not in _UNPACKED:
            raise InvalidRequest(
                f"quantization is only supported for F16, BF16 and F32 models, and this one is {dtype}",
                param="quantize",
            )
        if engine != "mlx" or creation.adapter or manifest.adapter:
            raise InvalidRequest("only text models without an adapter can be quantized here", param="quantize")
        target = await asyncio.to_thread(self._store.begin_weights)
        made.append(target)
        yield JobStatus(text=f"quantizing {dtype} model to {how.bits} bits")
        job = QuantizeJob(
            source=str(source), target=str(target), bits=how.bits, group_size=how.group_size, mode=how.mode
        )
        async with aclosing(run_job(job)) as events:
            async for event in events:
                if isinstance(event, JobFailed):
                    raise error_from_code(event.code, event.message)
                yield JobDone(path=str(target)) if isinstance(event, JobDone) else event

    async def _weights_of(self, manifest: Manifest) -> tuple[Path, str, str]:
        """Where the weights lie, how they are packed, and which engine runs them."""
        if manifest.weights:
            folder = self._store.weights_folder(manifest.weights)
            files = await asyncio.to_thread(inspect_folder, folder)
            return folder, files.quantization, files.engine
        entry = self._catalogue.resolve(manifest.base)
        return entry.path, entry.files.quantization, entry.files.engine

    # ----------------------------------------------------------- copy and delete

    async def copy(self, source: ModelEntry, destination: ModelName) -> None:
        """Another name for the same; what is done to one of them does not change the other."""
        self._check_free(destination)
        below = await self._manifest_of(source)
        await self._put(
            Manifest(
                name=destination.display,
                base=below.base,
                weights=below.weights,
                adapter=below.adapter,
                overlay=below.overlay,
                created_at=time.time(),
            )
        )

    async def delete(self, entry: ModelEntry, *, force: bool) -> int:
        """Remove a model and what only it needs; returns the bytes that are free again.

        Raises ``InvalidRequest`` for files that others need or that are not ours to remove; ``force`` stands for the
        word that files of the Hugging Face cache that another program fetched may go.
        """
        async with self._changing:
            manifests, _ = await asyncio.to_thread(self._store.manifests)
            if entry.source == "created":
                freed = await self._delete_created(entry, manifests)
            elif entry.source == "hub":
                freed = await self._delete_repository(entry, manifests, force=force)
            else:
                raise InvalidRequest(f"model '{entry.name.display}' cannot be deleted here: {_WHOSE[entry.source]}")
        await self._catalogue.refresh()
        log.info("event=deleted model=%r freed_bytes=%d", entry.name.display, freed)
        return freed

    async def _delete_created(self, entry: ModelEntry, manifests: list[Manifest]) -> int:
        own = next(manifest for manifest in manifests if parse_name(manifest.name).key == entry.name.key)
        others = [manifest for manifest in manifests if manifest is not own]
        shared = {folder for other in others for folder in (other.weights, other.adapter)}
        folders = [
            self._store.weights_folder(name) for name in (own.weights, own.adapter) if name and name not in shared
        ]
        freed = sum([await asyncio.to_thread(_size, folder) for folder in folders])
        await asyncio.to_thread(self._store.drop, own.name, others)
        base = self._catalogue.find_exactly(parse_name(own.base)) if own.by_pull else None
        if base is not None and base.source == "hub" and not self._needed(base, others):
            # The short name stood for what was pulled by it; nobody else asks for that.
            freed += await self._remove_repository(base)
        return freed

    async def _delete_repository(self, entry: ModelEntry, manifests: list[Manifest], *, force: bool) -> int:
        if needed := self._needed(entry, [manifest for manifest in manifests if not manifest.by_pull]):
            raise InvalidRequest(
                f"model '{entry.name.display}' is needed by {', '.join(needed)}: delete that first", param="model"
            )
        pulled = await asyncio.to_thread(self._store.pulled)
        if not force and _repository(entry) not in pulled:
            raise InvalidRequest(
                f"model '{entry.name.display}' was not pulled by this server, and other programs may use its files in "
                'the Hugging Face cache: delete it all the same with "force": true (mlx-router rm --force)',
                param="force",
            )
        for manifest in manifests:
            if manifest.by_pull and parse_name(manifest.base).key == entry.name.key:
                await asyncio.to_thread(self._store.drop, manifest.name, manifests)
        return await self._remove_repository(entry)

    def _needed(self, entry: ModelEntry, manifests: list[Manifest]) -> list[str]:
        """Models that lie on this one, or entries of the configuration that name its repository."""
        created = [manifest.name for manifest in manifests
                   if manifest.base and parse_name(manifest.base).key == entry.name.key]  # fmt: skip
        configured = [
            other.name.display
            for other in self._catalogue.entries()
            if other.source == "config" and other.path == entry.path
        ]
        return sorted({*created, *configured})

    async def _remove_repository(self, entry: ModelEntry) -> int:
        folder = entry.path.parent.parent  # <repository>/snapshots/<revision>
        assert self.cache is not None
        assert folder.parent == self.cache
        assert folder.name.startswith("models--")
        freed = await asyncio.to_thread(_size, folder / "blobs")
        gone = folder.with_name(f".deleting-{folder.name}-{time.monotonic_ns()}")
        await asyncio.to_thread(folder.rename, gone)  # gone in one step, whatever happens next
        await asyncio.to_thread(shutil.rmtree, gone, ignore_errors=True)
        await asyncio.to_thread(self._store.forget_pulled, _repository(entry))
        return freed


_WHOSE: Final = {
    "config": "the configuration names it",
    "demo": "it comes with mlx-router; demo_model = false leaves it out",
    "folder": "it lies in a folder of models_dirs; remove its files there",
}


def _repository(entry: ModelEntry) -> str:
    return f"{entry.name.namespace}/{entry.name.model}".lower()


def _size(folder: Path) -> int:
    return sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
