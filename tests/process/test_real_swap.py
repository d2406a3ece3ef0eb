"""Swaps between real models: the stream is whole, the process is gone, the memory is back."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from mlx_router_server.workers.memory import process_bytes
from tests.bench.memory import tree_bytes
from tests.support.router import RouterProcess, running_router, wait_until

_GREEDY = {"temperature": 0, "num_predict": 8}


def _tree_bytes(router: RouterProcess) -> int:
    return sum(process_bytes(process.pid) for process in [psutil.Process(router.pid), *router.children()])


@pytest.mark.slow
@pytest.mark.req("R10", "R12", "R15")
@pytest.mark.timeout(120)
def test_a_large_model_leaves_whole_for_a_small_one_and_its_stream_is_not_cut(
    home: Path, large_models_dir: Path
) -> None:
    arguments = ["--models-dir", str(large_models_dir), "--max-loaded-models", "1"]
    with running_router(home, *arguments) as router:
        router.generate("small", options=_GREEDY)
        router.client.post("/admin/models/small/unload")
        before = _tree_bytes(router)
        alone = router.generate("large", options=_GREEDY)
        pid = router.model("large")["pid"]
        assert process_bytes(pid) > 900_000_000
        stream = router.client.stream("/api/generate", {"model": "large", "prompt": "go", "options": _GREEDY})
        text = next(stream)["response"]
        with ThreadPoolExecutor(1) as pool:
            other = pool.submit(router.generate, "small", options=_GREEDY)
            router.wait_state("large", "draining")
            parts = list(stream)
            assert other.result(timeout=60)["eval_count"] == 8
        assert text + "".join(part["response"] for part in parts) == alone["response"]
        eviction = router.wait_eviction("small")
        assert not psutil.pid_exists(pid)
        swap = router.model("small")["last_swap"]
        assert eviction["verdict"] == "returned"
        assert eviction["rung"] == "shutdown"
        assert eviction["held_bytes"] > 900_000_000
        assert eviction["drain_seconds"] > 0
        assert min(swap[f"{stage}_seconds"] for stage in ("import", "weights", "first_token")) > 0
        assert any("event=unloaded model='large:latest'" in line for line in router.lines)
        router.client.post("/admin/models/small/unload")
        assert _tree_bytes(router) <= before * 1.01 + 5_000_000


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_twenty_swaps_between_8_mb_and_1_gb_leave_no_trace(home: Path, large_models_dir: Path) -> None:
    arguments = ["--models-dir", str(large_models_dir), "--max-loaded-models", "1"]
    with running_router(home, *arguments, standby=True) as router:
        _swap(router, ["small", "large"], 4)  # until every code path has been taken once
        process = psutil.Process(router.pid)
        (lock,) = [Path(file.path) for file in process.open_files() if file.path.endswith("/lock")]
        memory, descriptors = process_bytes(router.pid), _descriptors_at_rest(router)
        router.generate("small", options=_GREEDY)
        _descriptors_at_rest(router)
        tree = tree_bytes(router.pid)
        _swap(router, ["large", "small"], 20)
        assert process_bytes(router.pid) - memory < 2_000_000
        _descriptors_at_rest(router)
        wait_until(lambda: router.model("large")["state"] == "unloaded", "the large model is gone")
        assert tree_bytes(router.pid) <= tree * 1.01
        assert _descriptors_at_rest(router) <= descriptors
        children = {child.pid for child in router.children()}
        assert len(children) <= 3  # the model's worker, the fork server, and a worker that is forked ahead
        assert {path.name for path in lock.parent.iterdir()} == {"lock", "s", *(f"w-{pid}" for pid in children)}
        assert router.status()["router"]["kill_incidents"] == 0
        assert router.status()["router"]["stranded_incidents"] == 0
    assert not lock.parent.exists()


def _descriptors_at_rest(router: RouterProcess) -> int:
    """Open files of the router when the standby worker is there again and our own connections are closed."""
    wait_until(lambda: len(router.status()["router"]["standby_pids"]) == 1, "the standby worker is ready")
    process = psutil.Process(router.pid)
    wait_until(
        lambda: not [c for c in process.net_connections("tcp") if c.status in ("ESTABLISHED", "CLOSE_WAIT")],
        "its connections are closed",
    )
    return process.num_fds()


def _swap(router: RouterProcess, names: list[str], times: int) -> None:
    for number in range(times):
        name = names[number % len(names)]
        answer = router.generate(name, options={"temperature": 0, "num_predict": 2})
        assert answer["model"] == name
        loaded = [m["name"] for m in router.status()["models"] if m["state"] == "ready"]
        assert loaded == [f"{name}:latest"]


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_swaps_of_small_models_keep_the_router_small(home: Path, models_dir: Path) -> None:
    arguments = ["--models-dir", str(models_dir), "--max-loaded-models", "1"]
    with running_router(home, *arguments, standby=True) as router:
        _swap(router, ["small", "other"], 2)
        descriptors = _descriptors_at_rest(router)
        memory = process_bytes(router.pid)
        _swap(router, ["small", "other"], 6)
        assert process_bytes(router.pid) - memory < 2_000_000
        assert _descriptors_at_rest(router) <= descriptors
