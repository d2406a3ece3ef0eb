"""The page's files as any visitor gets them; what a browser makes of them is in tests/ui."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

from mlx_router_server.access.keys import Scope, keys_file, make_key, write_keys
from mlx_router_server.api.ui import UI_PATHS
from tests.support.http import call
from tests.support.router import RouterProcess, running_router

_TYPES = {"js": "text/javascript", "css": "text/css", "svg": "image/svg+xml", "ui": "text/html"}


@pytest.fixture(scope="module")
def locked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RouterProcess]:
    home = tmp_path_factory.mktemp("page")
    write_keys(keys_file(home), [make_key("somebody", [Scope.ADMIN], ())[1]])
    with running_router(home) as router:
        yield router


@pytest.mark.req("R31")
@pytest.mark.parametrize("path", sorted(UI_PATHS - {"/ui/"}))
def test_a_file_is_open_and_allows_nothing_from_outside(locked: RouterProcess, path: str) -> None:
    reply = call(locked, "GET", path)
    assert reply.status == 200
    assert reply.headers["content-type"].startswith(_TYPES[path.rpartition("/")[2].rpartition(".")[2]])
    policy = dict(part.strip().partition(" ")[::2] for part in reply.headers["content-security-policy"].split(";"))
    assert policy["default-src"] == "'none'"
    assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
    assert policy["frame-ancestors"] == "'none'"
    assert reply.headers["x-content-type-options"] == "nosniff"
    text = reply.body.decode()
    addresses = set(re.findall(r"https?://[\w./-]+", text)) - {"http://www.w3.org/2000/svg"}
    assert addresses == set()
    if path == "/ui":
        assert not re.search(r"<script(?![^>]*\bsrc=)|<style|\son\w+=|\sstyle=", text), "nothing inline"
        assert set(re.findall(r'(?:src|href)="(/[^"]+)"', text)) <= UI_PATHS
    for name in re.findall(r'from "\./([\w.]+)"', text):
        assert f"/ui/{name}" in UI_PATHS


def test_what_the_page_shows_is_not_open(locked: RouterProcess) -> None:
    for path in ("/admin/status", "/admin/events", "/admin/logs/stream", "/api/tags", "/metrics"):
        assert call(locked, "GET", path).status == 401
    assert call(locked, "GET", "/ui/").headers["location"].endswith("/ui")
    assert call(locked, "GET", "/ui/index.html").status == 401, "there is no such file"
    assert call(locked, "GET", "/ui/..%2fapp.py").status == 401
