"""The commands as a user runs them: words, exit codes, JSON."""

from __future__ import annotations

import json
import os
import pty
import select
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from mlx_router_server.version import __version__
from tests.support.command import command, command_on
from tests.support.http import call
from tests.support.router import RouterProcess, running_router, still_alive
from tests.tiny_models.script import GREETING


def test_list_show_ps_status_in_words_and_json(demo_router: RouterProcess) -> None:
    listed = command_on(demo_router, "list")
    assert listed.stdout.splitlines()[0].split() == ["NAME", "ID", "SIZE", "MODIFIED", "CAPABILITIES"]
    assert "demo:latest" in listed.stdout
    assert json.loads(command_on(demo_router, "list", "--json").stdout)[0]["name"] == "demo:latest"
    assert "demo" not in command_on(demo_router, "list", "zzz").stdout
    assert "context length      4096" in command_on(demo_router, "show", "demo").stdout
    assert command_on(demo_router, "load", "demo").stdout.startswith("demo:latest is loaded (")
    assert "ready" in command_on(demo_router, "ps").stdout
    assert json.loads(command_on(demo_router, "ps", "--json").stdout)[0]["state"] == "ready"
    status = command_on(demo_router, "status")
    assert f"pid {demo_router.pid}" in status.stdout
    assert json.loads(command_on(demo_router, "status", "--json").stdout)["router"]["pid"] == demo_router.pid
    assert command_on(demo_router, "unload", "demo").stdout == "demo:latest is unloaded\n"
    assert demo_router.model("demo")["state"] == "unloaded"


def test_version(demo_router: RouterProcess) -> None:
    assert command_on(demo_router, "version").stdout == f"mlx-router {__version__}\n"
    assert json.loads(command("version", "--json", port=1).stdout) == {"client": __version__, "router": None}


def test_run_answers_a_prompt_or_a_pipe(demo_router: RouterProcess) -> None:
    assert command_on(demo_router, "run", "demo", "Hello!").stdout == GREETING + "\n"
    assert command_on(demo_router, "run", "demo", text="Hello!\n").stdout == GREETING + "\n"
    thought = command_on(demo_router, "run", "demo", "What is 17 + 25?").stdout
    assert thought.startswith("Thinking...\nThe user wants a sum.")
    assert thought.endswith("...done thinking.\n\n17 + 25 = 42.\n")
    assert command_on(demo_router, "run", "--hidethinking", "demo", "What is 17 + 25?").stdout == "17 + 25 = 42.\n"
    assert command_on(demo_router, "run", "--think", "false", "demo", "What is 17 + 25?").stdout == "17 + 25 = 42.\n"
    assert "tokens/s" in command_on(demo_router, "run", "--verbose", "demo", "hi").stderr


def test_a_conversation_in_a_terminal(demo_router: RouterProcess) -> None:
    """A real terminal: prompts, an answer that recalls the turn before, and leaving."""
    master, slave = pty.openpty()
    environment = {**os.environ, "MLX_ROUTER_PORT": str(urlsplit(demo_router.url).port), "TERM": "dumb"}
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "mlx_router_server", "run", "demo"],
        stdin=slave,
        stdout=slave,
        stderr=slave,
        env=environment,
    )
    os.close(slave)
    screen = ""

    def wait_for(mark: str) -> None:
        nonlocal screen
        end = time.monotonic() + 20
        while mark not in screen:
            assert select.select([master], [], [], max(end - time.monotonic(), 0))[0], f"no {mark!r} in {screen!r}"
            screen += os.read(master, 4096).decode()
        screen = screen.partition(mark)[2]

    try:
        wait_for(">>> ")
        for said, answer in (
            ("My name is Ada.", "Nice to meet you, Ada."),
            ("What is my name?", "Your name is Ada."),
            ("/clear", "forgotten"),
            ("What is my name?", "You have not told me your name."),
            ("/clear", "forgotten"),
            ('"""Hello!"""', GREETING),
        ):
            os.write(master, said.encode() + b"\n")
            wait_for(answer)
            wait_for(">>> ")
        os.write(master, b"/bye\n")
        assert process.wait(10) == 0
    finally:
        process.kill()
        process.wait(5)
        os.close(master)


def test_errors_are_one_line_with_a_documented_status(demo_router: RouterProcess) -> None:
    for arguments, status, text in (
        (("run", "nosuch", "hi"), 4, "model 'nosuch' not found"),
        (("show", "nosuch"), 4, "not found"),
        (("load", "bad name"), 1, "invalid model name"),
    ):
        done = command_on(demo_router, *arguments)
        assert (done.returncode, done.stderr.count("\n")) == (status, 1), done.stderr
        assert text in done.stderr
    nobody = command("ps", port=1)
    assert (nobody.returncode, nobody.stderr.count("\n")) == (3, 1)
    assert "start one with: mlx-router start" in nobody.stderr
    assert command("frobnicate").returncode == 2
    assert command("start", "--port", "x").returncode == 2


def test_stop_ends_the_router_and_its_workers(home: Path) -> None:
    with running_router(home) as router:
        command_on(router, "load", "demo")
        workers = router.children()
        stopped = command_on(router, "stop")
        assert stopped.returncode == 0
        assert stopped.stdout.startswith(f"stopped (pid {router.pid}")
        assert still_alive(workers) == []
        assert router.process.wait(5) == -15


def test_stop_with_a_name_unloads_the_model(demo_router: RouterProcess) -> None:
    command_on(demo_router, "load", "demo")
    assert command_on(demo_router, "stop", "demo").returncode == 0
    demo_router.wait_state("demo", "unloaded")


class _Ollama(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        found = self.path == "/"
        self.send_response(200 if found else 404)
        self.end_headers()
        self.wfile.write(b"Ollama is running" if found else b"404 page not found")

    def log_message(self, *arguments: object) -> None:
        pass


class _Stranger(_Ollama):
    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"hello")


@pytest.mark.parametrize(("handler", "who"), [(_Ollama, "Ollama"), (_Stranger, "another program")])
def test_a_taken_port_is_explained(handler: type[BaseHTTPRequestHandler], who: str) -> None:
    server = HTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        port = server.server_port
        done = command("start", "--port", str(port))
    finally:
        server.shutdown()
        server.server_close()
    assert done.returncode == 1
    assert f"port {port} is taken: {who} answers at http://127.0.0.1:{port}. " in done.stderr
    assert f"mlx-router start --port {port + 1}" in done.stderr


def test_a_second_router_is_told_of_the_first(demo_router: RouterProcess) -> None:
    done = command_on(demo_router, "start")
    assert done.returncode == 1
    assert "another mlx-router answers" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("limit", [100, 300, 3000])
def test_a_low_limit_of_open_files_is_told_and_lived_with(home: Path, limit: int) -> None:
    """mlx-lm asks for 4,096 when it is imported, and does not load where that is refused."""
    limited = ["/bin/sh", "-c", f'ulimit -n {limit}; exec "$@"', "sh", sys.executable, "-P"]
    with running_router(home, python=limited) as router:
        assert router.generate("demo", options={"num_predict": 2})["done"]
        quantized = {"model": "q", "from": "demo", "quantize": "q4_0", "stream": False}
        made = call(router, "POST", "/api/create", quantized)
        assert made.status == 200, made.body
        assert ("event=few_descriptors" in router.log) == (limit < 1024)
    doctor = subprocess.run(
        [*limited, "-m", "mlx_router_server", "doctor", "--json", "--port", "1"],
        capture_output=True, text=True, timeout=120, env={**os.environ, "MLX_ROUTER_HOME": str(home)}, check=False,
    )  # fmt: skip
    assert doctor.stdout, doctor.stderr
    (found,) = [finding for finding in json.loads(doctor.stdout) if finding["about"] == "open files"]
    assert (found["level"] == "warning") == (limit < 1024)
