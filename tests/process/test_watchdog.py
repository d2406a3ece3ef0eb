"""Workers that hang, die in a loop or cannot load: ended, told, paused, forgiven, and replaced."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil
import pytest

from mlx_router_server.cli.client import ApiError
from tests.support.fakes import fake_config, write_fake
from tests.support.http import RawStream, call
from tests.support.router import running_router, wait_until

_STALL = {"stall_timeout_seconds": 1.0, "stop_timeout_seconds": 5.0}


@pytest.mark.req("R46")
@pytest.mark.parametrize(
    ("path", "mark"),
    [
        ("/api/generate", b'{"error":"'),
        ("/v1/chat/completions", b'data: {"error":{'),
        ("/v1/messages", b"event: error\n"),
    ],
)
def test_a_worker_that_stops_producing_is_ended_and_its_streams_are_told(home: Path, path: str, mark: bytes) -> None:
    """Its socket thread goes on answering: only the engine's progress tells."""
    arguments = fake_config(home, {"a": {"hang_at": "generate", "at_token": 3}, "b": {"tokens": 2}}, **_STALL)
    with running_router(home, *arguments) as router:
        body = {"model": "a", "prompt": "go", "messages": [{"role": "user", "content": "go"}], "stream": True,
                "max_tokens": 100}  # fmt: skip
        reply = call(router, "POST", path, body)
        assert b"a:latest-2" in reply.body
        assert mark in reply.body
        assert b"made no progress for" in reply.body
        assert b"[DONE]" not in reply.body
        wait_until(lambda: router.model("a")["pid"] is None, "the worker is gone")
        entry = router.model("a")
        assert (entry["in_flight"], entry["reserved_bytes"]) == (0, 0)
        assert "made no progress" in entry["last_failure"]["reason"]
        assert router.status()["router"]["kill_incidents"] == 0, "its socket thread has ended it"
        assert router.generate("b")["done"] is True


@pytest.mark.slow
@pytest.mark.req("R46")
def test_a_frozen_worker_is_ended_although_it_hears_nothing(home: Path) -> None:
    arguments = fake_config(home, {"a": {"tokens": 1000, "tokens_per_second": 50}}, **_STALL)
    with running_router(home, *arguments) as router:
        stream = router.client.stream("/api/generate", {"model": "a", "prompt": "go"})
        next(stream)
        os.kill(router.model("a")["pid"], signal.SIGSTOP)
        with pytest.raises(ApiError, match="made no progress"):
            list(stream)
        wait_until(lambda: router.children() == [], "the worker is gone")
        # Counted once its memory was seen to be back, which is a little later.
        wait_until(lambda: router.status()["router"]["kill_incidents"] == 1, "the incident is counted", 5)


@pytest.mark.req("R46")
def test_a_slow_worker_is_left_alone(home: Path) -> None:
    """A token takes almost as long as the limit, an answer several times as long."""
    arguments = fake_config(home, {"a": {"tokens": 5, "tokens_per_second": 1.7}}, **_STALL)
    with running_router(home, *arguments) as router:
        assert router.generate("a")["eval_count"] == 5


@pytest.mark.req("R46")
@pytest.mark.parametrize("stream", [True, False])
def test_a_worker_that_computes_without_output_is_left_alone(home: Path, stream: bool) -> None:
    """A long prompt, or text that is held back: the engine makes steps and sends nothing for more than a limit.

    The worker reports its steps once a second, so the limit leaves a busy machine another.
    """
    arguments = fake_config(home, {"a": {"tokens": 2, "tokens_per_second": 0.3}}, stall_timeout_seconds=2)
    with running_router(home, *arguments) as router:
        reply = call(router, "POST", "/api/generate", {"model": "a", "prompt": "go", "stream": stream})
        assert reply.status == 200
        assert reply.lines()[-1].get("eval_count") == 2, reply.body
        assert router.model("a")["failures"] == 0


@pytest.mark.slow
@pytest.mark.req("R46")
def test_a_client_that_reads_slowly_is_no_hang_of_the_worker(home: Path) -> None:
    """The worker has finished; what waits to be read waits in the router, because the sockets' buffers are full."""
    name = "a" * 70  # an answer of 6 MB
    arguments = fake_config(home, {name: {"tokens": 19_000, "context_tokens": 100_000}}, **_STALL)
    with running_router(home, *arguments) as router:
        raw = RawStream(router, "/api/generate", {"model": name, "prompt": "go"}, receive_buffer=4096)
        raw.read_until(b"-2 ")
        wait_until(lambda: router.model(name)["tokens_total"] == 19_000, "the worker is done")
        quiet_until = time.monotonic() + 2.5  # longer than a worker may stand still
        wait_until(lambda: time.monotonic() > quiet_until, "the watchdog has looked")
        assert router.model(name)["in_flight"] == 1, "the client is not"
        assert router.model(name)["state"] == "ready"
        assert b'"done":true' in raw.read_to_end()
        assert (router.model(name)["failures"], router.model(name)["loads"]) == (0, 1)


@pytest.mark.req("R47")
def test_a_model_that_always_fails_is_given_up_with_its_last_words_and_forgiven_on_request(home: Path) -> None:
    arguments = fake_config(home, {"a": {"crash_at": "load", "exit_status": 3}, "b": {"tokens": 2}})
    with running_router(home, *arguments) as router:
        for _ in range(5):
            reply = call(router, "POST", "/admin/models/a/load")  # explicit: each is tried at once
            assert reply.status == 500
            wait_until(lambda: router.model("a")["pid"] is None, "the worker is gone")
        # The explicit loads started afresh each time; ordinary requests do not, and meet the pause.
        refused = call(router, "POST", "/api/generate", {"model": "a", "prompt": "go"})
        assert refused.status == 503
        assert int(refused.headers["retry-after"]) >= 1
        entry = router.model("a")
        assert entry["state"] == "backoff"
        assert entry["retry_in_seconds"] > 0
        assert "exited with status 3" in entry["reason"]
        assert "fake engine: crashing at load, as its script says" in entry["last_failure"]["stderr_tail"]
        write_fake(home / "fakes" / "a", tokens=2)
        assert call(router, "POST", "/admin/models/a/load").status == 200
        assert router.generate("a")["done"] is True
        assert router.model("a")["failures"] == 0


@pytest.mark.slow
@pytest.mark.req("R47")
def test_ordinary_requests_bring_a_failing_model_to_failed_and_not_further(home: Path) -> None:
    with running_router(home, *fake_config(home, {"a": {"crash_at": "load"}})) as router:

        def given_up() -> bool:
            call(router, "POST", "/api/generate", {"model": "a", "prompt": "go"})
            return bool(router.model("a")["state"] == "failed")

        wait_until(given_up, "it is given up", 25)  # 1 + 2 + 4 + 8 s of pauses
        assert sum("event=loading" in line for line in router.lines) == 5
        assert router.model("a")["retry_in_seconds"] > 500
        assert router.client.get("/health")["status"] == "ok"


@pytest.mark.req("R14")
@pytest.mark.parametrize("restore", [True, False])
def test_the_evicted_model_comes_back_when_its_successor_fails(home: Path, restore: bool) -> None:
    scripts: dict[str, dict[str, Any]] = {"a": {"tokens": 2}, "b": {"fail_load": "no such luck", "load_seconds": 0.2}}
    arguments = fake_config(home, scripts, max_loaded_models=1, restore_on_failure=restore)
    with running_router(home, *arguments) as router:
        router.generate("a")
        with pytest.raises(ApiError, match="no such luck"):
            router.generate("b")
        if restore:
            router.wait_state("a", "ready")
            assert router.model("a")["loads"] == 2
        else:
            router.wait_state("b", "backoff")
            assert router.model("a")["state"] == "unloaded"


@pytest.mark.req("R46")
def test_public_errors_name_no_folders_and_the_operator_sees_them(home: Path) -> None:
    secret = "cannot open /private/ada/weights/model.safetensors"
    with running_router(home, *fake_config(home, {"a": {"fail_load": secret}})) as router:
        for path, body in (("/api/generate", {"prompt": "go"}), ("/v1/completions", {"prompt": "go"})):
            reply = call(router, "POST", path, {"model": "a", **body})
            assert b"cannot open model.safetensors" in reply.body
            assert b"/private" not in reply.body
            router.wait_state("a", "backoff")
        assert router.model("a")["last_failure"]["reason"] == secret


@pytest.mark.slow
@pytest.mark.req("R46")
def test_counting_tokens_is_watched_like_everything_else(home: Path) -> None:
    """A process of its own does it, for all models; one that does not get on is replaced."""
    path, body = "/v1/messages/count_tokens", {"model": "demo", "messages": [{"role": "user", "content": "Hello!"}]}
    with running_router(home, "--stall-timeout-seconds", "1") as router:
        counted = call(router, "POST", path, body).json()
        (counter,) = router.children()
        os.kill(counter.pid, signal.SIGSTOP)
        stalled = call(router, "POST", path, body)
        assert (stalled.status, "made no progress" in stalled.json()["error"]["message"]) == (500, True), stalled.body
        assert call(router, "POST", path, body).json() == counted
        wait_until(lambda: not counter.is_running(), "the frozen one is gone")


@pytest.mark.req("R7")
def test_a_counter_that_was_given_up_before_it_said_hello_is_no_counter(home: Path) -> None:
    path = "/v1/messages/count_tokens"
    body = json.dumps({"model": "demo", "messages": [{"role": "user", "content": "Hello!"}]}).encode()
    head = b"POST %s HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % (path.encode(), len(body))
    with running_router(home) as router:
        parts = urlsplit(router.url)
        wait_until(lambda: call(router, "GET", "/ready").status == 200, "the models are known")
        with socket.create_connection((parts.hostname or "", parts.port or 0)) as first:
            first.sendall(head + body)
            wait_until(router.children, "it is started")
        assert call(router, "POST", path, body).json()["input_tokens"] > 0
        wait_until(lambda: len(router.children()) == 1, "one is left")


@pytest.mark.slow
@pytest.mark.req("R14")
@pytest.mark.timeout(120)
def test_two_hundred_failures_leave_no_process_and_no_descriptor(home: Path) -> None:
    with running_router(home, *fake_config(home, {"a": {"fail_load": "no"}})) as router:

        def fail(times: int) -> None:
            for _ in range(times):
                assert call(router, "POST", "/admin/models/a/load").status == 500
                wait_until(lambda: router.model("a")["pid"] is None, "the worker is gone")

        fail(3)
        process = psutil.Process(router.pid)
        descriptors = process.num_fds()
        fail(200)
        wait_until(lambda: process.num_fds() <= descriptors, "descriptors are closed", 5)
        assert router.children() == []
        assert router.model("a")["reserved_bytes"] == 0
