"""Reservations, shares, pressure, pins, keep-alive bounds and forecasts of the state machine, by example."""

from __future__ import annotations

import math
from typing import Any

import pytest

from mlx_router_server.lifecycle.events import (
    BudgetLearned,
    LeaseReturned,
    LoadWanted,
    MemoryRead,
    PinChanged,
    SetShare,
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
from mlx_router_server.lifecycle.memory import MemoryReading, Pressure, share_of
from mlx_router_server.lifecycle.queueing import BusyPolicy
from mlx_router_server.lifecycle.spec import ModelSpec
from mlx_router_server.lifecycle.states import Cause, State
from mlx_router_shared.errors import LoadFailed, WorkerDied
from tests.unit.test_lifecycle import Bench, granted, refusals, started


def _reading(pressure: Pressure, available: int = 1000) -> MemoryRead:
    return MemoryRead(reading=MemoryReading(available_bytes=available, total_bytes=1000, pressure=pressure))


def _spec(model: str, size: int = 40, **more: Any) -> ModelSpec:
    return ModelSpec(name=model, estimate_bytes=size, **more)


# ------------------------------------------------------------------------------------------------ reservations


@pytest.mark.req("R13")
def test_a_measurement_replaces_the_estimate_and_makes_room() -> None:
    bench = Bench()
    worker = started(bench.request("t1", "a", 80, growth_bytes=10))
    assert bench.request("t2", "b", 60) == []
    bench.tell(WorkerStarted(worker=worker))
    effects = bench.tell(WorkerReady(worker=worker, memory_bytes=30, load_seconds=1.0))
    assert started(effects), "b fits beside it after all"
    assert [effect.share.memory_bytes for effect in bench.heard if isinstance(effect, SetShare)] == [40], (
        "and nothing is left"
    )
    assert bench.lifecycle.reserved_bytes == 100


@pytest.mark.req("R13", "R50")
def test_a_measurement_above_the_estimate_never_lifts_reservations_over_the_budget() -> None:
    bench = Bench()
    started(bench.request("t1", "a", 50))
    worker = started(bench.request("t2", "b", 40))
    bench.finish_load(worker, 70)
    shares = {effect.worker: effect.share.memory_bytes for effect in bench.heard if isinstance(effect, SetShare)}
    assert shares[worker] == 50
    assert bench.lifecycle.reserved_bytes == 100
    assert any(getattr(effect, "what", "") == "over_budget" for effect in bench.heard)


def test_what_the_operator_fixed_is_not_corrected() -> None:
    bench = Bench()
    worker = started(bench.request("t1", "a", 50, fixed=True))
    bench.finish_load(worker, 10)
    assert [effect.share.memory_bytes for effect in bench.heard if isinstance(effect, SetShare)] == [100]
    assert bench.lifecycle.reserved_bytes == 50


@pytest.mark.req("R50")
def test_shares_of_memory_cache_and_wired_memory_stay_within_the_machine() -> None:
    reservations = [30, 50, 20]
    shares = [share_of(size, budget_bytes=100, wired_bytes=75) for size in reservations]
    assert sum(share.memory_bytes for share in shares) <= 100
    assert sum(share.wired_bytes for share in shares) <= 75
    assert all(share.cache_bytes < share.memory_bytes for share in shares)
    assert share_of(50, budget_bytes=100, wired_bytes=0).wired_bytes == 0, "the system's own limit where none is known"


def test_a_budget_that_the_device_names_holds_for_the_next_load() -> None:
    bench = Bench(budget_bytes=10)
    assert [error.code for error in refusals(bench.request("t1", "a"))] == ["model_too_large"]
    bench.tell(BudgetLearned(budget_bytes=100, wired_bytes=80))
    (start,) = bench.request("t2", "a")
    assert isinstance(start, StartWorker)
    assert start.share.wired_bytes == 80, "it is alone"


@pytest.mark.req("R50")
def test_what_nobody_has_reserved_is_shared_and_taken_back() -> None:
    """Caches may grow into it; the next load reserves it."""
    bench = Bench()
    (start,) = bench.request("t1", "a", 20)
    assert isinstance(start, StartWorker)
    assert start.share.memory_bytes == 100
    bench.finish_load(start.worker, 20)
    effects = bench.request("t2", "b", 40)
    shares = {
        effect.worker: effect.share.memory_bytes for effect in bench.heard if isinstance(effect, StartWorker | SetShare)
    }
    other = started(effects)
    assert shares == {start.worker: 20 + 20, other: 40 + 20}


# ---------------------------------------------------------------------------------------------------- pressure


@pytest.mark.req("R15", "R50")
def test_tight_memory_has_caches_given_back_and_critical_memory_has_idle_models_leave_one_by_one() -> None:
    bench = Bench()
    a, b = bench.load("t1", "a"), bench.load("t2", "b")
    bench.tell(LeaseReturned(ticket="t1"))
    effects = bench.tell(_reading(Pressure.WARNING))
    assert {effect.worker for effect in effects if isinstance(effect, TrimMemory)} == {a, b}
    assert bench.tell(_reading(Pressure.WARNING)) == [], "once is enough"
    (stop,) = [effect for effect in bench.tell(_reading(Pressure.CRITICAL)) if isinstance(effect, StopWorker)]
    assert stop.worker == a, "b is in use"
    assert not [e for e in bench.tell(_reading(Pressure.CRITICAL)) if isinstance(e, StopWorker)], "a is on its way"
    bench.tell(WorkerReclaimed(worker=a))
    assert not [e for e in bench.tell(_reading(Pressure.CRITICAL)) if isinstance(e, StopWorker)], "b is in use"
    assert [error.code for error in refusals(bench.request("t3", "a"))] == ["memory_pressure"]
    assert granted(bench.request("t4", "b")) == ["t4"]
    bench.tell(_reading(Pressure.NORMAL))
    assert started(bench.request("t5", "a"))


def test_somebody_who_waits_for_room_gets_none_until_memory_is_back() -> None:
    bench = Bench(max_loaded_models=1, budget_bytes=70)
    a = bench.load("t1", "a")
    bench.request("t2", "b")
    bench.tell(_reading(Pressure.CRITICAL))
    bench.tell(LeaseReturned(ticket="t1"))
    assert bench.tell(WorkerReclaimed(worker=a)) == []
    view = bench.lifecycle.view("b")
    assert view is not None
    assert view.reason == "the machine is short of memory"
    assert started(bench.tell(_reading(Pressure.NORMAL)))


def test_pinned_models_stay_even_then() -> None:
    bench = Bench()
    bench.load("t1", "a", pinned=True)
    bench.tell(LeaseReturned(ticket="t1"))
    assert not [e for e in bench.tell(_reading(Pressure.CRITICAL)) if isinstance(e, StopWorker)]


@pytest.mark.req("R47")
def test_after_a_failure_memory_is_looked_at_before_the_next_try() -> None:
    bench = Bench()
    worker = bench.load("t1", "a", 40)
    bench.tell(_reading(Pressure.NORMAL, available=20))
    bench.tell(WorkerExited(worker=worker, error=WorkerDied("signal KILL")))
    bench.tell(LeaseReturned(ticket="t1"))
    bench.request("t2", "a", 40)
    assert bench.tell(WorkerReclaimed(worker=worker)) == [], "20 bytes are not enough for 40"
    assert started(bench.tell(_reading(Pressure.NORMAL, available=60)))


# ------------------------------------------------------------------------------------------- pins and keep-alive


def test_a_pin_of_the_operator_holds_until_it_is_taken_off() -> None:
    bench = Bench(max_loaded_models=1, budget_bytes=70)
    bench.load("t1", "a")
    bench.tell(LeaseReturned(ticket="t1"))
    bench.tell(PinChanged(spec=_spec("a"), pinned=True))
    assert bench.lifecycle.next_deadline() == math.inf
    assert [error.code for error in refusals(bench.request("t2", "b"))] == ["memory_pinned"]
    bench.tell(UnloadRequested(model="a", by_client=True))
    assert bench.state("a") is State.READY
    bench.tell(PinChanged(spec=_spec("a"), pinned=False))
    assert bench.lifecycle.next_deadline() == bench.now + 300
    assert [type(effect) for effect in bench.request("t3", "b")] == [StopWorker]


def test_an_operator_unloads_what_is_pinned() -> None:
    bench = Bench()
    bench.load("t1", "a", pinned=True)
    bench.tell(LeaseReturned(ticket="t1"))
    assert [type(effect) for effect in bench.tell(UnloadRequested(model="a"))] == [StopWorker]


def test_an_operator_unloads_a_locked_model_in_use_once_it_is_idle() -> None:
    bench = Bench()
    bench.load("t1", "a", keep_alive=KeepAlive(default=math.inf, locked=True))
    assert bench.tell(UnloadRequested(model="a")) == []
    assert [type(effect) for effect in bench.tell(LeaseReturned(ticket="t1"))] == [StopWorker]


@pytest.mark.parametrize(("by_client", "cause"), [(True, Cause.CLIENT), (False, Cause.OPERATOR)])
def test_who_unloads_a_model_in_use_is_still_known_when_it_leaves(by_client: bool, cause: Cause) -> None:
    bench = Bench()
    bench.load("t1", "a")
    bench.tell(UnloadRequested(model="a", reason="no longer needed", by_client=by_client))
    (stop,) = bench.tell(LeaseReturned(ticket="t1"))
    assert isinstance(stop, StopWorker)
    assert (stop.cause, stop.reason) == (cause, "no longer needed")


def test_an_unload_of_a_model_that_drains_for_another_holds_when_it_stays_after_all() -> None:
    bench = Bench(max_loaded_models=1, budget_bytes=70)
    bench.load("t1", "a")
    bench.request("t2", "b")
    assert bench.state("a") is State.DRAINING
    bench.tell(UnloadRequested(model="a", reason="no longer needed"))
    bench.tell(LeaseReturned(ticket="t2"))
    assert bench.state("a") is State.READY
    (stop,) = bench.tell(LeaseReturned(ticket="t1"))
    assert isinstance(stop, StopWorker)
    assert (stop.cause, stop.reason) == (Cause.OPERATOR, "no longer needed")


def test_a_pin_keeps_a_model_that_drains_for_another() -> None:
    bench = Bench(max_loaded_models=1, budget_bytes=70)
    bench.load("t1", "a")
    bench.request("t2", "b")
    assert [error.code for error in refusals(bench.tell(PinChanged(spec=_spec("a"), pinned=True)))] == ["memory_pinned"]
    assert bench.state("a") is State.READY
    assert bench.tell(LeaseReturned(ticket="t1")) == []


def test_a_model_that_was_pinned_before_it_left_is_not_brought_back() -> None:
    bench = Bench(max_loaded_models=2, restore_on_failure=True)
    bench.load("t1", "a")
    bench.load("t2", "b")
    bench.request("t3", "c")
    assert bench.state("a") is State.DRAINING
    bench.tell(PinChanged(spec=_spec("a"), pinned=True))
    assert (bench.state("a"), bench.state("b")) == (State.READY, State.DRAINING)
    (stop,) = bench.tell(LeaseReturned(ticket="t2"))
    assert isinstance(stop, StopWorker)
    worker = started(bench.tell(WorkerReclaimed(worker=stop.worker)))
    bench.tell(WorkerFailed(worker=worker, error=LoadFailed("no")))
    bench.tell(WorkerReclaimed(worker=worker))
    bench.tell(PinChanged(spec=_spec("a"), pinned=False))
    bench.tell(LeaseReturned(ticket="t1"))
    (stop,) = bench.tell(UnloadRequested(model="a"))
    assert isinstance(stop, StopWorker)
    bench.tell(WorkerReclaimed(worker=stop.worker))
    assert bench.state("a") is State.UNLOADED


def test_an_unload_does_not_outlive_the_worker_that_was_told() -> None:
    bench = Bench()
    bench.load("t1", "a")
    bench.tell(UnloadRequested(model="a", reason="no longer needed"))
    (stop,) = bench.tell(LeaseReturned(ticket="t1"))
    assert isinstance(stop, StopWorker)
    bench.tell(WorkerReclaimed(worker=stop.worker))
    bench.load("t2", "a")
    assert bench.tell(LeaseReturned(ticket="t2")) == []
    bench.now += 301
    (stop,) = bench.tell(Ticked())
    assert isinstance(stop, StopWorker)
    assert (stop.cause, stop.reason) == (Cause.IDLE, "idle for its keep_alive")


@pytest.mark.parametrize(
    ("keep_alive", "asked", "effective"),
    [
        (KeepAlive(default=60), None, 60),
        (KeepAlive(default=60), 5.0, 5),
        (KeepAlive(default=60, minimum=10), 5.0, 10),
        (KeepAlive(default=60, maximum=100), math.inf, 100),
        (KeepAlive(default=60, locked=True), 5.0, 60),
    ],
)
def test_keep_alive_stays_within_what_the_operator_allows(
    keep_alive: KeepAlive, asked: float | None, effective: float
) -> None:
    assert keep_alive.effective(asked) == effective
    bench = Bench()
    bench.load("t1", "a", keep_alive=keep_alive, keep_alive_seconds=asked)
    bench.tell(LeaseReturned(ticket="t1"))
    assert bench.lifecycle.next_deadline() == bench.now + effective


def test_a_client_that_unloads_gets_the_minimum_and_not_less() -> None:
    bench = Bench()
    bench.load("t1", "a", keep_alive=KeepAlive(default=60, minimum=10))
    bench.tell(LeaseReturned(ticket="t1"))
    assert bench.tell(UnloadRequested(model="a", by_client=True)) == []
    assert bench.lifecycle.next_deadline() == bench.now + 10
    bench.now += 11
    assert [type(effect) for effect in bench.tell(Ticked())] == [StopWorker]


# ------------------------------------------------------------------------------------------------------ preload


def test_a_preload_needs_nobody_and_displaces_nobody() -> None:
    bench = Bench(max_loaded_models=1, budget_bytes=70)
    worker = started(bench.tell(LoadWanted(spec=_spec("a"), reason="preloaded")))
    assert granted(bench.finish_load(worker)) == []
    assert bench.state("a") is State.READY
    assert bench.tell(LoadWanted(spec=_spec("b"), reason="preloaded")) == []
    assert bench.state("b") is State.UNLOADED
    assert any(getattr(effect, "what", "") == "not_loaded" for effect in bench.heard)


def test_a_hung_worker_is_stopped_without_asking_and_replaced_for_those_who_wait() -> None:
    bench = Bench()
    worker = bench.load("t1", "a", parallel=1)
    bench.request("t2", "a", parallel=1)
    (stop,) = bench.tell(WorkerFailed(worker=worker, error=WorkerDied("no progress"), hung=True))
    assert isinstance(stop, StopWorker)
    assert stop.hung
    bench.tell(LeaseReturned(ticket="t1"))
    assert started(bench.tell(WorkerReclaimed(worker=worker)))


@pytest.mark.req("R14", "R47")
def test_an_explicit_load_forgets_earlier_failures() -> None:
    bench = Bench()
    bench.tick = 0.01
    for attempt in range(6):
        effects = bench.request(f"t{attempt}", "a", explicit=True)
        worker = started(effects)
        bench.tell(WorkerFailed(worker=worker, error=LoadFailed("no")))
        bench.tell(WorkerReclaimed(worker=worker))
        assert bench.state("a") is State.BACKOFF, "never given up: each try was asked for"
        assert [error.code for error in refusals(bench.request(f"u{attempt}", "a"))] == ["backing_off"]


# ----------------------------------------------------------------------------------------------------- forecasts


def test_the_forecast_says_what_a_request_would_do() -> None:
    bench = Bench(max_loaded_models=2)
    forecast = bench.lifecycle.forecast
    assert (forecast(_spec("a"), 0).action, forecast(_spec("a", 101), 0).action) == ("load", "refuse")
    worker = started(bench.request("t1", "a"))
    assert forecast(_spec("a"), bench.now).action == "join"
    bench.finish_load(worker)
    assert forecast(_spec("a"), bench.now).action == "serve"
    bench.load("t2", "b", pinned=True)
    found = forecast(_spec("c"), bench.now)
    assert (found.action, found.evict, found.drain) == ("evict", ("a",), ("a",))
    bench.tell(LeaseReturned(ticket="t1"))
    assert forecast(_spec("c"), bench.now).drain == ()
    assert forecast(_spec("c", 70), bench.now).action == "refuse"
    assert forecast(_spec("c", 70), bench.now).pinned == ("b",)
    bench.request("t3", "c")
    assert forecast(_spec("a"), bench.now).action == "wait"
    assert forecast(_spec("d", 10), bench.now).wait_for == ("c",), "which is ahead of it"


def test_the_forecast_knows_that_a_queued_model_waits_for_memory() -> None:
    bench = Bench(busy_policy=BusyPolicy.FAIL)
    bench.tell(_reading(Pressure.CRITICAL, available=0))
    bench.tell(LoadWanted(spec=_spec("b"), reason="preloaded"))
    found = bench.lifecycle.forecast(_spec("b"), bench.now)
    assert (found.action, found.reason) == ("refuse", "the machine is short of memory")
    assert refusals(bench.request("t1", "b"))


def test_the_forecast_knows_that_room_is_made_already() -> None:
    bench = Bench(busy_policy=BusyPolicy.FAIL, max_loaded_models=1, budget_bytes=70)
    bench.load("t1", "a")
    bench.tell(LeaseReturned(ticket="t1"))
    bench.request("t2", "b")
    assert bench.lifecycle.forecast(_spec("b"), bench.now).action == "wait", "a leaves for it"
    assert not refusals(bench.request("t3", "b"))


def test_a_model_loads_while_the_one_it_replaces_exits_where_memory_allows() -> None:
    bench = Bench(max_loaded_models=1, budget_bytes=100)
    a = bench.load("t1", "a")
    bench.tell(LeaseReturned(ticket="t1"))
    stop, start = bench.request("t2", "b")
    assert isinstance(stop, StopWorker)
    assert isinstance(start, StartWorker)
    assert (stop.worker, stop.successor, start.model) == (a, "b", "b")
    assert bench.lifecycle.reserved_bytes == 80, "both hold their memory"
    assert bench.request("t3", "c") == [], "one model at a time is loaded or loading"
    bench.finish_load(start.worker)
    assert bench.tell(WorkerReclaimed(worker=a)) == []
    assert bench.lifecycle.reserved_bytes == 40


def test_a_model_waits_for_the_exit_of_the_one_it_replaces_where_both_do_not_fit() -> None:
    bench = Bench(max_loaded_models=1, budget_bytes=70)
    a = bench.load("t1", "a")
    bench.tell(LeaseReturned(ticket="t1"))
    (stop,) = bench.request("t2", "b")
    assert isinstance(stop, StopWorker)
    assert bench.state("b") is State.QUEUED
    (start,) = bench.tell(WorkerReclaimed(worker=a))
    assert isinstance(start, StartWorker)


def test_a_model_that_was_replaced_in_passing_does_not_let_others_go_first_later() -> None:
    """``yields_to`` is for the model that gets the memory; one that has it already needs no precedence."""
    bench = Bench(max_loaded_models=1, budget_bytes=100)
    a = bench.load("t1", "a")
    bench.tell(LeaseReturned(ticket="t1"))
    _, start = bench.request("t2", "b")
    assert isinstance(start, StartWorker)
    bench.tell(WorkerReclaimed(worker=a))
    record = bench.lifecycle._books.records["a"]
    assert record.yields_to is None
