"""Random interleavings against a small reference model: the promises that hold whatever happens.

The test plays the world: clients that come and leave, workers that start, load, fail, die and give their memory back,
a clock, an operator. It keeps books of its own and compares.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import ClassVar

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from mlx_router_server.lifecycle.events import (
    CancelStreams,
    Event,
    Grant,
    LeaseRequested,
    LeaseReturned,
    LoadProgressed,
    LoadWanted,
    MemoryRead,
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
    WorkerReady,
    WorkerReclaimed,
    WorkerStarted,
)
from mlx_router_server.lifecycle.keepalive import KeepAlive
from mlx_router_server.lifecycle.machine import Lifecycle, Limits
from mlx_router_server.lifecycle.memory import MemoryReading, Pressure
from mlx_router_server.lifecycle.queueing import BusyPolicy
from mlx_router_server.lifecycle.spec import ModelSpec, Share
from mlx_router_server.lifecycle.states import HOLDS_MEMORY, State
from mlx_router_shared.errors import LoadFailed, WorkerDied

_SIZES = {"a": 30, "b": 50, "c": 60, "d": 90, "huge": 200}
_BUDGET = 100
_QUEUE_SECONDS = 50.0
_BUSY_SECONDS = 15.0
_PARALLEL = 2
_MAX_QUEUE = 6
_MODELS = st.sampled_from(sorted(_SIZES))
_MAY_WAIT = (State.QUEUED, State.STARTING, State.LOADING, State.READY, State.DRAINING, State.STOPPING)


def _spec(model: str) -> ModelSpec:
    return ModelSpec(
        name=model, estimate_bytes=_SIZES[model], growth_bytes=5, keep_alive=KeepAlive(default=20.0, maximum=1e6),
        parallel=_PARALLEL,
    )  # fmt: skip


class World(RuleBasedStateMachine):
    """``starting``, ``loading``, ``ready`` and ``stopping`` are the processes as they really are."""

    lifecycle: Lifecycle

    @initialize(
        policy=st.sampled_from(list(BusyPolicy)),
        most=st.sampled_from([0, 1, 2]),
        residency=st.sampled_from([0.0, 3.0]),
        turn=st.sampled_from([0.0, 5.0]),
        requests=st.sampled_from([1, 3, 64]),
        cancel=st.booleans(),
        restore=st.booleans(),
    )
    def begin(
        self, policy: BusyPolicy, most: int, residency: float, turn: float, requests: int, cancel: bool, restore: bool
    ) -> None:
        numbers = itertools.count(1)
        self.limits = Limits(
            budget_bytes=_BUDGET, max_loaded_models=most, max_queue=_MAX_QUEUE, queue_timeout_seconds=_QUEUE_SECONDS,
            busy_wait_seconds=_BUSY_SECONDS, drain_timeout_seconds=40.0, busy_policy=policy, turn_seconds=turn,
            turn_requests=requests, min_residency_seconds=residency, cancel_at_drain_limit=cancel,
            restore_on_failure=restore,
        )  # fmt: skip
        self.lifecycle = Lifecycle(self.limits, lambda: f"w{next(numbers)}")
        self.patience = _BUSY_SECONDS if policy is BusyPolicy.WAIT_THEN_FAIL else _QUEUE_SECONDS
        self.now = 0.0
        self.tickets = itertools.count(1)
        self.waiting: dict[str, tuple[str, float, float]] = {}
        self.leases: dict[str, str] = {}
        self.model_of: dict[str, str] = {}
        self.shares: dict[str, Share] = {}
        self.starting: set[str] = set()
        self.loading: set[str] = set()
        self.ready: set[str] = set()
        self.stopping: set[str] = set()
        self.started_at: dict[str, float] = {}
        self.not_counted: dict[str, float] = {}
        self.shut_down = False
        self.contents: dict[str, int] = {}

    def tell(self, event: Event) -> None:
        for effect in self.lifecycle.handle(event, self.now):
            match effect:
                case StartWorker():
                    assert effect.worker not in self.model_of
                    running = self.starting | self.loading | self.ready | self.stopping
                    assert effect.model not in {self.model_of[worker] for worker in running}, "two for one model"
                    assert not self.shut_down
                    self.model_of[effect.worker] = effect.model
                    self.shares[effect.worker] = effect.share
                    self.starting.add(effect.worker)
                    self.started_at[effect.worker] = self.now
                case StopWorker():
                    users = [ticket for ticket, worker in self.leases.items() if worker == effect.worker]
                    assert effect.hung or effect.worker not in self.ready or not users, "stopped while in use"
                    for place in (self.starting, self.loading, self.ready):
                        place.discard(effect.worker)
                    self.stopping.add(effect.worker)
                case Grant():
                    assert effect.worker in self.ready
                    model, _, _ = self.waiting.pop(effect.ticket)
                    assert self.model_of[effect.worker] == model, "a worker of another model"
                    self.leases[effect.ticket] = effect.worker
                case Refuse():
                    del self.waiting[effect.ticket]
                case SetShare():
                    self.shares[effect.worker] = effect.share
                case TrimMemory():
                    assert effect.worker in self.ready
                case CancelStreams():
                    assert self.shut_down or self.limits.cancel_at_drain_limit, "nothing is cut for a swap"
                    for ticket in [t for t, worker in self.leases.items() if worker == effect.worker]:
                        self.cut.append(ticket)
        self.give_back_what_was_cut()

    cut: ClassVar[list[str]] = []

    def give_back_what_was_cut(self) -> None:
        while self.cut:
            ticket = self.cut.pop()
            if self.leases.pop(ticket, None) is not None:
                self.tell(LeaseReturned(ticket=ticket))

    @rule(
        model=_MODELS,
        keep_alive=st.sampled_from([None, None, None, 0.0, 5.0, float("inf")]),
        priority=st.sampled_from([0, 0, 0, 5, -5]),
        deadline=st.sampled_from([None, None, 7.0]),
        explicit=st.booleans(),
    )
    def request(
        self, model: str, keep_alive: float | None, priority: int, deadline: float | None, explicit: bool
    ) -> None:
        ticket = f"t{next(self.tickets)}"
        self.waiting[ticket] = (model, self.now, float("inf") if deadline is None else self.now + deadline)
        spec = self.spec(model)
        forecast = self.lifecycle.forecast(spec, self.now)
        self.tell(
            LeaseRequested(
                ticket=ticket, spec=spec, keep_alive_seconds=keep_alive, priority=priority,
                deadline_seconds=deadline, explicit=explicit,
            )
        )  # fmt: skip
        refused = ticket not in self.waiting and ticket not in self.leases
        if self.shut_down:
            assert refused
        elif not explicit and deadline is None:
            assert (forecast.action == "refuse") == refused, forecast

    @rule(model=_MODELS)
    def write_files(self, model: str) -> None:
        self.contents[model] = self.contents.get(model, 0) + 1

    def spec(self, model: str) -> ModelSpec:
        return replace(_spec(model), content=str(self.contents.get(model, 0)))

    @rule(model=_MODELS)
    def want(self, model: str) -> None:
        self.tell(LoadWanted(spec=self.spec(model), reason="preloaded"))

    @rule(model=_MODELS, pinned=st.booleans())
    def pin(self, model: str, pinned: bool) -> None:
        self.tell(PinChanged(spec=self.spec(model), pinned=pinned))

    @rule(pressure=st.sampled_from(list(Pressure)), available=st.integers(0, 200))
    def read_memory(self, pressure: Pressure, available: int) -> None:
        self.tell(MemoryRead(reading=MemoryReading(available_bytes=available, total_bytes=200, pressure=pressure)))

    @precondition(lambda self: not self.shut_down)
    @rule(chance=st.integers(0, 30))
    def shut_the_router_down(self, chance: int) -> None:
        if chance == 0:
            self.shut_down = True
            self.tell(ShutdownRequested())
            assert not self.waiting

    @precondition(lambda self: self.shut_down)
    @rule()
    def hasten(self) -> None:
        self.tell(ShutdownHastened())

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def leave_the_queue(self, data: st.DataObject) -> None:
        ticket = data.draw(st.sampled_from(sorted(self.waiting)))
        del self.waiting[ticket]
        self.tell(LeaseReturned(ticket=ticket))

    @precondition(lambda self: self.leases)
    @rule(data=st.data())
    def finish_a_request(self, data: st.DataObject) -> None:
        ticket = data.draw(st.sampled_from(sorted(self.leases)))
        del self.leases[ticket]
        self.tell(LeaseReturned(ticket=ticket))
        self.tell(LeaseReturned(ticket=ticket))  # idempotent

    @precondition(lambda self: self.starting)
    @rule(data=st.data())
    def say_hello(self, data: st.DataObject) -> None:
        worker = data.draw(st.sampled_from(sorted(self.starting)))
        self.starting.discard(worker)
        self.loading.add(worker)
        self.tell(WorkerStarted(worker=worker))

    @precondition(lambda self: self.loading)
    @rule(data=st.data())
    def finish_loading(self, data: st.DataObject) -> None:
        worker = data.draw(st.sampled_from(sorted(self.loading)))
        self.loading.discard(worker)
        self.ready.add(worker)
        for ticket, (model, since, _) in self.waiting.items():
            if model == self.model_of[worker]:
                spent = self.now - max(since, self.started_at[worker])
                self.not_counted[ticket] = self.not_counted.get(ticket, 0.0) + spent
        measured = max(_SIZES[self.model_of[worker]] + data.draw(st.sampled_from([-10, -5, 0, 20])), 1)
        self.tell(WorkerReady(worker=worker, memory_bytes=measured, load_seconds=1.0))

    @precondition(lambda self: self.loading)
    @rule(data=st.data(), fraction=st.floats(0.0, 1.0))
    def get_on(self, data: st.DataObject, fraction: float) -> None:
        self.tell(LoadProgressed(worker=data.draw(st.sampled_from(sorted(self.loading))), fraction=fraction))

    @precondition(lambda self: self.ready)
    @rule(data=st.data())
    def hang(self, data: st.DataObject) -> None:
        worker = data.draw(st.sampled_from(sorted(self.ready)))
        self.tell(WorkerFailed(worker=worker, error=WorkerDied("no progress"), hung=True))
        for ticket in [t for t, user_of in self.leases.items() if user_of == worker]:
            del self.leases[ticket]
            self.tell(LeaseReturned(ticket=ticket))

    @precondition(lambda self: self.starting | self.loading)
    @rule(data=st.data())
    def fail_to_load(self, data: st.DataObject) -> None:
        self.tell(WorkerFailed(worker=data.draw(st.sampled_from(sorted(self.starting | self.loading))),
                               error=LoadFailed("no")))  # fmt: skip

    @precondition(lambda self: self.ready)
    @rule(data=st.data(), was_stopped=st.booleans())
    def crash(self, data: st.DataObject, was_stopped: bool) -> None:
        worker = data.draw(st.sampled_from(sorted(self.ready)))
        self.ready.discard(worker)
        self.tell(WorkerExited(worker=worker, error=WorkerDied("signal"), was_stopped=was_stopped))

    @precondition(lambda self: self.stopping)
    @rule(data=st.data())
    def give_memory_back(self, data: st.DataObject) -> None:
        worker = data.draw(st.sampled_from(sorted(self.stopping)))
        self.stopping.discard(worker)
        self.tell(WorkerReclaimed(worker=worker))

    @rule(model=_MODELS, by_client=st.booleans())
    def unload(self, model: str, by_client: bool) -> None:
        self.tell(UnloadRequested(model=model, by_client=by_client))

    @rule(seconds=st.floats(0.1, 30.0))
    def let_time_pass(self, seconds: float) -> None:
        """In steps from deadline to deadline, as the owner's timer does."""
        end = self.now + seconds
        while (deadline := self.lifecycle.next_deadline()) <= end:
            self.now = max(self.now, deadline)
            self.tell(Ticked())
            assert self.lifecycle.next_deadline() > self.now, "a deadline that does not go away"
        self.now = end

    @invariant()
    def reservations_and_shares_stay_within_the_budget(self) -> None:
        running = self.starting | self.loading | self.ready | self.stopping
        assert self.lifecycle.reserved_bytes <= _BUDGET
        assert sum(self.shares[worker].memory_bytes for worker in running - self.stopping) <= _BUDGET
        assert sum(self.shares[worker].cache_bytes for worker in running) <= _BUDGET
        assert self.lifecycle.workers == len(running)
        assert len(running - self.stopping) <= (self.limits.max_loaded_models or len(running))

    @invariant()
    def the_books_agree(self) -> None:
        assert self.lifecycle.waiting == len(self.waiting) <= _MAX_QUEUE + _PARALLEL
        assert {w.ticket for w in self.lifecycle.queue(self.now)} == set(self.waiting)
        views = {view.name: view for view in self.lifecycle.views()}
        live = [worker for worker in self.leases.values() if worker in self.ready]
        in_flight = sum(view.in_flight for view in views.values() if view.state in (State.READY, State.DRAINING))
        assert in_flight == len(live)
        for view in views.values():
            assert (view.state in HOLDS_MEMORY) == (view.worker is not None)
            assert view.in_flight <= _PARALLEL

    @invariant()
    def nobody_waits_in_vain(self) -> None:
        views = {view.name: view for view in self.lifecycle.views()}
        waited_for = {model for model, _, _ in self.waiting.values()}
        for ticket, (model, since, deadline) in self.waiting.items():
            view = views[model]
            assert view.state in _MAY_WAIT, "a lost wake-up"
            if view.state is State.READY and view.in_flight < _PARALLEL:
                others = [name for name in waited_for - {model} if views[name].state is State.QUEUED]
                assert others, "a free place that nobody gets"
            assert self.now < deadline
            if view.state not in (State.STARTING, State.LOADING):
                assert self.now < since + self.patience + self.not_counted.get(ticket, 0.0) + 1e-6

    @invariant()
    def a_forecast_changes_nothing(self) -> None:
        before = self.lifecycle.views()
        for model in _SIZES:
            forecast = self.lifecycle.forecast(_spec(model), self.now)
            assert set(forecast.evict) <= {view.name for view in before if view.state is State.READY}
        assert self.lifecycle.views() == before

    def teardown(self) -> None:
        """Let the world run on with nobody new in it: everything has to come to rest."""
        if not hasattr(self, "now"):
            return
        self.tell(MemoryRead(reading=MemoryReading(available_bytes=200, total_bytes=200, pressure=Pressure.NORMAL)))
        for _ in range(200):
            for worker in sorted(self.starting):
                self.starting.discard(worker)
                self.loading.add(worker)
                self.tell(WorkerStarted(worker=worker))
            for worker in sorted(self.loading):
                self.loading.discard(worker)
                self.ready.add(worker)
                self.tell(WorkerReady(worker=worker, memory_bytes=1, load_seconds=1.0))
            for ticket in sorted(self.leases):
                del self.leases[ticket]
                self.tell(LeaseReturned(ticket=ticket))
            for worker in sorted(self.stopping):
                self.stopping.discard(worker)
                self.tell(WorkerReclaimed(worker=worker))
            self.let_time_pass(0.5)
            if not self.waiting and not self.leases and not self.starting | self.loading | self.stopping:
                break
        assert not self.waiting, "somebody was forgotten"
        for view in self.lifecycle.views():
            assert view.in_flight == view.queued == 0
            assert view.state in (State.UNLOADED, State.READY, State.BACKOFF, State.FAILED)


World.TestCase.settings = settings(max_examples=200, stateful_step_count=50, deadline=None)


@pytest.mark.req("R7", "R9", "R13", "R40", "R44", "R50", "R52")
class TestWorld(World.TestCase):  # type: ignore[misc, valid-type]  # made by hypothesis at run time
    """No illegal state, no lost wake-up, no double spawn, no reservation or share above the budget, no late waiter."""
