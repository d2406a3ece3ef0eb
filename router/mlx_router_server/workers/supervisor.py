"""The owner of all workers: a thin loop around the pure lifecycle.

One task, ``_own``, takes events from a queue, asks the lifecycle, and carries out the effects without waiting for
anything; what takes time (starting, loading, stopping) runs in tasks of its own that report back as events. Nobody
else touches the lifecycle. ``acquire`` is the only door to a worker.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import signal
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from typing import Any, Final, assert_never

from mlx_router_server.lifecycle.events import (
    BudgetLearned,
    CancelStreams,
    Decided,
    Effect,
    Grant,
    LeaseRequested,
    LeaseReturned,
    LimitsChanged,
    LoadWanted,
    MemoryRead,
    Moved,
    PinChanged,
    Refuse,
    SetShare,
    ShutdownHastened,
    ShutdownRequested,
    StartWorker,
    StopWorker,
    Ticked,
    TrimMemory,
    UnloadRequested,
    WorkerExited,
    WorkerFailed,
    WorkerReclaimed,
)
from mlx_router_server.lifecycle.events import Event as LifecycleEvent
from mlx_router_server.lifecycle.machine import Lifecycle
from mlx_router_server.lifecycle.memory import MemoryReading
from mlx_router_server.lifecycle.spec import ModelSpec
from mlx_router_server.lifecycle.states import State
from mlx_router_server.lifecycle.views import LoadForecast, ModelView, WaiterView
from mlx_router_server.telemetry.events import Happenings
from mlx_router_server.workers.counter import TokenCounter
from mlx_router_server.workers.lease import Lease
from mlx_router_server.workers.measured import Measured, Measurements
from mlx_router_server.workers.memory import wired_limit
from mlx_router_server.workers.plan import Failure, LoadPlan, SupervisorOptions, Wishes, WorkerView
from mlx_router_server.workers.processes import WorkerProcesses
from mlx_router_server.workers.run import Run
from mlx_router_server.workers.source import SourceView, WorkerSource
from mlx_router_server.workers.timings import EvictionTimings, SwapTimings
from mlx_router_server.workers.watching import watch_memory, watch_progress
from mlx_router_shared.errors import ShuttingDown
from mlx_router_shared.generation import Counted, CountRequest
from mlx_router_shared.protocol import Hello, ModelFacts

__all__ = ["Supervisor"]

log = logging.getLogger(__name__)

_NEVER: Final = 1e9
_HASTY_SECONDS: Final = 1.0
_NO_WISHES: Final = Wishes()
_LEVELS: Final = dict.fromkeys(("refused", "waited_too_long", "over_budget", "memory_pressure"), logging.WARNING) | {
    "worker_failed": logging.ERROR
}
"""Of decisions that an operator should see when only warnings are logged."""
_FIRST_PAUSE_SECONDS: Final = 0.05
_MOST_DEFECTS: Final = 20


class Supervisor:
    """Start inside a running event loop, ``stop`` before the loop ends."""

    def __init__(self, options: SupervisorOptions) -> None:
        self._options = options
        self._lifecycle = Lifecycle(options.limits, lambda: "w-" + secrets.token_hex(8))
        self._events: asyncio.Queue[LifecycleEvent] = asyncio.Queue()
        self._plans: dict[str, LoadPlan] = {}
        self._runs: dict[str, Run] = {}
        self._tickets: dict[str, asyncio.Future[Run]] = {}
        self._last_swaps: dict[str, SwapTimings] = {}
        self._last_failures: dict[str, Failure] = {}
        self._evictions_for: dict[str, list[EvictionTimings]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._changed = asyncio.Event()
        self._leaving = False
        self._stop_seconds = options.stop_timeout_seconds
        self.turns = 0
        """How often the owner has decided something: that it moves is the sign that the router lives."""
        self.kill_incidents = 0
        self.stranded_incidents = 0
        self.gave_up = False
        """Whether decisions kept failing, so that the router ends itself: its exit status says that it failed."""
        self.left_behind: list[int] = []
        """Pids of workers that not even KILL could end within its limit."""
        self.happenings = Happenings()
        self.on_facts: Callable[[LoadPlan, ModelFacts], None] | None = None
        """Called with what a worker found out about its model."""
        self._measurements = Measurements(options.measurements)
        self._processes = WorkerProcesses(self._learn_budget)
        self._owner: asyncio.Task[None] | None = None
        self._watchers: list[asyncio.Task[None]] = []
        self._source = WorkerSource(options.worker_source, options.standby_workers, self._processes)
        self._counters = {kind: TokenCounter(kind, self._source) for kind in ("tokenizer", "fake")}

    async def start(self) -> None:
        """Bind the socket and start owning; the source of workers gets ready by itself."""
        await self._processes.open()
        self._owner = asyncio.create_task(self._own(), name="owner")
        memory = watch_memory(self._options.read_memory, self._note_memory, self._options.memory_interval_seconds)
        progress = watch_progress(
            lambda: [*self._runs.values(), *self._counters.values()], lambda: self._options.stall_timeout_seconds
        )
        self._watchers = [
            asyncio.create_task(memory, name="memory"), asyncio.create_task(progress, name="watchdog"),
        ]  # fmt: skip
        self._source.refill()

    def begin_leaving(self) -> None:
        """Refuse whoever waits or comes; let run what runs. Idempotent, returns at once."""
        if not self._leaving:
            self._leaving = True
            self._post(ShutdownRequested())
            self.happenings.tell("leaving")
            self.happenings.close()

    def hasten(self) -> None:
        """The operator does not want to wait: running requests end with a visible error, workers get a second."""
        self.begin_leaving()
        self._stop_seconds = min(self._stop_seconds, _HASTY_SECONDS)
        self._post(ShutdownHastened())

    async def stop(self) -> None:
        """Refuse, drain, stop every worker and see each of them gone; then close the socket.

        After ``gave_up`` no decision stops a worker any more: those that are left end when this process does.
        """
        self.begin_leaving()
        if not self.gave_up:
            await self.settled()
        await self._source.close_idle()
        await asyncio.gather(*(counter.close(self._stop_seconds) for counter in self._counters.values()))
        while self._runs and not self.gave_up:
            await self.wait_change()
        await self._source.close()
        tasks = [*self._watchers, *([self._owner] if self._owner is not None else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for future in self._tickets.values():
            if not future.done():
                future.set_exception(ShuttingDown("the server is shutting down"))
        await self._measurements.close()
        await self._processes.close()

    # ------------------------------------------------------------------ the door

    @asynccontextmanager
    async def acquire(self, plan: LoadPlan, wishes: Wishes = _NO_WISHES, *, label: str = "") -> AsyncIterator[Lease]:
        """The only way to a worker: waits until the model may be used, and keeps it for as long as the block lasts.

        ``label`` names the request in what is shown of the queue. Raises ``MlxRouterError`` when it is refused. A load
        that was begun goes on when its first caller leaves.
        """
        if self._leaving:
            raise ShuttingDown("the server is shutting down")
        asked_at = time.monotonic()
        ticket = label or secrets.token_hex(8)
        future: asyncio.Future[Run] = asyncio.get_running_loop().create_future()
        self._tickets[ticket] = future
        self._plans[plan.spec.name] = plan
        self._post(
            LeaseRequested(
                ticket=ticket, spec=plan.spec, keep_alive_seconds=wishes.keep_alive_seconds,
                priority=wishes.priority, deadline_seconds=wishes.deadline_seconds, explicit=wishes.explicit,
            )
        )  # fmt: skip
        try:
            run = await future
            assert run.handle is not None
            assert run.granted_at is not None
            waited = time.monotonic() - asked_at
            yield Lease(run.handle, run.timings, run.granted_at, waited, run.settled.set)
        finally:
            del self._tickets[ticket]
            self._post(LeaseReturned(ticket=ticket))

    async def count(self, engine: str, request: CountRequest) -> Counted:
        """The tokens of a prompt, counted beside all models: nothing is loaded, and nobody waits for a turn."""
        if self._leaving:
            raise ShuttingDown("the server is shutting down")
        return await self._counters["fake" if engine == "fake" else "tokenizer"].count(request)

    def want(self, plan: LoadPlan, reason: str) -> None:
        """Have a model loaded for nobody in particular, if nobody has to leave for it; returns at once."""
        self._plans[plan.spec.name] = plan
        self._post(LoadWanted(spec=plan.spec, reason=reason))

    def unload(self, model: str, reason: str, *, by_client: bool = False) -> None:
        """Let a model go once nobody uses it; returns at once."""
        self._post(UnloadRequested(model=model, reason=reason, by_client=by_client))

    def pin(self, plan: LoadPlan, pinned: bool) -> None:
        """Never evict this model, or let it be evicted again, until the router ends; returns at once."""
        self._post(PinChanged(spec=plan.spec, pinned=pinned))

    # ------------------------------------------------------------------- looking

    def views(self) -> list[ModelView]:
        """Every model that was asked for since the start."""
        return self._lifecycle.views()

    def view(self, model: str) -> ModelView | None:
        return self._lifecycle.view(model)

    def queue(self) -> list[WaiterView]:
        """Everybody who waits, in order."""
        return self._lifecycle.queue(time.monotonic())

    def forecast(self, spec: ModelSpec) -> LoadForecast:
        """What a request for this model would cause now; changes nothing."""
        return self._lifecycle.forecast(spec, time.monotonic())

    def worker_view(self, worker: str | None) -> WorkerView | None:
        run = self._runs.get(worker) if worker is not None else None
        return run.view() if run is not None else None

    def last_swap(self, model: str) -> SwapTimings | None:
        return self._last_swaps.get(model)

    def last_failure(self, model: str) -> Failure | None:
        return self._last_failures.get(model)

    def measured(self, key: str) -> Measured | None:
        """What an earlier load under this key took, in this run or one before."""
        return self._measurements.get(key)

    @property
    def source(self) -> SourceView:
        """How workers are obtained."""
        return self._source.view()

    @property
    def budget_bytes(self) -> int:
        return self._lifecycle.limits.budget_bytes

    @property
    def reserved_bytes(self) -> int:
        return self._lifecycle.reserved_bytes

    @property
    def memory(self) -> MemoryReading | None:
        """The machine's memory at the last look."""
        return self._lifecycle.memory

    @property
    def waiting(self) -> int:
        return self._lifecycle.waiting

    def reconfigure(self, options: SupervisorOptions) -> None:
        """Other limits from now on; loads that have begun keep theirs. A budget that is ours to choose stays chosen."""
        limits = options.limits
        known = self._lifecycle.limits
        limits = replace(limits, wired_bytes=known.wired_bytes)
        if options.learn_budget and self._options.learn_budget:
            limits = replace(limits, budget_bytes=known.budget_bytes)
        self._options = options
        self._stop_seconds = options.stop_timeout_seconds
        self._source.reconfigure(options.worker_source, options.standby_workers)
        self._post(LimitsChanged(limits=limits))
        self._refill()

    def nudge(self) -> None:
        """Have the owner take a turn, so that ``turns`` moves if it can."""
        self._post(Ticked())

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

    def _decide(self, event: LifecycleEvent) -> None:
        """Take a decision and carry it out. A defect keeps no other effect from being carried out: the state has moved,
        and whoever waits for an effect must get it."""
        defects: list[Exception] = []
        try:
            effects = self._lifecycle.handle(event, time.monotonic())
        except Exception as error:
            defects.append(error)
            effects = self._lifecycle.take_effects()
        for effect in effects:
            try:
                self._perform(effect)
            except Exception as error:
                defects.append(error)
        if defects:
            raise ExceptionGroup(f"defects in the decision about {type(event).__name__}", defects)

    async def _own(self) -> None:
        defects = 0
        while True:
            event: LifecycleEvent = Ticked()
            taken = False
            try:
                until = asyncio.get_running_loop().time() + self._seconds_until(self._lifecycle.next_deadline())
                with suppress(TimeoutError):
                    async with asyncio.timeout_at(until):
                        event = await self._events.get()
                        taken = True
                if isinstance(event, WorkerFailed) or (isinstance(event, WorkerExited) and not event.was_stopped):
                    self._note_failure(event)
                self._decide(event)
            except Exception:
                # A defect in one decision must not end all others. One that comes back at once, as a deadline does,
                # must not keep the loop busy either; a service manager starts a router anew that gives up.
                defects += 1
                log.exception("event=lifecycle_error cause=%s", type(event).__name__)
                if defects >= _MOST_DEFECTS:
                    log.critical("event=router_gives_up reason=%r", f"{defects} decisions in a row failed")
                    self.gave_up = True
                    os.kill(os.getpid(), signal.SIGTERM)
                await asyncio.sleep(min(_FIRST_PAUSE_SECONDS * 2**defects, 1.0))
            else:
                defects = 0
            self.turns += 1
            if taken:
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
                self._settle_ticket(effect.ticket, run)
            case Refuse():
                self._settle_ticket(effect.ticket, effect.error)
            case StartWorker():
                self._begin_run(effect)
            case SetShare():
                self._runs[effect.worker].set_share(effect.share)
            case TrimMemory():
                self._runs[effect.worker].trim()
            case StopWorker():
                run = self._runs[effect.worker]
                self._spawn_task(self._stop_worker(run, effect), f"stop-{effect.worker}")
                if effect.successor is not None:
                    self._source.prepare(self._plans[effect.successor].engine)
            case CancelStreams():
                handle = self._runs[effect.worker].handle
                if handle is not None:
                    handle.fail_requests(effect.reason)
            case Moved():
                self.happenings.tell("state", model=effect.model, old=effect.old, new=effect.new, reason=effect.reason)
            case Decided():
                fields = " ".join(f"{name}={value!r}" for name, value in effect.fields.items())
                log.log(
                    _LEVELS.get(effect.what, logging.INFO), "event=%s model=%r %s", effect.what, effect.model, fields
                )
                self.happenings.tell("decision", what=effect.what, model=effect.model, **effect.fields)
            case _:
                assert_never(effect)

    def _settle_ticket(self, ticket: str, outcome: Run | Exception) -> None:
        future = self._tickets.get(ticket)
        if future is None or future.done():
            return  # its owner has left; the lease is on its way back
        if isinstance(outcome, Run):
            future.set_result(outcome)
        else:
            future.set_exception(outcome)

    def _spawn_task(self, work: Coroutine[Any, Any, None], name: str) -> None:
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # ----------------------------------------------------------------- workers

    def _begin_run(self, effect: StartWorker) -> None:
        plan = self._plans[effect.model]
        evictions = self._evictions_for.pop(effect.model, [])
        run = Run(
            effect, plan, self._options, evictions, self._post, self.happenings, self._measurements,
            self._is_answering, self._report_facts,
        )  # fmt: skip
        self._runs[effect.worker] = run
        self._last_swaps[effect.model] = run.timings
        self._spawn_task(self._live(run), f"run-{effect.worker}")

    def _report_facts(self, plan: LoadPlan, facts: ModelFacts) -> None:
        if self.on_facts is not None:
            self.on_facts(plan, facts)

    def _is_answering(self) -> bool:
        """Whether any worker computes for somebody: now, or a moment ago, as it is between two turns."""
        return any(run.is_answering(time.monotonic()) for run in self._runs.values())

    async def _live(self, run: Run) -> None:
        await run.live(self._source)
        self._refill()

    async def _stop_worker(self, run: Run, effect: StopWorker) -> None:
        timings = await run.stop(effect, self._stop_seconds, self._processes.bytes_of_others)
        if run.handle is not None and not run.handle.exited.is_set():
            self.left_behind.append(run.handle.pid)
        if timings is not None:
            self.kill_incidents += timings.rung == "kill"
            self.stranded_incidents += timings.verdict == "stranded"
            if effect.successor is not None:
                self._note_eviction(effect.successor, timings)
        del self._runs[effect.worker]
        self._post(WorkerReclaimed(worker=effect.worker))
        self._refill()
        self._wake()

    def _note_eviction(self, successor: str, timings: EvictionTimings) -> None:
        """Record how the memory for a load was made free; the load may have begun meanwhile, or be done."""
        run = next((run for run in self._runs.values() if run.plan.spec.name == successor), None)
        if run is not None:
            run.timings.evictions.append(timings)
        else:
            self._evictions_for.setdefault(successor, []).append(timings)

    def _note_failure(self, event: WorkerFailed | WorkerExited) -> None:
        """Keep why a worker failed. The exit of a worker that was asked to stop is no failure."""
        run = self._runs.get(event.worker)
        view = self.view(run.plan.spec.name) if run is not None else None
        if run is not None and view is not None and view.state is not State.STOPPING:
            self._last_failures[run.plan.spec.name] = run.failure(event.error.message)

    def _refill(self) -> None:
        """Not while anything loads or makes its first token: the imports would compete with it for the cores."""
        if not self._leaving and all(run.settled.is_set() for run in self._runs.values()):
            self._source.refill()

    def _note_memory(self, reading: MemoryReading) -> None:
        self._post(MemoryRead(reading=reading))

    def _learn_budget(self, hello: Hello) -> None:
        """The device says what it recommends to wire (Metal); a budget that is ours to choose follows it."""
        limits = self._lifecycle.limits
        wired = (wired_limit() or hello.working_set_bytes) if hello.working_set_bytes else 0
        if wired and wired != limits.wired_bytes:
            budget = wired if self._options.learn_budget else limits.budget_bytes
            self._post(BudgetLearned(budget_bytes=budget, wired_bytes=wired))
