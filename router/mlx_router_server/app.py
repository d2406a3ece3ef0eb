"""The only place that wires the rooms together. Everything bound to an event loop is made in the lifespan."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from starlette.applications import Starlette
from starlette.middleware import Middleware

from mlx_router_server.api import admin, errors, ollama, openai
from mlx_router_server.api.edge import Edge
from mlx_router_server.api.server import Server
from mlx_router_server.catalogue.catalogue import Catalogue, Registered, Sources
from mlx_router_server.catalogue.discovery import hub_cache
from mlx_router_server.lifecycle.machine import Limits
from mlx_router_server.settings import Settings, load_settings
from mlx_router_server.workers.memory import default_budget
from mlx_router_server.workers.supervisor import Supervisor, SupervisorOptions

__all__ = ["create_app", "create_app_from_environment"]


def create_app(settings: Settings) -> Starlette:
    """The ASGI application. It can be started and stopped any number of times in one process."""

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        catalogue = Catalogue(_sources(settings), settings.default_model)
        supervisor = Supervisor(_options(settings))
        app.state.server = Server(settings, catalogue, supervisor)
        await catalogue.start()
        await supervisor.start()
        try:
            yield
        finally:
            await supervisor.stop()
            await catalogue.stop()

    app = Starlette(
        routes=ollama.routes() + openai.routes() + admin.routes(),
        lifespan=lifespan,
        middleware=[Middleware(Edge, bound_host=settings.host, allowed_origins=settings.allowed_origins)],
    )
    errors.install(app)
    return app


def create_app_from_environment() -> Starlette:
    """For ``uvicorn --factory mlx_router_server.app:create_app_from_environment``."""
    return create_app(load_settings({}, dict(os.environ)))


def _sources(settings: Settings) -> Sources:
    registered = tuple(
        Registered(name=name, path=model.path, repo=model.repo, aliases=model.aliases)
        for name, model in settings.models.items()
    )
    return Sources(
        demo=settings.demo_model,
        registered=registered,
        folders=settings.models_dirs,
        hub=hub_cache(dict(os.environ)) if settings.hub_cache else None,
    )


def _options(settings: Settings) -> SupervisorOptions:
    return SupervisorOptions(
        limits=Limits(
            budget_bytes=settings.memory_budget or default_budget(),
            max_loaded_models=settings.max_loaded_models,
            max_queue=settings.max_queue,
            queue_timeout_seconds=settings.queue_timeout_seconds,
            drain_timeout_seconds=settings.drain_timeout_seconds,
        ),
        standby_workers=settings.standby_workers,
        load_timeout_seconds=settings.load_timeout_seconds,
        stop_timeout_seconds=settings.stop_timeout_seconds,
    )
