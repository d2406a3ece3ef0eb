"""The only place that wires the rooms together. Everything bound to an event loop is made in the lifespan."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

from starlette.applications import Starlette
from starlette.middleware import Middleware

from mlx_router_server.access.keys import KeyFileError, KeyRing, keys_file, local_key
from mlx_router_server.api import admin, anthropic, errors, manage, ollama, openai, responses
from mlx_router_server.api.auth import Auth
from mlx_router_server.api.edge import Edge
from mlx_router_server.api.server import Server
from mlx_router_server.catalogue.catalogue import Catalogue, Registered, Sources
from mlx_router_server.catalogue.discovery import hub_cache
from mlx_router_server.catalogue.overlay import Overlay
from mlx_router_server.catalogue.store import Store
from mlx_router_server.lifecycle.limits import Limits
from mlx_router_server.lifecycle.queueing import BusyPolicy
from mlx_router_server.management.models import Models
from mlx_router_server.settings import Settings, reloaded
from mlx_router_server.settings_layers import home_folder, load_settings
from mlx_router_server.telemetry.logs import configure_logs
from mlx_router_server.workers.memory import default_budget, read_memory, wired_limit
from mlx_router_server.workers.plan import SupervisorOptions
from mlx_router_server.workers.supervisor import Supervisor

__all__ = ["create_app", "create_app_from_environment", "reload"]

log = logging.getLogger(__name__)

_APIS: Final = (ollama, manage, openai, responses, anthropic, admin)

_KEYS_SECONDS: Final = 1.0


def create_app(settings: Settings, home: Path | None = None) -> Starlette:
    """The ASGI application. It can be started and stopped any number of times in one process.

    ``home`` is the folder for what is remembered between runs; None remembers nothing.
    """

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        folder = home if home is not None and await asyncio.to_thread(_can_keep, home) else None
        store = Store(folder) if folder is not None else None
        catalogue = Catalogue(_sources(settings), settings.default_model, store)
        supervisor = Supervisor(_options(settings, home))
        keys = KeyRing(settings.api_keys, keys_file(home) if home is not None else None)
        if folder is not None:
            keys.trust_local(await asyncio.to_thread(local_key, folder))
        await asyncio.to_thread(keys.refresh)  # a file that cannot be read must not mean that no keys are asked for
        models = Models(catalogue, store, supervisor.happenings) if store is not None else None
        app.state.server = Server(settings, catalogue, supervisor, keys, models)
        _configure_models(app.state.server, settings)
        await catalogue.start()
        await supervisor.start()
        tasks = [
            asyncio.create_task(_preload(app.state.server), name="preload"),
            asyncio.create_task(_watch_keys(keys), name="keys"),
        ]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            if models is not None:
                await models.stop()
            await supervisor.stop()
            await catalogue.stop()

    app = Starlette(
        routes=[route for api in _APIS for route in api.routes()],
        lifespan=lifespan,
        middleware=[Middleware(Edge, bound_host=settings.host), Middleware(Auth)],
    )
    errors.install(app)
    return app


def create_app_from_environment() -> Starlette:
    """For ``uvicorn --factory mlx_router_server.app:create_app_from_environment``."""
    settings = load_settings({}, dict(os.environ))
    configure_logs(settings.log_level, settings.log_format)
    return create_app(settings, home_folder(dict(os.environ)))


async def reload(app: Starlette, new: Settings, home: Path | None = None) -> None:
    """Have a running application follow other settings; says in the log which of them wait for the next start."""
    server: Server = app.state.server
    settings, waiting = reloaded(server.settings, new)
    await server.reload(settings, _sources(settings), _options(settings, home))
    _configure_models(server, settings)
    configure_logs(settings.log_level, settings.log_format)
    log.info("event=reloaded models=%d waiting_for_restart=%r", len(settings.models), ",".join(waiting))


async def _preload(server: Server) -> None:
    """Beside the listener, which is open meanwhile."""
    await server.catalogue.wait_ready()
    server.preload()


async def _watch_keys(keys: KeyRing) -> None:
    """Keys that are added or taken away count within a second."""
    while True:
        await asyncio.sleep(_KEYS_SECONDS)
        try:
            if await asyncio.to_thread(keys.refresh):
                log.info("event=keys_changed")
        except KeyFileError as error:
            log.error("event=keys_refused error=%r", str(error))


def _can_keep(home: Path) -> bool:
    """Make what is kept in the home folder. A router without one serves what there is, and keeps nothing."""
    try:
        Store(home).prepare()
        local_key(home, create=True)
    except OSError as error:
        log.warning("event=home_unusable path=%r error=%r hint=%r", str(home), str(error), "set MLX_ROUTER_HOME")
        return False
    return True


def _configure_models(server: Server, settings: Settings) -> None:
    if server.models is not None:
        server.models.cache = hub_cache(dict(os.environ)) if settings.hub_cache else None
        server.models.streams = settings.download_streams


def _sources(settings: Settings) -> Sources:
    registered = tuple(
        Registered(
            name=name,
            path=model.path,
            repo=model.repo,
            aliases=model.aliases,
            adapter=model.adapter,
            kind=model.kind,
            overlay=Overlay(system=model.system, parameters=model.options or {}),
        )
        for name, model in settings.models.items()
    )
    return Sources(
        demo=settings.demo_model,
        registered=registered,
        folders=settings.models_dirs,
        hub=hub_cache(dict(os.environ)) if settings.hub_cache else None,
        name_map=tuple(settings.name_map.items()),
        model_aliases=tuple(settings.model_aliases.items()),
    )


def _options(settings: Settings, home: Path | None) -> SupervisorOptions:
    return SupervisorOptions(
        limits=Limits(
            budget_bytes=settings.memory_budget or default_budget(read_memory()),
            wired_bytes=wired_limit(),
            max_loaded_models=settings.max_loaded_models,
            max_queue=settings.max_queue,
            busy_policy=BusyPolicy(settings.busy_policy),
            queue_timeout_seconds=settings.queue_timeout_seconds,
            busy_wait_seconds=settings.busy_wait_seconds,
            min_residency_seconds=settings.min_residency_seconds,
            turn_seconds=settings.turn_seconds,
            turn_requests=settings.turn_requests,
            drain_timeout_seconds=settings.drain_timeout_seconds,
            cancel_at_drain_limit=settings.drain_policy == "cancel",
            restore_on_failure=settings.restore_on_failure,
        ),
        standby_workers=settings.standby_workers,
        load_timeout_seconds=settings.load_timeout_seconds,
        warm_up_timeout_seconds=settings.warm_up_timeout_seconds,
        stop_timeout_seconds=settings.stop_timeout_seconds,
        stall_timeout_seconds=settings.stall_timeout_seconds,
        measurements=home / "measured.json" if home is not None else None,
        learn_budget=not settings.memory_budget,
    )
