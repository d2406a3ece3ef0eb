"""The owner of all workers: a thin loop around the pure lifecycle.

One task, ``_own``, takes events from a queue, asks the lifecycle, and carries out the effects without waiting for
anything; what takes time (starting, loading, stopping) runs in tasks of its own that report back as events. Nobody
else touches the lifecycle. ``acquire`` is the only door to a worker.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Final, assert_never

from mlx_router_server.lifecycle.events import (
    CancelStreams,
    Decided,
    Effect,
    Grant,
    LeaseRequested,
    LeaseReturned,
    ModelSpec,
    Refuse,
    ShutdownRequested,
    StartWorker,
    StopWorker,
    Ticked,
    UnloadRequested,
    WorkerExited,
    WorkerFailed,
    WorkerReady,
    WorkerReclaimed,
    WorkerStarted,
)
from mlx_router_server.lifecycle.events import Event as LifecycleEvent
from mlx_router_server.lifecycle.machine import Lifecycle, Limits
from mlx_router_server.lifecycle.record import ModelView
from mlx_router_server.workers.handle import WorkerHandle
from mlx_router_server.workers.launcher import launch
from mlx_router_server.workers.link import WorkerLink
from mlx_router_server.workers.memory import process_bytes
from mlx_router_server.workers.reclaim import reclaim
from mlx_router_server.workers.run_directory import RunDirectory
from mlx_router_server.workers.standby import StandbyPool
from mlx_router_server.workers.timings import EvictionTimings, SwapTimings
from mlx_router_shared.errors import LoadFailed, MlxRouterError, ShuttingDown, WorkerDied
from mlx_router_shared.generation import Event, GenerationRequest, ReasoningDelta, TextDelta, ToolCallDelta
from mlx_router_shared.protocol import Bootstrap, Load, ModelFacts

__all__ = ["Lease", "LoadPlan", "Supervisor", "SupervisorOptions", "WorkerView"]

log = logging.getLogger(__name__)

_HELLO_SECONDS: Final = 120.0
_NEVER: Final = 1e9


@dataclass(frozen=True, slots=True, kw_only=True)
class SupervisorOptions:
    """What the operator decides; times in seconds."""

    limits: Limits
    standby_workers: int = 1
    load_timeout_seconds: float = 600.0
    stop_timeout_seconds: float = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadPlan:
    """A model and everything that is needed to load it."""

    spec: ModelSpec
    path: str
    engine: str
    context_tokens: int
    parallel: int
    cache_limit_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerView:
    """What is known of a model's worker at this moment."""

    pid: int
    stage: str
    fraction: float
    memory_bytes: int
    streams: int
    tokens_total: int
    facts: ModelFacts | None


@dataclass(slots=True)
class _Run:
    """One worker's life for one model."""

    plan: LoadPlan
    timings: SwapTimings
    handle: WorkerHandle | None = None
    loading: bool = True
    granted_at: float | None = None
    has_process: asyncio.Event = field(default_factory=asyncio.Event)
    """Set once there is a process, or there will be none."""


class Lease:
    """The right to use a model; valid inside ``async with supervisor.acquire(...)``."""

    def __init__(self, run: _Run, handle: WorkerHandle, waited_seconds: float) -> None:
        self._run = run
        self._handle = handle
        self.waited_seconds = waited_seconds

    @property
    def facts(self) -> ModelFacts:
        assert self._handle.facts is not None
        return self._handle.facts

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[list[Event], None]:
        """The events of a request; closing the generator cancels the request."""
        stream = self._handle.generate(request)
        try:
            async for events in stream:
                if self._run.timings.first_token_seconds is None:
                    self._note_first_token(events)
                yield events
        finally:
            await stream.aclose()

    def _note_first_token(self, events: list[Event]) -> None:
        if any(isinstance(event, TextDelta | ReasoningDelta | ToolCallDelta) for event in events):
            assert self._run.granted_at is not None
            self._run.timings.first_token_seconds = time.monotonic() - self._run.granted_at


class Supervisor:
    """Start inside a running event loop, ``stop`` before the loop ends."""

    def __init__(self, options: SupervisorOptions) -> None:
        self._options = options
        self._lifecycle = Lifecycle(options.limits, lambda: "w-" + secrets.token_hex(8))
        self._events: asyncio.Queue[LifecycleEvent] = asyncio.Queue()
        self._plans: dict[str, LoadPlan] = {}
        self._runs: dict[str, _Run] = {}
        self._tickets: dict[str, asyncio.Future[_Run]] = {}
        self._last_swaps: dict[str, SwapTimings] = {}
        self._evictions_for: dict[str, list[EvictionTimings]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._changed = asyncio.Event()
        self._leaving = False
        self.kill_incidents = 0
        self.stranded_incidents = 0
        self._run_directory: RunDirectory | None = None
        self._link: WorkerLink | None = None
        self._owner: asyncio.Task[None] | None = None
        self._standby = StandbyPool(options.standby_workers, self._start_process)

    async def start(self) -> None:
        """Bind the socket and start owning; the standby worker comes by itself."""
        self._run_directory = RunDirectory.create()
        self._link = WorkerLink(self._run_directory.endpoint)
        self._owner = asyncio.create_task(self._own(), name="owner")
        self._standby.refill()

    async def stop(self) -> None:
        """Refuse, drain, stop every worker and see each of them gone; then close the socket."""
        self._leaving = True
        self._post(ShutdownRequested())
        await self.settled()
        await self._standby.close(self._options.stop_timeout_seconds)
        while self._runs:
            await self.wait_change()
        if self._owner is not None:
            self._owner.cancel()
            await asyncio.gather(self._owner, return_exceptions=True)
        for future in self._tickets.values():
            if not future.done():
                future.set_exception(ShuttingDown("the server is shutting down"))
        if self._link is not None:
            await self._link.close()
        if self._run_directory is not None:
            self._run_directory.remove()

    # ------------------------------------------------------------------ the door

    @asynccontextmanager
    async def acquire(self, plan: LoadPlan, *, keep_alive_seconds: float | None = None) -> AsyncIterator[Lease]:
        """The only way to a worker: waits until the model may be used, and keeps it for as long as the block lasts.

        Raises ``MlxRouterError`` when it is refused. A load that was begun goes on when its first caller leaves.
        """
        if self._leaving:
            raise ShuttingDown("the server is shutting down")
        asked_at = time.monotonic()
        ticket = secrets.token_hex(8)
        future: asyncio.Future[_Run] = asyncio.get_running_loop().create_future()
        self._tickets[ticket] = future
        self._plans[plan.spec.name] = plan
        self._post(LeaseRequested(ticket=ticket, spec=plan.spec, keep_alive_seconds=keep_alive_seconds))
        try:
            run = await future
            assert run.handle is not None
            yield Lease(run, run.handle, time.monotonic() - asked_at)
        finally:
            del self._tickets[ticket]
            self._post(LeaseReturned(ticket=ticket))

    def unload(self, model: str, reason: str) -> None:
        """Let a model go once nobody uses it; returns at once."""
        self._post(UnloadRequested(model=model, reason=reason))

    # ------------------------------------------------------------------- looking

    def views(self) -> list[ModelView]:
        """Every model that was asked for since the start."""
        return self._lifecycle.views()

    def worker_view(self, worker: str | None) -> WorkerView | None:
        run = self._runs.get(worker) if worker is not None else None
        if run is None or run.handle is None:
            return None
        handle = run.handle
        stats = handle.stats
        # The process as the system sees it, or what its engine says (on Metal either may be the larger).
        measured = max(process_bytes(handle.pid), stats.memory_bytes if stats else 0)
        return WorkerView(
            pid=handle.pid,
            stage=handle.stage,
            fraction=handle.fraction,
            memory_bytes=measured,
            streams=handle.open_requests,
            tokens_total=stats.tokens_total if stats else 0,
            facts=handle.facts,
        )

    def last_swap(self, model: str) -> SwapTimings | None:
        return self._last_swaps.get(model)

    @property
    def standby_pids(self) -> list[int]:
        return [worker.pid for worker in self._standby.workers]

    @property
    def budget_bytes(self) -> int:
        return self._options.limits.budget_bytes

    @property
    def reserved_bytes(self) -> int:
        return self._lifecycle.reserved_bytes

    @property
    def waiting(self) -> int:
        return self._lifecycle.waiting

    async def settled(self) -> None:
        """Until every event that was posted so far has been decided upon."""
        await self._events.join()

    async def wait_change(self) -> None:
        """Until something happened to some model."""
        changed = self._changed
        await changed.wait()

    # ------------------------------------------------------------------ the owner

    def _wake(self) -> None:
        """Wake everybody who waits for a change; who waits from now on waits for the next."""
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    def _post(self, event: LifecycleEvent) -> None:
        self._events.put_nowait(event)

    async def _own(self) -> None:
        while True:
            deadline = self._lifecycle.next_deadline()
            try:
                async with asyncio.timeout_at(asyncio.get_running_loop().time() + self._seconds_until(deadline)):
                    event = await self._events.get()
            except TimeoutError:
                event = Ticked()
            try:
                for effect in self._lifecycle.handle(event, time.monotonic()):
                    self._perform(effect)
            except Exception:
                # A defect in one decision must not end all others; the state machine refuses what it does not know.
                log.exception("event=lifecycle_error cause=%s", type(event).__name__)
            if not isinstance(event, Ticked):
                self._events.task_done()
            self._wake()

    @staticmethod
    def _seconds_until(deadline: float) -> float:
        return min(max(deadline - time.monotonic(), 0.0), _NEVER)

    def _perform(self, effect: Effect) -> None:
        match effect:
            case Grant():
                run = self._runs[effect.worker]
                if run.granted_at is None:
                    run.granted_at = time.monotonic()
                future = self._tickets.get(effect.ticket)
                if future is not None and not future.done():
                    future.set_result(run)
            case Refuse():
                future = self._tickets.get(effect.ticket)
                if future is not None and not future.done():
                    future.set_exception(effect.error)
            case StartWorker():
                self._begin_run(effect)
            case StopWorker():
                run = self._runs[effect.worker]
                self._spawn_task(self._stop_worker(run, effect), f"stop-{effect.worker}")
            case CancelStreams():
                handle = self._runs[effect.worker].handle
                if handle is not None:
                    handle.fail_requests(effect.reason)
            case Decided():
                fields = " ".join(f"{name}={value!r}" for name, value in effect.fields.items())
                log.info("event=%s model=%r %s", effect.what, effect.model, fields)
            case _:
                assert_never(effect)

    def _spawn_task(self, work: Coroutine[Any, Any, None], name: str) -> None:
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # ----------------------------------------------------------------- coming

    def _begin_run(self, effect: StartWorker) -> None:
        plan = self._plans[effect.model]
        timings = SwapTimings(model=effect.model, started_at=time.time())
        timings.waited_seconds = effect.waited_seconds
        timings.evictions = self._evictions_for.pop(effect.model, [])
        run = self._runs[effect.worker] = _Run(plan, timings)
        self._last_swaps[effect.model] = timings
        self._spawn_task(self._live(effect.worker, run), f"run-{effect.worker}")

    async def _live(self, worker: str, run: _Run) -> None:
        """Get a process and have it load. What happens to it afterwards, its exit tells."""
        try:
            handle = await self._get_process(run)
            handle.on_exit = lambda: self._post(WorkerExited(worker=worker, error=WorkerDied(handle.exit_reason)))
            self._post(WorkerStarted(worker=worker))
            began = time.monotonic()
            facts = await handle.load(self._load_message(run.plan), self._options.load_timeout_seconds)
            run.timings.weights_seconds = facts.weights_seconds
            run.timings.warm_up_seconds = facts.warm_up_seconds
            self._log_swap(run)
            load_seconds = time.monotonic() - began
            self._post(WorkerReady(worker=worker, memory_bytes=facts.memory_bytes, load_seconds=load_seconds))
        except MlxRouterError as error:
            self._post(WorkerFailed(worker=worker, error=error))
        except OSError as error:
            failure = WorkerDied(f"its worker process could not be started: {error}")
            self._post(WorkerFailed(worker=worker, error=failure))
        except Exception:
            log.exception(
                "event=load_broke_off model=%r", run.plan.spec.name
            )  # a defect of ours: nobody may hang on it
            self._post(WorkerFailed(worker=worker, error=LoadFailed("internal error while loading; see the log")))
        finally:
            run.has_process.set()
            run.loading = False
            self._refill_standby()

    def _refill_standby(self) -> None:
        """Not while anything loads: the imports would compete with it for the cores."""
        if not self._leaving and not any(run.loading for run in self._runs.values()):
            self._standby.refill()

    async def _get_process(self, run: _Run) -> WorkerHandle:
        began = time.monotonic()
        handle = await self._standby.take(run.plan.engine)
        run.timings.standby = handle is not None
        if handle is None:
            handle = run.handle = await self._start_process(run.plan.engine)
            run.has_process.set()
            hello = await handle.wait_hello(_HELLO_SECONDS)
            run.timings.import_seconds = hello.import_seconds
            run.timings.spawn_seconds = max(time.monotonic() - began - hello.import_seconds, 0.0)
        run.handle = handle
        run.has_process.set()
        return handle

    async def _start_process(self, engine: str) -> WorkerHandle:
        assert self._link is not None
        assert self._run_directory is not None
        worker_id, token = "p-" + secrets.token_hex(8), secrets.token_urlsafe(24)
        process = await launch(
            Bootstrap(endpoint=self._run_directory.endpoint, worker_id=worker_id, token=token, engine=engine)
        )
        return WorkerHandle(worker_id, engine, process, self._link, token)

    @staticmethod
    def _load_message(plan: LoadPlan) -> Load:
        return Load(
            model=plan.spec.name,
            path=plan.path,
            context_tokens=plan.context_tokens,
            parallel=plan.parallel,
            cache_limit_bytes=plan.cache_limit_bytes,
        )

    def _log_swap(self, run: _Run) -> None:
        timings = run.timings
        log.info(
            "event=loaded model=%r waited=%.3f standby=%s spawn=%.3f import=%.3f weights=%.3f warm_up=%.3f evicted=%d",
            timings.model, timings.waited_seconds, timings.standby, timings.spawn_seconds, timings.import_seconds,
            timings.weights_seconds, timings.warm_up_seconds, len(timings.evictions),
        )  # fmt: skip

    # ----------------------------------------------------------------- leaving

    async def _stop_worker(self, run: _Run, effect: StopWorker) -> None:
        """End the worker and see its memory back; the reservation is held until then."""
        await run.has_process.wait()
        if run.handle is not None:
            try:
                self._note_end(
                    await reclaim(run.handle, run.plan.spec.name, effect, self._options.stop_timeout_seconds),
                    effect.successor,
                )
            except Exception:
                log.exception(
                    "event=reclaim_broke_off model=%r", run.plan.spec.name
                )  # the room is given free all the same
        del self._runs[effect.worker]
        self._post(WorkerReclaimed(worker=effect.worker))
        self._refill_standby()
        self._wake()

    def _note_end(self, timings: EvictionTimings, successor: str | None) -> None:
        self.kill_incidents += timings.rung == "kill"
        self.stranded_incidents += timings.verdict == "stranded"
        if successor is not None:
            self._evictions_for.setdefault(successor, []).append(timings)
