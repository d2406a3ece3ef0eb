"""Loading, swapping and sharing, with real processes and the fake engine."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.support.fakes import fake_config
from tests.support.http import call
from tests.support.router import running_router, wait_until


@pytest.mark.req("R1")
def test_the_first_request_loads_the_model_and_the_second_does_not(home: Path) -> None:
    with running_router(home, *fake_config(home, {"a": {"load_seconds": 0.3, "tokens": 3}})) as router:
        assert router.generate("a")["response"] == "a:latest-1 a:latest-2 a:latest-3 "
        assert router.generate("a")["done_reason"] == "stop"
        assert router.model("a")["loads"] == 1
        assert len(router.children()) == 1


@pytest.mark.req("R7")
def test_fifty_cold_requests_share_one_load(home: Path) -> None:
    with running_router(home, *fake_config(home, {"a": {"load_seconds": 0.5, "tokens": 3}})) as router:
        with ThreadPoolExecutor(50) as pool:
            answers = list(pool.map(lambda _: router.generate("a"), range(50)))
        assert {answer["response"] for answer in answers} == {"a:latest-1 a:latest-2 a:latest-3 "}
        assert router.model("a")["loads"] == 1
        assert sum("event=loading" in line for line in router.lines) == 1


@pytest.mark.covers("T179")
@pytest.mark.req("R7")
def test_a_load_goes_on_when_its_first_caller_leaves(home: Path) -> None:
    with running_router(home, *fake_config(home, {"a": {"load_seconds": 1.0, "tokens": 3}})) as router:
        first = router.client.stream("/api/generate", {"model": "a", "prompt": "go"})
        started = threading.Thread(target=lambda: next(first, None), daemon=True)
        started.start()
        pid = router.wait_state("a", "loading")["pid"]
        with ThreadPoolExecutor(1) as pool:
            second = pool.submit(router.generate, "a")
            router.client.post("/api/show", {"model": "a"})
            wait_until(lambda: router.model("a")["queued"] == 2, "both wait")
            _break_off(router.url, "a")
            assert second.result(timeout=20)["done"] is True
        assert router.model("a")["pid"] == pid
        assert router.model("a")["loads"] == 1
        started.join(20)
        first.close()


def _break_off(url: str, model: str) -> None:
    """Ask and hang up at once, as a client does whose user is gone."""
    import socket
    from urllib.parse import urlsplit

    parts = urlsplit(url)
    body = b'{"model":"%s","prompt":"go"}' % model.encode()
    head = b"POST /api/generate HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(body)
    with socket.create_connection((parts.hostname, parts.port), 5) as connection:
        connection.sendall(head + body)


@pytest.mark.covers("T174")
@pytest.mark.req("R12", "R13")
def test_two_models_that_both_fit_are_loaded_side_by_side(home: Path) -> None:
    scripts = {"a": {"tokens": 2, "memory_bytes": 1_000_000}, "b": {"tokens": 2, "memory_bytes": 1_000_000}}
    with running_router(home, *fake_config(home, scripts, memory_budget=3_000_000)) as router:
        assert router.generate("a")["response"].startswith("a:")
        assert router.generate("b")["response"].startswith("b:")
        a, b = router.model("a"), router.model("b")
        assert (a["state"], b["state"]) == ("ready", "ready")
        assert a["pid"] != b["pid"]


@pytest.mark.req("R13")
def test_the_model_that_does_not_fit_takes_the_place_of_an_idle_one(home: Path) -> None:
    scripts = {"a": {"memory_bytes": 2_000_000}, "b": {"memory_bytes": 2_000_000}}
    with running_router(home, *fake_config(home, scripts, memory_budget=3_000_000)) as router:
        router.generate("a")
        pid = router.model("a")["pid"]
        router.generate("b")
        assert router.model("a")["state"] == "unloaded"
        assert pid not in [child.pid for child in router.children()]
        swap = router.model("b")["last_swap"]
        assert [eviction["model"] for eviction in swap["evictions"]] == ["a:latest"]


@pytest.mark.covers("T182")
@pytest.mark.req("R13")
def test_a_model_that_can_never_fit_is_refused_and_evicts_nothing(home: Path) -> None:
    scripts = {"a": {"memory_bytes": 1_000_000}, "big": {"memory_bytes": 9_000_000}}
    with running_router(home, *fake_config(home, scripts, memory_budget=3_000_000)) as router:
        router.generate("a")
        pid = router.model("a")["pid"]
        with pytest.raises(Exception, match=r"needs 9 MB and the budget is 3 MB"):
            router.generate("big")
        assert router.model("a")["pid"] == pid


@pytest.mark.covers("T173")
@pytest.mark.req("R10")
def test_a_swap_waits_for_the_running_stream(home: Path) -> None:
    scripts = {"a": {"tokens": 100, "tokens_per_second": 100}, "b": {"tokens": 2}}
    with running_router(home, *fake_config(home, scripts, max_loaded_models=1)) as router:
        stream = router.client.stream("/api/generate", {"model": "a", "prompt": "go"})
        text = next(stream)["response"]
        with ThreadPoolExecutor(1) as pool:
            other = pool.submit(router.generate, "b")
            router.wait_state("a", "draining")
            parts = list(stream)
            text += "".join(part["response"] for part in parts)
            assert text == "".join(f"a:latest-{n} " for n in range(1, 101))
            assert parts[-1]["done_reason"] == "stop"
            assert other.result(timeout=20)["response"] == "b:latest-1 b:latest-2 "
        assert router.wait_eviction("b")["drain_seconds"] > 0.2


def test_requests_for_a_draining_model_wait_and_are_served_after_the_swap(home: Path) -> None:
    scripts = {"a": {"tokens": 50, "tokens_per_second": 100}, "b": {"tokens": 2}}
    with (
        running_router(home, *fake_config(home, scripts, max_loaded_models=1)) as router,
        ThreadPoolExecutor(3) as pool,
    ):
        stream = router.client.stream("/api/generate", {"model": "a", "prompt": "go"})
        next(stream)
        b = pool.submit(router.generate, "b")
        router.wait_state("a", "draining")
        a = pool.submit(router.generate, "a")
        list(stream)
        assert b.result(timeout=20)["response"].startswith("b:")
        assert a.result(timeout=20)["response"].startswith("a:")
        assert router.model("a")["loads"] == 2


def test_keep_alive_ends_an_idle_model_on_time(home: Path) -> None:
    with running_router(home, *fake_config(home, {"a": {"tokens": 2}})) as router:
        router.generate("a", keep_alive="200ms")
        router.wait_state("a", "unloaded", seconds=3)
        assert "idle for its keep_alive" in router.model("a")["reason"]
        assert router.children() == []


@pytest.mark.covers("T060")
def test_an_unload_during_a_stream_lets_the_stream_finish(home: Path) -> None:
    with running_router(home, *fake_config(home, {"a": {"tokens": 60, "tokens_per_second": 100}})) as router:
        stream = router.client.stream("/api/generate", {"model": "a", "prompt": "go"})
        next(stream)
        answer = router.client.post("/api/generate", {"model": "a", "keep_alive": 0})
        assert answer["done_reason"] == "unload"
        parts = list(stream)
        assert parts[-1]["done_reason"] == "stop"
        assert parts[-1]["eval_count"] == 60
        router.wait_state("a", "unloaded")


@pytest.mark.covers("T175", "T149", "O126")
def test_a_full_queue_answers_503_with_retry_after(home: Path) -> None:
    scripts = {"a": {"load_seconds": 1.0, "tokens": 2}}
    with running_router(home, *fake_config(home, scripts, max_queue=1)) as router, ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(router.generate, "a")
        wait_until(lambda: router.model("a")["queued"] == 1, "the first waits")
        for path, status, kind in (
            ("/api/generate", 503, None), ("/v1/completions", 503, "api_error"), ("/v1/embeddings", 503, "api_error"),
            ("/v1/messages", 529, "overloaded_error"),
        ):  # fmt: skip
            body = {"model": "a", "prompt": "go", "input": "go", "max_tokens": 5,
                    "messages": [{"role": "user", "content": "go"}]}  # fmt: skip
            refused = call(router, "POST", path, body)
            assert refused.status == status
            assert kind is None or refused.json()["error"]["type"] == kind
            assert int(refused.headers["retry-after"]) >= 1
            assert b"server busy, please try again.  maximum pending requests exceeded" in refused.body
        assert waiting.result(timeout=20)["done"] is True


@pytest.mark.req("R15")
def test_memory_is_back_after_an_unload(home: Path) -> None:
    with running_router(home, *fake_config(home, {"a": {"tokens": 2, "memory_bytes": 300_000_000}, "b": {}},
                                           max_loaded_models=1)) as router:  # fmt: skip
        router.generate("a")
        assert router.model("a")["memory_bytes"] >= 300_000_000
        router.generate("b")
        eviction = router.wait_eviction("b")
        assert eviction["verdict"] == "returned"
        assert eviction["held_bytes"] >= 300_000_000
        assert eviction["memory_back_seconds"] < 2
