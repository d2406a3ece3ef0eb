"""Odd entries among the model folders: each is listed with a reason, and none keeps the others from being served."""

from __future__ import annotations

import os
import shutil
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mlx_router_server.catalogue.catalogue import DEMO_FOLDER, Catalogue, Sources
from mlx_router_server.catalogue.scans import BoundedScans, ScanTimeout
from mlx_router_shared.errors import Overloaded
from tests.support.http import call
from tests.support.router import running_router

# Root reads what it is not allowed to, unless it gives that capability up.
_BOUND_BY_PERMISSIONS = (
    ["setpriv", "--bounding-set=-dac_override,-dac_read_search", sys.executable, "-P"] if os.geteuid() == 0 else None
)


def _copy(folder: Path) -> Path:
    shutil.copytree(DEMO_FOLDER, folder)
    return folder


def _plain_copy(folder: Path) -> None:
    _copy(folder)


def _unreadable_folder(folder: Path) -> None:
    _copy(folder).chmod(0o000)


def _unreadable_parent(folder: Path) -> None:
    folder.mkdir()
    _copy(folder / "inside")
    folder.chmod(0o000)


def _not_searchable(folder: Path) -> None:
    _copy(folder).chmod(0o444)


def _unreadable_config(folder: Path) -> None:
    (_copy(folder) / "config.json").chmod(0o000)


def _unreadable_weights(folder: Path) -> None:
    (_copy(folder) / "model.safetensors").chmod(0o000)


def _pipe_for_config(folder: Path) -> None:
    os.mkfifo(_copy(folder) / "generation_config2.json")


def _pipe_for_weights(folder: Path) -> None:
    (_copy(folder) / "model.safetensors").unlink()
    os.mkfifo(folder / "model.safetensors")


def _socket_inside(folder: Path) -> None:
    _copy(folder)
    here = Path.cwd()
    os.chdir(folder)  # a socket's path may have 107 bytes
    try:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind("s")
    finally:
        os.chdir(here)


def _link_out(folder: Path) -> None:
    folder.symlink_to(_copy(folder.parent.parent / "elsewhere"))


def _link_to_itself(folder: Path) -> None:
    folder.symlink_to(folder.name)


def _links_in_a_circle(folder: Path) -> None:
    folder.symlink_to("looping-2")
    (folder.parent / "looping-2").symlink_to(folder.name)


def _file_linked_out(folder: Path) -> None:
    (_copy(folder) / "config.json").unlink()
    other = folder.parent.parent / "other.json"
    shutil.copy(DEMO_FOLDER / "config.json", other)
    (folder / "config.json").symlink_to(other)


def _dangling_link_inside(folder: Path) -> None:
    (_copy(folder) / "extra.json").symlink_to("nowhere.json")


def _weights_without_config(folder: Path) -> None:
    (_copy(folder) / "config.json").unlink()


def _config_without_weights(folder: Path) -> None:
    (_copy(folder) / "model.safetensors").unlink()


def _empty_config(folder: Path) -> None:
    (_copy(folder) / "config.json").write_text("")


_ODD: dict[str, tuple[Callable[[Path], None], str]] = {
    "lost+found": (_unreadable_folder, "Permission denied"),
    "locked-parent": (_unreadable_parent, "Permission denied"),
    "not-searchable": (_not_searchable, "Permission denied"),
    "locked-config": (_unreadable_config, "Permission denied"),
    "locked-weights": (_unreadable_weights, "Permission denied"),
    "pipe": (_pipe_for_config, "neither a file nor a folder"),
    "pipe-for-weights": (_pipe_for_weights, "neither a file nor a folder"),
    "socket": (_socket_inside, "neither a file nor a folder"),
    "linked": (_link_out, "a link that leads out"),
    "itself": (_link_to_itself, "a link that leads out"),
    "looping": (_links_in_a_circle, "a link that leads out"),
    "looping-2": (lambda folder: None, "a link that leads out"),
    "file-linked": (_file_linked_out, "a link that leads out"),
    "dangling": (_dangling_link_inside, "cannot be read"),
    "no-config": (_weights_without_config, "no config.json"),
    "no-weights": (_config_without_weights, "model.safetensors is missing"),
    "empty-config": (_empty_config, "config.json cannot be read"),
    "bad name!": (_plain_copy, "cannot be a model's name"),
}


@pytest.fixture
def odd_models(tmp_path: Path) -> Iterator[Path]:
    root = tmp_path / "models"
    root.mkdir()
    _copy(root / "zz-good")
    for name, (make, _) in _ODD.items():
        make(root / name)
    yield root
    for path in [*root.iterdir(), root / "locked-config" / "config.json"]:
        if not path.is_symlink():
            path.chmod(0o755)  # so that pytest can remove it


@pytest.mark.req("R27", "R28")
def test_each_odd_folder_has_a_reason_and_the_others_are_served(home: Path, odd_models: Path) -> None:
    hub = home / "hf" / "hub"
    for repository in ("models--org--locked", "models--org--fine"):
        (hub / repository / "refs").mkdir(parents=True)
        _copy(hub / repository / "snapshots" / "abc")
    (hub / "models--org--locked" / "snapshots").chmod(0o000)
    with running_router(home, "--models-dir", str(odd_models), python=_BOUND_BY_PERMISSIONS) as router:
        for model in ("demo", "zz-good", "org/fine"):
            assert router.generate(model, prompt="Hello!")["done"] is True
        assert call(router, "GET", "/ready").status == 200
        unservable = router.status()["router"]["unservable"]
        for name, (_, reason) in {**_ODD, "org/locked": (None, "Permission denied")}.items():
            key = name if name in unservable else f"{name}/inside"
            assert reason in unservable.get(key, ""), (name, unservable)
        assert not any("Traceback" in line for line in router.lines)
    (hub / "models--org--locked" / "snapshots").chmod(0o755)


@pytest.mark.req("R27")
def test_a_models_dir_that_is_a_model_is_served(home: Path, tmp_path: Path) -> None:
    with running_router(home, "--models-dir", str(_copy(tmp_path / "lone"))) as router:
        assert router.generate("lone", prompt="Hello!")["done"] is True


@pytest.mark.slow
@pytest.mark.req("R27")
def test_what_is_hidden_by_its_place_is_listed(home: Path, tmp_path: Path) -> None:
    """A folder of the same name in other letters or in another root, one too deep, and a root that is gone."""
    root, other = tmp_path / "models", tmp_path / "others"
    for folder in (root / "PAIR", root / "pair", root / "a" / "b" / "deep", other / "pair", root / "a" / "good"):
        _copy(folder)
    (root / "a" / "b" / "locked").mkdir(mode=0o000)
    (root / "a" / "b" / "web").mkdir()
    (root / "a" / "b" / "web" / "config.json").write_text("{}")
    _copy(tmp_path / "once" / "twice-named")
    (tmp_path / "again").symlink_to(tmp_path / "once")
    roots = (root, other, tmp_path / "gone", tmp_path / "once", tmp_path / "again")
    arguments = [argument for path in roots for argument in ("--models-dir", str(path))]
    with running_router(home, *arguments, python=_BOUND_BY_PERMISSIONS) as router:
        assert router.generate("a/good", prompt="Hello!")["done"] is True
        assert router.generate("pair", prompt="Hello!")["done"] is True
        unservable = router.status()["router"]["unservable"]
        assert unservable == {
            "pair": f"its name is taken by {root / 'PAIR'}: rename one of them",
            str(other / "pair"): f"its name is taken by {root / 'PAIR'}: rename one of them",
            "a/b/deep": "nested too deeply: models_dirs hold MODEL or ORG/MODEL; "
            "add the folder above it to models_dirs",
            str(tmp_path / "gone"): "its folder cannot be read: No such file or directory",
        }
    (root / "a" / "b" / "locked").chmod(0o755)


@pytest.mark.req("R27")
def test_a_models_dir_that_cannot_be_read_is_listed(home: Path, tmp_path: Path) -> None:
    locked = tmp_path / "locked"
    _unreadable_parent(locked)
    with running_router(home, "--models-dir", str(locked), python=_BOUND_BY_PERMISSIONS) as router:
        assert router.generate("demo", prompt="Hello!")["done"] is True
        assert "Permission denied" in router.status()["router"]["unservable"][str(locked)]
    locked.chmod(0o755)


def test_a_scan_that_hangs_fails_at_its_limit_and_is_not_started_twice() -> None:
    scans, release, started = BoundedScans(0.05), threading.Event(), []

    def hang() -> str:
        started.append(1)
        release.wait(30)
        return "back"

    for _ in range(3):
        with pytest.raises(ScanTimeout, match="answer"):
            scans.run("mount", hang)
    assert len(started) == 1
    assert scans.run("other", lambda: 5) == 5
    release.set()
    while scans._hanging["mount"].done.wait(5) is False:
        raise AssertionError("the scan did not return")
    assert scans.run("mount", lambda: "read") == "read"


def test_a_scan_that_gets_on_has_all_the_time_it_needs() -> None:
    scans = BoundedScans(0.2)

    def read_many() -> int:
        for _ in range(8):
            threading.Event().wait(0.08)
            scans.note_progress("disk")
        return 8

    assert scans.run("disk", read_many) == 8


async def _wait_without_scan(catalogue: Catalogue) -> None:
    await catalogue.wait_ready()


def test_waiting_for_the_first_scan_has_a_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    import asyncio

    monkeypatch.setattr("mlx_router_server.catalogue.catalogue._READY_SECONDS", 0.05)

    async def wait() -> None:
        with pytest.raises(Overloaded, match="still being read"):
            await _wait_without_scan(Catalogue(Sources()))

    asyncio.run(wait())
