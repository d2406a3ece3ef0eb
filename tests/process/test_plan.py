"""The dry run, over HTTP and on the command line: what would go, whom it would wait for, would it fit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support.command import command_on
from tests.support.fakes import fake_config
from tests.support.http import call
from tests.support.router import RouterProcess, running_router, wait_until

_MB = 1_000_000


def _plan(router: RouterProcess, model: str) -> dict[str, object]:
    reply = call(router, "POST", "/admin/plan", {"model": model})
    assert reply.status == 200, reply.body
    found: dict[str, object] = reply.json()
    return found


@pytest.mark.slow
@pytest.mark.req("R13")
def test_a_peak_of_many_requests_makes_no_model_too_large(home: Path) -> None:
    """It fits by its files, and did so before; what it once took beyond that has others leave, and no more."""
    arguments = ("--memory-budget", "300MB")
    with running_router(home, *arguments) as router:
        router.generate("demo")
    file = home / "measured.json"
    known = json.loads(file.read_text())
    assert len(known) == 1
    file.write_text(json.dumps({key: entry | {"peak_bytes": 900 * _MB} for key, entry in known.items()}))
    with running_router(home, *arguments) as router:
        planned = _plan(router, "demo")
        assert (planned["action"], planned["fits"]) == ("load", True)
        assert router.generate("demo")["done"]


def test_a_plan_tells_what_would_happen_and_does_nothing(home: Path) -> None:
    scripts = {
        "a": {"memory_bytes": 2 * _MB, "tokens": 100_000, "tokens_per_second": 50},
        "b": {"memory_bytes": 2 * _MB},
        "huge": {"memory_bytes": 9 * _MB},
    }
    with running_router(home, *fake_config(home, scripts, memory_budget=3 * _MB)) as router:
        first = _plan(router, "a")
        assert (first["action"], first["fits"], first["evict"]) == ("load", True, [])
        assert first["estimate_bytes"] == 2 * _MB
        stream = router.client.stream("/api/generate", {"model": "a", "prompt": "go"})
        next(stream)
        busy = _plan(router, "b")
        assert busy["evict"] == [{"model": "a:latest", "reserved_bytes": 2 * _MB, "drains_first": True}]
        stream.close()
        wait_until(lambda: router.model("a")["in_flight"] == 0, "a is idle")
        idle = _plan(router, "b")
        assert (idle["action"], idle["state"]) == ("evict", "unloaded")
        assert idle["evict"] == [{"model": "a:latest", "reserved_bytes": 2 * _MB, "drains_first": False}]
        huge = _plan(router, "huge")
        assert (huge["action"], huge["fits"], huge["evict"]) == ("refuse", False, [])
        assert "needs 9 MB and the budget is 3 MB" in str(huge["reason"])
        assert _plan(router, "a")["action"] == "serve"
        call(router, "POST", "/admin/models/a/pin")
        assert _plan(router, "b")["pinned"] == ["a:latest"]
        assert router.model("a")["state"] == "ready"
        assert router.model("b")["loads"] == 0
        assert call(router, "POST", "/admin/plan", {"model": "nosuch"}).status == 404
        assert call(router, "POST", "/admin/plan", b"{").status == 400


@pytest.mark.slow
def test_the_command_says_it_in_words_and_in_json(home: Path) -> None:
    scripts = {"a": {"memory_bytes": 2 * _MB}, "b": {"memory_bytes": 2 * _MB}}
    with running_router(home, *fake_config(home, scripts, memory_budget=3 * _MB)) as router:
        router.generate("a")
        said = command_on(router, "plan", "b").stdout.splitlines()
        assert said[0] == "b:latest (unloaded): is loaded once others have left: the room of others is needed"
        assert "  evicts    a:latest: leaves, frees 2.0 MB" in said
        assert json.loads(command_on(router, "plan", "--json", "b").stdout)["action"] == "evict"
        assert command_on(router, "plan", "nosuch").returncode == 4
        assert command_on(router, "pin", "a").stdout == "a:latest is pinned until the router ends\n"
        assert "pinned    a:latest" in command_on(router, "plan", "b").stdout
        assert command_on(router, "unpin", "a").stdout == "a:latest is not pinned\n"
        assert json.loads(command_on(router, "pin", "--json", "a").stdout)["pinned"] is True


def test_each_eviction_and_each_wait_is_one_line_with_its_reason(home: Path) -> None:
    scripts = {"a": {"tokens": 40, "tokens_per_second": 100}, "b": {"tokens": 2}}
    with running_router(home, *fake_config(home, scripts, max_loaded_models=1)) as router:
        stream = router.client.stream("/api/generate", {"model": "a", "prompt": "go"})
        next(stream)
        router.generate("b")
        list(stream)
        log = [line for line in router.lines if "event=" in line]
        waits = [line for line in log if "event=waiting model='b:latest'" in line]
        assert len(waits) == 1
        assert "reason='a:latest: asked to leave'" in waits[0]
        assert sum("event=draining model='a:latest' reason='evicted for b:latest'" in line for line in log) == 1
        assert sum("event=stopping model='a:latest' reason='evicted for b:latest'" in line for line in log) == 1
