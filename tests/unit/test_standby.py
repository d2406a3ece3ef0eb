"""The idle workers: how many there are, who gets one, and what becomes of those that hang."""

from __future__ import annotations

import asyncio
import os
import sys
import threading
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from mlx_router_server.workers.standby import OnProcess, StandbyPool
from mlx_router_shared.errors import WorkerDied
from mlx_router_worker.priority import at_low_priority


class _Worker:
    """As much of ``WorkerHandle`` as the pool uses."""

    def __init__(self, number: int, engine: str) -> None:
        self.worker_id, self.pid, self.engine = f"p-{number}", number, engine
        self.exited = asyncio.Event()
        self.hangs = False

    async def get_stats(self, limit_seconds: float) -> None:
        if self.hangs:
            raise TimeoutError


class _Bench:
    def __init__(self, size: int, extra: int = 0) -> None:
        self.started: list[tuple[str, bool]] = []
        self.ended: list[int] = []
        self.fails = False
        self.may_start = asyncio.Event()
        self.may_start.set()
        self.pool = StandbyPool(self._start, lambda worker: self.ended.append(worker.pid))
        self.pool.resize(size, extra)

    async def _start(self, engine: str, on_process: OnProcess | None, *, background: bool) -> Any:
        self.started.append((engine, background))
        worker: Any = _Worker(len(self.started), engine)
        if on_process is not None:
            on_process(worker)
        await self.may_start.wait()
        if self.fails:
            raise WorkerDied("no")
        return worker

    async def settle(self) -> None:
        while self.pool._starting:
            await asyncio.wait(list(self.pool._starting))


def _run(test: Callable[[], Coroutine[Any, Any, None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(20):
            await test()

    asyncio.run(bounded())


def test_idle_workers_are_started_at_a_low_priority_and_handed_over() -> None:
    async def test() -> None:
        bench = _Bench(2)
        assert await bench.pool.take("mlx") is None
        bench.pool.refill()
        await bench.settle()
        assert bench.started == [("mlx", True), ("mlx", True)]
        assert await bench.pool.take("embed") is None, "they have imported another engine"
        worker = await bench.pool.take("mlx")
        assert worker is not None
        assert worker.pid == 1
        await bench.pool.close()
        assert bench.ended == [2]

    _run(test)


def test_their_number_follows_the_recent_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr("mlx_router_server.workers.standby.time.monotonic", lambda: now)

    async def test() -> None:
        nonlocal now
        bench = _Bench(1, 3)
        assert bench.pool.wanted == 1
        for taken in range(1, 9):
            await bench.pool.take("mlx")
            now += 1.0
            assert bench.pool.wanted == min(taken, 4)
        bench.pool.refill()
        await bench.settle()
        assert len(bench.pool.workers) == 4
        now += 10.0
        assert bench.pool.wanted == 1
        bench.pool._end_surplus()
        assert [worker.pid for worker in bench.pool.workers] == [4]
        assert bench.ended == [1, 2, 3]
        await bench.pool.close()

    _run(test)


def test_none_are_kept_when_none_are_wanted_but_one_is_prepared_for_a_load_that_waits() -> None:
    async def test() -> None:
        bench = _Bench(0)
        for _ in range(3):
            await bench.pool.take("mlx")
        bench.pool.refill()
        assert bench.started == []
        bench.may_start.clear()
        bench.pool.prepare("vlm")
        bench.pool.prepare("vlm")
        taking = asyncio.create_task(bench.pool.take("vlm"))
        await asyncio.sleep(0)
        assert bench.started == [("vlm", False)], "one, and not at a low priority"
        bench.may_start.set()
        assert await taking is not None
        bench.pool.prepare("vlm")
        await bench.settle()
        bench.pool._end_surplus()  # what was prepared and not taken
        assert bench.ended == [2]
        await bench.pool.close()

    _run(test)


def test_one_that_hangs_or_has_ended_is_passed_over() -> None:
    async def test() -> None:
        bench = _Bench(3)
        bench.pool.refill()
        await bench.settle()
        first, second, third = bench.pool.workers
        first.exited.set()
        second.hangs = True  # type: ignore[attr-defined]
        assert await bench.pool.take("mlx") is third
        assert bench.ended == [2]
        await bench.pool.close()

    _run(test)


def test_an_installation_that_cannot_start_workers_is_not_tried_again_and_again() -> None:
    async def test() -> None:
        bench = _Bench(1)
        bench.fails = True
        for _ in range(10):
            bench.pool.refill()
            await bench.settle()
        assert len(bench.started) == 3
        await bench.pool.close()

    _run(test)


def test_a_low_priority_ends_with_the_work() -> None:
    if sys.platform == "darwin":
        assert at_low_priority(lambda: 5) == 5
        return

    def nice() -> tuple[int, int]:
        return os.getpriority(os.PRIO_PROCESS, threading.get_native_id()), os.getpriority(os.PRIO_PROCESS, os.getpid())

    low, of_main = at_low_priority(nice)
    assert (low, of_main) == (10, nice()[0])
    with pytest.raises(KeyError, match="lost"):
        at_low_priority(lambda: dict[str, int]()["lost"])
