"""What the handlers share: the settings, the catalogue, and the one door to models."""

from __future__ import annotations

import time
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import Protocol

from starlette.requests import Request

from mlx_router_server.catalogue.catalogue import Catalogue
from mlx_router_server.catalogue.entry import ModelEntry
from mlx_router_server.catalogue.names import parse_name
from mlx_router_server.dialects.call import Needs
from mlx_router_server.lifecycle.events import ModelSpec
from mlx_router_server.lifecycle.record import ModelView
from mlx_router_server.lifecycle.states import State
from mlx_router_server.settings import ModelSettings, Settings
from mlx_router_server.workers.supervisor import Lease, LoadPlan, Supervisor
from mlx_router_shared.errors import InvalidRequest, ModelNotFound, UnsupportedCapability

__all__ = ["MAX_BODY_BYTES", "BodyTooLarge", "Door", "Server", "read_body", "server_of"]

MAX_BODY_BYTES = 32 * 2**20


class BodyTooLarge(InvalidRequest):
    """The body is longer than any request needs to be; status 413."""


class Door(Protocol):
    """All that a handler may do with models."""

    def acquire(
        self, plan: LoadPlan, *, keep_alive_seconds: float | None = None
    ) -> AbstractAsyncContextManager[Lease]: ...


@dataclass(slots=True)
class Server:
    """Made in the application's lifespan, handed to every handler by the application's state."""

    settings: Settings
    catalogue: Catalogue
    supervisor: Supervisor
    started_at: float = field(default_factory=time.time)

    @property
    def door(self) -> Door:
        return self.supervisor

    async def resolve(self, name: str) -> ModelEntry:
        """The model of that name; raises ``ModelNotFound`` or ``InvalidRequest``."""
        await self.catalogue.wait_ready()
        entry = self.catalogue.resolve(name)
        if not self.settings.on_demand and not self._loaded(entry):
            raise ModelNotFound(f"model '{name}' not found: it is not loaded and on_demand is off", param="model")
        return entry

    def listed(self) -> list[ModelEntry]:
        """What can be asked for: everything, or with on_demand off what is loaded."""
        entries = self.catalogue.entries()
        return entries if self.settings.on_demand else [entry for entry in entries if self._loaded(entry)]

    def plan(self, entry: ModelEntry) -> LoadPlan:
        """How this model would be loaded."""
        said = self._model_settings(entry)
        context = said.context_length if said.context_length is not None else self.settings.context_length
        keep_alive = said.keep_alive if said.keep_alive is not None else self.settings.keep_alive
        return LoadPlan(
            spec=ModelSpec(
                name=entry.name.display,
                estimate_bytes=said.memory or entry.estimate_bytes(context),
                pinned=said.pinned,
                keep_alive_seconds=keep_alive,
            ),
            path=str(entry.path.absolute()),
            engine=entry.files.engine,
            context_tokens=context,
            parallel=max(self.settings.parallel, 1),
        )

    @staticmethod
    def check_capabilities(entry: ModelEntry, requested: str, needs: dict[Needs, str]) -> None:
        """Raise ``UnsupportedCapability`` in the API's words for the first thing that the model cannot do."""
        for capability, sentence in needs.items():
            if capability.value not in entry.files.capabilities:
                raise UnsupportedCapability(sentence.format(name=requested, full=entry.name.full), param="model")

    def view(self, entry: ModelEntry) -> ModelView | None:
        return next((view for view in self.supervisor.views() if view.name == entry.name.display), None)

    def _loaded(self, entry: ModelEntry) -> bool:
        view = self.view(entry)
        return view is not None and view.state in (State.READY, State.DRAINING)

    def _model_settings(self, entry: ModelEntry) -> ModelSettings:
        for name, said in self.settings.models.items():
            if parse_name(name).key == entry.name.key:
                return said
        return ModelSettings()


def server_of(request: Request) -> Server:
    server: Server = request.app.state.server
    return server


async def read_body(request: Request) -> bytes:
    """The body; raises ``BodyTooLarge`` without keeping more than the limit in memory."""
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > MAX_BODY_BYTES:
            raise BodyTooLarge(f"the body is longer than {MAX_BODY_BYTES} bytes")
        parts.append(part)
    return b"".join(parts)
