"""The one place that changes which models there are. Here: pull and copy, and what making and removing stand on.

Changes are made one after the other, in threads, and the catalogue has looked again before anybody hears that they are
done. Nothing here runs a model or reads a weight.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Generator
from contextlib import aclosing, contextmanager
from pathlib import Path
from typing import Any

from mlx_router_server.catalogue.catalogue import Catalogue
from mlx_router_server.catalogue.entry import ModelEntry
from mlx_router_server.catalogue.names import ModelName, parse_name
from mlx_router_server.catalogue.overlay import NOTHING
from mlx_router_server.catalogue.store import Manifest, Store
from mlx_router_server.management.pulls import Pulls
from mlx_router_server.telemetry.events import Happenings
from mlx_router_shared.errors import InvalidRequest, ModelNotFound, ShuttingDown, error_from_code
from mlx_router_shared.jobs import JobDone, JobEvent, JobFailed, JobStatus, PullJob

__all__ = ["Models", "just_removed", "manifest_among"]


def manifest_among(manifests: list[Manifest], entry: ModelEntry) -> Manifest:
    """The one of this model. Raises ``ModelNotFound`` if it has been removed meanwhile."""
    for manifest in manifests:
        if parse_name(manifest.name).key == entry.name.key:
            return manifest
    raise just_removed(entry)


def just_removed(entry: ModelEntry) -> ModelNotFound:
    """The error for a model that was there when the request began."""
    return ModelNotFound(f"model '{entry.name.display}' not found: it has just been removed", param="model")


class Models:
    """``cache`` is the Hugging Face cache; None where the operator wants it left alone."""

    def __init__(self, catalogue: Catalogue, store: Store, happenings: Happenings) -> None:
        self.catalogue = catalogue
        self.store = store
        self._pulls = Pulls(self._note_pulled, happenings)
        self.changing = asyncio.Lock()
        self.cache: Path | None = None
        self.streams = 4
        self.is_stopping = False
        self._working: set[asyncio.Task[Any]] = set()

    @property
    def pulls(self) -> Pulls:
        return self._pulls

    async def stop(self) -> None:
        """End downloads and whatever is being made."""
        self.is_stopping = True
        for task in self._working:
            task.cancel()
        await self._pulls.stop()

    @contextmanager
    def working(self) -> Generator[None, None, None]:
        """Around work in the current task that ``stop`` is to end: raises ``ShuttingDown`` then."""
        task = asyncio.current_task()
        assert task is not None
        self._working.add(task)
        try:
            yield
        except asyncio.CancelledError:
            if not self.is_stopping:
                raise
            task.uncancel()
            raise ShuttingDown("the server is shutting down") from None
        finally:
            self._working.discard(task)

    # --------------------------------------------------------------------- pull

    def pull_job(self, name: ModelName) -> PullJob | None:
        """What is to be downloaded for a name; None when it is here and nobody's to fetch. Raises ``ModelNotFound`` or
        ``InvalidRequest``."""
        entry = self.catalogue.find(name)
        repository = self.catalogue.repository(name)
        if entry is not None and (repository is None or not self._is_of_hub(entry)):
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
        async with self.changing:
            await asyncio.to_thread(self.store.note_pulled, job.repository, done.revision)
        await self.catalogue.refresh()

    async def _note_name(self, name: ModelName, repository: str) -> None:
        """What was pulled by a short name is listed under it too, beside its own."""
        base = parse_name(repository)
        if name.key == base.key:
            async with self.changing:
                await asyncio.to_thread(self.store.note_pulled_by_name, repository)
            return
        if self.catalogue.find_exactly(name) is not None:
            return
        manifest = Manifest(name=name.display, base=base.display, created_at=time.time(), by_pull=True)
        await self.put(manifest)

    async def put(self, manifest: Manifest) -> None:
        """Keep it. Raises ``ModelNotFound`` if what it was made from has been removed meanwhile."""
        async with self.changing:
            for folder in (manifest.weights, manifest.adapter):
                if folder and not await asyncio.to_thread(self.store.weights_folder(folder).is_dir):
                    raise ModelNotFound(f"what {manifest.name!r} was made from has just been removed", param="from")
            await asyncio.to_thread(self.store.put, manifest)
        await self.catalogue.refresh()

    async def remove_weights(self, names: list[str]) -> None:
        """Those of them that no model has come to need."""
        if names:
            async with self.changing:
                await asyncio.to_thread(self.store.remove_weights, names)

    # ---------------------------------------------------------------- manifests

    def check_free(self, name: ModelName) -> None:
        """A created model may be made anew; anything else keeps its name."""
        there = self.catalogue.find_exactly(name)
        if there is not None and there.source != "created":
            raise InvalidRequest(
                f"{name.display!r} is the name of a model that was not created here ({there.source}); choose another",
                param="model",
            )

    async def manifest_of(self, entry: ModelEntry) -> Manifest:
        """Return what is kept of it. Raises ``ModelNotFound`` if it has been removed meanwhile."""
        if entry.source != "created":
            return Manifest(name=entry.name.display, base=entry.name.display)
        manifests, _ = await asyncio.to_thread(self.store.manifests)
        return manifest_among(manifests, entry)

    # --------------------------------------------------------------------- copy

    async def copy(self, source: ModelEntry, destination: ModelName) -> None:
        """Another name for the same; what is done to one of them does not change the other."""
        self.check_free(destination)
        async with self.changing:  # the source must not be removed between the two steps
            below = await self.manifest_of(source)
            manifest = Manifest(
                name=destination.display,
                base=below.base,
                weights=below.weights,
                adapter=below.adapter,
                overlay=below.overlay,
                created_at=time.time(),
            )
            await asyncio.to_thread(self.store.put, manifest)
        await self.catalogue.refresh()
