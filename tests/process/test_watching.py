"""``mlx-router logs`` and ``top``: what a terminal shows of a running router."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.support.command import command, command_on
from tests.support.fakes import fake_config
from tests.support.http import call
from tests.support.router import DEADLINE, RouterProcess, running_router, wait_until


def _command(router: RouterProcess, *words: str) -> list[str]:
    return [sys.executable, "-P", "-m", "mlx_router_server", *words, "--port", str(urlsplit(router.url).port)]


def _environment() -> dict[str, str]:
    return {**os.environ, "MLX_ROUTER_HOME": "/nonexistent", "TERM": "xterm", "COLUMNS": "120", "LINES": "40"}


@pytest.mark.slow
def test_logs_show_everything_or_one_model_and_follow(home: Path) -> None:
    with running_router(home, *fake_config(home, {"a": {}, "b": {}})) as router:
        router.generate("a")
        shown = command_on(router, "logs")
        assert shown.returncode == 0
        lines = shown.stdout.splitlines()
        assert re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3} INFO    event=", lines[0])
        assert any("event=loaded model='a:latest'" in line for line in lines)
        assert command_on(router, "logs", "b").stdout == ""
        assert len(command_on(router, "logs", "-n", "1").stdout.splitlines()) == 1
        last = json.loads(command_on(router, "logs", "a", "-n", "1", "--json").stdout)[0]
        assert last["text"].startswith("event=request ")
        unknown = command_on(router, "logs", "nobody")
        assert (unknown.returncode, unknown.stdout) == (4, "")

        following = subprocess.Popen(
            _command(router, "logs", "-f", "b", "-n", "0"), stdout=subprocess.PIPE, text=True, env=_environment()
        )
        assert following.stdout is not None
        wait_until(lambda: _in_progress(router) == 2, "it follows, beside the request that looks")
        router.generate("a")
        router.generate("b")
        line = following.stdout.readline()
        while "event=request " not in line:
            assert "a:latest" not in line
            line = following.stdout.readline()
        assert "model='b:latest'" in line
        router.process.terminate()
        assert following.wait(DEADLINE) == 0, "the router has ended the stream in order"
        following.stdout.close()
    assert command("logs", "--port", "1").returncode == 3


def _in_progress(router: RouterProcess) -> int:
    """Requests that are being answered, by the router's own count."""
    body = call(router, "GET", "/metrics").body.decode()
    found = re.search(r"^mlx_router_requests_in_progress (\d+)", body, re.MULTILINE)
    assert found is not None
    return int(found[1])


def test_top_is_one_look_where_there_is_no_terminal(home: Path) -> None:
    with running_router(home, *fake_config(home, {"a": {"memory_bytes": 5_000_000}, "b": {}})) as router:
        router.generate("a", keep_alive=-1)
        shown = command_on(router, "top")
        assert shown.returncode == 0, shown.stderr
        assert f"mlx-router 0.1.0 at {router.url}, pid {router.pid}" in shown.stdout
        row = next(line for line in shown.stdout.splitlines() if line.startswith("a:latest"))
        assert re.search(r"ready .* 1 +Forever", row)
        assert "and 1 at rest" in shown.stdout
        told = json.loads(command_on(router, "top", "--json").stdout)
        assert told["router"]["pid"] == router.pid
    assert command("top", "--port", "1").returncode == 3


def test_top_goes_on_in_a_terminal_and_ends_with_ctrl_c(home: Path) -> None:
    """A load is seen while it happens; the screen is given back."""
    with running_router(home, *fake_config(home, {"slow": {"load_seconds": 3}})) as router:
        parent, child = pty.openpty()
        process = subprocess.Popen(
            _command(router, "top"), stdin=child, stdout=child, stderr=child, env=_environment(), start_new_session=True
        )
        os.close(child)
        seen = ""

        def read() -> str:
            nonlocal seen
            while select.select([parent], [], [], 0)[0]:
                try:
                    data = os.read(parent, 65536)
                except OSError:
                    break
                if not data:
                    break
                seen += data.decode("utf-8", "replace")
            return seen

        wait_until(lambda: "at rest" in read(), "the first look")
        asking = subprocess.Popen(
            _command(router, "load", "slow"), env=_environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        wait_until(lambda: re.search(r"loading: weights\s+\d+%", read()), "the load")
        wait_until(lambda: re.search(r"slow:latest\s+.*ready", read()), "the model is ready")
        process.send_signal(signal.SIGINT)
        end = time.monotonic() + DEADLINE
        while process.poll() is None and time.monotonic() < end:
            read()
        assert process.returncode == 130
        assert "\x1b[?1049l" in read(), "the other screen is left"
        asking.wait(DEADLINE)
        os.close(parent)
