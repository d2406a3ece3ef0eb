"""Code in a model's folder is never run, whichever part of the server reads the folder."""

from __future__ import annotations

import json
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.hostile import add_code
from tests.support.http import call
from tests.support.router import RouterProcess, running_router, write_config

_MESSAGES = [{"role": "user", "content": "Hello!"}]


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    return tmp_path / "marker"


def _copy(models_dir: Path, target: Path) -> Path:
    shutil.copytree(models_dir / "small", target)
    return target


def _assert_nothing_asked(router: RouterProcess) -> None:
    assert not any("[y/N]" in line or ("trust_remote_code" in line and "?" in line) for line in router.lines), (
        router.log
    )


@pytest.mark.req("R33")
def test_a_text_model_with_code_answers_and_is_counted_without_running_it(
    home: Path, models_dir: Path, tmp_path: Path, marker: Path
) -> None:
    add_code(_copy(models_dir, tmp_path / "models" / "text"), marker)
    with running_router(home, "--models-dir", str(tmp_path / "models")) as router:
        chat = call(router, "POST", "/api/chat", {"model": "text", "messages": _MESSAGES, "stream": False,
                                                  "options": {"num_predict": 2}})  # fmt: skip
        assert chat.status == 200, chat.body
        count = call(router, "POST", "/v1/messages/count_tokens", {"model": "text", "messages": _MESSAGES})
        assert count.status == 200, count.body
        _assert_nothing_asked(router)
    assert not marker.exists()


@pytest.mark.req("R33")
def test_an_embedding_model_with_code(home: Path, models_dir: Path, tmp_path: Path, marker: Path) -> None:
    folder = add_code(_copy(models_dir, tmp_path / "models" / "embedder"), marker)
    (folder / "modules.json").write_text("[]")
    with running_router(home, "--models-dir", str(tmp_path / "models")) as router:
        reply = call(router, "POST", "/api/embed", {"model": "embedder", "input": "hello"})
        assert reply.status == 200, reply.body
        _assert_nothing_asked(router)
    assert not marker.exists()


@pytest.mark.req("R33")
def test_a_draft_model_and_an_adapter_with_code(home: Path, models_dir: Path, tmp_path: Path, marker: Path) -> None:
    target = _copy(models_dir, tmp_path / "target")
    draft = add_code(_copy(models_dir, tmp_path / "draft"), marker)
    models: dict[str, dict[str, Any]] = {
        "big": {"path": str(target), "draft_model": "guesser"}, "guesser": {"path": str(draft)},
    }  # fmt: skip
    with running_router(home, "--config", str(write_config(home, models))) as router:
        reply = call(router, "POST", "/api/chat", {"model": "big", "messages": _MESSAGES, "stream": False,
                                                   "options": {"num_predict": 2}})  # fmt: skip
        assert reply.status == 200, reply.body
        _assert_nothing_asked(router)
    assert not marker.exists()


@pytest.mark.req("R33")
def test_an_architecture_of_its_own_is_listed_with_the_reason(
    home: Path, models_dir: Path, tmp_path: Path, marker: Path
) -> None:
    folder = add_code(_copy(models_dir, tmp_path / "models" / "custom"), marker)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_file": "evil.py"}))
    with running_router(home, "--models-dir", str(tmp_path / "models")) as router:
        reply = call(router, "POST", "/api/chat", {"model": "custom", "messages": _MESSAGES, "stream": False})
        assert reply.status == 404, reply.body
        assert "code of its own" in router.status()["router"]["unservable"]["custom"]
    assert not marker.exists()


@pytest.mark.req("R33")
@pytest.mark.parametrize("way", ["import", "run_path", "open", "compiled", "link", "exec"])
def test_the_guard_refuses_every_way_to_read_code_of_a_folder(tmp_path: Path, marker: Path, way: str) -> None:
    """In a process of its own, because an audit hook cannot be removed."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "evil.py").write_text(f"import os; os.close(os.open({str(marker)!r}, os.O_CREAT))\n")
    (tmp_path / "elsewhere").symlink_to(folder)
    actions = {
        "import": f"sys.path.insert(0, {str(folder)!r}); import evil",
        "run_path": f"import runpy; runpy.run_path({str(folder / 'evil.py')!r})",
        "open": f"open({str(folder / 'evil.py')!r}).read()",
        "compiled": f"sys.path.insert(0, {str(folder)!r}); import compiled",
        "link": f"sys.path.insert(0, {str(tmp_path / 'elsewhere')!r}); import evil",
        "exec": f"exec(compile('import os; os.mkdir(marker)', {str(folder / 'evil.py')!r}, 'exec'))",
    }
    if way == "compiled":
        import py_compile

        py_compile.compile(str(folder / "evil.py"), cfile=str(folder / "compiled.pyc"))
    script = (
        "import sys\nfrom mlx_router_worker.repository_code import RepositoryCodeGuard, RepositoryCodeRefused\n"
        f"RepositoryCodeGuard().refuse({str(folder)!r}, '')\n"
        f"try:\n    {actions[way]}\nexcept RepositoryCodeRefused as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-P", "-c", script], capture_output=True, text=True, timeout=30, check=False)
    assert (done.returncode, "code of its own" in done.stdout) == (0, True), done.stderr
    assert not marker.exists()
    runpy.run_path(str(folder / "evil.py"))
    assert marker.exists(), "the file would have written it"
