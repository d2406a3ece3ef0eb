"""Commands under odd circumstances: one sentence and a documented exit status, never a traceback."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from tests.support.command import command
from tests.support.program import serving
from tests.support.router import DEADLINE, RouterProcess

_PROGRAM = f"{sys.executable} -P -m mlx_router_server"


def _shell(line: str, home: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("MLX_ROUTER", "OLLAMA"))}
    environment = {**clean, "MLX_ROUTER_HOME": str(home), "MLX_ROUTER_PORT": "1", **variables}
    return subprocess.run(
        ["bash", "-c", line.replace("mlx-router", _PROGRAM)], env=environment, cwd=home, capture_output=True,
        errors="replace", text=True, timeout=DEADLINE,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("line", "status", "sentence"),
    [
        ("mlx-router list >&-", 3, "no router answers"),
        ("mlx-router completion bash >/dev/full", 1, "No space left on device"),
        ("mlx-router config show >/dev/full", 1, "No space left on device"),
        ("mlx-router run demo <&-", 2, "nothing to ask"),
        ("mlx-router load $'\\xff'", 3, "no router answers"),
        ("MLX_ROUTER_API_KEY=€ mlx-router ps", 2, "MLX_ROUTER_API_KEY"),
        ("MLX_ROUTER_API_KEY=$'a\\nb' mlx-router ps", 2, "MLX_ROUTER_API_KEY"),
        ("MLX_ROUTER_HOME=~nosuchuser/x mlx-router config path", 2, "there is no such user"),
        ("MLX_ROUTER_HOME=/proc/x mlx-router keys add a", 1, "/proc/x"),
        ("MLX_ROUTER_HOME=/$(printf 'x%.0s' {1..300}) mlx-router list", 1, "File name too long"),
        ("MLX_ROUTER_DRAIN_TIMEOUT_SECONDS=inf mlx-router config show", 2, "thousand years"),
        ("MLX_ROUTER_MODELS_DIRS=~nosuchuser/m mlx-router config show", 2, "there is no such user"),
        ("OLLAMA_HOST=127.0.0.1:$(printf '1%.0s' {1..5000}) mlx-router ps", 3, "no router answers"),
        ("echo 'a = '$(printf '[%.0s' {1..3000}) > config.toml; mlx-router config show", 2, "nested too deeply"),
        ("echo 'port = '$(printf '1%.0s' {1..5000}) > config.toml; mlx-router config show", 2, "config.toml"),
        ("echo 'models_dirs = [\"/tmp/a\\u0000b\"]' > config.toml; mlx-router config check", 2, "NUL"),
    ],
)
def test_odd_circumstances_are_told_in_one_sentence(tmp_path: Path, line: str, status: int, sentence: str) -> None:
    done = _shell(line, tmp_path)
    said = done.stderr + done.stdout
    assert "Traceback" not in said
    assert sentence in said
    assert done.returncode == status


def test_a_terminal_that_is_not_utf_8_is_written_to(tmp_path: Path) -> None:
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = _shell("mlx-router doctor --port 0", tmp_path, **plain)
    assert "Traceback" not in done.stderr
    assert "problem" in done.stdout


class _Handler(BaseHTTPRequestHandler):
    body = b"{}"

    def do_GET(self) -> None:
        self.rfile.read(int(self.headers.get("content-length") or 0))
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(self.body)))
        self.end_headers()
        self.wfile.write(self.body)

    do_POST = do_DELETE = do_HEAD = do_GET  # noqa: N815

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.mark.parametrize(
    "body",
    [b'{"error": "Unexpected endpoint"}', *(pytest.param(body, marks=pytest.mark.slow) for body in (b"[]", b""))],
)
def test_a_program_that_answers_everything_is_no_router(tmp_path: Path, body: bytes) -> None:
    """As LM Studio does."""
    handler = type("Handler", (_Handler,), {"body": body})
    with serving(HTTPServer(("127.0.0.1", 0), handler)) as port:
        for arguments in (
            ("list",),
            ("ps",),
            ("rm", "a"),
            ("cp", "a", "b"),
            ("stop", "demo"),
            ("pull", "a/b"),
            ("logs",),
        ):
            done = command(*arguments, port=port, home=tmp_path)
            assert (done.returncode, done.stdout) == (3, ""), (arguments, done.stderr)
            assert "is another program, not mlx-router" in done.stderr, arguments


def test_a_name_with_marks_of_a_url_reaches_the_router_as_it_is(demo_router: RouterProcess) -> None:
    for name in ("a?b", "a b", "a&model=demo", "a#b", "ü"):
        done = command("load", name, port=int(demo_router.url.rpartition(":")[2]))
        assert done.returncode in (1, 4)
        assert "404 page not found" not in done.stderr
        shown = command("logs", name, "--json", port=int(demo_router.url.rpartition(":")[2]))
        assert json.loads(shown.stdout or "[]") == [], name
