"""The only place that wires the rooms together. Everything bound to an event loop is made in the lifespan."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

from starlette.applications import Starlette
from starlette.middleware import Middleware

from mlx_router_server.access.keys import KeyFileError, KeyRing, keys_file, local_key_file, renew_local_key
from mlx_router_server.api import admin, anthropic, errors, figures, manage, ollama, openai, responses, ui
from mlx_router_server.api.auth import Auth
from mlx_router_server.api.edge import Edge
from mlx_router_server.api.inspect import Inspector
from mlx_router_server.api.meter import Meter
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
from mlx_router_server.telemetry.events import Happening
from mlx_router_server.telemetry.logs import LogRing, configure_logs
from mlx_router_server.telemetry.metrics import Metrics
from mlx_router_server.workers.memory import default_budget, read_memory, wired_limit
from mlx_router_server.workers.plan import SupervisorOptions
from mlx_router_server.workers.source import SourceKind
from mlx_router_server.workers.supervisor import Supervisor

__all__ = ["create_app", "create_app_from_environment", "reload"]

log = logging.getLogger(__name__)

_APIS: Final = (ollama, manage, openai, responses, anthropic, admin, figures, ui)

_KEYS_SECONDS: Final = 1.0
_LAG_SECONDS: Final = 1.0


def create_app(settings: Settings, home: Path | None = None) -> Starlette:
    """The ASGI application. It can be started and stopped any number of times in one process.

    ``home`` is the folder for what is remembered between runs; None remembers nothing.
    """

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        lines = LogRing()
        logging.getLogger().addHandler(lines)
        folder = home if home is not None and await asyncio.to_thread(_can_keep, home) else None
        store = Store(folder) if folder is not None else None
        catalogue = Catalogue(_sources(settings), settings.default_model, store)
        supervisor = Supervisor(_options(settings, home))
        keys = KeyRing(
            settings.api_keys,
            keys_file(home) if home is not None else None,
            local_key_file(folder) if folder is not None else None,
        )
        await asyncio.to_thread(keys.refresh)  # a file that cannot be read must not mean that no keys are asked for
        models = Models(catalogue, store, supervisor.happenings) if store is not None else None
        app.state.server = server = Server(settings, catalogue, supervisor, keys, models, logs=lines.ring)
        supervisor.happenings.observers += [server.metrics.observe, _letting_go(lines)]
        supervisor.on_facts = lambda plan, facts: catalogue.note_facts(
            plan.spec.name, has_tools=facts.has_tools, has_thinking=facts.has_thinking
        )
        _apply(server, settings)
        await catalogue.start()
        await supervisor.start()
        tasks = [
            asyncio.create_task(_preload(server), name="preload"),
            asyncio.create_task(_watch_keys(keys), name="keys"),
            asyncio.create_task(_watch_loop(server.metrics), name="loop-lag"),
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
            server.parsers.shutdown(wait=False, cancel_futures=True)
            logging.getLogger().removeHandler(lines)

    app = Starlette(
        routes=[route for api in _APIS for route in api.routes()],
        lifespan=lifespan,
        middleware=[
            Middleware(Meter),
            Middleware(Edge, bound_host=settings.host),
            Middleware(Auth),
            Middleware(Inspector),
            Middleware(errors.LastResort),
        ],
    )
    errors.install(app)
    return app


def create_app_from_environment() -> Starlette:
    """For ``uvicorn --factory mlx_router_server.app:create_app_from_environment``."""
    settings = load_settings({}, dict(os.environ))
    configure_logs(settings.log_level, settings.log_format, settings.log_file)
    return create_app(settings, home_folder(dict(os.environ)))


async def reload(app: Starlette, new: Settings, home: Path | None = None) -> None:
    """Have a running application follow other settings; says in the log which of them wait for the next start."""
    server: Server = app.state.server
    settings, waiting = reloaded(server.settings, new)
    await server.reload(settings, _sources(settings), _options(settings, home))
    _apply(server, settings)
    try:
        configure_logs(settings.log_level, settings.log_format, settings.log_file)
    except OSError as error:
        log.error("event=log_file_refused path=%r error=%r", settings.log_file, str(error))
    log.info("event=reloaded models=%d waiting_for_restart=%r", len(settings.models), ",".join(waiting))


async def _preload(server: Server) -> None:
    """Beside the listener, which is open meanwhile."""
    await server.catalogue.wait_ready()
    server.preload()


async def _watch_keys(keys: KeyRing) -> None:
    """Follow changes of the key file; each failure is logged once."""
    logged = ""
    while True:
        await asyncio.sleep(_KEYS_SECONDS)
        try:
            if await asyncio.to_thread(keys.refresh):
                log.info("event=keys_changed")
            logged = ""
        except Exception as error:  # whatever is wrong with the file, the next one must be read
            reason = str(error) if isinstance(error, KeyFileError) else f"{type(error).__name__}: {error}"
            if reason != logged:
                logged = reason
                log.error("event=keys_refused error=%r", logged)


def _can_keep(home: Path) -> bool:
    """Make what is kept in the home folder. A router without one serves what there is, and keeps nothing."""
    try:
        Store(home).prepare()
        renew_local_key(home)
    except OSError as error:
        log.warning("event=home_unusable path=%r error=%r hint=%r", str(home), str(error), "set MLX_ROUTER_HOME")
        return False
    return True


def _letting_go(lines: LogRing) -> Callable[[Happening], None]:
    """Who follows the log must not hold up the end of the router."""

    def observe(happening: Happening) -> None:
        if happening.kind == "leaving":
            lines.ring.close()

    return observe


async def _watch_loop(metrics: Metrics) -> None:
    """Whatever holds the loop up makes this late."""
    while True:
        began = time.monotonic()
        await asyncio.sleep(_LAG_SECONDS)
        metrics.loop_lag.observe(max(time.monotonic() - began - _LAG_SECONDS, 0.0))


def _apply(server: Server, settings: Settings) -> None:
    """What is no setting of the supervisor's or the catalogue's, at the start and after a reload."""
    server.inspection.configure(settings.inspect_requests)
    if settings.log_prompts:
        log.warning("event=prompts_are_logged hint='everything that clients send is in this log: log_prompts = false'")
    if settings.inspect_requests:
        log.warning("event=requests_are_kept count=%d hint='with bodies and answers, in memory, for the admin scope: "
                    "inspect_requests = 0'", settings.inspect_requests)  # fmt: skip
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
        worker_source=SourceKind(settings.worker_source),
        prefill_share=settings.prefill_share,
        longest_gap_ms=settings.longest_gap_ms,
        prefix_cache_bytes=settings.prefix_cache_memory,
        standby_workers=settings.standby_workers,
        load_timeout_seconds=settings.load_timeout_seconds,
        warm_up_timeout_seconds=settings.warm_up_timeout_seconds,
        stop_timeout_seconds=settings.stop_timeout_seconds,
        stall_timeout_seconds=settings.stall_timeout_seconds,
        measurements=home / "measured.json" if home is not None else None,
        learn_budget=not settings.memory_budget,
    )
