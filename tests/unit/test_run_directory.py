"""The folder of a router run, and routers that start at the same moment."""

from __future__ import annotations

import fcntl
import shutil
from pathlib import Path

import pytest

from mlx_router_server.workers.run_directory import RunDirectory


@pytest.mark.parametrize("is_locked", [False, True])
def test_a_folder_that_another_router_sweeps_before_it_is_locked_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_locked: bool
) -> None:
    swept: list[Path] = []
    lock = fcntl.flock

    def sweep_first(descriptor: int, operation: int) -> None:
        if not swept:
            swept.extend(tmp_path.iterdir())
            shutil.rmtree(swept[0])
            if is_locked:
                raise BlockingIOError
        lock(descriptor, operation)

    monkeypatch.setattr("fcntl.flock", sweep_first)
    directory = RunDirectory.create(tmp_path)
    try:
        assert directory.path != swept[0]
        assert (directory.path / "lock").exists()
    finally:
        directory.remove()
