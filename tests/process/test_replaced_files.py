"""A model whose files are replaced while it is loaded is used by the next request; what runs ends with the old ones."""

from __future__ import annotations

import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.support.http import RawStream
from tests.support.router import RouterProcess, running_router, wait_until
from tests.tiny_models.parrot import make_parrot


def _ask(router: RouterProcess, model: str = "p") -> str:
    text: str = router.generate(model, options={"num_predict": 8})["response"]
    return text


def _replace(folder: Path, source: Path, *, in_place: bool) -> None:
    """Copy a model over another; in place: file by file, so that the folder itself stays as it is."""
    if not in_place:
        shutil.rmtree(folder)
        shutil.copytree(source, folder)
        return
    for file in source.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())


@pytest.mark.req("R27")
@pytest.mark.parametrize("in_place", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_next_request_gets_the_new_model(home: Path, tmp_path: Path, in_place: bool) -> None:
    models = tmp_path / "models"
    make_parrot(models / "p", ["on", "ly one", " of"])
    make_parrot(tmp_path / "new", ["two", " it is", " of"])
    with running_router(home, "--models-dir", str(models)) as router:
        assert _ask(router) == "only one of"
        pid = router.model("p")["pid"]
        assert _ask(router) == "only one of"
        assert router.model("p")["pid"] == pid, "nothing was replaced"
        _replace(models / "p", tmp_path / "new", in_place=in_place)
        wait_until(lambda: _ask(router) == "two it is of", "the new model answers", 15)
        assert router.model("p")["loads"] == 2
        assert router.status()["router"]["kill_incidents"] == 0


@pytest.mark.slow
@pytest.mark.req("R27")
def test_a_folder_of_the_same_sizes_and_times_is_another(home: Path, tmp_path: Path) -> None:
    """As ``rsync --archive`` and ``mv`` leave it."""
    models = tmp_path / "models"
    make_parrot(models / "p", ["abc", "def"])
    make_parrot(tmp_path / "new", ["uvw", "xyz"])
    old = {file.name: file.stat() for file in [*(models / "p").iterdir(), models / "p"]}
    for file in [*(tmp_path / "new").iterdir()]:
        assert file.stat().st_size == old[file.name].st_size
        os.utime(file, ns=(0, old[file.name].st_mtime_ns))
    os.utime(tmp_path / "new", ns=(0, old["p"].st_mtime_ns))
    with running_router(home, "--models-dir", str(models)) as router:
        assert _ask(router) == "abcdef"
        times = models.stat()
        (models / "p").rename(tmp_path / "old")
        (tmp_path / "new").rename(models / "p")
        os.utime(models, ns=(0, times.st_mtime_ns))
        wait_until(lambda: _ask(router) == "uvwxyz", "the new model answers", 15)


@pytest.mark.slow
@pytest.mark.req("R27")
def test_a_running_answer_ends_with_the_old_files(home: Path, tmp_path: Path) -> None:
    models = tmp_path / "models"
    make_parrot(models / "p", ["a ", "b ", "c "], ends=False)
    make_parrot(tmp_path / "new", ["new"])
    with running_router(home, "--models-dir", str(models)) as router:
        body = {"model": "p", "prompt": "go", "options": {"num_predict": 4000}}
        raw = RawStream(router, "/api/generate", body)
        raw.read_until(b'"a "')
        _replace(models / "p", tmp_path / "new", in_place=False)
        with ThreadPoolExecutor(1) as pool:
            reading = pool.submit(raw.read_to_end)
            wait_until(lambda: _ask(router) == "new", "the new model answers", 30)
            rest = reading.result(30)
        assert b'"done_reason":"length"' in rest, rest[-300:]
        assert b"new" not in rest


def test_prompts_are_counted_and_shown_with_the_template_that_is_there_now(home: Path, tmp_path: Path) -> None:
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    make_parrot(tmp_path / "models" / "p", ["on", "ly"], chat_template=template)
    messages = [{"role": "user", "content": "one"}]

    def shown(router: RouterProcess) -> str:
        body = {"model": "p", "messages": messages, "_debug_render_only": True, "stream": False}
        return str(router.client.post("/api/chat", body))

    with running_router(home, "--models-dir", str(tmp_path / "models")) as router:
        assert "new: " not in shown(router)
        before = router.client.post("/v1/messages/count_tokens", {"model": "p", "messages": messages})["input_tokens"]
        (tmp_path / "models" / "p" / "chat_template.jinja").write_text("new: new: " + template)
        assert "new: new: one" in shown(router)
        after = router.client.post("/v1/messages/count_tokens", {"model": "p", "messages": messages})["input_tokens"]
        assert after > before
