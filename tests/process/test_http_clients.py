"""HTTP as clients in the field speak it: offers of another protocol, HTTP/1.0, redundant slashes, Host headers."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import ollama
import pytest

from mlx_router_server.dialects.body import ndjson_line
from tests.support.http import call
from tests.support.router import RouterProcess, running_router
from tests.tiny_models.parrot import make_parrot
from tests.tiny_models.script import GREETING

_BODY = json.dumps({"model": "demo", "messages": [{"role": "user", "content": "Hello!"}], "stream": False}).encode()
_H2C = (b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\n"
        b"HTTP2-Settings: AAEAAEAAAAIAAAABAAMAAABkAAQBAAAAAAUAAEAA\r\n")  # fmt: skip


@pytest.fixture(scope="module")
def router(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RouterProcess]:
    root = tmp_path_factory.mktemp("parrots")
    make_parrot(root / "lines", ["a\u2028b", " c\x85d", "\u2029"])
    with running_router(tmp_path_factory.mktemp("home"), "--models-dir", str(root)) as found:
        yield found


def _connect(router: RouterProcess) -> socket.socket:
    parts = urlsplit(router.url)
    connection = socket.create_connection((parts.hostname or "", parts.port or 0))
    connection.settimeout(20)
    return connection


def _exchange(router: RouterProcess, *parts: bytes, until: bytes = b"") -> bytes:
    """Send the parts one by one and read to the end, or until something was read."""
    with _connect(router) as connection:
        for part in parts:
            connection.sendall(part)
        data = b""
        while (more := connection.recv(65536)) and not (until and until in data + more):
            data += more
        return data + more


def _request(path: str = "/api/chat", *headers: bytes, body: bytes = _BODY, version: bytes = b"1.1") -> bytes:
    head = b"POST %s HTTP/%s\r\nHost: localhost\r\nContent-Length: %d\r\n" % (path.encode(), version, len(body))
    return head + b"".join(headers) + b"\r\n" + body


@pytest.mark.parametrize("offer", [_H2C, b"Connection: Upgrade\r\nUpgrade: websocket\r\n",
                                   b"Connection: keep-alive, Upgrade\r\nUpgrade: TLS/1.0, IRC/6.9\r\n"])  # fmt: skip
@pytest.mark.parametrize("cut", [0, 1, 40])
def test_an_offered_upgrade_is_declined_and_the_body_read(router: RouterProcess, offer: bytes, cut: int) -> None:
    """``cut``: so many bytes of the body come with the headers, as the recorded bytes of JDK 17 have it: none."""
    data = _request("/api/chat", offer)
    at = data.index(b"\r\n\r\n") + 4 + cut
    answer = _exchange(router, data[:at], data[at:], until=b'"done":true')
    assert answer.startswith(b"HTTP/1.1 200 OK"), answer
    assert GREETING.encode()[:20] in answer


def test_a_chunked_body_behind_an_offer_and_the_next_request_of_the_connection(router: RouterProcess) -> None:
    head = b"POST /api/chat HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n" + _H2C + b"\r\n"
    chunks = b"%x\r\n%s\r\n0\r\n\r\n" % (len(_BODY), _BODY)
    with _connect(router) as connection:
        for data in (head + chunks, _request("/api/chat", _H2C), _request()):
            connection.sendall(data)
            answer = b""
            while b'"done":true' not in answer:
                more = connection.recv(65536)
                assert more, answer
                answer += more
            assert answer.startswith(b"HTTP/1.1 200 OK"), answer


def test_an_offer_without_a_body(router: RouterProcess) -> None:
    data = b"GET /api/version HTTP/1.1\r\nHost: localhost\r\n" + _H2C + b"\r\n"
    assert b'{"version":' in _exchange(router, data, until=b'"}')


@pytest.mark.skipif(shutil.which("java") is None, reason="no Java here; its bytes are replayed above")
def test_javas_own_client(router: RouterProcess) -> None:
    stream = _BODY.replace(b'"stream": false', b'"stream": true')
    done = subprocess.run(
        ["java", str(Path(__file__).parent / "java" / "Chat.java"), router.url, _BODY.decode(), stream.decode(),
         _BODY.decode()],
        capture_output=True, text=True, timeout=55, check=False,
    )  # fmt: skip
    lines = done.stdout.splitlines()
    assert [line[:4] for line in lines] == ["200 "] * 3, (done.stdout, done.stderr)
    assert GREETING in lines[0]


@pytest.mark.parametrize("path", ["/api/chat", "/v1/chat/completions", "/v1/messages"])
@pytest.mark.parametrize("stream", [True, False])
def test_http_1_0_gets_a_body_without_chunks(router: RouterProcess, path: str, stream: bool) -> None:
    body = {"model": "demo", "messages": [{"role": "user", "content": "Hello!"}], "stream": stream, "max_tokens": 50}
    for version, head in ((b"1.0", b"Host: localhost\r\n"), (b"1.0", b"")):
        data = json.dumps(body).encode()
        request = b"POST %s HTTP/%s\r\n%sContent-Length: %d\r\n\r\n%s" % (path.encode(), version, head, len(data), data)
        answer = _exchange(router, request)
        headers, _, content = answer.partition(b"\r\n\r\n")
        assert b" 200 " in headers.splitlines()[0]
        assert b"transfer-encoding" not in headers.lower()
        assert b"connection: close" in headers.lower()
        lines = [line for line in content.splitlines() if line]
        assert all(line.startswith((b"{", b"data: ", b"event: ")) for line in lines), content


@pytest.mark.parametrize("path", ["//api/chat", "/api//chat", "/api/chat/", "///api///chat//"])
def test_redundant_slashes_change_nothing(router: RouterProcess, path: str) -> None:
    assert _exchange(router, _request(path), until=b'"done":true').startswith(b"HTTP/1.1 200")
    assert call(router, "GET", "//v1//models/").status == 200


@pytest.mark.parametrize(
    ("headers", "status"),
    [(b"", 400), (b"Host: localhost\r\nHost: localhost\r\n", 400), (b"Host: [::1]evil.com\r\n", 400),
     (b"Host: localhost:evil.com\r\n", 400), (b"Host: localhost:80:80\r\n", 400), (b"Host: evil.com\r\n", 403),
     (b"Host: a.local\r\n", 200), (b"Host: local\r\n", 403), (b"Host: a.local.evil.com\r\n", 403),
     (b"Host: localhost.\r\n", 200),
     (b"Host: [::1]:11434\r\n", 200), (b"Host: host.docker.internal:11434\r\n", 200), (b"Host: a.localhost\r\n", 200),
     (b"Host: 192.168.1.7:11434\r\n", 200), (b"Host:\r\n", 200)],
)  # fmt: skip
def test_the_host_header_is_one_name_that_cannot_be_rebound(router: RouterProcess, headers: bytes, status: int) -> None:
    answer = _exchange(router, b"GET /api/version HTTP/1.1\r\nConnection: close\r\n%s\r\n" % headers)
    assert answer.split(b" ", 2)[1] == b"%d" % status, answer


@pytest.mark.parametrize(
    ("origin", "status"),
    [("http://[::1]:3000", 200), ("http://localhost:\u00b2".encode().decode("latin-1"), 403),
     ("http://localhost:3000", 200), ("https://evil.com", 403), ("http://localhost.evil.com", 403)],
)  # fmt: skip
def test_origins_of_this_machine(router: RouterProcess, origin: str, status: int) -> None:
    assert call(router, "GET", "/api/version", Origin=origin).status == status


def test_lines_are_lines_for_python_too(router: RouterProcess) -> None:
    """httpx splits a stream with str.splitlines."""
    client = ollama.Client(router.url)
    text = "".join(
        part.message.content or "" for part in client.chat("lines", [{"role": "user", "content": "go"}], stream=True)
    )
    client._client.close()
    assert text == "a\u2028b c\x85d\u2029"
    line: Any = ndjson_line({"x": "".join(map(chr, range(0x2100)))})
    assert len(line.decode().splitlines()) == 1
    assert json.loads(line)["x"] == "".join(map(chr, range(0x2100)))


def test_a_connection_that_rests_is_kept(router: RouterProcess) -> None:
    from mlx_router_server.cli.start import _KEEP_ALIVE_SECONDS

    assert _KEEP_ALIVE_SECONDS >= 60
