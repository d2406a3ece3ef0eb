"""One worker process, spoken to directly: handshake, liveness, orderly end."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import zmq

from mlx_router_server.workers.handle import WorkerHandle
from mlx_router_server.workers.launcher import launch, worker_environment
from mlx_router_server.workers.link import WorkerLink
from mlx_router_server.workers.run_directory import RunDirectory
from mlx_router_shared.codec import encode
from mlx_router_shared.errors import WorkerDied
from mlx_router_shared.generation import Finish, GenerationRequest, Message, Role, Started, TextDelta
from mlx_router_shared.protocol import PROTOCOL_VERSION, Bootstrap, Hello, Load, Loading
from tests.support.fakes import write_fake
from tests.support.router import wait_until

_REQUEST = GenerationRequest(messages=[Message(role=Role.USER, content="go")])


@asynccontextmanager
async def _worker(tmp_path: Path, **script: Any) -> AsyncIterator[tuple[WorkerHandle, Load]]:
    """A worker with the fake engine, and what it is to load."""
    directory = RunDirectory.create(tmp_path)
    link = WorkerLink(directory.endpoint)
    bootstrap = Bootstrap(endpoint=directory.endpoint, worker_id="p-1", token="secret", engine="fake")
    process = await launch("p-1")
    handle = WorkerHandle("p-1", "fake", process, link, "secret")
    process.begin(bootstrap)
    load = Load(model="a", path=str(write_fake(tmp_path / "model", **script)), context_tokens=0, parallel=4)
    try:
        yield handle, load
    finally:
        await handle.stop("the test is over", 2)
        await link.close()
        directory.remove()


def _run(test: Callable[[], Coroutine[Any, Any, None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(20):
            await test()

    asyncio.run(bounded())


def test_it_answers_while_it_loads_and_while_it_generates(tmp_path: Path) -> None:
    async def test() -> None:
        script = {"load_seconds": 0.5, "burn": True, "tokens": 10_000, "tokens_per_second": 200}
        async with _worker(tmp_path, **script) as (handle, load):
            hello = await handle.wait_hello(10)
            assert (hello.engine, hello.pid) == ("fake", handle.pid)
            loading = asyncio.create_task(handle.load(load, 10))
            while handle.fraction == 0.0:
                await handle.get_stats(2)
            stats = await handle.get_stats(2)
            assert (stats.steps, stats.streams) == (0, 0)
            assert not loading.done()
            await loading
            stream = handle.generate(_REQUEST)
            assert isinstance((await anext(stream))[0], Started)
            await anext(stream)
            first = await handle.get_stats(2)
            await anext(stream)
            assert (await handle.get_stats(2)).steps > first.steps > 0
            assert first.streams == 1
            await stream.aclose()

    _run(test)


def test_progress_is_told_in_steps_however_often_an_engine_reports(tmp_path: Path) -> None:
    """A router with more words to read than it can would see readiness late."""

    async def test() -> None:
        async with _worker(tmp_path, load_seconds=0.5, burn=True) as (handle, load):
            await handle.wait_hello(10)
            told: list[Loading] = []
            handle.on_loading = told.append
            await handle.load(load, 10)
            weights = [message.fraction for message in told if message.stage == "weights"]
            assert 2 < len(weights) <= 101
            assert weights == sorted(weights)

    _run(test)


def test_an_engine_that_hangs_is_alive_without_progress(tmp_path: Path) -> None:
    """The two signals that a watchdog needs: the socket thread answers, the step counter stands still."""

    async def test() -> None:
        async with _worker(tmp_path, hang_at="generate", at_token=3) as (handle, load):
            await handle.wait_hello(10)
            await handle.load(load, 10)
            stream = handle.generate(_REQUEST)
            text = ""
            while text != "a-1 a-2 ":
                text += "".join(event.text for event in await anext(stream) if isinstance(event, TextDelta))
            # Periodic statistics use a socket of their own: one sent before the tokens may arrive after them.
            while (first := await handle.get_stats(2)).steps < 2:
                pass
            second = await handle.get_stats(2)
            assert first.steps == second.steps
            assert second.streams == 1
            assert second.step_age_seconds > first.step_age_seconds
            await stream.aclose()

    _run(test)


def test_it_leaves_in_order_with_status_0(tmp_path: Path) -> None:
    async def test() -> None:
        async with _worker(tmp_path) as (handle, load):
            await handle.wait_hello(10)
            await handle.load(load, 10)
            events = [event async for batch in handle.generate(_REQUEST) for event in batch]
            assert isinstance(events[-1], Finish)
            report = await handle.stop("asked to", 5)
            assert report.rung == "shutdown"
            assert await handle.process.wait() == 0
            with pytest.raises(WorkerDied):
                await anext(handle.generate(_REQUEST))

    _run(test)


def test_sigterm_is_obeyed_in_order(tmp_path: Path) -> None:
    async def test() -> None:
        async with _worker(tmp_path) as (handle, load):
            await handle.wait_hello(10)
            await handle.load(load, 10)
            os.kill(handle.pid, signal.SIGTERM)
            await handle.exited.wait()
            assert await handle.process.wait() == 0

    _run(test)


def test_signals_that_arrive_during_each_other_end_a_worker() -> None:
    """The second one interrupts the handler of the first, which may hold no lock then."""
    script = (
        "import os, signal, threading, types\n"
        "from queue import SimpleQueue\n"
        "from mlx_router_worker.process import _terminate\n"
        "link, inbox = types.SimpleNamespace(shutdown_requested=False), SimpleQueue()\n"
        "signal.signal(signal.SIGTERM, lambda *_: _terminate(link, inbox))\n"
        "threading.Thread(target=lambda: (inbox.get(), os._exit(0)), daemon=True).start()\n"
        "print('ready', flush=True)\n"
        "SimpleQueue().get()\n"
    )
    workers = [
        subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, env=worker_environment({}))
        for _ in range(3)
    ]
    for worker in workers:
        with worker:
            assert worker.stdout is not None
            assert worker.stdout.readline() == b"ready\n"
            for _ in range(6):
                worker.send_signal(signal.SIGTERM)
            assert worker.wait(10) in (0, 128 + signal.SIGTERM)


def test_a_worker_of_its_own_session_sees_no_secrets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """R33: the environment is minimal, and the token is not to be seen from outside."""
    monkeypatch.setenv("OPENAI_API_KEY", "k")
    monkeypatch.setenv("HF_TOKEN", "t")
    monkeypatch.setenv("MLX_ROUTER_PORT", "1")

    async def test() -> None:
        async with _worker(tmp_path) as (handle, _):
            await handle.wait_hello(10)
            process = psutil.Process(handle.pid)
            environment = process.environ()
            assert not {"OPENAI_API_KEY", "HF_TOKEN", "MLX_ROUTER_PORT", "PYTHONDONTWRITEBYTECODE"} & set(environment)
            assert environment["HF_HUB_OFFLINE"] == "1"
            assert "secret" not in " ".join([*process.cmdline(), *environment.values()])
            assert os.getsid(handle.pid) == handle.pid

    _run(test)
    assert "PYTHONDONTWRITEBYTECODE" not in worker_environment({"PYTHONDONTWRITEBYTECODE": "1"})


@pytest.mark.parametrize(
    ("change", "sentence"),
    [({"token": "guessed"}, "wrong token"), ({"protocol_version": 99}, "speaks protocol version 99, this router 2")],
)
def test_a_peer_that_is_not_ours_is_not_heard(tmp_path: Path, change: dict[str, Any], sentence: str) -> None:
    async def test() -> None:
        directory = RunDirectory.create(tmp_path)
        link = WorkerLink(directory.endpoint)
        heard: list[Any] = []
        broken: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        link.expect("w", "secret", heard.append, broken.set_result)
        context = zmq.Context()
        for identity in (b"stranger", b"w"):
            socket = context.socket(zmq.DEALER)
            socket.setsockopt(zmq.IDENTITY, identity)
            socket.setsockopt(zmq.LINGER, 0)
            socket.connect(directory.endpoint)
            hello = {"protocol_version": 1, "pid": 1, "token": "secret", "engine": "fake", "import_seconds": 0.0}
            socket.send(encode(Hello(**{**hello, **change})))
            if identity == b"w":
                assert sentence in await broken
            socket.close()
        assert heard == []
        context.term()
        await link.close()
        directory.remove()

    _run(test)


def test_started_by_hand_it_says_so() -> None:
    done = subprocess.run(
        [sys.executable, "-P", "-m", "mlx_router_worker"],
        input="",
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )
    assert done.returncode == 2
    assert "not by hand" in done.stderr


def test_the_run_directory_is_private_and_swept_only_when_its_router_is_gone(tmp_path: Path) -> None:
    first = RunDirectory.create(tmp_path)
    second = RunDirectory.create(tmp_path)
    assert first.path.exists(), "its router lives"
    assert first.path.stat().st_mode & 0o777 == 0o700
    dead = tmp_path / "mlxr-dead"
    dead.mkdir()
    (dead / "lock").touch()
    stranger = tmp_path / "mlxr-stranger"
    stranger.mkdir()
    second.remove()
    third = RunDirectory.create(tmp_path)
    assert not dead.exists()
    assert stranger.exists(), "without a lock it may be in the making"
    third.remove()
    first.remove()


def test_what_a_worker_has_sent_can_be_read_without_the_event_loop(tmp_path: Path) -> None:
    """A router that was too busy to look must not take a worker's last message for missing."""

    async def test() -> None:
        directory = RunDirectory.create(tmp_path)
        link = WorkerLink(directory.endpoint)
        received: list[Any] = []
        link.expect("p-1", "secret", received.append, received.append)
        context = zmq.Context()
        socket = context.socket(zmq.DEALER)
        socket.setsockopt(zmq.IDENTITY, b"p-1")
        socket.connect(directory.endpoint)
        hello = Hello(protocol_version=PROTOCOL_VERSION, pid=1, token="secret", engine="fake", import_seconds=0.0,
                      versions={}, working_set_bytes=0)  # fmt: skip
        socket.send(encode(hello))

        def has_arrived() -> bool:
            link.read_now()
            return bool(received)

        wait_until(has_arrived, "the message is read")
        assert received == [hello]
        context.destroy(linger=0)
        await link.close()
        directory.remove()

    _run(test)
