"""The state machine by example: one event at a time, with a clock that the test moves."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest

from mlx_router_server.lifecycle.backoff import FAILURES_BEFORE_GIVING_UP, pause_after
from mlx_router_server.lifecycle.events import (
    CancelStreams,
    Decided,
    Effect,
    Event,
    Grant,
    LeaseRequested,
    LeaseReturned,
    Moved,
    Refuse,
    SetShare,
    ShutdownHastened,
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
from mlx_router_server.lifecycle.machine import Lifecycle, Limits
from mlx_router_server.lifecycle.spec import ModelSpec
from mlx_router_server.lifecycle.states import TRANSITIONS, IllegalTransition, State, check_transition
from mlx_router_shared.errors import LoadFailed, MlxRouterError, WorkerDied


class Bench:
    """A lifecycle with a clock and a memory of what it wanted."""

    def __init__(self, **limits: Any) -> None:
        numbers = itertools.count(1)
        self.lifecycle = Lifecycle(Limits(**{"budget_bytes": 100, **limits}), lambda: f"w{next(numbers)}")
        self.now = 0.0
        self.tick = 1.0

    def tell(self, event: Event) -> list[Effect]:
        """Return the effects of an event but reports and limits; all of them are in ``heard``."""
        self.now += self.tick
        self.heard = self.lifecycle.handle(event, self.now)
        return [effect for effect in self.heard if not isinstance(effect, Decided | Moved | SetShare)]

    def request(self, ticket: str, model: str, size: int = 40, **more: Any) -> list[Effect]:
        names = ("pinned", "keep_alive", "parallel", "growth_bytes", "fixed", "load_seconds")
        spec = {name: more.pop(name) for name in names if name in more}
        return self.tell(LeaseRequested(ticket=ticket, spec=ModelSpec(name=model, estimate_bytes=size, **spec), **more))

    def load(self, ticket: str, model: str, size: int = 40, **more: Any) -> str:
        """Request, start and finish loading; returns the worker."""
        effects = self.request(ticket, model, size, **more)
        worker = started(effects)
        assert Grant(ticket=ticket, worker=worker) in self.finish_load(worker, size)
        return worker

    def finish_load(self, worker: str, size: int = 40, load_seconds: float = 1.0) -> list[Effect]:
        self.tell(WorkerStarted(worker=worker))
        return self.tell(WorkerReady(worker=worker, memory_bytes=size, load_seconds=load_seconds))

    def state(self, model: str) -> State:
        view = self.lifecycle.view(model)
        assert view is not None
        return view.state


def started(effects: list[Effect]) -> str:
    """The worker of the one load that was begun."""
    (start,) = [effect for effect in effects if isinstance(effect, StartWorker)]
    return start.worker


def granted(effects: list[Effect]) -> list[str]:
    return [effect.ticket for effect in effects if isinstance(effect, Grant)]


def refusals(effects: list[Effect]) -> list[MlxRouterError]:
    return [effect.error for effect in effects if isinstance(effect, Refuse)]


def test_a_request_goes_through_all_states_of_a_load() -> None:
    bench = Bench()
    (start,) = bench.request("t", "a")
    assert isinstance(start, StartWorker)
    assert bench.state("a") is State.STARTING
    bench.tell(WorkerStarted(worker=start.worker))
    assert bench.state("a") is State.LOADING
    assert bench.tell(WorkerReady(worker=start.worker, memory_bytes=40, load_seconds=1.0)) == [
        Grant(ticket="t", worker=start.worker)
    ]
    assert bench.state("a") is State.READY


@pytest.mark.req("R9")
def test_models_that_fit_start_in_the_same_breath_and_the_third_waits() -> None:
    bench = Bench()
    assert len(bench.request("t1", "a")) == 1
    assert len(bench.request("t2", "b")) == 1
    assert bench.request("t3", "c") == []
    assert bench.state("c") is State.QUEUED
    assert bench.lifecycle.reserved_bytes == 80


@pytest.mark.req("R10")
def test_a_model_in_use_is_drained_and_not_stopped() -> None:
    bench = Bench(max_loaded_models=1, budget_bytes=70)
    worker = bench.load("t1", "a")
    assert bench.request("t2", "b") == []
    assert bench.state("a") is State.DRAINING
    assert bench.request("t3", "a") == []
    (stop,) = bench.tell(LeaseReturned(ticket="t1"))
    assert isinstance(stop, StopWorker)
    assert (stop.worker, stop.successor) == (worker, "b")
    assert stop.drain_seconds == 2


@pytest.mark.req("R13", "R15")
def test_the_reservation_is_held_until_the_memory_was_seen_to_be_back() -> None:
    bench = Bench(budget_bytes=60)
    worker = bench.load("t1", "a")
    bench.tell(LeaseReturned(ticket="t1"))
    assert [type(effect) for effect in bench.request("t2", "b")] == [StopWorker]
    assert bench.tell(WorkerExited(worker=worker, error=WorkerDied("x"))) == []
    assert bench.lifecycle.reserved_bytes == 40
    assert [type(effect) for effect in bench.tell(WorkerReclaimed(worker=worker))] == [StartWorker]


def test_the_waiters_of_an_evicted_model_are_served_after_the_newcomer() -> None:
    bench = Bench(max_loaded_models=1, budget_bytes=70)
    a = bench.load("t1", "a")
    bench.request("t2", "b")
    bench.request("t3", "a")
    bench.tell(LeaseReturned(ticket="t1"))
    (start,) = bench.tell(WorkerReclaimed(worker=a))
    assert isinstance(start, StartWorker)
    assert start.model == "b"
    assert bench.state("a") is State.QUEUED


@pytest.mark.req("R14")
def test_a_failed_load_refuses_everybody_once_and_pauses() -> None:
    bench = Bench()
    bench.tick = 0.01  # the first pause is a second
    (start,) = bench.request("t1", "a")
    assert isinstance(start, StartWorker)
    bench.request("t2", "a")
    bench.tell(WorkerStarted(worker=start.worker))
    error = LoadFailed("bad weights")
    effects = bench.tell(WorkerFailed(worker=start.worker, error=error))
    assert refusals(effects) == [error, error]
    assert refusals(bench.request("t3", "a"))[0].code == "backing_off"
    bench.tell(WorkerReclaimed(worker=start.worker))
    assert bench.state("a") is State.BACKOFF
    assert bench.lifecycle.reserved_bytes == 0
    bench.now += 60
    assert [type(effect) for effect in bench.request("t4", "a")] == [StartWorker]


def test_after_too_many_failures_the_model_is_given_up_and_an_unload_clears_it() -> None:
    bench = Bench()
    for attempt in range(FAILURES_BEFORE_GIVING_UP):
        (start,) = bench.request(f"t{attempt}", "a")
        assert isinstance(start, StartWorker)
        bench.tell(WorkerFailed(worker=start.worker, error=LoadFailed("no")))
        bench.tell(WorkerReclaimed(worker=start.worker))
        bench.now += 120
    assert bench.state("a") is State.FAILED
    bench.tell(UnloadRequested(model="a"))
    assert bench.state("a") is State.UNLOADED
    assert [type(effect) for effect in bench.request("again", "a")] == [StartWorker]


def test_a_crash_of_a_ready_model_is_replaced_at_once() -> None:
    bench = Bench()
    worker = bench.load("t1", "a")
    bench.tell(WorkerExited(worker=worker, error=WorkerDied("signal")))
    bench.tell(LeaseReturned(ticket="t1"))
    assert bench.request("t2", "a") == []
    (start,) = bench.tell(WorkerReclaimed(worker=worker))
    assert isinstance(start, StartWorker)
    assert pause_after(1, served=True) == 0
    assert pause_after(2, served=True) > 0


def test_a_worker_that_somebody_else_ended_is_no_failure_of_its_model() -> None:
    bench = Bench()
    for turn in range(FAILURES_BEFORE_GIVING_UP + 1):
        worker = bench.load(f"t{turn}", "a")
        bench.tell(LeaseReturned(ticket=f"t{turn}"))
        bench.tell(WorkerExited(worker=worker, error=WorkerDied("signal"), was_stopped=True))
        bench.tell(WorkerReclaimed(worker=worker))
        assert bench.state("a") is State.UNLOADED


def test_a_waiter_that_leaves_takes_its_place_in_the_queue_with_it() -> None:
    bench = Bench(max_loaded_models=1, budget_bytes=70)
    bench.load("t1", "a", pinned=False)
    bench.request("t2", "b")
    bench.tell(LeaseReturned(ticket="t2"))
    assert bench.state("b") is State.UNLOADED
    assert bench.lifecycle.waiting == 0


def test_a_pinned_model_is_never_evicted() -> None:
    bench = Bench(max_loaded_models=1, budget_bytes=70)
    bench.load("t1", "a", pinned=True)
    bench.tell(LeaseReturned(ticket="t1"))
    (error,) = refusals(bench.request("t2", "b"))
    assert error.code == "memory_pinned"
    assert bench.state("a") is State.READY


def test_a_model_asked_to_stay_for_ever_is_not_evicted_either() -> None:
    bench = Bench(max_loaded_models=1, budget_bytes=70)
    bench.load("t1", "a", keep_alive_seconds=math.inf)
    bench.tell(LeaseReturned(ticket="t1"))
    assert [error.code for error in refusals(bench.request("t2", "b"))] == ["memory_pinned"]


def test_a_model_that_is_too_large_evicts_nobody() -> None:
    bench = Bench()
    bench.load("t1", "a")
    (error,) = refusals(bench.request("t2", "b", 101))
    assert error.code == "model_too_large"
    assert bench.state("a") is State.READY


def test_keep_alive_counts_from_the_end_of_the_last_request() -> None:
    bench = Bench()
    bench.load("t1", "a", keep_alive_seconds=10.0)
    assert bench.lifecycle.next_deadline() == math.inf
    bench.tell(LeaseReturned(ticket="t1"))
    assert bench.lifecycle.next_deadline() == bench.now + 10
    bench.request("t2", "a")  # says nothing of its own: the duration stays
    bench.tell(LeaseReturned(ticket="t2"))
    assert bench.lifecycle.next_deadline() == bench.now + 10
    bench.now += 20
    assert [type(effect) for effect in bench.tell(Ticked())] == [StopWorker]


def test_a_request_that_waits_too_long_is_refused() -> None:
    bench = Bench(max_loaded_models=1, budget_bytes=70, queue_timeout_seconds=5.0, drain_timeout_seconds=100.0)
    bench.load("t1", "a")
    bench.request("t2", "b")
    asked = bench.now
    assert bench.lifecycle.next_deadline() == asked + 5
    bench.now = asked + 5
    (error,) = refusals(bench.tell(Ticked()))
    assert error.code == "waited_too_long"


def test_at_the_drain_limit_the_old_model_is_kept_and_the_newcomer_told() -> None:
    bench = Bench(max_loaded_models=1, budget_bytes=70, drain_timeout_seconds=5.0)
    bench.load("t1", "a")
    bench.request("t2", "b")
    bench.request("t3", "a")
    bench.now += 10
    effects = bench.tell(Ticked())
    assert [error.code for error in refusals(effects)] == ["waited_too_long"]
    assert Grant(ticket="t3", worker="w1") in effects
    assert bench.state("a") is State.READY


def test_a_full_queue_refuses() -> None:
    bench = Bench(max_loaded_models=1, budget_bytes=70, max_queue=1)
    bench.load("t1", "a")
    bench.request("t2", "b")
    assert [error.code for error in refusals(bench.request("t3", "c"))] == ["overloaded"]


def test_shutdown_refuses_drains_and_then_cancels() -> None:
    bench = Bench(drain_timeout_seconds=5.0)
    worker = bench.load("t1", "a")
    bench.tell(ShutdownRequested())
    assert bench.state("a") is State.DRAINING
    assert [error.code for error in refusals(bench.request("t2", "a"))] == ["shutting_down"]
    bench.now += 10
    assert [type(effect) for effect in bench.tell(Ticked())] == [CancelStreams]
    (stop,) = bench.tell(LeaseReturned(ticket="t1"))
    assert isinstance(stop, StopWorker)
    assert stop.worker == worker


@pytest.mark.req("R40")
@pytest.mark.parametrize("old", list(State))
@pytest.mark.parametrize("new", list(State))
def test_only_transitions_of_the_table_are_legal(old: State, new: State) -> None:
    if new in TRANSITIONS[old]:
        check_transition("m", old, new)
    else:
        with pytest.raises(IllegalTransition, match=f"m: {old} -> {new}"):
            check_transition("m", old, new)


@pytest.mark.req("R10", "R52")
def test_a_stream_that_nobody_reads_holds_no_model_beyond_the_drain_limit() -> None:
    """It is told to end; whoever does not take that either is not waited for."""
    bench = Bench(max_loaded_models=1, budget_bytes=70, cancel_at_drain_limit=True, drain_timeout_seconds=10.0)
    worker = bench.load("t1", "a")
    bench.request("t2", "b")
    bench.now += 10
    assert [type(effect) for effect in bench.tell(Ticked())] == [CancelStreams]
    assert bench.tell(Ticked()) == [], "a moment to hear it"
    bench.now = bench.lifecycle.next_deadline()
    (stop,) = bench.tell(Ticked())
    assert isinstance(stop, StopWorker)
    (start,) = bench.tell(WorkerReclaimed(worker=worker))
    assert isinstance(start, StartWorker)
    assert bench.tell(LeaseReturned(ticket="t1")) == [], "late, and of no worker any more"


@pytest.mark.req("R10", "R52")
def test_a_hastened_end_waits_for_no_reader() -> None:
    bench = Bench()
    bench.load("t1", "a")
    bench.tell(ShutdownRequested())
    assert [type(effect) for effect in bench.tell(ShutdownHastened())] == [CancelStreams]
    assert bench.tell(ShutdownHastened()) == [], "once"
    deadline = bench.lifecycle.next_deadline()
    bench.tell(ShutdownRequested())
    assert bench.lifecycle.next_deadline() == deadline, "it does not get all of its time back"
    bench.now = bench.lifecycle.next_deadline()
    assert [type(effect) for effect in bench.tell(Ticked())] == [StopWorker]
