"""Ends: of the router by signal and by command, of what a killed router left behind, of preloaded and pinned models."""

from __future__ import annotations

import signal
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

import psutil
import pytest

from mlx_router_server.cli.client import ApiError, NoRouter
from tests.support.command import command_on
from tests.support.fakes import fake_config
from tests.support.http import call
from tests.support.router import RouterProcess, running_router, still_alive, wait_until

_ENDLESS = {"tokens": 1_000_000, "tokens_per_second": 50}


def test_sigterm_refuses_who_waits_and_lets_run_what_runs(home: Path) -> None:
    scripts = {"a": {"tokens": 60, "tokens_per_second": 50}, "b": {"tokens": 2}}
    router = RouterProcess(home, fake_config(home, scripts, max_loaded_models=1))
    stream = router.client.stream("/api/generate", {"model": "a", "prompt": "go"})
    next(stream)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(router.generate, "b")
        wait_until(lambda: router.model("b")["queued"] == 1, "it waits")
        router.process.terminate()
        with pytest.raises(ApiError, match="shutting down"):
            waiting.result(10)
    assert list(stream)[-1]["eval_count"] == 60
    assert router.process.wait(10) == -signal.SIGTERM
    router.stop()


def _listens(url: str) -> bool:
    parts = urlsplit(url)
    with socket.socket() as probe:
        return probe.connect_ex((parts.hostname, parts.port)) == 0


@pytest.mark.covers("O133")
def test_a_second_signal_hastens_and_leaves_nothing(home: Path) -> None:
    router = RouterProcess(home, fake_config(home, {"a": _ENDLESS}, drain_timeout_seconds=300))
    stream = router.client.stream("/api/generate", {"model": "a", "prompt": "go"})
    next(stream)
    workers = router.children()
    (lock,) = [Path(file.path) for file in psutil.Process(router.pid).open_files() if file.path.endswith("/lock")]
    router.process.terminate()
    # Signals that come while another is pending are one for the kernel.
    wait_until(lambda: not _listens(router.url), "the first signal has been received")
    next(stream)  # it cuts nothing
    router.process.terminate()
    with pytest.raises(ApiError, match="shutting down"):
        list(stream)
    assert router.process.wait(10) == -signal.SIGTERM
    assert still_alive(workers) == []
    assert not lock.parent.exists()
    router.stop()


@pytest.mark.req("R49")
def test_stop_says_so_only_when_everything_is_gone(home: Path) -> None:
    with running_router(home, *fake_config(home, {"a": {"memory_bytes": 200_000_000, "tokens": 2}})) as router:
        router.generate("a")
        workers = router.children()
        done = command_on(router, "stop")
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.startswith(f"stopped (pid {router.pid}, ")
        assert still_alive(workers) == []
        assert router.process.wait(5) == -signal.SIGTERM


@pytest.mark.slow
@pytest.mark.req("R49")
def test_stop_of_a_worker_that_does_not_leave_fails_and_names_it(home: Path) -> None:
    script = {"ignore_shutdown": True, "ignore_term": True, "tokens": 2}
    arguments = fake_config(home, {"a": script}, stop_timeout_seconds=3.0)
    with running_router(home, *arguments) as router:
        router.generate("a")
        pid = router.model("a")["pid"]
        done = command_on(router, "stop", "--timeout", "1")
        assert done.returncode == 1
        assert "still running after 1 s: pid " in done.stderr
        assert str(pid) in done.stderr
        assert done.stdout == ""


@pytest.mark.req("R48")
def test_the_next_run_ends_workers_that_outlived_a_killed_router(home: Path) -> None:
    """One that is frozen before it could leave is found by the note in the run's folder."""
    router = RouterProcess(home, fake_config(home, {"a": {"hang_at": "generate"}}))
    stream = router.client.stream("/api/generate", {"model": "a", "prompt": "go"})
    next(stream)
    (worker,) = router.children()
    worker.suspend()  # it cannot see that its router is gone
    wait_until(lambda: worker.status() == psutil.STATUS_STOPPED, "it is frozen")
    router.process.kill()
    router.process.wait(5)
    stream.close()
    with running_router(home, *fake_config(home, {"a": {"tokens": 2}})) as following:
        # By this router, or by one that another test has started in the same moment.
        wait_until(lambda: not still_alive([worker]), "the leftover is gone", 5)
        assert following.generate("a")["done"] is True
    router.stop()


def test_preloaded_models_come_in_the_background_in_their_order_and_evict_nobody(home: Path) -> None:
    scripts = {name: {"load_seconds": 0.5, "tokens": 2} for name in ("first", "second", "third")}
    arguments = fake_config(home, scripts, max_loaded_models=2)
    config = home / "config.toml"
    config.write_text(config.read_text().replace("[models.", "[models.").replace("path =", "preload = true\npath ="))
    with running_router(home, *arguments) as router:
        assert router.client.get("/health")["status"] == "ok", "the listener does not wait for them"
        for name in ("first", "second"):
            assert router.wait_state(name, "ready")["loads"] == 1
        assert router.model("third")["state"] == "unloaded"
        assert any("event=not_loaded model='third:latest'" in line for line in router.lines)
        assert router.generate("third")["done"] is True, "on demand it is loaded all the same"


@pytest.mark.covers("T181")
def test_a_pinned_model_stays_is_not_evicted_and_not_unloaded_by_clients(home: Path) -> None:
    scripts = {"a": {"tokens": 2}, "b": {"tokens": 2}}
    with running_router(home, *fake_config(home, scripts, max_loaded_models=1, keep_alive="200ms")) as router:
        router.generate("a")
        assert call(router, "POST", "/admin/models/a/pin").json() == {
            "name": "a:latest", "state": "ready", "pinned": True,
        }  # fmt: skip
        router.generate("a")
        assert router.model("a")["expires_in_seconds"] == -1
        with pytest.raises(ApiError, match="held by pinned a:latest"):
            router.generate("b")
        refused = call(router, "POST", "/api/generate", {"model": "a", "keep_alive": 0})
        assert (refused.status, "pinned" in refused.json()["error"]) == (400, True)
        call(router, "POST", "/admin/models/a/unpin")
        router.wait_state("a", "unloaded", seconds=5)
        assert router.generate("b")["done"] is True


def test_keep_alive_comes_by_body_or_header_on_both_apis_within_the_bounds_of_the_model(home: Path) -> None:
    scripts = {"a": {"tokens": 2}, "locked": {"tokens": 2}}
    arguments = fake_config(home, scripts, keep_alive="1h")
    config = home / "config.toml"
    text = config.read_text().replace('[models."a"]', '[models."a"]\nkeep_alive_min = "2m"\nkeep_alive_max = "30m"')
    config.write_text(text.replace('[models."locked"]', '[models."locked"]\nkeep_alive = "7m"\nkeep_alive_lock = true'))
    with running_router(home, *arguments) as router:

        def left(name: str) -> float:
            wait_until(lambda: router.model(name)["in_flight"] == 0, "it is idle")
            return round(float(router.model(name)["expires_in_seconds"]) / 60)

        chat = {"messages": [{"role": "user", "content": "go"}]}
        router.generate("a")
        assert left("a") == 30, "the default of an hour is above what this model may stay"
        call(router, "POST", "/v1/chat/completions", {"model": "a", "keep_alive": "10m", **chat})
        assert left("a") == 10
        call(router, "POST", "/v1/chat/completions", {"model": "a", **chat}, X_Keep_Alive="20m")
        assert left("a") == 20
        call(router, "POST", "/api/chat", {"model": "a", "stream": False, **chat}, X_Keep_Alive="900")
        assert left("a") == 15
        call(router, "POST", "/api/generate", {"model": "a", "keep_alive": 0})
        assert left("a") == 2
        router.generate("locked", keep_alive="1s")
        assert left("locked") == 7


@pytest.mark.req("R10", "R48")
def test_a_killed_router_in_the_middle_of_streams_leaves_no_worker(home: Path) -> None:
    arguments = fake_config(home, dict.fromkeys("abc", _ENDLESS))
    router = RouterProcess(home, arguments)
    ended = threading.Barrier(4)

    def listen(model: str) -> None:
        stream = router.client.stream("/api/generate", {"model": model, "prompt": "go"})
        try:
            for _ in stream:
                pass
        except NoRouter:
            ended.wait(20)

    threads = [threading.Thread(target=listen, args=(model,), daemon=True) for model in "abc"]
    for thread in threads:
        thread.start()
    wait_until(lambda: all(router.model(model)["tokens_total"] for model in "abc"), "all are answered")
    workers = router.children()
    assert len(workers) == 3
    router.process.kill()
    wait_until(lambda: not still_alive(workers), "the workers have left", 2)
    ended.wait(20)
    for thread in threads:
        thread.join(20)
    router.stop()
