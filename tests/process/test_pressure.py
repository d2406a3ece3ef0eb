"""Tight memory, by readings that are handed in: caches are given back, idle models leave, nothing new is loaded."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from mlx_router_server.lifecycle.limits import Limits
from mlx_router_server.lifecycle.memory import MemoryReading, Pressure
from mlx_router_server.lifecycle.spec import ModelSpec
from mlx_router_server.lifecycle.states import State
from mlx_router_server.workers.plan import LoadPlan, SupervisorOptions
from mlx_router_server.workers.supervisor import Supervisor
from mlx_router_shared.errors import MemoryPressure
from mlx_router_shared.protocol import Hello
from tests.support.fakes import write_fake


class Machine:
    """Memory as the test wants it to be."""

    def __init__(self) -> None:
        self.pressure = Pressure.NORMAL

    def read(self) -> MemoryReading:
        return MemoryReading(available_bytes=10**9, total_bytes=10**10, pressure=self.pressure)


@contextlib.asynccontextmanager
async def _supervised(machine: Machine, *, learn_budget: bool = False) -> AsyncIterator[Supervisor]:
    supervisor = Supervisor(
        SupervisorOptions(
            limits=Limits(budget_bytes=10**9), standby_workers=0, read_memory=machine.read,
            memory_interval_seconds=0.02, learn_budget=learn_budget,
        )
    )  # fmt: skip
    await supervisor.start()
    try:
        yield supervisor
    finally:
        await supervisor.stop()


def _plan(folder: Path, name: str, **script: Any) -> LoadPlan:
    write_fake(folder / name, tokens=2, **script)
    spec = ModelSpec(name=name, estimate_bytes=10_000_000)
    return LoadPlan(spec=spec, path=str(folder / name), engine="fake", context_tokens=0, parallel=4, measured_as=name)


async def _until(supervisor: Supervisor, model: str, state: State) -> None:
    async with asyncio.timeout(10):
        while (view := supervisor.view(model)) is None or view.state is not state:
            await supervisor.wait_change()


@pytest.mark.req("R15", "R50")
def test_critical_pressure_evicts_what_is_idle_and_refuses_loads_until_it_is_over(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")

    async def test() -> None:
        machine = Machine()
        async with _supervised(machine) as supervisor:
            idle, used, new = (_plan(tmp_path, name) for name in ("idle", "used", "new"))
            async with supervisor.acquire(idle):
                pass
            async with supervisor.acquire(used):
                machine.pressure = Pressure.CRITICAL
                await _until(supervisor, "idle", State.UNLOADED)
                view = supervisor.view("used")
                assert view is not None
                assert view.state is State.READY, "in use"
                with pytest.raises(MemoryPressure, match="short of memory"):
                    async with supervisor.acquire(new):
                        pass
                machine.pressure = Pressure.NORMAL
                async with asyncio.timeout(10):
                    while supervisor.memory is None or supervisor.memory.pressure is not Pressure.NORMAL:
                        await supervisor.wait_change()
                async with supervisor.acquire(new):
                    pass
            assert supervisor.kill_incidents == 0

    asyncio.run(test())
    assert any("trim=True" in record.getMessage() for record in caplog.records), "workers were told to give back"


@pytest.mark.req("R50")
def test_each_worker_is_told_its_share(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The fake engine logs its limits when a measurement changes them; alone, it may use the whole budget."""
    caplog.set_level("INFO")

    told = "limits memory=1000000000 cache=2000000"

    async def test() -> None:
        plan = _plan(tmp_path, "a", memory_bytes=25_000_000)
        async with _supervised(Machine()) as supervisor, supervisor.acquire(plan) as lease:
            assert lease.facts.memory_bytes == 25_000_000
            assert supervisor.reserved_bytes == 25_000_000
            async with asyncio.timeout(10):
                while not any(told in record.getMessage() for record in caplog.records):
                    await supervisor.wait_change()  # memory is looked at again and again

    asyncio.run(test())


@pytest.mark.req("R13", "R50")
@pytest.mark.parametrize(("ours_to_choose", "budget"), [(True, 6 * 10**9), (False, 10**9)])
def test_what_a_device_recommends_is_wired_and_is_the_budget_unless_the_operator_said_one(
    tmp_path: Path, ours_to_choose: bool, budget: int
) -> None:
    """As the first worker on a Mac says hello; played here, where no device recommends anything."""
    hello = Hello(protocol_version=1, pid=1, token="", engine="mlx", import_seconds=1.0, working_set_bytes=6 * 10**9)

    async def test() -> None:
        async with _supervised(Machine(), learn_budget=ours_to_choose) as supervisor:
            supervisor._learn_budget(hello)
            await supervisor.settled()
            assert supervisor.budget_bytes == budget
            assert supervisor._lifecycle.limits.wired_bytes == 6 * 10**9
            async with supervisor.acquire(_plan(tmp_path, "a", memory_bytes=1_000_000)):
                (run,) = supervisor._runs.values()
                assert 0 < run._share.wired_bytes <= run._share.memory_bytes

    asyncio.run(test())
