"""What the handlers share: the settings, the catalogue, and the one door to models."""

from __future__ import annotations

import fnmatch
import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import Final, Protocol

from starlette.requests import Request

from mlx_router_server.access.keys import Caller, KeyRing
from mlx_router_server.api.listing import Listing
from mlx_router_server.api.response_store import ResponseStore
from mlx_router_server.catalogue.catalogue import Catalogue, Sources
from mlx_router_server.catalogue.entry import Capability, Estimate, ModelEntry
from mlx_router_server.catalogue.extras import install_command
from mlx_router_server.catalogue.names import parse_name
from mlx_router_server.dialects.call import Need, Needs
from mlx_router_server.lifecycle.keepalive import KeepAlive
from mlx_router_server.lifecycle.spec import ModelSpec
from mlx_router_server.lifecycle.states import State
from mlx_router_server.lifecycle.views import ModelView
from mlx_router_server.management.models import Models
from mlx_router_server.settings import ModelSettings, Settings
from mlx_router_server.telemetry.inspection import Inspection
from mlx_router_server.telemetry.logs import LogLine
from mlx_router_server.telemetry.metrics import Metrics
from mlx_router_server.telemetry.ring import Ring
from mlx_router_server.workers.lease import Lease
from mlx_router_server.workers.plan import LoadPlan, SupervisorOptions, Wishes
from mlx_router_server.workers.supervisor import Supervisor
from mlx_router_shared.errors import InvalidRequest, LoadFailed, MlxRouterError, ModelNotFound, UnsupportedCapability

__all__ = ["Door", "Server", "caller_of", "server_of"]

log = logging.getLogger(__name__)

_FOREIGN_NAMES: Final = "claude-*"


class Door(Protocol):
    """All that a handler may do with models."""

    def acquire(
        self, plan: LoadPlan, wishes: Wishes = ..., *, label: str = ""
    ) -> AbstractAsyncContextManager[Lease]: ...


@dataclass(slots=True)
class Server:
    """Made in the application's lifespan, handed to every handler by the application's state."""

    settings: Settings
    catalogue: Catalogue
    supervisor: Supervisor
    keys: KeyRing
    models: Models | None = None
    """None: there is no home folder to keep any in."""
    started_at: float = field(default_factory=time.time)
    responses: ResponseStore = field(default_factory=ResponseStore)
    metrics: Metrics = field(default_factory=Metrics)
    inspection: Inspection = field(default_factory=Inspection)
    logs: Ring[LogLine] = field(default_factory=lambda: Ring(0))
    listings: dict[str, Listing] = field(default_factory=dict)
    parsers: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(2, "parser"))
    """Threads that parse large bodies; few, so that a flood of them leaves the event loop its share."""

    @property
    def door(self) -> Door:
        return self.supervisor

    def views(self) -> list[ModelView]:
        """Of each model that was asked for since the start, unless it is gone for good: neither in the catalogue, nor
        loaded, nor waited for."""
        known = {entry.runner for entry in self.catalogue.entries()}
        views = self.supervisor.views()
        return [view for view in views if view.name in known or view.worker is not None or view.queued]

    async def resolve(self, name: str, caller: Caller, *, by_operator: bool = False) -> ModelEntry:
        """The model of that name, if the caller may use it; raises ``ModelNotFound`` or ``InvalidRequest``.

        What ``on_demand`` keeps requests from, the operator may.
        """
        await self.catalogue.wait_ready()
        entry = self._resolve(name, caller)
        if not caller.may_use(entry.names):
            raise ModelNotFound(f"model '{name}' not found, or not allowed with this key", param="model")
        if not self.settings.on_demand and not by_operator and not self._loaded(entry):
            raise ModelNotFound(f"model '{name}' not found: it is not loaded and on_demand is off", param="model")
        return entry

    def names_of(self, name: str, caller: Caller) -> tuple[str, ...]:
        """All names of the model that a request for ``name`` gets; the name alone when there is none now."""
        try:
            return self._resolve(name, caller).names
        except MlxRouterError:
            return (name,)

    def _resolve(self, name: str, caller: Caller) -> ModelEntry:
        try:
            return self.catalogue.resolve(name, lambda entry: caller.may_use(entry.names))
        except ModelNotFound as error:
            if caller.models:
                # The same words whether it is there or not: a key does not tell what others may use.
                raise ModelNotFound(f"{error.message}, or not allowed with this key", param="model") from None
            if not fnmatch.fnmatchcase(name.strip().lower(), _FOREIGN_NAMES):
                raise
            return self._stand_in(error)

    def _stand_in(self, error: ModelNotFound) -> ModelEntry:
        """For names that Anthropic's clients send unasked: the default model, or the one that is there anyway."""
        if self.settings.default_model:
            return self.catalogue.resolve(self.settings.default_model)
        warm = [entry for entry in self.catalogue.entries()
                if Capability.COMPLETION in entry.files.capabilities and self._loaded(entry)]  # fmt: skip
        pinned = [entry for entry in warm if (view := self.view(entry)) is not None and view.pinned]
        for candidates in (pinned, warm):
            if len(candidates) == 1:
                return candidates[0]
        text = f"{error.message}: say under [name_map] in the configuration which model stands in for it"
        raise ModelNotFound(text, param="model")

    def unload_for_client(self, name: str) -> None:
        """A client asks for it; raises ``InvalidRequest`` when the operator has pinned the model."""
        view = self.supervisor.view(name)
        if view is not None and view.pinned:
            raise InvalidRequest(f"model '{name}' is pinned: only the operator can unload it", param="keep_alive")
        self.supervisor.unload(name, "asked to by a client", by_client=True)

    def listed(self, caller: Caller) -> list[ModelEntry]:
        """What the caller can ask for: everything it may use, or with on_demand off what of that is loaded."""
        entries = self.catalogue.entries()
        if caller.models:
            entries = [entry for entry in entries if caller.may_use(entry.names)]
        return entries if self.settings.on_demand else [entry for entry in entries if self._loaded(entry)]

    def plan(self, entry: ModelEntry) -> LoadPlan:
        """How this model would be loaded; what was measured of it before corrects the estimate."""
        if entry.files.unusable:
            raise UnsupportedCapability(entry.files.unusable, param="model")
        said = self._model_settings(entry)
        context = self._context(said)
        parallel = max(self.settings.parallel, 1)
        draft = self._draft(entry, said)
        estimate = self.estimate(entry)
        key = f"{entry.weights_digest}:{context}:{parallel}" + (f":{draft.weights_digest}" if draft else "")
        measured = self.supervisor.measured(key)
        needed = estimate.loaded_bytes + estimate.growth_bytes
        if measured is not None:
            # Its peak says how much memory was free, not how much it needs: caches grow into what nobody has reserved.
            needed = measured.loaded_bytes + estimate.growth_bytes
        return LoadPlan(
            spec=ModelSpec(
                name=entry.runner,
                content=f"{entry.content}:{draft.content if draft is not None else ''}",
                estimate_bytes=said.memory or needed,
                growth_bytes=max(said.memory - estimate.loaded_bytes, 0) if said.memory else estimate.growth_bytes,
                fixed=bool(said.memory),
                load_seconds=measured.load_seconds if measured is not None else None,
                pinned=said.pinned,
                keep_alive=KeepAlive(
                    default=said.keep_alive if said.keep_alive is not None else self.settings.keep_alive,
                    minimum=said.keep_alive_min,
                    maximum=said.keep_alive_max,
                    locked=said.keep_alive_lock,
                ),
                parallel=parallel,
            ),
            path=str(entry.path.absolute()),
            adapter=str(entry.adapter.absolute()) if entry.adapter is not None else "",
            draft=str(draft.path.absolute()) if draft is not None else "",
            engine=entry.files.engine,
            context_tokens=context,
            parallel=parallel,
            measured_as=key,
        )

    def estimate(self, entry: ModelEntry) -> Estimate:
        """Memory of its worker, with everything that the configuration has it load."""
        said = self._model_settings(entry)
        context = self._context(said)
        draft = self._draft(entry, said)
        alone = entry.estimate(context)
        return alone.with_draft(draft.estimate(context)) if draft is not None else alone

    def _context(self, said: ModelSettings) -> int:
        return said.context_length if said.context_length is not None else self.settings.context_length

    def _draft(self, entry: ModelEntry, said: ModelSettings) -> ModelEntry | None:
        """The model that guesses ahead for this one; raises ``LoadFailed`` when there is none of that name, or it
        cannot do that."""
        if not said.draft_model:
            return None
        name = f"draft_model '{said.draft_model}' of model '{entry.name.display}'"
        try:
            draft = self.catalogue.resolve(said.draft_model)
        except MlxRouterError:
            raise LoadFailed(f"{name} is not here; fetch it, or take the setting out") from None
        if entry.files.engine != "mlx" or draft.files.engine != "mlx":
            raise LoadFailed(f"{name} cannot be used: both have to generate text, and nothing else")
        return draft

    async def reload(self, settings: Settings, sources: Sources, options: SupervisorOptions) -> None:
        """Other settings from now on, all of them at once; requests that have begun keep theirs."""
        self.keys.configure(settings.api_keys)  # first: nothing else may keep a key in force, or a new one out
        await self.catalogue.reconfigure(sources, settings.default_model)
        self.supervisor.reconfigure(options)
        self.settings = settings
        self.preload()

    def preload(self) -> None:
        """Have the models that the configuration names loaded, in its order; returns at once."""
        for name, said in self.settings.models.items():
            if said.preload:
                try:
                    self.supervisor.want(self.plan(self.catalogue.resolve(name)), "preloaded")
                except MlxRouterError as error:
                    log.error("event=preload_failed model=%r error=%r", name, error.message)

    @staticmethod
    def check_capabilities(entry: ModelEntry, requested: str, needs: dict[Needs, Need]) -> None:
        """Raise ``UnsupportedCapability`` in the API's words for the first thing that the model cannot do."""
        for capability, need in needs.items():
            if capability.value not in entry.files.capabilities:
                sentence = need.sentence.format(name=requested, full=entry.name.full)
                if capability is Needs.VISION and entry.files.extra:
                    sentence += f" here; an extra is missing: {install_command(entry.files.extra)}"
                raise UnsupportedCapability(sentence, param=need.param)

    def view(self, entry: ModelEntry) -> ModelView | None:
        return self.supervisor.view(entry.runner)

    def list_models(self, kind: str, render: Callable[[ModelEntry, State], bytes], entries: list[ModelEntry]) -> bytes:
        """The items of a JSON array, with the state of each model."""
        states = {view.name: view.state for view in self.supervisor.views()}
        listing = self.listings.get(kind)
        if listing is None:
            listing = self.listings[kind] = Listing(render)
        return listing.join(
            [(entry, states.get(entry.runner, State.UNLOADED)) for entry in entries], self.catalogue.generation
        )

    def state(self, entry: ModelEntry) -> State:
        view = self.view(entry)
        return view.state if view is not None else State.UNLOADED

    def _loaded(self, entry: ModelEntry) -> bool:
        view = self.view(entry)
        return view is not None and view.state in (State.READY, State.DRAINING)

    def _model_settings(self, entry: ModelEntry) -> ModelSettings:
        runner = parse_name(entry.runner).key
        for name, said in self.settings.models.items():
            if parse_name(name).key == runner:
                return said
        return ModelSettings()


def server_of(request: Request) -> Server:
    server: Server = request.app.state.server
    return server


def caller_of(request: Request) -> Caller:
    """Who sent a request that was let through."""
    caller: Caller = request.scope["state"]["caller"]
    return caller
