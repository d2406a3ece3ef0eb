"""The fork server and the workers it forks: what a fork must not take over, and what becomes of loads when it fails."""

from __future__ import annotations

import asyncio
import ctypes
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from mlx_router_server.workers.forking import ForkServer, ForkUnavailable
from mlx_router_server.workers.handle import WorkerHandle
from mlx_router_server.workers.memory import process_bytes
from tests.support.router import still_alive
from tests.support.sources import run_bounded, worker_processes

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the fork server is for Linux")

_PR_SET_CHILD_SUBREAPER = 36  # <linux/prctl.h>


@asynccontextmanager
async def _forked(*engines: str, count: int = 1) -> AsyncIterator[tuple[ForkServer, list[WorkerHandle]]]:
    """A fork server of these engine kinds, and workers of the first that have said hello."""
    async with worker_processes() as processes:
        server = await ForkServer.start(engines)
        workers = [await processes.start(engines[0], fork_server=server) for _ in range(count)]
        try:
            for worker in workers:
                await worker.wait_hello(20)
            yield server, workers
        finally:
            await asyncio.gather(*(worker.stop("the test is over", 2) for worker in workers))
            await server.close()


# ------------------------------------------------------------------------------------------- safety of the fork


def test_a_forked_worker_has_a_session_and_streams_of_its_own() -> None:
    async def test() -> None:
        async with _forked("fake", count=2) as (server, workers):
            ready = await server.wait_ready()
            assert (ready.engines, ready.import_errors, ready.unsafe) == (["fake"], {}, "")
            pids = [worker.pid for worker in workers]
            assert len({os.getsid(pid) for pid in (*pids, server.pid, os.getpid())}) == 4
            for pid in pids:
                assert os.getpgid(pid) == pid
                assert os.readlink(f"/proc/{pid}/fd/0") == os.devnull, "a library that asks on stdin gets its end"
                assert _proc(pid, "comm").strip() == "mlx-worker"
                assert "mlx_router_worker.fork_server" in psutil.Process(pid).cmdline()
            # Its control socket and the pidfds of its other children stay with the fork server.
            first, second = (_links(pid) for pid in pids)
            control = {link for link in _links(server.pid) if link.startswith("socket:")}
            assert control
            assert not control & first
            assert not control & second
            pidfds = [link for link in _links(server.pid, unique=False) if "pidfd" in link]
            assert len(pidfds) == 2
            assert not any("pidfd" in link for link in second)
            pipes = [{link for link in links if link.startswith("pipe:")} for links in (first, second)]
            assert not pipes[0] & pipes[1], "an open end of the other's pipe would hide the router's end"

    run_bounded(test)


def _proc(pid: int, name: str) -> str:
    return Path(f"/proc/{pid}/{name}").read_text(encoding="utf-8")


def _links(pid: int, *, unique: bool = True) -> Any:
    found = [os.readlink(file) for file in Path(f"/proc/{pid}/fd").iterdir()]
    return set(found) if unique else found


def test_a_fork_server_has_one_thread_and_no_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("MLX_ROUTER_API_KEYS", "secret-key")

    async def test() -> None:
        async with _forked("mlx", "embed", "tokenizer") as (server, _):
            assert (await server.wait_ready()).engines == ["mlx", "embed", "tokenizer"]
            assert len(os.listdir(f"/proc/{server.pid}/task")) == 1
            environment = _proc(server.pid, "environ")
            assert "secret" not in environment
            assert psutil.Process(server.pid).memory_info().rss < 200e6
            # ctrl-C is for the router; TERM ends it, and what it forks starts with the same handlers.
            status = dict(line.split(":\t", 1) for line in _proc(server.pid, "status").splitlines())
            assert int(status["SigCgt"], 16) & (1 << (signal.SIGTERM - 1)) == 0
            assert int(status["SigIgn"], 16) & (1 << (signal.SIGINT - 1))

    run_bounded(test)


def test_shared_memory_is_counted_once(tmp_path: Path) -> None:
    async def test() -> None:
        async with _forked("mlx", count=4) as (server, workers):
            base = process_bytes(server.pid)
            assert base > 30e6
            for worker in workers:
                assert process_bytes(worker.pid) > 0.8 * base, "the kernel counts shared pages for everybody"
                worker.measure_shared()
                assert worker.memory_bytes < 0.5 * base
                assert worker.shared_bytes > 0.4 * base

    run_bounded(test)


def test_the_exit_status_of_a_forked_worker_is_known() -> None:
    async def test() -> None:
        async with _forked("fake", count=3) as (_, (first, second, third)):
            assert (await first.stop("done", 5)).rung == "shutdown"
            assert first.exit_reason == "its worker process exited with status 0"
            os.kill(second.pid, signal.SIGKILL)
            await second.exited.wait()
            assert second.exit_reason == "its worker process was ended by signal SIGKILL"
            os.kill(third.pid, signal.SIGTERM)
            await third.exited.wait()
            assert third.was_stopped
            assert not still_alive([p for p in psutil.Process().children(recursive=True) if p.pid == second.pid])

    run_bounded(test)


def test_a_worker_outlives_its_fork_server_and_its_end_is_noticed() -> None:
    async def test() -> None:
        async with _forked("fake", count=2) as (server, (first, second)):
            os.kill(server.pid, signal.SIGKILL)
            await server.closed
            with pytest.raises(ForkUnavailable, match="ended"):
                await _fork_again(server)
            await first.get_stats(2)
            os.kill(first.pid, signal.SIGKILL)
            await first.exited.wait()
            assert first.exit_reason == "its worker process has ended; its exit status is not known"
            await second.stop("done", 5)

    run_bounded(test)


async def _fork_again(server: ForkServer) -> None:
    async with worker_processes() as processes:
        await processes.start("fake", fork_server=server)


def test_workers_that_outlive_their_fork_server_leave_no_zombies_in_a_container() -> None:
    """Where the router is the first process of a container, or a subreaper, they become its children."""
    children = psutil.Process().children

    async def test() -> None:
        async with _forked("fake", count=2) as (server, (first, second)):
            # Its status is not reported, because the fork server is stopped.
            os.kill(server.pid, signal.SIGSTOP)
            os.kill(first.pid, signal.SIGKILL)
            await first.exited.wait()
            assert first.exit_reason == "its worker process has ended; its exit status is not known"
            os.kill(server.pid, signal.SIGKILL)
            await server.close()
            os.kill(second.pid, signal.SIGKILL)
            await second.exited.wait()
            assert second.exit_reason == "its worker process was ended by signal SIGKILL"
            left = {child.pid for child in children(recursive=True)}
            assert not left & {server.pid, first.pid, second.pid}

    system = ctypes.CDLL(None, use_errno=True)
    assert system.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) == 0
    try:
        run_bounded(test)
    finally:
        system.prctl(_PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)
