"""Names that are meant to be more than names: on every route and on the command line, nothing is opened, started or
reached because of them, and the log stays one line for each event."""

from __future__ import annotations

import http.client
import json
import os
import re
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import pytest
from starlette.routing import Route

from mlx_router_server.app import create_app
from mlx_router_server.catalogue.names import parse_name
from mlx_router_server.settings import Settings
from mlx_router_shared.errors import InvalidRequest
from tests.process.test_names import body_for
from tests.security.audited import Audit, audited_router, noting
from tests.support.command import command_on
from tests.support.router import RouterProcess

_ROOT = str(Path(__file__).parents[2])
_NAMES = [
    "../../etc/passwd", "..", "../x", "a/../b", "/etc/passwd", "//etc/passwd", "~/x", "~root", "C:\\Windows\\x",
    "\\\\server\\share", "..\\..\\x", "%2e%2e%2fetc%2fpasswd", "..%2f..%2fetc", "a\x00b",
    "a\nERROR event=forged", "a\r\nX: y", "\x1b[31mred", "--config", "-rf", "--x=y", "$(touch /tmp/mlxr-pwned)",
    "`id`", ";id", "|id", "a b", "a&b",
    "http://127.0.0.1:9/x", "https://evil.example/x", "file:///etc/passwd", "data:text/plain,x", "hf.co/../../x",
    "evil.example/a/b", "evil.example:443/a/b:c", "раypal", "ｑｗｅｎ３", "qwen3\u202e4b", "\ufeffdemo", "demo\u200b",
    "a" * 256, "a/" * 200, "a" * 1_000_000, ":", ":::", "@sha256:00", "demo@sha256:00", "x:cloud:local", "con", "{}",
    "%s%n%x", "{0.__class__}", "{{7*7}}", "' OR 1=1 --", "<script>", ".", "./demo", "demo/", "/demo", "models--a--b",
]  # fmt: skip
_LINE = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} (DEBUG|INFO|WARNING|ERROR) ")
# The interpreter's own, the project's, and what the kernel says of memory.
_ROOTS = ("/proc/", "/sys/", "/usr/", "/dev/")


@pytest.fixture(scope="module")
def audited(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[RouterProcess, Audit]]:
    home = tmp_path_factory.mktemp("audited")
    (home / "elsewhere").mkdir()
    arguments = ["--models-dir", str(home / "elsewhere"), "--allow-download", "true", "--download-allowlist", "*",
                 "--standby-workers", "0"]  # fmt: skip
    # Nothing may even look for the hub: the address is one where nobody is.
    with audited_router(home, *arguments, variables={"HF_ENDPOINT": "http://127.0.0.1:9"}) as found:
        yield found


def _routes() -> list[tuple[str, str]]:
    return sorted(
        (method, route.path)
        for route in create_app(Settings()).routes
        if isinstance(route, Route)
        for method in route.methods or ()
    )


def _send(router: RouterProcess, method: str, path: str, body: Any) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection(urlsplit(router.url).netloc, timeout=30)
    try:
        connection.request(method, path, json.dumps(body).encode() if body is not None else None)
        response = connection.getresponse()
        if path == "/admin/events":
            return response.status, b""
        return response.status, response.read()
    finally:
        connection.close()


def _bodies(path: str, name: str) -> list[Any]:
    """A new model may have any name that is one: those are left out where one would be made."""
    if path == "/api/copy":
        bodies: list[Any] = [{"source": name, "destination": "x"}]
        return bodies if _is_name(name) else [*bodies, {"source": "demo", "destination": name}]
    if path == "/api/create":
        bodies = [{"model": "x", "files": {name: "sha256:" + "0" * 64}},
                  {"model": "x", "from": "demo", "adapters": {name: name}}]  # fmt: skip
        return bodies if _is_name(name) else [*bodies, {"model": name, "from": "demo"}]
    if path in ("/api/pull", "/api/push", "/api/delete", "/api/show", "/admin/plan"):
        return [{"model": name}, {"name": name}]
    return [{**body_for(path), "model": name}]


def _is_name(text: str) -> bool:
    try:
        parse_name(text)
    except InvalidRequest:
        return False
    return True


@pytest.mark.req("R32", "R5", "R42")
@pytest.mark.parametrize("number", range(len(_NAMES)), ids=lambda number: ascii(_NAMES[number])[:30])
def test_a_name_is_only_ever_a_key(audited: tuple[RouterProcess, Audit], number: int) -> None:
    router, audit = audited
    name = _NAMES[number]
    audit.begin()
    lines = len(router.lines)
    for method, path in _routes():
        if path in ("/admin/events", "/admin/shutdown"):
            continue  # one does not end, the other takes no name and ends the router
        if "{" in path:
            encoded = quote(name[:2000], safe="")
            target = re.sub(r"\{\w+(:path)?\}", encoded.replace("\\", r"\\"), path)
            status, body = _send(router, method, target, {} if method == "POST" else None)
            assert status in (200, 204, 307, 400, 401, 404, 405, 431), (method, target[:80], status, body[:200])
            if "/admin/models/" in path or path.startswith("/v1/models/"):
                assert status != 200, (target, body)
        elif method in ("POST", "DELETE"):
            for data in _bodies(path, name):
                status, body = _send(router, method, path, data)
                if path == "/api/pull" and status == 200:
                    assert b'"error"' in body
                    continue
                allowed = (401, 403) if path in ("/api/me", "/api/signout") or "experimental" in path else (400, 404)
                assert status in allowed, (path, status, body[:200])
    home = audit.file.parent
    roots = (*_ROOTS, str(home), str(Path(__file__).parents[2]), str(Path(http.client.__file__).parents[1]))
    assert audit.opened_outside(*roots) == []
    assert audit.spawned() == []
    assert audit.connected() == []
    assert router.status()["router"]["downloads"] == []
    assert all(model["state"] == "unloaded" for model in router.status()["models"])
    for line in router.lines[lines:]:
        assert _LINE.match(line), line
        assert len(line) < 10_000
        assert line.isprintable(), ascii(line)
    assert not Path("/tmp/mlxr-pwned").exists()


@pytest.mark.slow
@pytest.mark.req("R32")
@pytest.mark.timeout(240)
def test_the_same_from_the_command_line(audited: tuple[RouterProcess, Audit], tmp_path: Path) -> None:
    """Neither the router nor the command itself opens, starts or asks anything for such a name."""
    router, audit = audited
    audit.begin()
    commands = Audit(tmp_path / "audit", None)
    commands.file.touch()
    verbs = ("show", "pull", "rm", "load", "run", "unload", "pin", "unpin", "plan", "stop", "cp", "create")
    names = [name for name in _NAMES if "\x00" not in name and len(name) < 100_000]
    nasty = [name for name in names if not name.isprintable()][:3]
    calls = [(verbs[number % len(verbs)], name) for number, name in enumerate(names[::2])]
    calls += [(verb, nasty[number % len(nasty)]) for number, verb in enumerate(verbs)]

    def run(asked: tuple[str, str]) -> None:
        verb, name = asked
        more = {"run": ["hi"], "cp": ["x"], "create": ["-f", "-"]}.get(verb, [])
        text = "FROM nosuch\n" if verb == "create" else ""
        done = command_on(router, verb, name, *more, text=text, environment=noting(commands.file))
        assert done.returncode in (1, 2, 4), (verb, name, done.stdout, done.stderr)
        if done.returncode != 2:  # 2 is a complaint of argparse about a flag, with its usage
            assert done.stderr.count("\n") == 1, done.stderr
            assert done.stderr.rstrip("\n").isprintable(), ascii(done.stderr)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(run, calls))
    assert audit.spawned() == []
    assert audit.connected() == []
    of_python = {os.path.realpath(path) for path in (sys.prefix, sys.base_prefix, _ROOT)} | {
        sys.prefix,
        sys.base_prefix,
    }
    assert len(commands.events()) > len(calls), "they were listened to"
    assert (
        set(commands.opened_outside(*of_python, "/usr/lib/", "/proc/self/", "/nonexistent/"))
        - {"/proc/stat", "/dev/null"}
        == set()
    )
    assert commands.spawned() == []
    port = urlsplit(router.url).port
    assert [what for what in commands.connected() if str(port) not in what] == []


@pytest.mark.req("R29")
def test_a_thousand_lists_touch_no_disk(audited: tuple[RouterProcess, Audit]) -> None:
    """Beside the look at the folders that happens every few seconds anyway."""
    router, audit = audited
    connection = http.client.HTTPConnection(urlsplit(router.url).netloc, timeout=30)
    audit.begin()
    for number in range(1000):
        connection.request("GET", ("/api/tags", "/v1/models")[number % 2])
        assert connection.getresponse().read()
    connection.close()
    looks = [what for what in audit.walked() if "elsewhere" in what]
    assert len(audit.walked()) <= 20, "a look at the disk for each list"
    assert len(looks) <= 5
