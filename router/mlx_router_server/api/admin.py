"""The operator's routes: is it alive, is it ready, what is loaded and why, load, unload, pin, plan, events."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Callable
from typing import Any, Final

import msgspec
import psutil
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from mlx_router_server.api.answer import load_only
from mlx_router_server.api.body import read_body
from mlx_router_server.api.disconnect import unless_client_leaves
from mlx_router_server.api.ring_stream import RingStream, last_event_id
from mlx_router_server.api.server import Server, caller_of, server_of
from mlx_router_server.api.wishes import read_wishes
from mlx_router_server.catalogue.entry import ModelEntry
from mlx_router_server.dialects.body import convert, read_object
from mlx_router_server.lifecycle.memory import MemoryReading
from mlx_router_server.lifecycle.states import State
from mlx_router_server.lifecycle.views import ModelView, WaiterView
from mlx_router_server.settings import shown_settings
from mlx_router_server.telemetry.events import Happening
from mlx_router_server.telemetry.logs import LogLine
from mlx_router_server.version import __version__
from mlx_router_server.workers.plan import Failure, WorkerView

__all__ = ["routes"]


_LONGEST_CHALLENGE: Final = 128
_ANSWER_SECONDS: Final = 0.05  # so that the answer is out before the listener closes
_PAUSED: Final = (State.BACKOFF, State.FAILED)


class _PlanBody(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    model: str = ""


def _json(data: Any, status: int = 200) -> Response:
    return Response(msgspec.json.encode(data), status_code=status, media_type="application/json")


async def health(request: Request) -> Response:
    """The router's own event loop answers; models are not asked. A command of the same user can have it prove that it
    knows the local key, before the key is sent to it."""
    response = _json({"status": "ok", "version": __version__})
    challenge = request.headers.get("x-mlx-router-challenge", "")
    address, port = request.scope.get("server") or ("", None)
    if challenge and len(challenge) <= _LONGEST_CHALLENGE and port:
        response.headers["x-mlx-router-proof"] = server_of(request).keys.prove_local(challenge, address, port)
    return response


async def shutdown(request: Request) -> Response:
    """Begin an orderly shutdown, as SIGTERM does."""
    asyncio.get_running_loop().call_later(_ANSWER_SECONDS, os.kill, os.getpid(), signal.SIGTERM)
    return _json({"pid": os.getpid()}, 202)


async def ready(request: Request) -> Response:
    """Whether requests for models can be taken."""
    is_ready = server_of(request).catalogue.ready
    return _json({"ready": is_ready}, 200 if is_ready else 503)


async def status(request: Request) -> Response:
    server = server_of(request)
    await server.catalogue.wait_ready()
    supervisor = server.supervisor
    source = supervisor.source
    views = {view.name: view for view in server.views()}
    entries = server.catalogue.entries()
    models = [_model(server, views.get(entry.runner), entry.name.display) for entry in entries]
    known = {entry.runner for entry in entries}
    # gone from disk and still loaded
    models += [_model(server, view, name) for name, view in views.items() if name not in known]
    router = {
        "version": __version__,
        "pid": os.getpid(),
        "started_at": server.started_at,
        "uptime_seconds": round(time.time() - server.started_at, 3),
        "memory_bytes": psutil.Process().memory_info().rss,
        "budget_bytes": supervisor.budget_bytes,
        "reserved_bytes": supervisor.reserved_bytes,
        "memory": _memory(supervisor.memory),
        "waiting": supervisor.waiting,
        "queue": [_waiter(waiter) for waiter in supervisor.queue()],
        "standby_pids": source.standby_pids,
        "worker_source": {
            "kind": source.kind.value,
            "reason": source.reason,
            "fork_server_pid": source.fork_server_pid,
            "fork_server_ready": source.fork_server_ready,
            "fork_server_engines": source.fork_server_engines,
        },
        "kill_incidents": supervisor.kill_incidents,
        "stranded_incidents": supervisor.stranded_incidents,
        "downloads": []
        if server.models is None
        else [
            {"repository": repository, "completed": completed, "total": total}
            for repository, (completed, total) in server.models.pulls.progress().items()
        ],
        "unservable": {name: what.reason for name, what in server.catalogue.unservable.items()},
        "unservable_kinds": {name: what.kind for name, what in server.catalogue.unservable.items()},
    }
    return _json({"router": router, "models": models})


def _memory(reading: MemoryReading | None) -> dict[str, Any] | None:
    """The machine at the last look."""
    if reading is None:
        return None
    return {"available_bytes": reading.available_bytes, "total_bytes": reading.total_bytes,
            "pressure": reading.pressure.name.lower()}  # fmt: skip


def _waiter(waiter: WaiterView) -> dict[str, Any]:
    now = time.monotonic()
    left = waiter.given_up_at - now
    return {
        "position": waiter.position,
        "request": waiter.ticket,
        "model": waiter.model,
        "priority": waiter.priority,
        "waited_seconds": round(now - waiter.since, 3),
        "given_up_in_seconds": None if left == float("inf") else round(left, 3),
    }


def _stage(view: ModelView | None, worker: WorkerView | None) -> str:
    """What it is busy with, in words; empty at rest."""
    if view is None:
        return ""
    match view.state:
        case State.QUEUED:
            return f"waiting for {', '.join(view.waiting_for)} to leave" if view.waiting_for else "waiting for room"
        case State.STARTING:
            return "spawning"
        case State.LOADING:
            return (worker.stage if worker else "") or "spawning"
        case _:
            return ""


def _failure(failure: Failure | None) -> dict[str, Any] | None:
    if failure is None:
        return None
    return {"at": failure.at, "reason": failure.reason, "stderr_tail": list(failure.stderr_tail)}


def _model(server: Server, view: ModelView | None, name: str) -> dict[str, Any]:
    worker = server.supervisor.worker_view(view.worker) if view else None
    runner = view.name if view else name
    swap = server.supervisor.last_swap(runner)
    left = None if view is None or view.expires_at is None else view.expires_at - time.monotonic()
    return {
        "name": name,
        "runs_as": runner,
        "state": view.state if view else State.UNLOADED,
        "state_seconds": round(time.monotonic() - view.since, 3) if view else None,
        "stage": _stage(view, worker),
        "fraction": worker.fraction if worker and view and view.state is State.LOADING else 0.0,
        "pid": worker.pid if worker else None,
        "memory_bytes": worker.memory_bytes if worker else 0,
        "reserved_bytes": view.reserved_bytes if view else 0,
        "in_flight": view.in_flight if view else 0,
        "queued": view.queued if view else 0,
        "waiting_for": list(view.waiting_for) if view else [],
        "streams": worker.streams if worker else 0,
        "batched": worker.facts.is_batched if worker and worker.facts else None,
        "tokens_total": worker.tokens_total if worker else 0,
        "pinned": view.pinned if view else False,
        # JSON has no infinity: for ever is -1, as in keep_alive.
        "expires_in_seconds": None if left is None else -1 if left == float("inf") else round(left, 3),
        "expires_at": None if left is None or left == float("inf") else time.time() + left,
        "loads": view.loads if view else 0,
        "failures": view.failures if view else 0,
        "retry_in_seconds": None
        if view is None or view.state not in _PAUSED
        else round(max(view.retry_at - time.monotonic(), 0.0), 3),
        "reason": view.reason if view else "",
        "last_failure": _failure(server.supervisor.last_failure(runner)),
        "last_swap": swap.as_dict() if swap else None,
    }


async def _named(request: Request, name: str) -> ModelEntry:
    return await server_of(request).resolve(name, caller_of(request), by_operator=True)


async def load(request: Request) -> Response:
    """Load a model and answer when it is ready; forgets earlier failures."""
    server = server_of(request)
    entry = await _named(request, request.path_params["name"])
    wishes = read_wishes(request, explicit=True)
    waited = await unless_client_leaves(request.receive, load_only(server, server.plan(entry), wishes))
    return _json({"name": entry.name.display, "state": State.READY, "waited_seconds": round(waited, 3)})


async def unload(request: Request) -> Response:
    """Let a model go once nobody uses it; answers when its memory is back, or at once if it is still in use."""
    server = server_of(request)
    entry = await _named(request, request.path_params["name"])
    server.supervisor.unload(entry.runner, "unloaded by the operator")
    state = await unless_client_leaves(request.receive, _until_gone(server, entry.runner))
    return _json({"name": entry.name.display, "state": state})


async def pin(request: Request) -> Response:
    """Never evict this model, nor unload it when it is idle, until it is unpinned or the router ends."""
    return await _set_pin(request, pinned=True)


async def unpin(request: Request) -> Response:
    return await _set_pin(request, pinned=False)


async def _set_pin(request: Request, *, pinned: bool) -> Response:
    server = server_of(request)
    plan = server.plan(await _named(request, request.path_params["name"]))
    server.supervisor.pin(plan, pinned)
    await server.supervisor.settled()
    view = server.supervisor.view(plan.spec.name)
    return _json({"name": plan.spec.name, "state": view.state if view else State.UNLOADED, "pinned": pinned})


async def plan(request: Request) -> Response:
    """What loading a model would do now: who would go, whom it would wait for, would it fit. Does nothing."""
    server = server_of(request)
    asked = convert(read_object(await read_body(request)), _PlanBody)
    entry = await _named(request, asked.model)
    load_plan = server.plan(entry)
    forecast = server.supervisor.forecast(load_plan.spec)
    sizes = {view.name: view.reserved_bytes for view in server.supervisor.views()}
    estimate = server.estimate(entry)
    measured = server.supervisor.measured(load_plan.measured_as)
    return _json(
        {
            "model": forecast.model,
            "state": forecast.state,
            "action": forecast.action,
            "reason": forecast.reason,
            "fits": forecast.estimate_bytes <= forecast.budget_bytes,
            "estimate_bytes": forecast.estimate_bytes,
            "estimate": {
                "loaded_bytes": estimate.loaded_bytes,
                "cache_bytes": estimate.cache_bytes,
                "work_bytes": estimate.work_bytes,
                "measured_bytes": measured.loaded_bytes if measured is not None else None,
                "fixed_by_configuration": load_plan.spec.fixed,
            },
            "budget_bytes": forecast.budget_bytes,
            "reserved_bytes": forecast.reserved_bytes,
            "evict": [
                {"model": name, "reserved_bytes": sizes[name], "drains_first": name in forecast.drain}
                for name in forecast.evict
            ],
            "wait_for": list(forecast.wait_for),
            "pinned": list(forecast.pinned),
            "wait_seconds": None if forecast.wait_seconds is None else round(forecast.wait_seconds, 3),
        }
    )


async def config(request: Request) -> Response:
    """The settings in force, secrets masked, with the origin of each that is not at its default."""
    settings = server_of(request).settings
    return _json({"settings": shown_settings(settings), "origins": settings.origins})


async def events(request: Request) -> Response:
    """Server-sent events of everything that happens; ``Last-Event-ID`` continues where a client broke off."""
    ring = server_of(request).supervisor.happenings.ring
    return RingStream(ring, last_event_id(request, ring), lambda happening: (happening.kind, _told(happening)))


def _told(happening: Happening) -> dict[str, Any]:
    return {"at": happening.at, **happening.data}


async def logs(request: Request) -> Response:
    """The last lines of the log, of everything or of one model."""
    ring = server_of(request).logs
    is_wanted = await _line_filter(request)
    after = last_event_id(request, ring) or 0
    lines = [{"number": number, **_line(line)} for number, line in ring.since(after) if is_wanted(line)]
    return _json({"lines": lines, "last": ring.next_number - 1})


async def follow_logs(request: Request) -> Response:
    """The same as they are logged, as server-sent events."""
    is_wanted = await _line_filter(request)
    ring = server_of(request).logs
    after = last_event_id(request, ring)
    return RingStream(ring, after, lambda line: ("line", _line(line)) if is_wanted(line) else None)


async def _line_filter(request: Request) -> Callable[[LogLine], bool]:
    name = request.query_params.get("model", "")
    if not name:
        return lambda line: True
    entry = await _named(request, name)
    names = frozenset({entry.runner, entry.name.display})
    return lambda line: line.is_about(names)


def _line(line: LogLine) -> dict[str, Any]:
    return {"at": line.at, "level": line.level, "text": line.text}


async def requests(request: Request) -> Response:
    """The last requests, newest first, if they are kept."""
    server = server_of(request)
    found = [inspected.summary() for inspected in server.inspection.newest_first()]
    return _json({"kept": server.settings.inspect_requests, "requests": found})


async def one_request(request: Request) -> Response:
    """One of them with headers, body and answer; keys are taken out."""
    return _json(server_of(request).inspection.find(request.path_params["id"]).whole())


async def _until_gone(server: Server, name: str) -> State:
    while True:
        await server.supervisor.settled()
        view = server.supervisor.view(name)
        if view is None or view.worker is None or view.in_flight or view.queued:
            return view.state if view else State.UNLOADED
        await server.supervisor.wait_change()


def routes() -> list[BaseRoute]:
    return [
        Route("/health", health),
        Route("/ready", ready),
        Route("/admin/status", status),
        Route("/admin/config", config),
        Route("/admin/shutdown", shutdown, methods=["POST"]),
        Route("/admin/models/{name:path}/load", load, methods=["POST"]),
        Route("/admin/models/{name:path}/unload", unload, methods=["POST"]),
        Route("/admin/models/{name:path}/pin", pin, methods=["POST"]),
        Route("/admin/models/{name:path}/unpin", unpin, methods=["POST"]),
        Route("/admin/plan", plan, methods=["POST"]),
        Route("/admin/events", events),
        Route("/admin/logs", logs),
        Route("/admin/logs/stream", follow_logs),
        Route("/admin/requests", requests),
        Route("/admin/requests/{id}", one_request),
    ]
