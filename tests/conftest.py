"""Fixtures for all tests, and the check that none of them leaves anything behind."""

from __future__ import annotations

import fcntl
import gc
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.router import RouterProcess, running_router

# Started in the background, the tests may have ctrl-C ignored, which the programs that are sent one would inherit.
signal.signal(signal.SIGINT, signal.default_int_handler)

_MODELS = {"small": 8_000_000, "other": 8_000_000}


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A state folder of its own for a router."""
    path = tmp_path / "home"
    path.mkdir()
    return path


@pytest.fixture(scope="session")
def models_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two random models of about 8 MB, made once for all test processes."""
    root = tmp_path_factory.getbasetemp().parent / "random-models"
    return _make_once(root, _MODELS)


@pytest.fixture(scope="session")
def large_models_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model of about 1 GB beside one of about 8 MB."""
    root = tmp_path_factory.getbasetemp().parent / "large-models"
    return _make_once(root, {"small": 8_000_000, "large": 1_000_000_000})


def _make_once(root: Path, sizes: dict[str, int]) -> Path:
    from tests.tiny_models.random_model import make_random_model  # brings in mlx: only where it is needed

    root.mkdir(parents=True, exist_ok=True)
    with (root / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for seed, (name, size) in enumerate(sizes.items()):
            if not (root / name / "generation_config.json").exists():  # the last file to be written
                make_random_model(root / name, size_bytes=size, seed=seed)
    return root


@pytest.fixture(scope="module")
def demo_router(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RouterProcess]:
    """A router with the demo model, shared by the tests of a module."""
    with running_router(tmp_path_factory.mktemp("demo-home")) as router:
        yield router


@pytest.fixture(autouse=True, scope="module")
def _no_descriptor_is_left_open() -> Iterator[None]:
    """Per module, because routers and clients are shared within one."""
    before = len(os.listdir("/dev/fd"))
    yield
    gc.collect()
    assert len(os.listdir("/dev/fd")) <= before
