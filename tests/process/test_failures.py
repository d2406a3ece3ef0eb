"""What goes wrong: crashes, hangs, nonsense, refusals to leave, kill -9. Nothing may wait for ever or stay behind."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from mlx_router_server.cli.client import ApiError
from tests.process.test_names import body_for
from tests.support.fakes import fake_config
from tests.support.http import RawStream, call
from tests.support.router import RouterProcess, running_router, still_alive, wait_until

_SLOW = {"tokens": 1000, "tokens_per_second": 100}


@pytest.mark.covers("T089", "T156", "T186", "O76", "O101", "O121")
@pytest.mark.req("R46")
@pytest.mark.parametrize(
    "path",
    ["/api/generate", "/api/chat", "/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"],
)
def test_a_killed_worker_is_heard_by_its_streams_and_by_no_other(home: Path, path: str) -> None:
    with running_router(
        home, *fake_config(home, {"a": _SLOW, "b": {"tokens": 80, "tokens_per_second": 100}})
    ) as router:
        other = router.client.stream("/api/generate", {"model": "b", "prompt": "go"})
        next(other)
        stream = RawStream(router, path, {**body_for(path, model="a", max_tokens=1000), "stream": True})
        stream.read_until(b"a:latest-2")
        os.kill(router.model("a")["pid"], signal.SIGKILL)
        killed = time.monotonic()
        rest = stream.read_to_end()
        heard = time.monotonic() - killed
        assert b"model runner has unexpectedly stopped" in rest
        assert b'"error"' in rest
        for end in (b"[DONE]", b'"done":true', b"message_stop", b"response.completed", b'"finish_reason":"'):
            assert end not in rest, "an error and a good end exclude each other"
        assert rest.endswith(b"0\r\n\r\n"), "the body has to end as HTTP says"
        assert heard < 2  # the figure is measured by the benchmark; this only tells a hang from an answer
        assert list(other)[-1]["done_reason"] == "stop"
        assert router.generate("a", options={"num_predict": 2})["done_reason"] == "length"
        assert router.model("a")["loads"] == 2
        assert router.model("a")["in_flight"] == 0


@pytest.mark.req("R48")
def test_when_the_router_is_killed_its_workers_leave(home: Path) -> None:
    router = RouterProcess(home, fake_config(home, {"a": _SLOW}))
    stream = router.client.stream("/api/generate", {"model": "a", "prompt": "go"})
    next(stream)
    workers = router.children()
    assert len(workers) == 1
    (lock,) = [Path(file.path) for file in psutil.Process(router.pid).open_files() if file.path.endswith("/lock")]
    router.process.kill()
    router.process.wait(5)
    wait_until(lambda: not still_alive(workers), "the workers have left", 2)
    assert router.stop() == -signal.SIGKILL
    stream.close()
    assert lock.exists()
    with running_router(home, *fake_config(home, {"a": {}})) as following:
        following.generate("a")
        # By this router, or by one that another test has started in the same moment.
        wait_until(lambda: not lock.parent.exists(), "the folder of the killed run is swept", 10)


@pytest.mark.covers("T187")
@pytest.mark.req("R14")
def test_a_failed_load_says_why_is_paused_and_can_be_tried_again(home: Path) -> None:
    with running_router(
        home, *fake_config(home, {"a": {"fail_load": "the weights are made of cheese"}, "b": {}})
    ) as router:
        with pytest.raises(ApiError, match="made of cheese") as first:
            router.generate("a")
        assert first.value.status == 500
        entry = router.wait_state("a", "backoff")
        assert entry["reason"] == "the weights are made of cheese"
        assert entry["reserved_bytes"] == 0
        with pytest.raises(ApiError, match="tried again in 1 s") as second:
            router.generate("a")
        assert second.value.status == 503
        assert router.generate("b")["done"] is True
        (home / "fakes" / "a" / "fake.json").write_text("{}")
        answer = wait_until(lambda: _try(router, "a"), "the pause is over", 5)
        assert answer["done"] is True


def _try(router: RouterProcess, model: str) -> dict[str, Any] | None:
    try:
        return router.generate(model)
    except ApiError:
        return None


@pytest.mark.req("R14")
def test_a_failed_load_is_told_to_everybody_who_waits(home: Path) -> None:
    with running_router(home, *fake_config(home, {"a": {"load_seconds": 0.5, "fail_load": "no"}})) as router:
        with ThreadPoolExecutor(20) as pool:
            futures = [pool.submit(router.generate, "a") for _ in range(20)]
        errors = [future.exception() for future in futures]
        assert {str(error) for error in errors} == {"no"}
        assert sum("event=loading" in line for line in router.lines) == 1


@pytest.mark.req("R46")
@pytest.mark.parametrize("point", ["load", "ready", "generate"])
def test_a_crash_at_any_point_is_an_error_with_its_reason(home: Path, point: str) -> None:
    with running_router(home, *fake_config(home, {"a": {"crash_at": point, "exit_status": 7}})) as router:
        with pytest.raises(ApiError, match=r"exited with status 7.*crashing at"):
            router.generate("a")
        wait_until(lambda: router.model("a")["pid"] is None, "the worker is gone")
        assert router.children() == []
        assert router.model("a")["reserved_bytes"] == 0


@pytest.mark.parametrize("point", ["load", "generate"])
def test_a_worker_that_sends_rubbish_is_cut_off(home: Path, point: str) -> None:
    with running_router(home, *fake_config(home, {"a": {"garbage_at": point}, "b": {}})) as router:
        with pytest.raises(ApiError, match="broke the protocol"):
            router.generate("a")
        wait_until(lambda: router.children() == [], "the worker is gone")
        assert router.generate("b")["done"] is True


def test_a_load_that_hangs_ends_at_its_limit(home: Path) -> None:
    arguments = fake_config(home, {"a": {"hang_at": "load"}}, load_timeout_seconds=0.5, stop_timeout_seconds=0.3)
    with running_router(home, *arguments) as router:
        with pytest.raises(ApiError, match=r"did not finish loading within 0\.5 s"):
            router.generate("a")
        wait_until(lambda: router.children() == [], "the worker is gone", 10)


@pytest.mark.req("R15")
@pytest.mark.parametrize(
    ("script", "rung"),
    [({"ignore_shutdown": True}, "term"), ({"ignore_shutdown": True, "ignore_term": True}, "kill")],
)
def test_a_worker_that_does_not_leave_is_made_to(home: Path, script: dict[str, Any], rung: str) -> None:
    arguments = fake_config(home, {"a": script, "b": {}}, max_loaded_models=1, stop_timeout_seconds=0.3)
    with running_router(home, *arguments) as router:
        router.generate("a")
        router.generate("b")
        # b was loaded while it still ran, because memory allows both.
        eviction = router.wait_eviction("b")
        assert eviction["rung"] == rung
        assert router.status()["router"]["kill_incidents"] == (1 if rung == "kill" else 0)


@pytest.mark.covers("T177", "O77")
@pytest.mark.req("R51")
def test_a_client_that_leaves_stops_its_stream_and_returns_its_lease(home: Path) -> None:
    with running_router(home, *fake_config(home, {"a": {"tokens": 1000, "tokens_per_second": 10}})) as router:
        stream = router.client.stream("/api/generate", {"model": "a", "prompt": "go"})
        for _ in range(3):
            next(stream)
        stream.close()
        wait_until(lambda: router.model("a")["in_flight"] == 0, "the lease is back", 5)
        router.generate("a", options={"num_predict": 3})
        wait_until(lambda: router.model("a")["tokens_total"] >= 6, "the worker has told its figures")
        # Three that were read, three of the second request, and two at most after the client had left.
        assert router.model("a")["tokens_total"] <= 3 + 3 + 2


@pytest.mark.req("R10")
def test_a_client_that_never_reads_its_answer_returns_its_lease(home: Path) -> None:
    with running_router(home, *fake_config(home, {"a": {"load_seconds": 0.5, "tokens": 5}})) as router:
        raw = RawStream(router, "/api/generate", {"model": "a", "prompt": "go"})
        wait_until(lambda: router.model("a")["queued"] == 1, "it waits")
        raw.socket.close()
        wait_until(lambda: router.model("a")["queued"] == 0, "nobody waits any more", 5)
        router.wait_state("a", "ready")
        assert router.model("a")["in_flight"] == 0


@pytest.mark.covers("T189")
def test_sigterm_lets_running_streams_finish_and_leaves_nothing(home: Path) -> None:
    router = RouterProcess(home, fake_config(home, {"a": {"tokens": 80, "tokens_per_second": 100}}))
    stream = router.client.stream("/api/generate", {"model": "a", "prompt": "go"})
    next(stream)
    workers = router.children()
    router.process.terminate()
    assert list(stream)[-1]["eval_count"] == 80
    assert router.process.wait(20) == -signal.SIGTERM
    assert still_alive(workers) == []
    router.stop()


@pytest.mark.slow
@pytest.mark.req("R47")
def test_a_model_that_always_dies_is_given_up(home: Path) -> None:
    with running_router(home, *fake_config(home, {"a": {"crash_at": "load"}})) as router:
        seen = set()
        end = time.monotonic() + 8
        while time.monotonic() < end:
            _try(router, "a")
            seen.add(router.model("a")["state"])
        assert "backoff" in seen
        # 1 + 2 + 4 s of pauses: no more than four attempts fit into this time, however often it is asked for.
        assert sum("event=loading" in line for line in router.lines) <= 4
        assert router.client.get("/health")["status"] == "ok"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", ["/api/chat", "/v1/chat/completions", "/v1/messages", "/v1/responses"])
def test_a_worker_that_somebody_else_ends_costs_no_request_that_had_no_output(
    home: Path, path: str, stream: bool
) -> None:
    """As ``pkill`` or the end of a session does: requests that come while it leaves are answered by the next one."""
    script = {"tokens": 2, "tokens_per_second": 50}
    with running_router(home, *fake_config(home, {"a": script})) as router, ThreadPoolExecutor(8) as pool:
        router.generate("a")
        asked = [
            pool.submit(call, router, "POST", path, {**body_for(path, model="a", max_tokens=4), "stream": stream})
            for _ in range(8)
        ]
        for _ in range(2):  # a request that meets both is on its third worker, and none gets a fourth
            with suppress(ProcessLookupError):  # the status may still show the previous worker
                os.kill(router.wait_state("a", "ready")["pid"], signal.SIGTERM)
            asked += [
                pool.submit(call, router, "POST", path, {**body_for(path, model="a", max_tokens=4), "stream": stream})
                for _ in range(8)
            ]
        replies = [each.result() for each in asked]
    # What had begun to be told when the worker left ends with an error; all else is answered.
    whole = [reply for reply in replies if reply.status == 200]
    assert len(whole) == len(replies), [reply.body for reply in replies if reply.status != 200]
    if not stream:
        assert all(b"error" not in reply.body.replace(b'"error":null', b"") for reply in replies)


@pytest.mark.parametrize(
    ("path", "stream"),
    [
        ("/api/chat", True),
        ("/v1/chat/completions", False),
        *(
            pytest.param(path, stream, marks=pytest.mark.slow)
            for path, stream in (
                ("/api/chat", False),
                ("/v1/chat/completions", True),
                ("/v1/messages", False),
                ("/v1/messages", True),
                ("/v1/responses", False),
                ("/v1/responses", True),
            )
        ),
    ],
)
def test_a_request_whose_prompt_was_being_read_is_given_to_the_next_worker(home: Path, path: str, stream: bool) -> None:
    script = {"text": "one two", "prefill_seconds": 2.0}
    body = {**body_for(path, model="a", max_tokens=20), "stream": stream}
    with running_router(home, *fake_config(home, {"a": script})) as router, ThreadPoolExecutor(1) as pool:
        asked = pool.submit(call, router, "POST", path, body)
        router.wait_state("a", "ready")
        wait_until(lambda: router.model("a")["streams"] == 1, "the worker has begun with it")
        os.kill(router.model("a")["pid"], signal.SIGTERM)
        reply = asked.result(40)
        assert reply.status == 200, reply.body
        assert router.model("a")["loads"] == 2
        assert b"two" in reply.body
        assert b"unexpectedly" not in reply.body
        assert router.status()["models"][0]["failures"] == 0
        assert "outcome=ok" in router.wait_line("event=request ")


def test_a_request_that_loses_three_workers_gets_an_error(home: Path) -> None:
    with (
        running_router(home, *fake_config(home, {"a": {"prefill_seconds": 20.0}})) as router,
        ThreadPoolExecutor(1) as pool,
    ):
        asked = pool.submit(call, router, "POST", "/v1/chat/completions", body_for("/v1/chat/completions", model="a"))
        for load in range(1, 4):
            wait_until(lambda: (router.model("a")["loads"], router.model("a")["streams"]) == (load, 1), "begun", 20)  # noqa: B023
            os.kill(router.model("a")["pid"], signal.SIGTERM)
        reply = asked.result(40)
        assert (reply.status, json.loads(reply.body)["error"]["code"]) == (500, "worker_died")


def test_an_idle_worker_that_somebody_else_ends_is_replaced_at_the_next_request(home: Path) -> None:
    with running_router(home, *fake_config(home, {"a": {"tokens": 2}})) as router:
        router.generate("a")
        for _ in range(10):
            os.kill(router.model("a")["pid"], signal.SIGTERM)
            assert router.generate("a")["done_reason"] == "stop"
        assert router.model("a")["loads"] == 11


def test_a_run_directory_that_was_removed_is_made_again(home: Path) -> None:
    """As a cleaner of temporary files does after some days."""
    scripts = {"a": {"tokens": 2}, "b": {"tokens": 2}, "c": {"tokens": 2}}
    with running_router(home, *fake_config(home, scripts)) as router:
        router.generate("a")
        (lock,) = [Path(file.path) for file in psutil.Process(router.pid).open_files() if file.path.endswith("/lock")]
        (lock.parent / "s").unlink()
        assert router.generate("b")["done"]
        (again,) = [Path(file.path) for file in psutil.Process(router.pid).open_files() if file.path.endswith("/lock")]
        shutil.rmtree(again.parent)
        assert router.generate("c")["done"]
        assert router.generate("a")["done"], "the workers from before are still there"
        assert router.model("a")["loads"] == 1
        (last,) = [Path(file.path) for file in psutil.Process(router.pid).open_files() if file.path.endswith("/lock")]
        assert {int(note.name[2:]) for note in last.parent.glob("w-*")} == {child.pid for child in router.children()}
    assert not last.parent.exists()


@pytest.mark.slow
@pytest.mark.parametrize("standby", [0, 1])
def test_a_worker_that_is_stopped_before_it_is_ready_costs_no_long_wait(home: Path, standby: int) -> None:
    """SIGSTOP or a debugger: the process sends nothing and uses no processor."""
    with running_router(home, "--standby-workers", str(standby)) as router, ThreadPoolExecutor(1) as pool:
        if standby:
            (pid,) = wait_until(lambda: router.status()["router"]["standby_pids"], "a standby worker")
            os.kill(pid, signal.SIGSTOP)
            began = time.monotonic()
            assert router.generate("demo", options={"num_predict": 1})["done"]
            assert time.monotonic() - began < 15, "a fresh one does it"
            wait_until(lambda: not psutil.pid_exists(pid), "the one that hangs is ended", 20)
            return
        asked = pool.submit(router.generate, "demo")
        own = psutil.Process(router.pid).cmdline()
        (child,) = wait_until(
            lambda: [child for child in router.children() if child.cmdline() not in ([], own)], "its program runs"
        )
        os.kill(child.pid, signal.SIGSTOP)
        with pytest.raises(ApiError, match="did not say hello, and made no progress for 20 s"):
            asked.result(45)
        wait_until(lambda: not child.is_running(), "it is ended", 10)
