"""What a command does when the address is not a plain mlx-router of this machine, or the configuration is broken."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil
import pytest

from mlx_router_server.access.keys import local_key, renew_local_key
from mlx_router_server.cli.client import Client, NoRouter, OtherProgram
from tests.support.command import command, command_on
from tests.support.http import call
from tests.support.program import serving
from tests.support.router import DEADLINE, RouterProcess, running_router, wait_until

_PID = os.getpid()
_ELSEWHERE = "127.0.0.2" if sys.platform == "linux" else "::1"
"""Another address of this machine."""


class _Recorder(BaseHTTPRequestHandler):
    """Keeps what it is sent; answers as its subclasses say."""

    seen: list[str]

    def answer(self) -> tuple[int, bytes, dict[str, str]]:
        raise NotImplementedError

    def do_GET(self) -> None:
        size = int(self.headers.get("content-length") or 0)
        type(self).seen.append(f"{self.path}\n{self.headers}\n{self.rfile.read(size)!r}")
        status, body, headers = self.answer()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_POST = do_DELETE = do_GET  # noqa: N815

    def log_message(self, *arguments: object) -> None:
        pass


class _Ollama(_Recorder):
    """Has the routes that Ollama has, as far as these tests go."""

    def answer(self) -> tuple[int, bytes, dict[str, str]]:
        if self.path == "/":
            return 200, b"Ollama is running", {}
        if self.path == "/api/tags":
            return 200, b'{"models": []}', {}
        return 404, b"404 page not found", {}


class _Stranger(_Recorder):
    def answer(self) -> tuple[int, bytes, dict[str, str]]:
        return 200, b"<html>hello</html>", {}


class _Impostor(_Recorder):
    """Answers as a router would that runs as a process of this machine; the process is another one."""

    def answer(self) -> tuple[int, bytes, dict[str, str]]:
        status = {"router": {"pid": _PID, "standby_pids": [], "started_at": 0.0}, "models": []}
        body = {"/health": {"status": "ok", "version": "1"}, "/admin/status": status}.get(self.path, {})
        headers = {"x-request-id": "1", "x-mlx-router-proof": "0" * 64}
        if self.path == "/admin/shutdown":
            threading.Thread(target=self.server.shutdown, daemon=True).start()
        return 200, json.dumps(body).encode(), headers


class _Relay(_Recorder):
    """Passes the challenge on to a real router at the same port of another address."""

    def answer(self) -> tuple[int, bytes, dict[str, str]]:
        connection = http.client.HTTPConnection(
            "127.0.0.1", int(self.headers["host"].rpartition(":")[2]), timeout=DEADLINE
        )
        challenge = self.headers.get("x-mlx-router-challenge") or ""
        connection.request("GET", self.path, headers={"x-mlx-router-challenge": challenge})
        reply = connection.getresponse()
        body, proof = reply.read(), reply.headers.get("x-mlx-router-proof") or ""
        connection.close()
        return reply.status, body, {"x-request-id": "1", "x-mlx-router-proof": proof}


class _ElsewhereServer(HTTPServer):
    address_family = socket.AF_INET6 if ":" in _ELSEWHERE else socket.AF_INET


@contextmanager
def _listening(kind: type[_Recorder], port: int = 0) -> Iterator[tuple[int, list[str]]]:
    seen: list[str] = []
    handler: Any = type("Handler", (kind,), {"seen": seen})
    server = _ElsewhereServer((_ELSEWHERE, port), handler) if port else HTTPServer(("127.0.0.1", 0), handler)
    with serving(server):
        yield server.server_port, seen


@pytest.mark.slow
@pytest.mark.parametrize("kind", [_Ollama, _Stranger, _Impostor])
def test_no_other_program_is_told_the_local_key(tmp_path: Path, kind: type[_Recorder]) -> None:
    renew_local_key(tmp_path)
    key = local_key(tmp_path)
    for arguments in (("list",), ("ps",), ("status",), ("run", "demo", "hi"), ("version",), ("stop",), ("doctor",)):
        with _listening(kind) as (port, seen):
            command(*arguments, port=port, home=tmp_path)
            assert seen, arguments
            assert not [text for text in seen if key in text or "authorization" in text.lower()], arguments


def test_a_challenge_that_is_passed_on_to_a_router_proves_nothing(home: Path) -> None:
    with running_router(home) as router, _listening(_Relay, urlsplit(router.url).port or 0) as (port, seen):
        key = wait_until(lambda: local_key(home), "the router has written its local key")
        assert Client(
            f"http://{_ELSEWHERE}:{port}" if "." in _ELSEWHERE else f"http://[{_ELSEWHERE}]:{port}", local_key=key
        ).get("/admin/config")["settings"]
        assert "x-mlx-router-challenge" in seen[0].lower()
        assert not [text for text in seen if key in text]


def test_a_router_that_proves_itself_is_told_the_local_key(home: Path) -> None:
    with running_router(home, "--api-keys", "a-key-that-is-needed-0123456789") as router:
        assert call(router, "GET", "/admin/status").status == 401
        assert command_on(router, "status", home=home).returncode == 0
        wrong = command_on(router, "status", home=home / "nowhere")
        assert (wrong.returncode, "key" in wrong.stderr) == (1, True)
        old = local_key(home)
        renew_local_key(home)  # as another router of the same user does that starts beside this one
        assert local_key(home) != old
        assert command_on(router, "status", home=home).returncode == 0


@pytest.mark.parametrize(
    ("kind", "who", "end"), [(_Ollama, "Ollama", "Quit Ollama"), (_Stranger, "another program", "End it")]
)
def test_another_program_at_the_address_is_named(kind: type[_Recorder], who: str, end: str) -> None:
    with _listening(kind) as (port, _):
        url = f"http://127.0.0.1:{port}"
        for arguments in (("ps",), ("status",), ("load", "demo"), ("stop",)):
            if kind is _Ollama and arguments == ("ps",):
                continue
            done = command(*arguments, port=port)
            assert done.returncode == 3, (arguments, done.stderr)
            assert done.stderr.startswith(f"mlx-router: {url} is {who}, not mlx-router. {end}"), done.stderr
            assert f"--port {port + 1}" in done.stderr
            assert done.stderr.count("\n") == 1
        assert f"is {who}, not mlx-router" in command("version", port=port).stdout


def test_stop_signals_no_process_that_the_answer_merely_names(tmp_path: Path) -> None:
    """A forwarded port answers with numbers of processes of another machine."""
    with _listening(_Impostor) as (port, seen):
        done = command("stop", port=port, home=tmp_path)
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith(f"stopped (http://127.0.0.1:{port}, ")
        assert any(text.startswith("/admin/shutdown\n") for text in seen)
    assert os.getpid() == _PID, "this process was named, and lives"


def test_an_https_address_is_spoken_to_in_tls() -> None:
    first: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(DEADLINE)

        def take() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.settimeout(DEADLINE)
                first.append(connection.recv(16))

        thread = threading.Thread(target=take, daemon=True)
        thread.start()
        address = f"https://127.0.0.1:{listener.getsockname()[1]}"
        done = command("ps", environment={"OLLAMA_HOST": address})
        thread.join(DEADLINE)
    assert first[0][:2] == b"\x16\x03", "a handshake of TLS"
    assert done.returncode == 3
    assert f"no router answers at {address}" in done.stderr


@pytest.fixture
def broken_home(tmp_path: Path) -> Path:
    (tmp_path / "config.toml").write_text("port = \n")
    return tmp_path


@pytest.mark.slow
def test_a_broken_configuration_stops_only_what_needs_it(demo_router: RouterProcess, broken_home: Path) -> None:
    for arguments in (("start",), ("config", "show"), ("config", "check")):
        done = command_on(demo_router, *arguments, home=broken_home)
        assert done.returncode in (1, 2), arguments
        assert "config.toml" in done.stderr + done.stdout, arguments
    for arguments in (("ps",), ("list",), ("status",), ("stop", "demo")):
        done = command_on(demo_router, *arguments, home=broken_home)
        assert done.returncode == 0, (arguments, done.stderr)
        assert done.stderr.startswith("mlx-router: the configuration is left out: "), arguments
        assert "config.toml" in done.stderr
    for arguments in (("config", "path"), ("version",)):
        done = command_on(demo_router, *arguments, home=broken_home)
        assert (done.returncode, done.stderr) == (0, ""), arguments


def test_doctor_reports_a_broken_configuration_among_its_findings(broken_home: Path) -> None:
    done = command("doctor", "--json", home=broken_home, port=1)
    findings = json.loads(done.stdout)
    found = [finding for finding in findings if finding["about"] == "configuration"]
    assert done.returncode == 1
    assert found[0]["level"] == "problem"
    assert "config.toml" in found[0]["text"]
    assert "config check" in found[0]["fix"]
    assert {finding["about"] for finding in findings} > {"Python", "memory"}, "it looks at all else as well"


def test_help_of_client_commands_speaks_of_the_routers_address() -> None:
    text = command("ps", "--help").stdout
    assert "address of the router" in text
    assert "listen" not in text


def test_a_program_that_accepts_and_says_nothing_holds_no_command(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one that may take as long as a load does."""
    monkeypatch.setattr("mlx_router_server.cli.client._LOOK_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        client = Client(f"http://127.0.0.1:{silent.getsockname()[1]}")
        for ask in (
            lambda: client.get("/api/tags"),
            lambda: client.post("/admin/models/demo/load"),
            lambda: client.delete("/api/delete", {"model": "demo"}),
            lambda: list(client.stream("/api/generate", {"model": "demo"})),
            lambda: list(client.events("/admin/events")),
        ):
            with pytest.raises(NoRouter, match="no router answers"):
                ask()


@contextmanager
def _endless(head: bytes, piece: bytes, pause: float) -> Iterator[int]:
    """A program whose answers have no end; yields its port."""
    done = threading.Event()
    threads: list[threading.Thread] = []

    def talk(peer: socket.socket) -> None:
        with suppress(OSError), peer:
            peer.recv(4096)
            peer.sendall(head)
            while not done.wait(pause):
                peer.sendall(piece)

    def accept() -> None:
        with suppress(OSError):
            while True:
                threads.append(threading.Thread(target=talk, args=(server.accept()[0],)))
                threads[-1].start()

    with socket.create_server(("127.0.0.1", 0)) as server:
        accepting = threading.Thread(target=accept)
        accepting.start()
        try:
            yield server.getsockname()[1]
        finally:
            done.set()
            server.shutdown(socket.SHUT_RDWR)
            for thread in (accepting, *threads):
                thread.join(DEADLINE)


_OK = b"HTTP/1.1 200 OK\r\n\r\n"


@pytest.mark.parametrize(
    ("head", "piece", "pause"),
    [(b"", b"H", 0.02), (b"HTTP/1.1 200 OK\r\n", b"a", 0.02), (_OK, b"x", 0.02), (_OK, b"x" * 2**20, 0.0)],
    ids=["status", "headers", "slow body", "large body"],
)
def test_an_answer_without_an_end_holds_no_command(
    monkeypatch: pytest.MonkeyPatch, head: bytes, piece: bytes, pause: float
) -> None:
    monkeypatch.setattr("mlx_router_server.cli.client._LOOK_SECONDS", 0.5)
    monkeypatch.setattr("mlx_router_server.cli.client._CONNECT_SECONDS", 0.5)
    monkeypatch.setattr("mlx_router_server.cli.client._LARGEST_ANSWER", 2**22)
    with _endless(head, piece, pause) as port:
        client = Client(f"http://127.0.0.1:{port}", local_key="x" * 40)
        with pytest.raises((NoRouter, OtherProgram)):
            client.get("/api/tags")
        with pytest.raises((NoRouter, OtherProgram)):
            client.post("/admin/shutdown", answer_seconds=0.5)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_doctor_ended_by_a_signal_leaves_nothing(home: Path, tmp_path: Path, number: signal.Signals) -> None:
    """A closed terminal sends HUP; the trial's router would go on without anybody."""
    environment = {**os.environ, "MLX_ROUTER_HOME": str(home), "TMPDIR": str(tmp_path)}
    process = subprocess.Popen([sys.executable, "-P", "-m", "mlx_router_server", "doctor"], env=environment,
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
    try:
        trial: psutil.Process = wait_until(lambda: _trial_router(process.pid), "the trial has begun")
        process.send_signal(number)
        assert process.wait(DEADLINE) == 128 + number
    finally:
        process.kill()
        process.wait()
    wait_until(lambda: not trial.is_running(), "the trial's router is gone")
    assert not list(tmp_path.glob("mlxr-doctor-*"))


def _trial_router(pid: int) -> psutil.Process | None:
    for child in psutil.Process(pid).children():
        with suppress(psutil.Error):
            if "start" in child.cmdline():
                return child
    return None
