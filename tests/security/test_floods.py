"""Much of everything: bodies, nesting, connections. The service stays, and so does its memory."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from urllib.parse import urlsplit

import psutil
import pytest

from tests.support.http import call
from tests.support.router import DEADLINE, RouterProcess, running_router, wait_until

_FLAT = 30 * 2**20


@pytest.fixture(scope="module")
def router(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RouterProcess]:
    with running_router(tmp_path_factory.mktemp("floods")) as found:
        found.generate("demo", prompt="Hello!")
        yield found


def _connect(router: RouterProcess) -> socket.socket:
    parts = urlsplit(router.url)
    return socket.create_connection((parts.hostname or "", parts.port or 0), timeout=DEADLINE)


def _memory(router: RouterProcess) -> int:
    return psutil.Process(router.pid).memory_info().rss


@pytest.mark.req("R52")
@pytest.mark.parametrize("path", ["/api/chat", "/v1/chat/completions", "/v1/messages", "/api/create", "/admin/plan"])
@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_of_a_hundred_megabytes_is_refused_before_it_is_kept(
    router: RouterProcess, path: str, chunked: bool
) -> None:
    before, connection = _memory(router), _connect(router)
    how = b"Transfer-Encoding: chunked" if chunked else b"Content-Length: 100000000"
    connection.sendall(b"POST " + path.encode() + b" HTTP/1.1\r\nHost: localhost\r\n" + how + b"\r\n\r\n")
    part = b" " * 1_000_000
    with contextlib.suppress(ConnectionError):  # it hangs up on us
        for _ in range(100):
            connection.sendall(b"f4240\r\n" + part + b"\r\n" if chunked else part)
    answer = b""
    with contextlib.suppress(ConnectionError):
        answer = connection.recv(1000)
    connection.close()
    assert not answer or b" 413 " in answer.split(b"\r\n", 1)[0]
    assert call(router, "GET", "/api/tags").status == 200
    assert _memory(router) - before < _FLAT + 33 * 2**20, "one body may have been held up to its limit"


@pytest.mark.req("R52")
@pytest.mark.parametrize("path", ["/api/chat", "/v1/chat/completions", "/v1/messages", "/v1/responses", "/api/create"])
@pytest.mark.parametrize(
    "body",
    [b"[" * 1_000_000, b'{"a":' * 500_000, b'{"messages":' + b"[" * 400_000 + b"]" * 400_000 + b"}",
     b'{"model":"demo","tools":' + b'[{"a":' * 100_000, b'{"a":"' + b"\\u0000" * 1_000_000 + b'"}',
     b"{" + b",".join(b'"k%d":1' % number for number in range(300_000)) + b"}"],
    ids=["arrays", "objects", "closed", "tools", "escapes", "keys"],
)  # fmt: skip
def test_deep_and_wide_json_is_a_bad_request(router: RouterProcess, path: str, body: bytes) -> None:
    assert call(router, "POST", path, body).status in (400, 404, 413)


@pytest.mark.req("R52")
def test_ten_thousand_connections(router: RouterProcess) -> None:
    """A few hundred at a time from here; the router holds what it is allowed to and answers those it holds."""
    before, held = _memory(router), []
    for number in range(10_000):
        with contextlib.suppress(OSError):
            held.append(_connect(router))
        if number % 500 == 0:
            assert call(router, "GET", "/health").status == 200
        if len(held) > 400:
            held.pop(0).close()
    for connection in held:
        connection.close()
    wait_until(lambda: psutil.Process(router.pid).num_fds() < 100, "the descriptors are back")
    assert router.generate("demo", prompt="Hello!")["done"]
    assert _memory(router) - before < _FLAT
