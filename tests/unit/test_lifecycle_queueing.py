"""Queues, turns, priorities, deadlines and policies of the state machine, by example."""

from __future__ import annotations

import math

import pytest

from mlx_router_server.lifecycle.events import (
    LeaseReturned,
    LoadProgressed,
    Refuse,
    StartWorker,
    StopWorker,
    Ticked,
    WorkerFailed,
    WorkerReclaimed,
    WorkerStarted,
)
from mlx_router_server.lifecycle.queueing import BusyPolicy, Waiter, WaitQueue
from mlx_router_server.lifecycle.states import State
from mlx_router_shared.errors import LoadFailed, Unavailable
from tests.unit.test_lifecycle import Bench, granted, refusals, started


def _one_place(**limits: object) -> Bench:
    bench = Bench(max_loaded_models=1, budget_bytes=70, **limits)
    bench.tick = 0.01
    return bench


def _swap(bench: Bench, stopped: str) -> str:
    """The old worker is gone; the new one, whose room it was, is loaded. Returns the new one."""
    worker = started(bench.tell(WorkerReclaimed(worker=stopped)))
    bench.finish_load(worker)
    return worker


def _waiter(ticket: str, order: int, *, since: float = 0.0, priority: int = 0) -> Waiter:
    return Waiter(ticket=ticket, order=order, since=since, room_limit=since + 100, priority=priority)


# ---------------------------------------------------------------------------------------------------- order


@pytest.mark.req("R44")
def test_a_queue_goes_by_priority_then_age_and_lets_nobody_starve() -> None:
    queue = WaitQueue()
    queue.add(_waiter("late", 3))
    queue.add(_waiter("old", 1))
    queue.add(_waiter("urgent", 4, priority=5))
    queue.add(_waiter("low", 2, priority=-5))
    assert [w.ticket for w in queue.in_order(1.0)] == ["urgent", "old", "late", "low"]
    queue.add(_waiter("new", 5, since=49.0, priority=100))
    # Half of their patience is over for the others: now only age counts among them, and the new one comes last.
    assert [w.ticket for w in queue.in_order(50.0)] == ["old", "low", "late", "urgent", "new"]


@pytest.mark.req("R8", "R52")
def test_requests_above_parallel_wait_here_in_order_and_count_for_the_limit() -> None:
    bench = Bench(max_queue=2)
    bench.load("t1", "a", parallel=1)
    assert bench.request("t2", "a", parallel=1) == []
    assert bench.request("t3", "a", parallel=1, priority=1) == []
    assert [view.ticket for view in bench.lifecycle.queue(bench.now)] == ["t3", "t2"]
    assert [error.code for error in refusals(bench.request("t4", "a", parallel=1))] == ["overloaded"]
    assert granted(bench.tell(LeaseReturned(ticket="t1"))) == ["t3"]
    assert granted(bench.tell(LeaseReturned(ticket="t3"))) == ["t2"]


def test_models_get_room_by_their_best_waiter() -> None:
    bench = _one_place()
    a = bench.load("t1", "a")
    bench.request("t2", "b")
    bench.request("t3", "c", priority=10)
    bench.tell(LeaseReturned(ticket="t1"))
    (start,) = bench.tell(WorkerReclaimed(worker=a))
    assert isinstance(start, StartWorker)
    assert start.model == "c"


# ---------------------------------------------------------------------------------------------------- turns


@pytest.mark.req("R44")
def test_two_alternating_clients_are_served_in_turns_and_not_one_by_one() -> None:
    """A B A B … by two clients that each send their next request when they have an answer."""
    bench = _one_place(turn_seconds=5.0)
    a = bench.load("a0", "a")
    bench.request("b0", "b")
    bench.tell(LeaseReturned(ticket="a0"))
    bench.request("a1", "a")
    b = _swap(bench, a)
    for n in range(100):  # b is served again and again while a waits, for the length of its turn
        stopped = [e for e in bench.tell(LeaseReturned(ticket=f"b{n}")) if isinstance(e, StopWorker)]
        assert not stopped
        bench.now += 0.1
        if granted(bench.request(f"b{n + 1}", "b")) != [f"b{n + 1}"]:
            break
    assert 30 < n < 60
    assert bench.state("b") is State.DRAINING or bench.state("b") is State.STOPPING
    assert started(bench.tell(WorkerReclaimed(worker=b)))
    assert bench.state("a") is State.STARTING


@pytest.mark.req("R44")
def test_a_turn_ends_early_when_nobody_comes() -> None:
    bench = _one_place(turn_seconds=60.0)
    a = bench.load("a0", "a")
    bench.request("b0", "b")
    bench.tell(LeaseReturned(ticket="a0"))
    bench.request("a1", "a")
    _swap(bench, a)
    assert bench.tell(LeaseReturned(ticket="b0")) == []
    lull_over = bench.lifecycle.next_deadline()
    assert lull_over == pytest.approx(bench.now + 0.5)  # at most half a second, and never more than a load takes
    bench.now = lull_over
    assert [type(effect) for effect in bench.tell(Ticked())] == [StopWorker]


@pytest.mark.req("R44")
def test_a_turn_is_bounded_in_requests_and_the_others_wait_for_the_next() -> None:
    bench = _one_place(turn_requests=3)
    a = bench.load("a0", "a")
    for n in range(5):
        bench.request(f"b{n}", "b")
    bench.tell(LeaseReturned(ticket="a0"))
    bench.request("a1", "a")
    worker = started(bench.tell(WorkerReclaimed(worker=a)))
    assert granted(bench.finish_load(worker)) == ["b0", "b1", "b2"]
    assert bench.state("b") is State.DRAINING
    for n in range(3):
        bench.tell(LeaseReturned(ticket=f"b{n}"))
    assert started(bench.tell(WorkerReclaimed(worker=worker)))
    assert bench.state("b") is State.QUEUED


@pytest.mark.req("R44")
def test_a_load_serves_those_who_waited_for_it_even_when_turns_have_no_length() -> None:
    """Otherwise two models could be loaded in turns for ever, and nobody be served."""
    bench = _one_place(turn_seconds=0.0)
    a = bench.load("a0", "a")
    bench.request("b0", "b")
    bench.tell(LeaseReturned(ticket="a0"))
    bench.request("a1", "a")
    worker = started(bench.tell(WorkerReclaimed(worker=a)))
    assert granted(bench.finish_load(worker)) == ["b0"]


@pytest.mark.req("R44")
def test_traffic_for_a_warm_model_does_not_starve_a_waiter() -> None:
    bench = _one_place()
    bench.load("a0", "a")
    bench.request("b", "b")
    assert bench.state("a") is State.DRAINING, "a has had its time: it was loaded before anybody waited"
    for n in range(1, 20):
        assert bench.request(f"a{n}", "a") == []
    effects = bench.tell(LeaseReturned(ticket="a0"))
    assert [type(effect) for effect in effects] == [StopWorker]


@pytest.mark.req("R44")
def test_a_model_stays_for_its_minimum_residency() -> None:
    bench = _one_place(min_residency_seconds=30.0)
    bench.load("t1", "a")
    ready = bench.now
    bench.tell(LeaseReturned(ticket="t1"))
    assert bench.request("t2", "b") == []
    assert bench.state("a") is State.READY
    assert bench.lifecycle.next_deadline() == pytest.approx(ready + 30.0, abs=0.1)
    bench.now = ready + 30.1
    assert [type(effect) for effect in bench.tell(Ticked())] == [StopWorker]


def test_a_drain_ends_when_the_newcomer_has_left() -> None:
    bench = _one_place()
    bench.load("t1", "a")
    bench.request("t2", "b")
    bench.request("t3", "a")
    assert bench.state("a") is State.DRAINING
    assert granted(bench.tell(LeaseReturned(ticket="t2"))) == ["t3"]
    assert bench.state("a") is State.READY


# ----------------------------------------------------------------------------------------------- busy policy


@pytest.mark.req("R8")
def test_policy_fail_refuses_at_once_what_others_are_in_the_way_of() -> None:
    bench = _one_place(busy_policy=BusyPolicy.FAIL)
    worker = started(bench.request("t1", "a"))
    bench.tell(WorkerStarted(worker=worker))
    (error,) = refusals(bench.request("t2", "b"))
    assert isinstance(error, Unavailable)
    assert error.code == "busy"
    assert bench.state("a") is State.LOADING
    assert bench.state("b") is State.UNLOADED
    assert bench.request("t3", "a") == [], "the same model joins its load"


@pytest.mark.req("R8")
def test_policy_fail_waits_for_idle_models_to_leave_and_never_drains() -> None:
    bench = _one_place(busy_policy=BusyPolicy.FAIL)
    bench.load("t1", "a")
    assert [error.code for error in refusals(bench.request("t2", "b"))] == ["busy"]
    assert bench.state("a") is State.READY
    bench.tell(LeaseReturned(ticket="t1"))
    assert [type(effect) for effect in bench.request("t3", "b")] == [StopWorker]
    assert bench.request("t4", "b") == []


@pytest.mark.req("R8")
def test_policy_fail_does_not_matter_when_both_fit() -> None:
    bench = Bench(busy_policy=BusyPolicy.FAIL)
    started(bench.request("t1", "a"))
    started(bench.request("t2", "b"))


@pytest.mark.req("R8")
def test_policy_wait_then_fail_waits_for_its_own_time() -> None:
    bench = _one_place(busy_policy=BusyPolicy.WAIT_THEN_FAIL, busy_wait_seconds=20.0)
    bench.load("t1", "a")
    bench.request("t2", "b")
    asked = bench.now
    bench.now = asked + 19.9
    assert bench.tell(Ticked()) == []
    assert bench.lifecycle.next_deadline() == asked + 20.0
    bench.now = asked + 20.0
    assert [error.code for error in refusals(bench.tell(Ticked()))] == ["waited_too_long"]


# --------------------------------------------------------------------------------------- deadlines, Retry-After


def test_a_deadline_that_cannot_be_kept_is_refused_at_once_with_the_time_it_takes() -> None:
    bench = Bench()
    (error,) = refusals(bench.request("t1", "a", deadline_seconds=5.0, load_seconds=20.0))
    assert isinstance(error, Unavailable)
    assert error.retry_after_seconds == 20
    assert "within 5 s: about 20 s" in error.message
    assert bench.state("a") is State.UNLOADED, "nothing was started for it"


def test_a_deadline_holds_even_while_the_model_loads() -> None:
    bench = Bench()
    bench.tell(WorkerStarted(worker=started(bench.request("t1", "a", deadline_seconds=5.0))))
    bench.request("t2", "a")
    bench.now += 6
    effects = bench.tell(Ticked())
    assert [effect.ticket for effect in effects if isinstance(effect, Refuse)] == ["t1"]


@pytest.mark.req("R8")
def test_retry_after_comes_from_the_progress_of_the_load() -> None:
    bench = _one_place(busy_policy=BusyPolicy.FAIL)
    worker = started(bench.request("t1", "a"))
    bench.tell(WorkerStarted(worker=worker))
    began = bench.now
    (unknown,) = refusals(bench.request("t2", "b"))
    assert isinstance(unknown, Unavailable)
    assert unknown.retry_after_seconds == 30, "nothing is known yet"
    bench.now = began + 10.0
    bench.tell(LoadProgressed(worker=worker, fraction=0.25))
    (known,) = refusals(bench.request("t3", "b"))
    assert isinstance(known, Unavailable)
    assert 29 <= known.retry_after_seconds <= 31, "a quarter took ten seconds"
    bench.tell(LoadProgressed(worker=worker, fraction=0.9))
    (sooner,) = refusals(bench.request("t4", "b"))
    assert isinstance(sooner, Unavailable)
    assert sooner.retry_after_seconds <= 2


def test_somebody_who_waited_for_a_long_load_keeps_the_patience_for_what_comes_after_it() -> None:
    bench = Bench(queue_timeout_seconds=10.0)
    bench.tick = 0.01
    worker = started(bench.request("t1", "a", parallel=1))
    bench.request("t2", "a", parallel=1)
    bench.now += 100
    assert granted(bench.finish_load(worker)) == ["t1"]
    bench.now += 9
    assert bench.tell(Ticked()) == []
    bench.now += 2
    assert [error.code for error in refusals(bench.tell(Ticked()))] == ["waited_too_long"]


# ------------------------------------------------------------------------------------------------- bringing back


@pytest.mark.req("R14")
@pytest.mark.parametrize("restore", [True, False])
def test_what_was_evicted_for_a_failed_load_is_brought_back_if_configured(restore: bool) -> None:
    bench = _one_place(restore_on_failure=restore)
    a = bench.load("t1", "a")
    bench.tell(LeaseReturned(ticket="t1"))
    bench.request("t2", "b")
    b = started(bench.tell(WorkerReclaimed(worker=a)))
    bench.tell(WorkerFailed(worker=b, error=LoadFailed("no")))
    back = [effect for effect in bench.tell(WorkerReclaimed(worker=b)) if isinstance(effect, StartWorker)]
    assert [effect.model for effect in back] == (["a"] if restore else [])
    if restore:
        bench.finish_load(back[0].worker)
        assert bench.state("a") is State.READY
        assert bench.lifecycle.next_deadline() < math.inf, "idle, so its keep-alive runs"
