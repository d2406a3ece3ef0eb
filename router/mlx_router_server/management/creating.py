"""Making a model: from another one or from uploaded files, with a prompt on top, an adapter, or packed weights.

What breaks off leaves nothing under the new name, and nothing on the disk. Quantising is a job of its own.
"""

from __future__ import annotations

import asyncio
import shutil
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from mlx_router_server.catalogue.inspect import NotServable, inspect_folder
from mlx_router_server.catalogue.names import ModelName, parse_name
from mlx_router_server.catalogue.overlay import Overlay
from mlx_router_server.catalogue.store import Manifest
from mlx_router_server.jobs.process import run_job
from mlx_router_server.management.models import Models
from mlx_router_shared.errors import InvalidRequest, ModelNotFound, error_from_code
from mlx_router_shared.jobs import JobDone, JobEvent, JobFailed, JobStatus, QuantizeJob

__all__ = ["Creation", "Creator", "Quantization"]

_UNPACKED: Final = frozenset({"BF16", "F16", "F32"})
_ADAPTER: Final = frozenset({"adapter_config.json", "adapters.safetensors"})


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


@dataclass(slots=True)
class _Made:
    """What one creation has put on the disk; what no model is made of in the end goes again."""

    begun: list[Path] = field(default_factory=list)
    finished: list[str] = field(default_factory=list)

    def finish(self, folder: Path, name: str) -> None:
        self.begun.remove(folder)
        self.finished.append(name)


class Creator:
    """Makes one model at a time; any number of them may be made side by side."""

    def __init__(self, models: Models) -> None:
        self._models = models

    async def create(self, creation: Creation) -> AsyncGenerator[JobEvent, None]:
        """Ends with ``JobDone``; raises what went wrong, and then nothing is there that was not before."""
        self._models.check_free(creation.name)
        await asyncio.to_thread(self._models.store.make_folders)
        for files, param in ((creation.files, "files"), (creation.adapter, "adapters")):
            await asyncio.to_thread(self._models.store.check_files, files, param)
        if creation.adapter and not creation.adapter.keys() >= _ADAPTER:
            raise InvalidRequest("an adapter is adapter_config.json and adapters.safetensors", param="adapters")
        made = _Made()
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
            await self._models.put(base)
            yield JobDone()
        finally:
            for folder in made.begun:
                await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)
            await self._models.remove_weights(made.finished)

    async def _pull_base(self, base: str) -> AsyncGenerator[JobEvent, None]:
        """An absent base is fetched first, as an operator's pull would."""
        name = parse_name(base)
        if self._models.catalogue.find(name) is not None:
            return
        async with aclosing(self._models.pull(name)) as events:
            async for event in events:
                if not isinstance(event, JobDone):
                    yield event

    async def _from_model(self, creation: Creation) -> Manifest:
        """The manifest of something on top of a model; of one that is such itself, what it is on top of."""
        entry = self._models.catalogue.find(parse_name(creation.base))
        if entry is None:
            raise ModelNotFound(f"model '{creation.base}' not found", param="from")
        below = await self._models.manifest_of(entry)
        return Manifest(
            name=creation.name.display, base=below.base, weights=below.weights, adapter=below.adapter,
            overlay=creation.overlay.over(below.overlay), created_at=time.time(),
        )  # fmt: skip

    async def _from_files(self, creation: Creation, made: _Made) -> Manifest:
        folder = await asyncio.to_thread(self._models.store.assemble, creation.files)
        made.begun.append(folder)
        return await self._with_weights(
            Manifest(name=creation.name.display, overlay=creation.overlay, created_at=time.time()), folder, made
        )

    async def _with_weights(self, manifest: Manifest, folder: Path, made: _Made) -> Manifest:
        """Keep the weights in a folder, if they are a model."""
        try:
            files = await asyncio.to_thread(inspect_folder, folder)
        except NotServable as error:
            raise InvalidRequest(f"these files are no model that can be served: {error}", param="files") from None
        if files.engine == "fake":
            raise InvalidRequest("a script of the fake engine is served only where the configuration names it")
        name = await asyncio.to_thread(
            self._models.store.finish_weights, folder, f"{parse_name(manifest.name).key} {files.digest}"
        )
        made.finish(folder, name)
        return Manifest(
            name=manifest.name, weights=name, adapter="", overlay=manifest.overlay, created_at=manifest.created_at
        )

    async def _with_adapter(self, manifest: Manifest, creation: Creation, made: _Made) -> Manifest:
        entry = self._models.catalogue.find(parse_name(creation.base)) if creation.base else None
        if entry is not None and entry.files.engine != "mlx":
            raise InvalidRequest("only models that generate text can have an adapter", param="adapters")
        folder = await asyncio.to_thread(self._models.store.assemble, creation.adapter)
        made.begun.append(folder)
        identity = f"adapter {parse_name(manifest.name).key} {sorted(creation.adapter.items())}"
        name = await asyncio.to_thread(self._models.store.finish_weights, folder, identity)
        made.finish(folder, name)
        return Manifest(
            name=manifest.name, base=manifest.base, weights=manifest.weights, adapter=name, overlay=manifest.overlay,
            created_at=manifest.created_at,
        )  # fmt: skip

    async def _quantized(
        self, manifest: Manifest, creation: Creation, how: Quantization, made: _Made
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
        target = await asyncio.to_thread(self._models.store.begin_weights)
        made.begun.append(target)
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
            folder = self._models.store.weights_folder(manifest.weights)
            files = await asyncio.to_thread(inspect_folder, folder)
            return folder, files.quantization, files.engine
        entry = self._models.catalogue.resolve(manifest.base)
        return entry.path, entry.files.quantization, entry.files.engine
