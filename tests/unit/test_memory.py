"""Readings of memory, what is remembered of them, and what the public may hear."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from mlx_router_server.dialects.statuses import for_the_public
from mlx_router_server.lifecycle.events import StopWorker
from mlx_router_server.lifecycle.memory import MemoryReading, Pressure
from mlx_router_server.lifecycle.states import Cause
from mlx_router_server.workers import reclaim as reclaim_module
from mlx_router_server.workers.cgroup import CgroupMemory, read_cgroup_memory
from mlx_router_server.workers.handle import StopReport
from mlx_router_server.workers.measured import Measurements
from mlx_router_server.workers.memory import default_budget, judge_pressure, read_memory
from mlx_router_shared.errors import BackingOff, InvalidRequest, LoadFailed, MlxRouterError


def _group(folder: Path, names: tuple[str, str], limit: str, used: int, stat: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / names[0]).write_text(f"{limit}\n")
    (folder / names[1]).write_text(f"{used}\n")
    (folder / "memory.stat").write_text(stat)


_V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes")
_V2 = ("memory.max", "memory.current")


@pytest.mark.req("R13")
def test_the_tightest_of_all_groups_above_counts_in_version_2(tmp_path: Path) -> None:
    root = tmp_path / "cgroup"
    _group(root / "user", _V2, "1000", 700, "anon 1\ninactive_file 100\n")
    _group(root / "user" / "app", _V2, "max", 300, "inactive_file 50\n")
    proc = tmp_path / "self"
    proc.write_text("0::/user/app\n")
    assert read_cgroup_memory(proc, root) == CgroupMemory(limit_bytes=1000, available_bytes=400)


@pytest.mark.req("R13")
def test_version_1_keeps_memory_in_a_tree_of_its_own(tmp_path: Path) -> None:
    root = tmp_path / "cgroup"
    _group(root / "memory", _V1, str(2**63 - 4096), 5000, "total_inactive_file 0\n")
    _group(root / "memory" / "box", _V1, "2000", 1500, "total_inactive_file 200\n")
    proc = tmp_path / "self"
    proc.write_text("9:cpu,cpuacct:/box\n5:memory:/box\n1:name=systemd:/x\n")
    assert read_cgroup_memory(proc, root) == CgroupMemory(limit_bytes=2000, available_bytes=700)


def test_without_groups_or_limits_there_is_no_answer(tmp_path: Path) -> None:
    assert read_cgroup_memory(tmp_path / "nothing", tmp_path) is None
    proc = tmp_path / "self"
    proc.write_text("0::/\n")
    _group(tmp_path, _V2, "max", 1, "")
    assert read_cgroup_memory(proc, tmp_path) is None


def test_the_budget_leaves_a_reserve_and_the_reading_is_of_this_machine() -> None:
    reading = read_memory()
    assert 0 < reading.available_bytes <= reading.total_bytes
    assert 0 < default_budget(reading) < reading.total_bytes


@pytest.mark.parametrize(
    ("available", "pressure"), [(500, Pressure.NORMAL), (60, Pressure.WARNING), (30, Pressure.CRITICAL)]
)
def test_pressure_is_judged_by_what_is_left(available: int, pressure: Pressure) -> None:
    assert judge_pressure(available, 1000) is pressure
    assert MemoryReading(available_bytes=available, total_bytes=1000, pressure=pressure).pressure is pressure


@pytest.mark.req("R13")
def test_measurements_outlive_the_router(tmp_path: Path) -> None:
    file = tmp_path / "home" / "measured.json"

    async def write() -> None:
        measured = Measurements(file)
        measured.note("k", loaded_bytes=100, peak_bytes=150, load_seconds=2.0)
        measured.note("k", loaded_bytes=90, peak_bytes=120, load_seconds=1.0)
        await measured.close()

    asyncio.run(write())
    found = Measurements(file).get("k")
    assert found is not None
    assert (found.loaded_bytes, found.peak_bytes, found.load_seconds) == (90, 150, 1.0)
    file.write_text("not json")
    assert Measurements(file).get("k") is None, "a spoilt file costs the memory of it and nothing else"


@pytest.mark.req("R46")
@pytest.mark.parametrize(
    ("error", "public"),
    [
        (LoadFailed("cannot read /Users/ada/models/secret/model.safetensors: bad header"),
         "cannot read model.safetensors: bad header"),
        (LoadFailed("No module at '/opt/x/y.py', line 3"), "No module at 'y.py', line 3"),
        (BackingOff("model 'org/name' failed: ~/models/a/config.json is gone"),
         "model 'org/name' failed: config.json is gone"),
        (MlxRouterError("nothing of the kind"), "nothing of the kind"),
        (InvalidRequest("invalid path /a/b/c in your own request"), "invalid path /a/b/c in your own request"),
    ],
)  # fmt: skip
def test_the_public_does_not_hear_of_folders(error: MlxRouterError, public: str) -> None:
    heard = for_the_public(error)
    assert heard.message == public
    assert type(heard) is type(error)


class _Leaving:
    """A worker of 300 MB that leaves when it is told to."""

    pid = 1
    memory_bytes = 300 * 10**6

    def __init__(self) -> None:
        self.exited = asyncio.Event()

    async def stop(self, reason: str, limit_seconds: float, *, hung: bool) -> StopReport:
        self.exited.set()
        return StopReport(exit_seconds=0.0, reap_seconds=0.0, rung="shutdown")


@pytest.mark.req("R15")
@pytest.mark.parametrize(("taken_by_others", "verdict"), [(300, "returned"), (0, "stranded")])
def test_what_other_workers_take_meanwhile_is_not_held_against_the_one_that_leaves(
    monkeypatch: pytest.MonkeyPatch, taken_by_others: int, verdict: str
) -> None:
    """The machine's used memory does not fall: because another model was loaded, or because it did not come back."""
    worker = _Leaving()
    megabytes = 10**6
    monkeypatch.setattr(reclaim_module, "machine_used_bytes", lambda: 1000 * megabytes)
    monkeypatch.setattr(reclaim_module, "_BACK_SECONDS", 0.05)

    def others() -> int:
        return (100 + (taken_by_others if worker.exited.is_set() else 0)) * megabytes

    effect = StopWorker(worker="w", cause=Cause.EVICTED, reason="evicted")
    timings = asyncio.run(reclaim_module.reclaim(worker, "a", effect, 1.0, others))  # type: ignore[arg-type]  # plays one
    assert timings.verdict == verdict
    assert timings.returned_bytes == taken_by_others * megabytes
