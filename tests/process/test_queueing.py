"""Waiting over HTTP: policies, priorities, deadlines, positions, turns; with real processes and the fake engine."""

from __future__ import annotations

import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from mlx_router_server.cli.client import ApiError
from mlx_router_server.workers.memory import process_bytes
from tests.support.fakes import fake_config
from tests.support.http import RawStream, call
from tests.support.router import RouterProcess, running_router, wait_until

_QUICK = {"tokens": 2}
_BUSY = {"tokens": 100_000, "tokens_per_second": 50}


def _hold(router: RouterProcess, model: str) -> Any:
    """A stream that keeps a model in use until it is closed."""
    stream = router.client.stream("/api/generate", {"model": model, "prompt": "go"})
    next(stream)
    return stream


@pytest.mark.req("R8")
@pytest.mark.parametrize("path", ["/api/generate", "/v1/completions"])
def test_policy_fail_answers_503_with_retry_after_and_leaves_the_load_alone(home: Path, path: str) -> None:
    scripts: dict[str, dict[str, Any]] = {"a": {"load_seconds": 1.5, "tokens": 2}, "b": _QUICK}
    with (
        running_router(home, *fake_config(home, scripts, max_loaded_models=1, busy_policy="fail")) as router,
        ThreadPoolExecutor(1) as pool,
    ):
        loading = pool.submit(router.generate, "a")
        pid = router.wait_state("a", "loading")["pid"]
        refused = call(router, "POST", path, {"model": "b", "prompt": "go"})
        assert refused.status == 503
        assert int(refused.headers["retry-after"]) >= 1
        assert "cannot begin now" in str(refused.json()["error"])
        assert loading.result(20)["done"] is True
        assert router.model("a")["pid"] == pid
        assert router.model("b")["loads"] == 0


@pytest.mark.req("R8")
def test_policy_fail_with_room_for_both_loads_at_once(home: Path) -> None:
    scripts: dict[str, dict[str, Any]] = {"a": {"load_seconds": 1.5, "tokens": 2}, "b": _QUICK}
    with (
        running_router(home, *fake_config(home, scripts, busy_policy="fail")) as router,
        ThreadPoolExecutor(1) as pool,
    ):
        loading = pool.submit(router.generate, "a")
        router.wait_state("a", "loading")
        assert router.generate("b")["done"] is True
        assert loading.result(20)["done"] is True


@pytest.mark.req("R8")
def test_policy_wait_then_fail_refuses_at_its_cap(home: Path) -> None:
    arguments = fake_config(home, {"a": _BUSY, "b": _QUICK}, max_loaded_models=1, busy_policy="wait_then_fail",
                            busy_wait_seconds=0.6)  # fmt: skip
    with running_router(home, *arguments) as router:
        holding = _hold(router, "a")
        began = time.monotonic()
        refused = call(router, "POST", "/api/generate", {"model": "b", "prompt": "go"})
        assert refused.status == 503
        assert time.monotonic() - began >= 0.6
        assert "could not begin within 0.6" in refused.json()["error"]
        holding.close()


@pytest.mark.req("R17", "R44")
def test_positions_and_priorities_are_visible_and_hold(home: Path) -> None:
    with (
        running_router(home, *fake_config(home, {"a": _BUSY}, parallel=1)) as router,
        ThreadPoolExecutor(3) as pool,
    ):
        holding = _hold(router, "a")
        order: list[str] = []

        def ask(name: str, priority: str) -> None:
            # Answers of 0.2 s, so that the ends of two are not mixed up by the threads that wait for them.
            body = {"model": "a", "prompt": "go", "stream": False, "options": {"num_predict": 10}}
            assert call(router, "POST", "/api/generate", body, X_Priority=priority).status == 200
            order.append(name)

        pool.submit(ask, "low", "low")
        wait_until(lambda: router.model("a")["queued"] == 1, "the first waits")
        pool.submit(ask, "normal", "normal")
        wait_until(lambda: router.model("a")["queued"] == 2, "the second waits")
        last = pool.submit(ask, "high", "7")
        wait_until(lambda: router.model("a")["queued"] == 3, "the third waits")
        queue = router.status()["router"]["queue"]
        assert [(w["position"], w["priority"], w["model"]) for w in queue] == [
            (1, 7, "a:latest"), (2, 0, "a:latest"), (3, -10, "a:latest"),
        ]  # fmt: skip
        assert all(w["request"].startswith("req_") and w["given_up_in_seconds"] > 0 for w in queue)
        holding.close()
        last.result(20)
        wait_until(lambda: len(order) == 3, "all were served")
        assert order == ["high", "normal", "low"]


@pytest.mark.covers("T176")
@pytest.mark.req("R52")
def test_the_limit_counts_who_waits_for_a_loaded_model_too(home: Path) -> None:
    arguments = fake_config(home, {"a": _BUSY}, parallel=1, max_queue=1)
    with running_router(home, *arguments) as router, ThreadPoolExecutor(1) as pool:
        holding = _hold(router, "a")
        waiting = pool.submit(router.generate, "a", options={"num_predict": 1})
        wait_until(lambda: router.model("a")["queued"] == 1, "one waits")
        refused = call(router, "POST", "/api/generate", {"model": "a", "prompt": "go"})
        assert refused.status == 503
        assert int(refused.headers["retry-after"]) >= 1
        assert "maximum pending requests exceeded" in refused.json()["error"]
        holding.close()
        assert waiting.result(20)["done"] is True


def test_a_deadline_is_kept_or_refused(home: Path) -> None:
    with running_router(home, *fake_config(home, {"a": _BUSY, "b": _QUICK}, max_loaded_models=1)) as router:
        holding = _hold(router, "a")
        body = {"model": "b", "prompt": "go", "stream": False}
        late = call(router, "POST", "/api/generate", body, X_Deadline_Seconds="0.3")
        assert late.status == 503
        assert "could not begin within 0.3" in late.json()["error"]
        holding.close()
        assert call(router, "POST", "/api/generate", body, X_Deadline_Seconds="20").status == 200
        for header, value in (("X_Deadline_Seconds", "soon"), ("X_Deadline_Seconds", "-1"), ("X_Priority", "1e9"),
                              ("X_Keep_Alive", "1 fortnight")):  # fmt: skip
            refused = call(router, "POST", "/api/generate", body, **{header: value})
            assert refused.status == 400, header


@pytest.mark.req("R44")
def test_forty_alternating_calls_cost_two_loads(home: Path) -> None:
    """A B A B … at once, with room for one."""
    scripts: dict[str, dict[str, Any]] = {
        "a": {"tokens": 3, "load_seconds": 0.2},
        "b": {"tokens": 3, "load_seconds": 0.2},
    }
    with (
        running_router(home, *fake_config(home, scripts, max_loaded_models=1)) as router,
        ThreadPoolExecutor(40) as pool,
    ):
        answers = list(pool.map(lambda n: (n % 2, router.generate("ab"[n % 2])), range(40)))
        for which, answer in answers:
            assert answer["response"].startswith(f"{'ab'[which]}:latest-1 ")
        assert router.model("a")["loads"] + router.model("b")["loads"] <= 6


@pytest.mark.req("R44")
def test_two_clients_that_take_turns_do_not_reload_on_each_call(home: Path) -> None:
    """Each asks again when it has its answer; without turns every call would cost a load."""
    scripts: dict[str, dict[str, Any]] = {
        "a": {"tokens": 2, "load_seconds": 0.3},
        "b": {"tokens": 2, "load_seconds": 0.3},
    }
    arguments = fake_config(home, scripts, max_loaded_models=1, turn_seconds=1.0)
    with running_router(home, *arguments) as router, ThreadPoolExecutor(2) as pool:

        def client(model: str) -> int:
            return sum(router.generate(model)["response"].startswith(f"{model}:") for _ in range(25))

        assert list(pool.map(client, ["a", "b"])) == [25, 25]
        assert router.model("a")["loads"] + router.model("b")["loads"] <= 12


@pytest.mark.covers("T180")
@pytest.mark.req("R44")
def test_a_steady_stream_to_a_warm_model_does_not_starve_another(home: Path) -> None:
    scripts: dict[str, dict[str, Any]] = {"a": {"tokens": 20, "tokens_per_second": 100}, "b": _QUICK}
    with running_router(home, *fake_config(home, scripts, max_loaded_models=1, turn_seconds=0.5)) as router:
        enough = threading.Event()

        def keep_busy() -> int:
            served = 0
            while not enough.is_set():
                served += router.generate("a")["done"] is True
            return served

        with ThreadPoolExecutor(5) as pool:
            busy = [pool.submit(keep_busy) for _ in range(4)]
            wait_until(lambda: router.model("a")["in_flight"] >= 3, "the traffic runs")
            for _ in range(3):
                answer = pool.submit(router.generate, "b").result(20)
                assert answer["response"].startswith("b:")
            enough.set()
            assert all(future.result(20) > 0 for future in busy)


@pytest.mark.req("R10")
def test_a_drain_at_its_limit_keeps_or_cancels_as_configured(home: Path) -> None:
    for policy in ("keep", "cancel"):
        folder = home / policy
        folder.mkdir()
        arguments = fake_config(folder, {"a": _BUSY, "b": _QUICK}, max_loaded_models=1, drain_timeout_seconds=0.4,
                                drain_policy=policy)  # fmt: skip
        with running_router(folder, *arguments) as router:
            holding = _hold(router, "a")
            if policy == "keep":
                with pytest.raises(ApiError, match=r"still in use after 0\.4 s"):
                    router.generate("b")
                assert next(holding)["done"] is False
                holding.close()
            else:
                assert router.generate("b")["done"] is True
                with pytest.raises(ApiError, match="evicted for b"):
                    list(holding)


@pytest.mark.req("R10")
def test_a_drain_is_called_off_when_the_newcomer_leaves(home: Path) -> None:
    with running_router(home, *fake_config(home, {"a": _BUSY, "b": _QUICK}, max_loaded_models=1)) as router:
        holding = _hold(router, "a")
        pid = router.model("a")["pid"]
        reply = call(router, "POST", "/api/generate", {"model": "b", "prompt": "go"}, X_Deadline_Seconds="0.2")
        assert reply.status == 503
        assert router.model("a")["state"] == "ready"
        assert router.model("a")["pid"] == pid
        holding.close()


@pytest.mark.req("R52")
def test_overload_is_refused_with_a_time_to_come_back_and_the_router_stays_small(home: Path) -> None:
    """Three hundred at once for a model that takes two, with places for twenty: answers or 503, and nothing else."""
    script = {"tokens": 5, "tokens_per_second": 100}
    arguments = fake_config(home, {"a": script}, parallel=2, max_queue=20)
    with running_router(home, *arguments) as router, ThreadPoolExecutor(60) as pool:
        router.generate("a")
        before = process_bytes(router.pid)
        body = {"model": "a", "prompt": "go", "stream": False}
        replies = list(pool.map(lambda _: call(router, "POST", "/api/generate", body), range(300)))
        assert {reply.status for reply in replies} == {200, 503}
        for reply in replies:
            if reply.status == 503:
                assert 1 <= int(reply.headers["retry-after"]) <= 60
            else:
                assert reply.json()["eval_count"] == 5
        wait_until(lambda: router.model("a")["in_flight"] == router.model("a")["queued"] == 0, "all is over")
        assert process_bytes(router.pid) - before < 10_000_000


@pytest.mark.req("R10")
@pytest.mark.parametrize(
    "way", ["whole", "streamed", "left early", "left the queue", "killed", "hung", "rubbish", "refused by the worker"]
)
def test_a_lease_comes_back_on_every_way_out(home: Path, way: str) -> None:
    scripts: dict[str, dict[str, Any]] = {
        "whole": _QUICK, "streamed": _QUICK, "left early": _BUSY, "left the queue": {"load_seconds": 1.0, **_QUICK},
        "killed": _BUSY, "hung": {"hang_at": "generate"}, "rubbish": {"garbage_at": "generate"},
        "refused by the worker": {"context_tokens": 8},
    }  # fmt: skip
    arguments = fake_config(home, {"a": scripts[way]}, stall_timeout_seconds=1.0)
    with running_router(home, *arguments) as router:
        body: dict[str, Any] = {"model": "a", "prompt": "go"}
        match way:
            case "whole":
                assert router.generate("a")["done"] is True
            case "left early":
                _hold(router, "a").close()
            case "left the queue":
                raw = RawStream(router, "/api/generate", body)
                wait_until(lambda: router.model("a")["queued"] == 1, "it waits")
                raw.socket.close()
            case "killed":
                stream = _hold(router, "a")
                os.kill(router.model("a")["pid"], signal.SIGKILL)
                with pytest.raises(ApiError, match="unexpectedly stopped"):
                    list(stream)
            case "refused by the worker":
                reply = call(router, "POST", "/api/generate", {**body, "prompt": "word " * 20})
                assert reply.status == 400
            case _:
                reply = call(router, "POST", "/api/generate", body)
                assert (b'"error"' in reply.body) == (way != "streamed")
        wait_until(lambda: router.model("a")["in_flight"] == router.model("a")["queued"] == 0, "the lease is back", 5)
        router.wait_state("a", "ready", "unloaded")
        assert router.model("a")["loads"] == 1
