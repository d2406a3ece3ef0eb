"""The operator's routes: is it alive, is it ready, what is loaded, load and unload."""

from __future__ import annotations

import os
import time
from typing import Any

import msgspec
import psutil
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from mlx_router_server.api.answer import load_only
from mlx_router_server.api.disconnect import unless_client_leaves
from mlx_router_server.api.server import Server, server_of
from mlx_router_server.lifecycle.record import ModelView
from mlx_router_server.lifecycle.states import State
from mlx_router_server.version import __version__

__all__ = ["routes"]


def _json(data: Any, status: int = 200) -> Response:
    return Response(msgspec.json.encode(data), status_code=status, media_type="application/json")


async def health(request: Request) -> Response:
    """The router's own event loop answers; models are not asked."""
    return _json({"status": "ok", "version": __version__})


async def ready(request: Request) -> Response:
    """Whether requests for models can be taken."""
    is_ready = server_of(request).catalogue.ready
    return _json({"ready": is_ready}, 200 if is_ready else 503)


async def status(request: Request) -> Response:
    server = server_of(request)
    await server.catalogue.wait_ready()
    supervisor = server.supervisor
    views = {view.name: view for view in supervisor.views()}
    names = [entry.name.display for entry in server.catalogue.entries()]
    models = [_model(server, views.pop(name, None), name) for name in names]
    models += [_model(server, view, name) for name, view in views.items()]  # gone from disk, maybe still loaded
    router = {
        "version": __version__,
        "pid": os.getpid(),
        "started_at": server.started_at,
        "uptime_seconds": round(time.time() - server.started_at, 3),
        "memory_bytes": psutil.Process().memory_info().rss,
        "budget_bytes": supervisor.budget_bytes,
        "reserved_bytes": supervisor.reserved_bytes,
        "waiting": supervisor.waiting,
        "standby_pids": supervisor.standby_pids,
        "kill_incidents": supervisor.kill_incidents,
        "stranded_incidents": supervisor.stranded_incidents,
        "unservable": server.catalogue.unservable,
    }
    return _json({"router": router, "models": models})


def _model(server: Server, view: ModelView | None, name: str) -> dict[str, Any]:
    worker = server.supervisor.worker_view(view.worker) if view else None
    swap = server.supervisor.last_swap(name)
    left = None if view is None or view.expires_at is None else view.expires_at - time.monotonic()
    return {
        "name": name,
        "state": view.state if view else State.UNLOADED,
        "state_seconds": round(time.monotonic() - view.since, 3) if view else None,
        "stage": worker.stage if worker else "",
        "fraction": worker.fraction if worker else 0.0,
        "pid": worker.pid if worker else None,
        "memory_bytes": worker.memory_bytes if worker else 0,
        "reserved_bytes": view.reserved_bytes if view else 0,
        "in_flight": view.in_flight if view else 0,
        "queued": view.queued if view else 0,
        "waiting_for": list(view.waiting_for) if view else [],
        "streams": worker.streams if worker else 0,
        "tokens_total": worker.tokens_total if worker else 0,
        "pinned": view.pinned if view else False,
        # JSON has no infinity: for ever is -1, as in keep_alive.
        "expires_in_seconds": None if left is None else -1 if left == float("inf") else round(left, 3),
        "expires_at": None if left is None or left == float("inf") else time.time() + left,
        "loads": view.loads if view else 0,
        "failures": view.failures if view else 0,
        "reason": view.reason if view else "",
        "last_swap": swap.as_dict() if swap else None,
    }


async def load(request: Request) -> Response:
    """Load a model and answer when it is ready."""
    server = server_of(request)
    plan = server.plan(await server.resolve(request.path_params["name"]))
    waited = await unless_client_leaves(request.receive, load_only(server.door, plan))
    return _json({"name": plan.spec.name, "state": State.READY, "waited_seconds": round(waited, 3)})


async def unload(request: Request) -> Response:
    """Let a model go once nobody uses it; answers when its memory is back, or at once if it is still in use."""
    server = server_of(request)
    name = server.plan(await server.resolve(request.path_params["name"])).spec.name
    server.supervisor.unload(name, "unloaded by the operator")
    state = await unless_client_leaves(request.receive, _until_gone(server, name))
    return _json({"name": name, "state": state})


async def _until_gone(server: Server, name: str) -> State:
    while True:
        await server.supervisor.settled()
        view = next((view for view in server.supervisor.views() if view.name == name), None)
        if view is None or view.worker is None or view.in_flight or view.queued:
            return view.state if view else State.UNLOADED
        await server.supervisor.wait_change()


def routes() -> list[BaseRoute]:
    return [
        Route("/health", health),
        Route("/ready", ready),
        Route("/admin/status", status),
        Route("/admin/models/{name:path}/load", load, methods=["POST"]),
        Route("/admin/models/{name:path}/unload", unload, methods=["POST"]),
    ]
