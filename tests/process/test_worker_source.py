"""Where workers come from: what becomes of loads when a fork server fails, and a router with one."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest

from mlx_router_server.workers.forking import ForkServer
from mlx_router_server.workers.source import SourceKind
from tests.support.command import command
from tests.support.router import RouterProcess, running_router, still_alive, wait_until
from tests.support.sources import run_bounded, running_source, server_pid
from tests.tiny_models.random_model import make_random_model

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the fork server is for Linux")

_QUICK = {"options": {"temperature": 0, "num_predict": 8}}


@pytest.mark.parametrize("number", [signal.SIGKILL, pytest.param(signal.SIGSTOP, marks=pytest.mark.slow)])
def test_a_load_is_served_when_the_fork_server_fails_during_its_imports(number: signal.Signals) -> None:
    async def test() -> None:
        async with running_source() as source:
            taking = asyncio.create_task(source.take("mlx"))
            pid = 0
            async with asyncio.timeout(20):
                while not (pid := source.view().fork_server_pid or 0):  # noqa: ASYNC110  # it has no event of its own
                    await asyncio.sleep(0)
            os.kill(pid, number)
            supply = await taking
            assert supply.origin is SourceKind.SPAWN
            source.refill()
            assert await server_pid(source) != pid, "it is replaced"
            await supply.worker.stop("done", 2)

    run_bounded(test)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_load_is_served_when_the_fork_server_fails_before_it_forks(number: signal.Signals) -> None:
    async def test() -> None:
        async with running_source() as source:
            source.prepare("mlx")
            pid = await server_pid(source)
            first = await source.take("mlx")
            assert first.origin is SourceKind.FORK
            os.kill(pid, number)
            supplies = await asyncio.gather(*(source.take("mlx") for _ in range(2)))
            assert {supply.origin for supply in supplies} <= {SourceKind.SPAWN, SourceKind.FORK}
            await first.worker.get_stats(2)
            source.refill()
            assert await server_pid(source) != pid, "it is replaced"
            assert (await source.take("mlx")).origin is SourceKind.FORK

    run_bounded(test)


@pytest.mark.parametrize("number", [signal.SIGKILL, pytest.param(signal.SIGSTOP, marks=pytest.mark.slow)])
def test_a_load_is_served_when_the_forked_worker_fails_before_its_hello(
    number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    forked: list[int] = []
    fork = ForkServer.fork

    async def fork_and_hit(self: ForkServer, worker_id: str) -> Any:
        process = await fork(self, worker_id)
        os.kill(process.pid, number)
        forked.append(process.pid)
        return process

    monkeypatch.setattr(ForkServer, "fork", fork_and_hit)

    async def test() -> None:
        async with running_source() as source:
            for attempt in range(3):
                supply = await source.take("fake")
                assert supply.origin is SourceKind.SPAWN
                assert len(forked) == attempt + 1
                await supply.worker.stop("done", 2)
            # After three failures in a row it is not tried any more for a while; idle workers take its place.
            assert source.view().kind is SourceKind.STANDBY
            assert "did not say hello" in source.view().reason
            await source.take("fake")
            assert len(forked) == 3

    run_bounded(test)
    assert not any(psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie" for pid in forked)


def test_a_worker_that_is_quicker_than_the_router_is_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    """A forked worker could say hello before the router listens for it."""
    fork = ForkServer.fork

    async def fork_and_pause(self: ForkServer, worker_id: str) -> Any:
        process = await fork(self, worker_id)
        await asyncio.sleep(0.5)
        return process

    monkeypatch.setattr(ForkServer, "fork", fork_and_pause)

    async def test() -> None:
        async with running_source() as source:
            assert (await source.take("fake")).origin is SourceKind.FORK

    run_bounded(test)


def test_the_end_of_a_fork_server_is_one_failure_however_many_wait_for_it() -> None:
    async def test() -> None:
        async with running_source() as source:
            taking = [asyncio.create_task(source.take("fake")) for _ in range(5)]
            async with asyncio.timeout(20):
                while not (pid := source.view().fork_server_pid or 0):  # noqa: ASYNC110  # it has no event of its own
                    await asyncio.sleep(0)
            os.kill(pid, signal.SIGKILL)
            assert {supply.origin for supply in await asyncio.gather(*taking)} == {SourceKind.SPAWN}
            assert source.view().kind is SourceKind.FORK
            assert (await source.take("fake")).origin is SourceKind.FORK

    run_bounded(test)


def _path_with_threads(folder: Path) -> str:
    """A PYTHONPATH that has each fork server start a thread, as a library might."""
    (folder / "sitecustomize.py").write_text(
        "import sys, threading, time\n"
        "if 'mlx_router_worker.fork_server' in sys.orig_argv:\n"
        "    threading.Thread(target=time.sleep, args=(60,), daemon=True).start()\n"
    )
    return os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH", "")]))


def test_a_fork_server_whose_libraries_start_threads_is_not_used(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A lock that another thread holds at the fork is never released in the child."""
    monkeypatch.setenv("PYTHONPATH", _path_with_threads(tmp_path))

    async def test() -> None:
        async with running_source() as source:
            assert (await source.take("fake")).origin is SourceKind.SPAWN
            view = source.view()
            assert (view.kind, view.fork_server_pid) == (SourceKind.STANDBY, None)
            assert "threads" in view.reason

    run_bounded(test)


@pytest.mark.slow
def test_doctor_says_why_workers_are_not_forked(tmp_path: Path) -> None:
    environment = {"PYTHONPATH": _path_with_threads(tmp_path), "HF_HOME": str(tmp_path)}
    done = command("doctor", "--json", home=tmp_path, environment=environment)
    (source,) = (found for found in json.loads(done.stdout) if found["about"] == "worker source")
    assert source["level"] == "warning"
    assert source["text"].startswith("idle workers wait for models")
    assert "threads" in source["text"]
    assert "worker_source" in source["fix"]


@pytest.mark.slow
def test_engines_that_models_have_needed_are_imported_by_the_next_fork_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlx_router_server.workers.source._SHARED_ENGINES", ("mlx",))

    async def test() -> None:
        async with running_source() as source:
            source._engines = ("mlx",)
            supply = await source.take("embed")
            assert supply.origin is SourceKind.FORK, "the fork imports it by itself"
            first = await server_pid(source)
            source.refill()
            assert source._replacing is not None
            await source._replacing
            assert await server_pid(source) != first
            assert source._server is not None
            assert source._server.engines == ("mlx", "embed")
            # The former one ends with its last worker, and reports how that ended.
            assert psutil.pid_exists(first)
            await supply.worker.stop("done", 2)
            assert supply.worker.exit_reason == "its worker process exited with status 0"
            ahead = await source.take("mlx")
            await ahead.worker.stop("done", 2)
            await asyncio.to_thread(
                wait_until, lambda: not psutil.pid_exists(first), "the former fork server has ended"
            )

    run_bounded(test)


def test_the_fork_server_can_be_switched_off_and_on(tmp_path: Path) -> None:
    async def test() -> None:
        async with running_source(SourceKind.SPAWN) as source:
            source.refill()
            assert (await source.take("fake")).origin is SourceKind.SPAWN
            assert source.view().fork_server_pid is None
            source.reconfigure(SourceKind.FORK, 1)
            source.refill()
            pid = await server_pid(source)
            assert (await source.take("fake")).origin is SourceKind.FORK
            source.reconfigure(SourceKind.STANDBY, 1)
            assert (await source.take("fake")).origin is SourceKind.SPAWN
            assert source.view().kind is SourceKind.STANDBY
            assert psutil.pid_exists(pid), "its worker lives"

    run_bounded(test)


@pytest.mark.parametrize(
    ("kind", "standby", "used"),
    [("auto", 1, "fork"), ("auto", 0, "spawn"), ("fork", 0, "fork"), ("standby", 1, "standby"), ("standby", 0, "spawn"),
     ("spawn", 3, "spawn")],
)  # fmt: skip
def test_what_the_settings_mean(kind: str, standby: int, used: str) -> None:
    async def test() -> None:
        async with running_source(SourceKind(kind), standby) as source:
            assert source.view().kind.value == used

    run_bounded(test)


# ------------------------------------------------------------------------------------------- in a router


def _models(tmp_path: Path) -> str:
    for seed, name in enumerate(("one", "two")):
        make_random_model(tmp_path / "models" / name, size_bytes=1_000_000, seed=seed)
    return str(tmp_path / "models")


def _fork_server(router: RouterProcess) -> int:
    """The pid of its fork server, once that is ready and a worker is forked ahead."""

    def ready() -> int | None:
        status = router.status()["router"]
        source = status["worker_source"]
        return source["fork_server_pid"] if source["fork_server_ready"] and status["standby_pids"] else None

    pid: int = wait_until(ready, "the fork server is ready")
    return pid


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_no_request_fails_when_the_fork_server_does(tmp_path: Path, number: signal.Signals) -> None:
    """Hit while it imports, while it is idle, between two loads, while a stream runs, and at the end of its workers."""
    arguments = ["--models-dir", _models(tmp_path), "--max-loaded-models", "1"]
    with running_router(tmp_path, *arguments, standby=True) as router, ThreadPoolExecutor(4) as pool:
        hits: list[int] = []

        def hit() -> None:
            pid = router.status()["router"]["worker_source"]["fork_server_pid"]
            if pid is not None and pid not in hits:
                hits.append(pid)
                os.kill(pid, number)

        hit()  # it imports
        assert router.generate("one", **_QUICK)["done"]
        _fork_server(router)
        hit()  # idle, with a worker forked ahead
        for name in ("two", "one", "two"):
            assert router.generate(name, **_QUICK)["done"]
        _fork_server(router)
        stream = pool.submit(router.generate, "demo", prompt="Tell me a long story.")
        router.wait_state("demo", "ready")
        hit()  # a stream of a forked worker runs, which is drained and ended after that
        swap = pool.submit(router.generate, "one", **_QUICK)
        assert stream.result(60)["done_reason"] == "stop"
        assert swap.result(60)["done"]
        together = [pool.submit(router.generate, name, **_QUICK) for name in ("one", "two", "one", "two")]
        hit()
        assert all(answer.result(60)["done"] for answer in together)
        assert len(hits) >= 3
        assert router.status()["router"]["kill_incidents"] == 0
    assert not any(psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie" for pid in hits)


@pytest.mark.slow
def test_nothing_is_forked_ahead_while_a_request_waits_for_its_first_token(tmp_path: Path) -> None:
    """A start of another worker would compete with it for the cores."""
    make_random_model(tmp_path / "models" / "one", size_bytes=8_000_000, seed=1)
    body = {"prompt": "go " * 300, "raw": True, "options": {"temperature": 0, "num_predict": 1}}
    with (
        running_router(tmp_path, "--models-dir", str(tmp_path / "models"), standby=True) as router,
        ThreadPoolExecutor(1) as pool,
    ):
        router.client.post("/admin/models/demo/load")
        _fork_server(router)
        answer = pool.submit(router.generate, "one", **body)
        router.wait_state("one", "ready")
        router.client.post("/admin/models/demo/unload")  # after the end of a worker, too
        looks = []
        while not answer.done():
            status = router.status()
            (model,) = (found for found in status["models"] if found["name"] == "one:latest")
            if model["state"] in ("loading", "ready"):
                looks.append((model["last_swap"]["first_token_seconds"] is not None, status["router"]["standby_pids"]))
        assert answer.result()["done"]
        waiting = [pids for has_token, pids in looks if not has_token]
        assert len(waiting) > 5
        assert not any(waiting)
        assert _fork_server(router), "one is forked afterwards"


def test_a_model_that_replaces_another_is_loaded_at_full_speed(tmp_path: Path) -> None:
    """The one that exits has just answered, but answers nobody any more: the load need not leave it bandwidth."""
    arguments = ["--models-dir", _models(tmp_path), "--max-loaded-models", "1"]
    with running_router(tmp_path, *arguments, standby=True) as router:
        _fork_server(router)
        for name in ("one", "two", "one"):
            router.generate(name, **_QUICK)
            assert not router.model(name)["last_swap"]["yielded"]


@pytest.mark.slow
def test_two_routers_have_a_fork_server_each(tmp_path: Path) -> None:
    homes = [tmp_path / name for name in ("first", "second")]
    for home in homes:
        home.mkdir()
    with running_router(homes[0], standby=True) as first, running_router(homes[1], standby=True) as second:
        pids = [_fork_server(first), _fork_server(second)]
        assert pids[0] != pids[1]
        for router in (first, second):
            assert router.generate("demo", **_QUICK)["done"]
            assert router.model("demo")["last_swap"]["source"] == "fork"
        os.kill(pids[0], signal.SIGKILL)
        assert second.status()["router"]["worker_source"]["fork_server_pid"] == pids[1]


@pytest.mark.slow
def test_nothing_is_left_of_a_router_that_is_killed(tmp_path: Path) -> None:
    with running_router(tmp_path, standby=True) as router:
        _fork_server(router)
        assert router.generate("demo", **_QUICK)["done"]
        children = router.children()
        assert len(children) >= 2
        os.kill(router.pid, signal.SIGKILL)
        wait_until(lambda: not still_alive(children), "the fork server and its workers have ended")


@pytest.mark.slow
def test_a_stopped_fork_server_of_a_killed_router_is_ended_by_the_next(tmp_path: Path) -> None:
    with running_router(tmp_path, standby=True) as router:
        pid = _fork_server(router)
        process = psutil.Process(pid)
        os.kill(pid, signal.SIGSTOP)
        os.kill(router.pid, signal.SIGKILL)
        router.process.wait(30)
    assert still_alive([process])
    with running_router(tmp_path) as router:
        wait_until(lambda: not still_alive([process]), "the next router has ended it")


_SANDBOX = """
set -e
kept=$1; shift
mount --make-rprivate /
mount -t tmpfs tmpfs /mnt
number=0
for path in $kept; do
    mkdir /mnt/$number; mount --bind "$path" /mnt/$number; number=$((number + 1))
done
mount -t tmpfs tmpfs /tmp
number=0
for path in $kept; do
    mkdir -p "$path"; mount --bind /mnt/$number "$path"; number=$((number + 1))
done
mount -o remount,bind,ro /
exec setpriv --no-new-privs "$@"
"""


@pytest.mark.slow
def test_it_works_in_the_sandbox_of_the_unit(tmp_path: Path) -> None:
    """PrivateUsers, PrivateTmp, ProtectSystem=strict and NoNewPrivileges."""
    if subprocess.run(["unshare", "--user", "--map-root-user", "--mount", "true"], check=False).returncode:
        pytest.skip("this kernel allows no user namespaces, so systemd cannot make this sandbox either")
    needed = {str(tmp_path), sys.prefix, sys.base_prefix, str(Path(__file__).parents[2])}
    kept = " ".join(path for path in needed if path.startswith("/tmp/"))
    sandbox = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", _SANDBOX, "sh", kept]
    with running_router(tmp_path, standby=True, python=[*sandbox, sys.executable, "-P"]) as router:
        _fork_server(router)
        assert router.generate("demo", **_QUICK)["done"]
        assert router.model("demo")["last_swap"]["source"] == "fork"


def test_forks_of_one_server_draw_different_random_numbers(tmp_path: Path) -> None:
    """Without new seeds each fork would continue the generator of its parent."""
    make_random_model(tmp_path / "models" / "random", size_bytes=1_000_000, seed=1)
    prompts = {"prompt": "go", "raw": True, "options": {"temperature": 1.5, "num_predict": 24}}
    with running_router(tmp_path, "--models-dir", str(tmp_path / "models"), standby=True) as router:
        texts = []
        for _ in range(3):
            texts.append(router.generate("random", **prompts)["response"])
            assert router.model("random")["last_swap"]["source"] == "fork"
            router.client.post("/admin/models/random/unload")
            router.wait_state("random", "unloaded")
        assert len(set(texts)) == 3
