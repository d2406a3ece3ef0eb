"""Before there is a request: who may connect, how much, how fast, under which name."""

from __future__ import annotations

import contextlib
import os
import select
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from urllib.parse import urlsplit

import psutil
import pytest

from tests.support.command import command
from tests.support.fakes import fake_config
from tests.support.http import call
from tests.support.router import DEADLINE, RouterProcess, running_router, wait_until


def _connect(router: RouterProcess) -> socket.socket:
    parts = urlsplit(router.url)
    return socket.create_connection((parts.hostname or "", parts.port or 0), timeout=DEADLINE)


def _read_all(connection: socket.socket) -> bytes:
    data = b""
    with contextlib.suppress(ConnectionResetError, BrokenPipeError):
        while part := connection.recv(65536):
            data += part
    connection.close()
    return data


def _ask(connection: socket.socket) -> None:
    """One request on a connection that stays open."""
    connection.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
    answer = b""
    while not answer.endswith(b"Ollama is running"):
        part = connection.recv(1000)
        assert part, answer
        answer += part


@pytest.mark.req("R31")
@pytest.mark.parametrize("host", ["0.0.0.0", "::", "", "192.0.2.1"])
def test_an_address_that_others_can_reach_is_refused_without_keys(host: str) -> None:
    started = command("start", "--host", host, "--port", "0")
    assert started.returncode == 2
    assert "keys add" in started.stderr
    assert started.stderr.count("\n") == 1


@pytest.mark.req("R31")
@pytest.mark.parametrize("arguments", [["--api-keys", "secret"], ["--insecure-bind", "true"]])
def test_with_keys_or_the_operators_word_it_is_not(home: Path, arguments: list[str]) -> None:
    with running_router(home, "--host", "0.0.0.0", *arguments) as router:
        router.url = router.url.replace("0.0.0.0", "127.0.0.1")
        locked = arguments[0] == "--api-keys"
        assert call(router, "GET", "/api/tags").status == (401 if locked else 200)
        assert call(router, "GET", "/api/tags", x_api_key="secret").status == 200


@pytest.mark.req("R31")
def test_an_asgi_server_of_the_users_own_does_not_open_the_door(home: Path) -> None:
    """The router cannot know on which address it is served; it sees where a request came in."""
    address = next((a.address for addresses in psutil.net_if_addrs().values() for a in addresses
                    if a.family == socket.AF_INET and not a.address.startswith("127.")), None)  # fmt: skip
    log = home / "log"
    environment = {**os.environ, "MLX_ROUTER_HOME": str(home), "HF_HOME": str(home), "MLX_ROUTER_ALLOWED_HOSTS": "*"}
    with log.open("w") as stream, socket.socket() as listener:
        listener.bind(("0.0.0.0", 0))
        listener.listen()
        port = listener.getsockname()[1]
        os.set_inheritable(listener.fileno(), True)
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "uvicorn", "--factory", "mlx_router_server.app:create_app_from_environment",
             "--fd", str(listener.fileno())],
            env=environment, stderr=stream, stdout=stream, pass_fds=[listener.fileno()],
        )  # fmt: skip
    try:
        for host, status in (("127.0.0.1", b"200"), *([(address, b"403")] if address else [])):
            with socket.create_connection((host, port), timeout=DEADLINE) as connection:
                connection.sendall(b"GET /api/version HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
                assert status in _read_all(connection).split(b"\r\n", 1)[0]
    finally:
        process.terminate()
        process.wait(DEADLINE)


@pytest.mark.req("R31")
def test_names_and_origins_that_are_allowed_besides(home: Path) -> None:
    arguments = ["--allowed-hosts", "router.example,*.tail.example", "--allowed-origins", "https://ui.example"]
    with running_router(home, *arguments) as router:
        for host in ("router.example", "router.example:11434", "a.tail.example", "ROUTER.example"):
            assert call(router, "GET", "/api/tags", host=host).status == 200
        refused = call(router, "GET", "/api/tags", host="evil.example")
        assert (refused.status, "allowed_hosts" in refused.json()["error"]) == (403, True)
        refused = call(router, "GET", "/v1/models", origin="https://evil.example")
        assert refused.status == 403
        assert "allowed_origins" in refused.json()["error"]["message"]
        assert "access-control-allow-origin" not in refused.headers
        refused = call(router, "OPTIONS", "/v1/messages", origin="https://evil.example")
        assert (refused.status, refused.json()["error"]["type"]) == (403, "permission_error")
        assert call(router, "GET", "/v1/models", origin="https://ui.example").status == 200


@pytest.mark.req("R52")
def test_slow_and_silent_clients_are_let_go(home: Path) -> None:
    """Headers byte by byte, no headers at all, and a body that stops."""
    with running_router(home, "--request-timeout-seconds", "0.5") as router:
        silent, dripping, body = _connect(router), _connect(router), _connect(router)
        body.sendall(b"POST /api/chat HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{")
        began = time.monotonic()
        dripping.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\nX: ")
        dripping.settimeout(0.05)
        answer = b""
        while not answer:
            assert time.monotonic() - began < DEADLINE, "it may drip for ever"
            with contextlib.suppress(TimeoutError):
                dripping.sendall(b"a")
                answer = dripping.recv(1000)
        dripping.close()
        assert b"408" in answer
        assert b"408" in _read_all(silent)
        assert b"408" in _read_all(body)
        assert call(router, "GET", "/api/tags").status == 200


@pytest.mark.req("R10", "R52")
def test_a_client_that_does_not_read_its_answer_is_let_go(home: Path) -> None:
    """It keeps its connection, and with it a place with the model."""
    script = {"tokens": 10_000_000, "tokens_per_second": 20_000, "context_tokens": 10_000_100}
    arguments = fake_config(home, {"a": script}, reading_timeout_seconds=1.0)
    with running_router(home, *arguments) as router:
        body = b'{"model":"a","prompt":"go"}'
        head = b"POST /api/generate HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(body)
        with _connect(router) as connection:
            connection.sendall(head + body)
            assert connection.recv(10)
            router.wait_line("client_stalled")
            wait_until(lambda: router.model("a")["in_flight"] == 0, "its place is free")


@pytest.mark.req("R10", "R52")
def test_what_the_system_would_keep_for_a_client_counts_as_unread(home: Path) -> None:
    """Its buffer takes megabytes: a whole answer might lie there, and its request count as done."""
    script = {"text": "x" * 2_000_000, "context_tokens": 10_000_000}
    arguments = fake_config(home, {"a": script}, reading_timeout_seconds=1.0)
    with running_router(home, *arguments) as router, socket.socket() as connection:
        body = b'{"model":"a","prompt":"go","stream":false}'
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 100_000)
        parts = urlsplit(router.url)
        connection.connect((parts.hostname or "", parts.port or 0))
        connection.sendall(
            b"POST /api/generate HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(body) + body
        )
        router.wait_line("client_stalled")


@pytest.mark.slow
@pytest.mark.req("R10")
def test_a_client_that_reads_slowly_and_steadily_gets_everything(home: Path) -> None:
    """Also of one large body, of which much lies here all the time."""
    text = ("x" * 1000 + " ") * 8_000
    arguments = fake_config(home, {"a": {"text": text, "context_tokens": 10_000_000}}, reading_timeout_seconds=0.5)
    with running_router(home, *arguments) as router:
        body = b'{"model":"a","prompt":"go","stream":false}'
        head = b"POST /api/generate HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: %d\r\n\r\n"
        with socket.socket() as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 100_000)
            parts = urlsplit(router.url)
            connection.connect((parts.hostname or "", parts.port or 0))
            connection.settimeout(DEADLINE)
            connection.sendall(head % len(body) + body)
            size = 0
            while part := connection.recv(100_000):
                size += len(part)
                threading.Event().wait(0.02)
        assert size > len(text)
        assert "client_stalled" not in router.log


@pytest.mark.req("R52")
def test_headers_and_bodies_have_limits(home: Path) -> None:
    with running_router(home, "--max-header-bytes", "8KiB", "--max-body-bytes", "10000") as router:
        for head in (
            b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 9000 + b"\r\n\r\n",
            b"GET / HTTP/1.1\r\nHost: localhost\r\n" + b"X: y\r\n" * 2000 + b"\r\n",
            b"GET /" + b"a" * 9000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
            b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 9000,  # and no end
        ):
            connection = _connect(router)
            connection.sendall(head)
            answer = _read_all(connection)
            assert b" 431 " in answer.split(b"\r\n", 1)[0]
            assert answer.count(b"HTTP/1.1") == 1
        body = b"POST /api/chat HTTP/1.1\r\nHost: localhost\r\nContent-Length: 3000000\r\nX: %b\r\n\r\n" % (b"a" * 9000)
        connection = _connect(router)
        connection.sendall(body + b"x" * 3_000_000)  # what follows is taken, so that the answer is not lost
        assert b" 431 " in _read_all(connection).split(b"\r\n", 1)[0]
        assert call(router, "POST", "/api/chat", b"x" * 10001).status == 413
        connection = _connect(router)
        connection.sendall(b"POST /api/chat HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100000000000\r\n\r\n")
        connection.settimeout(DEADLINE)
        assert b" 413 " in connection.recv(1000).split(b"\r\n", 1)[0]
        connection.close()
        chunked = b"POST /api/chat HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
        connection = _connect(router)
        connection.sendall(chunked + b"1000\r\n" + b"x" * 0x1000 + b"\r\n" + b"2000\r\n" + b"x" * 0x2000 + b"\r\n")
        assert b" 413 " in connection.recv(1000).split(b"\r\n", 1)[0]
        connection.close()
        assert call(router, "GET", "/").status == 200


def test_requests_behind_one_that_is_refused_are_not_answered(home: Path) -> None:
    with running_router(home, "--max-header-bytes", "8KiB") as router:
        connection = _connect(router)
        good = b"GET /api/version HTTP/1.1\r\nHost: localhost\r\n\r\n"
        bad = b"GET /api/version HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 9000 + b"\r\n\r\n"
        connection.sendall(bad + good * 100)
        assert _read_all(connection).count(b"HTTP/1.1 ") == 1
        upgrade = b"GET /api/version HTTP/1.1\r\nHost: localhost\r\nUpgrade: h2c\r\nConnection: Upgrade\r\n\r\n"
        connection = _connect(router)
        connection.sendall(upgrade * 1500 + good.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"))
        assert _read_all(connection).count(b"HTTP/1.1 200") == 1501
        assert "Traceback" not in router.log


@pytest.mark.req("R52")
def test_a_flood_of_connections_leaves_room_for_those_that_are_there(home: Path) -> None:
    with running_router(home, "--max-connections", "50") as router:
        held = _connect(router)
        _ask(held)
        memory = psutil.Process(router.pid).memory_info().rss
        flood = [_connect(router) for _ in range(60)]
        router.wait_line("connections_full")
        wait_until(lambda: len(select.select(flood, [], [], 0)[0]) == 60 - 49, "those beyond the limit are closed")
        for _ in range(2000):
            connection = _connect(router)
            flood.append(connection)
            if len(flood) >= 400:
                flood.pop(0).close()
        _ask(held)
        held.close()
        for connection in flood:
            connection.close()
        reply = wait_for_answer(router)
        assert reply == 200
        assert psutil.Process(router.pid).memory_info().rss - memory < 20 * 2**20
        assert sum("connections_full" in line for line in router.lines) <= 3, "not a line for each of them"


def wait_for_answer(router: RouterProcess) -> int:
    """Closed connections are counted off a moment later."""
    end = time.monotonic() + DEADLINE
    while True:
        try:
            return call(router, "GET", "/api/tags").status
        except OSError:
            assert time.monotonic() < end, "nobody is let in any more"


@pytest.mark.parametrize("name", ["Host", "Origin"])
def test_a_header_that_decides_access_comes_once(demo_router: RouterProcess, name: str) -> None:
    """With two, a proxy may have looked at the other one."""
    parts = urlsplit(demo_router.url)
    with socket.create_connection((parts.hostname or "", parts.port or 0), DEADLINE) as connection:
        host = "" if name == "Host" else "Host: localhost\r\n"
        twice = f"{name}: http://localhost\r\n{name}: https://evil.example\r\n"
        connection.sendall(f"GET /api/version HTTP/1.1\r\n{host}{twice}Connection: close\r\n\r\n".encode())
        answer = connection.makefile("rb").read()
    assert (answer.split(b" ", 2)[1], f"more than one {name}".encode() in answer) == (b"400", True)
