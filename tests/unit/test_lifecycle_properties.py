"""Random interleavings against a small reference model: the promises that hold whatever happens.

The test plays the world: clients that come and leave, workers that start, load, fail, die and give their memory back,
a clock, an operator. It keeps books of its own and compares.
"""

from __future__ import annotations

import itertools

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from mlx_router_server.lifecycle.events import (
    CancelStreams,
    Event,
    Grant,
    LeaseRequested,
    LeaseReturned,
    ModelSpec,
    Refuse,
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
from mlx_router_server.lifecycle.machine import Lifecycle, Limits
from mlx_router_server.lifecycle.states import HOLDS_MEMORY, State
from mlx_router_shared.errors import LoadFailed, WorkerDied

_SIZES = {"a": 30, "b": 50, "c": 60, "d": 90, "huge": 200}
_BUDGET = 100
_QUEUE_SECONDS = 50.0


class World(RuleBasedStateMachine):
    """``starting``, ``loading``, ``ready`` and ``stopping`` are the processes as they really are."""

    def __init__(self) -> None:
        super().__init__()
        numbers = itertools.count(1)
        self.lifecycle = Lifecycle(
            Limits(budget_bytes=_BUDGET, max_loaded_models=2, max_queue=6, queue_timeout_seconds=_QUEUE_SECONDS,
                   drain_timeout_seconds=40.0),
            lambda: f"w{next(numbers)}",
        )  # fmt: skip
        self.now = 0.0
        self.tickets = itertools.count(1)
        self.waiting: dict[str, tuple[str, float]] = {}
        self.leases: dict[str, str] = {}
        self.model_of: dict[str, str] = {}
        self.starting: set[str] = set()
        self.loading: set[str] = set()
        self.ready: set[str] = set()
        self.stopping: set[str] = set()

    def tell(self, event: Event) -> None:
        for effect in self.lifecycle.handle(event, self.now):
            match effect:
                case StartWorker():
                    assert effect.worker not in self.model_of
                    running = self.starting | self.loading | self.ready | self.stopping
                    assert effect.model not in {self.model_of[worker] for worker in running}, "two for one model"
                    self.model_of[effect.worker] = effect.model
                    self.starting.add(effect.worker)
                case StopWorker():
                    users = [ticket for ticket, worker in self.leases.items() if worker == effect.worker]
                    assert effect.worker not in self.ready or not users, "stopped while in use"
                    for place in (self.starting, self.loading, self.ready):
                        place.discard(effect.worker)
                    self.stopping.add(effect.worker)
                case Grant():
                    assert effect.worker in self.ready
                    model, _ = self.waiting.pop(effect.ticket)
                    assert self.model_of[effect.worker] == model, "a worker of another model"
                    self.leases[effect.ticket] = effect.worker
                case Refuse():
                    del self.waiting[effect.ticket]
                case CancelStreams():
                    raise AssertionError("nothing is cut for a swap")

    @rule(model=st.sampled_from(sorted(_SIZES)), keep_alive=st.sampled_from([None, None, 0.0, 5.0, float("inf")]))
    def request(self, model: str, keep_alive: float | None) -> None:
        ticket = f"t{next(self.tickets)}"
        self.waiting[ticket] = (model, self.now)
        spec = ModelSpec(name=model, estimate_bytes=_SIZES[model], keep_alive_seconds=20.0)
        self.tell(LeaseRequested(ticket=ticket, spec=spec, keep_alive_seconds=keep_alive))

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
        self.tell(WorkerReady(worker=worker, memory_bytes=_SIZES[self.model_of[worker]], load_seconds=1.0))

    @precondition(lambda self: self.starting | self.loading)
    @rule(data=st.data())
    def fail_to_load(self, data: st.DataObject) -> None:
        self.tell(WorkerFailed(worker=data.draw(st.sampled_from(sorted(self.starting | self.loading))),
                               error=LoadFailed("no")))  # fmt: skip

    @precondition(lambda self: self.ready)
    @rule(data=st.data())
    def crash(self, data: st.DataObject) -> None:
        worker = data.draw(st.sampled_from(sorted(self.ready)))
        self.ready.discard(worker)
        self.tell(WorkerExited(worker=worker, error=WorkerDied("signal")))

    @precondition(lambda self: self.stopping)
    @rule(data=st.data())
    def give_memory_back(self, data: st.DataObject) -> None:
        worker = data.draw(st.sampled_from(sorted(self.stopping)))
        self.stopping.discard(worker)
        self.tell(WorkerReclaimed(worker=worker))

    @rule(model=st.sampled_from(sorted(_SIZES)))
    def unload(self, model: str) -> None:
        self.tell(UnloadRequested(model=model))

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
    def reservations_stay_within_the_budget(self) -> None:
        assert self.lifecycle.reserved_bytes <= _BUDGET
        assert self.lifecycle.workers <= 2
        running = self.starting | self.loading | self.ready | self.stopping
        assert self.lifecycle.reserved_bytes == sum(_SIZES[self.model_of[worker]] for worker in running)

    @invariant()
    def the_books_agree(self) -> None:
        assert self.lifecycle.waiting == len(self.waiting)
        views = {view.name: view for view in self.lifecycle.views()}
        live = [worker for worker in self.leases.values() if worker in self.ready]
        in_flight = sum(view.in_flight for view in views.values() if view.state in (State.READY, State.DRAINING))
        assert in_flight == len(live)
        for view in views.values():
            assert (view.state in HOLDS_MEMORY) == (view.worker is not None)

    @invariant()
    def nobody_waits_in_vain(self) -> None:
        views = {view.name: view for view in self.lifecycle.views()}
        for model, since in self.waiting.values():
            state = views[model].state
            assert state not in (State.READY, State.UNLOADED, State.BACKOFF, State.FAILED), "a lost wake-up"
            if state not in (State.STARTING, State.LOADING):
                assert self.now <= since + _QUEUE_SECONDS + 1e-6

    def teardown(self) -> None:
        """Let the world run on with nobody new in it: everything has to come to rest."""
        for _ in range(200):
            if self.starting:
                self.say_hello_all()
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
            if not self.waiting:
                break
        assert not self.waiting, "somebody was forgotten"

    def say_hello_all(self) -> None:
        for worker in sorted(self.starting):
            self.starting.discard(worker)
            self.loading.add(worker)
            self.tell(WorkerStarted(worker=worker))


TestWorld = World.TestCase
TestWorld.settings = settings(max_examples=150, stateful_step_count=60, deadline=None)
