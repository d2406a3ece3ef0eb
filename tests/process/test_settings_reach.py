"""Every setting, by every way in, as the running router tells it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from mlx_router_server import setting_kinds as kinds
from mlx_router_server.cli.client import Client
from mlx_router_server.settings import Settings, describe_settings
from tests.support.fakes import fake_config
from tests.support.router import DEADLINE, running_router, wait_until

_KEY = "a-key-for-everything"
# Values that say more than "another one than the default", or that a running router needs to be so.
_CHOSEN: dict[str, Any] = {
    "host": "localhost",
    "port": 0,
    "models_dirs": ["/tmp/of-no-models", "/tmp/of-none-either"],
    "memory_budget": "3GB",
    "prefill_share": 0.3,
    "keep_alive": "7m",
    "api_keys": [_KEY],
    "allowed_origins": ["https://a.example", "https://b.example"],
    "allowed_hosts": ["router.example"],
    "download_allowlist": ["mlx-community/*"],
    "default_model": "demo",
    "log_file": f"{tempfile.gettempdir()}/mlx-router-test-{os.getuid()}/of-the-walk.log",
}


def _other(field: Any) -> Any:
    """A value that is not the default."""
    if field.name in _CHOSEN:
        return _CHOSEN[field.name]
    if choices := getattr(field.metadata["parse"], "choices", None):
        return next(choice for choice in choices if choice != field.default)
    return not field.default if isinstance(field.default, bool) else field.default + 1


_VALUES = {field.name: _other(field) for field in describe_settings()}
_EXPECTED = {
    field.name: kinds.shown(field.metadata["parse"](_VALUES[field.name]), secret=field.metadata["secret"])
    for field in describe_settings()
}


def _text(value: Any) -> str:
    if isinstance(value, list):
        return (os.pathsep if value[0].startswith("/") else ",").join(value)
    return str(value).lower() if isinstance(value, bool) else str(value)


def _environment(home: Path, **more: str) -> dict[str, str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("MLX_ROUTER", "OLLAMA"))}
    return {**clean, "MLX_ROUTER_HOME": str(home), "HF_HOME": str(home / "hf"), **more}


@contextmanager
def _started(command: list[str], environment: dict[str, str]) -> Iterator[Client]:
    """A router by whatever command, and a client for the address that it names in its log."""
    log = Path(environment["MLX_ROUTER_HOME"]) / "log"
    with log.open("w") as stream:
        process = subprocess.Popen(command, env=environment, stderr=stream, stdout=stream)
    try:

        def address() -> str | None:
            assert process.poll() is None, log.read_text()
            found = re.search(r"(?:listens|running) on (http://\S+?)(?:\s|$)", log.read_text())
            return found[1] if found else None

        yield Client(str(wait_until(address, "an address in the log")).replace("localhost", "127.0.0.1"), _KEY)
    finally:
        process.terminate()
        process.wait(DEADLINE)


def _check(client: Client, origins: dict[str, str], *, but: tuple[str, ...] = ()) -> None:
    told = client.get("/admin/config")
    settings = {name: told["settings"][name] for name in _EXPECTED if name not in but}
    assert settings == {name: value for name, value in _EXPECTED.items() if name not in but}
    assert {name: told["origins"][name] for name in settings} == {name: origins[name] for name in settings}
    assert _KEY not in json.dumps(told)


@pytest.mark.req("R20")
def test_no_value_of_the_walk_is_a_default() -> None:
    defaults = Settings()
    parsed = {field.name: field.metadata["parse"](_VALUES[field.name]) for field in describe_settings()}
    assert [name for name, value in parsed.items() if value == getattr(defaults, name)] == []


@pytest.mark.req("R20", "R22")
@pytest.mark.parametrize("entry", ["console script", pytest.param("module", marks=pytest.mark.slow)])
def test_every_flag_reaches_the_router(home: Path, entry: str) -> None:
    script = Path(sys.executable).with_name("mlx-router")
    program = [str(script)] if entry == "console script" else [sys.executable, "-P", "-m", "mlx_router_server"]
    flags: list[str] = []
    for name, value in _VALUES.items():
        if name == "models_dirs":
            flags += [part for path in value for part in ("--models-dir", path)]
        else:
            flags += ["--" + name.replace("_", "-"), _text(value)]
    with _started([*program, "start", *flags], _environment(home)) as client:
        _check(client, {name: "--" + name.replace("_", "-") for name in _VALUES})


@pytest.mark.req("R20")
def test_every_variable_reaches_the_router(home: Path) -> None:
    variables = {f"MLX_ROUTER_{name.upper()}": _text(value) for name, value in _VALUES.items()}
    command = [sys.executable, "-P", "-m", "mlx_router_server", "start"]
    with _started(command, _environment(home, **variables)) as client:
        _check(client, {name: f"MLX_ROUTER_{name.upper()}" for name in _VALUES})


@pytest.mark.req("R20", "R22")
def test_every_key_of_the_file_reaches_the_router_also_by_the_factory(home: Path) -> None:
    """An ASGI server of the user's own takes the address; everything else is the file's."""
    (home / "config.toml").write_text("\n".join(f"{name} = {json.dumps(value)}" for name, value in _VALUES.items()))
    factory = ["--factory", "mlx_router_server.app:create_app_from_environment", "--port", "0"]
    origins = dict.fromkeys(_VALUES, str(home / "config.toml"))
    for command in (["mlx_router_server", "start"], ["uvicorn", *factory]):
        with _started([sys.executable, "-P", "-m", *command], _environment(home)) as client:
            _check(client, origins)


@pytest.mark.req("R21", "R22")
@pytest.mark.parametrize("entry", ["factory", pytest.param("console script", marks=pytest.mark.slow)])
def test_on_demand_takes_effect(home: Path, entry: str) -> None:
    """With it a cold model loads and is listed, without it there is no such model."""
    for on_demand in (True, False):
        if entry == "console script":
            script = str(Path(sys.executable).with_name("mlx-router"))
            command, variables = [script, "start", "--port", "0", "--on-demand", str(on_demand).lower()], {}
        else:
            command = [sys.executable, "-P", "-m", "uvicorn", "--factory", "--port", "0",
                       "mlx_router_server.app:create_app_from_environment"]  # fmt: skip
            variables = {"MLX_ROUTER_ON_DEMAND": str(on_demand).lower()}
        with _started(command, _environment(home, **variables)) as client:
            listed = [model["name"] for model in client.get("/api/tags")["models"]]
            assert listed == (["demo:latest"] if on_demand else [])
            body = json.dumps({"model": "demo", "prompt": "Hello!", "stream": False}).encode()
            import http.client
            from urllib.parse import urlsplit

            connection = http.client.HTTPConnection(urlsplit(client.url).netloc, timeout=DEADLINE)
            connection.request("POST", "/api/generate", body)
            response = connection.getresponse()
            data = json.loads(response.read())
            connection.close()
            assert response.status == (200 if on_demand else 404), data
            loaded = [model["name"] for model in client.get("/api/ps")["models"]]
            assert loaded == (["demo:latest"] if on_demand else [])


@pytest.mark.slow
@pytest.mark.req("R23", "R26")
def test_twenty_swaps_change_no_setting_and_no_list(home: Path) -> None:
    arguments = fake_config(home, {"small": {"tokens": 1}, "other": {"tokens": 1}}, default_model="small")
    with running_router(home, *arguments, "--max-loaded-models", "1") as router:
        before = router.client.get("/admin/config"), _ids(router.client)
        for number in range(20):
            router.generate("small" if number % 2 else "other")
            assert _ids(router.client) == before[1]
        assert (router.client.get("/admin/config"), _ids(router.client)) == before
        assert sum(model["loads"] for model in router.status()["models"]) == 20


def _ids(client: Client) -> list[list[str]]:
    return [
        [model["id"] for model in client.get("/v1/models")["data"]],
        [model["name"] for model in client.get("/api/tags")["models"]],
    ]
