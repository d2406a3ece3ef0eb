"""SIGHUP: the settings are read again, validated first, and hold at once; what cannot be understood changes nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from mlx_router_server.cli.client import ApiError
from tests.support.fakes import fake_config, write_fake
from tests.support.http import call
from tests.support.router import RouterProcess, running_router, wait_until


def _reload(router: RouterProcess, pattern: str) -> str:
    router.process.send_signal(signal.SIGHUP)
    return router.wait_line(pattern)


def test_models_limits_and_names_follow_the_file_while_a_stream_runs(home: Path) -> None:
    scripts = {"a": {"tokens": 100_000, "tokens_per_second": 50}}
    with running_router(home, *fake_config(home, scripts)) as router:
        stream = router.client.stream("/api/generate", {"model": "a", "prompt": "go"})
        next(stream)
        config = home / "config.toml"
        folder = write_fake(home / "fakes" / "b", tokens=2)
        text = 'keep_alive = 420\nmax_loaded_models = 1\nbusy_policy = "fail"\n' + config.read_text()
        config.write_text(f'{text}[models."b"]\npath = "{folder}"\n[name_map]\n"gpt-*" = "b"\n')
        _reload(router, "event=reloaded models=2")
        with pytest.raises(ApiError, match="cannot begin now"):
            router.generate("b")
        assert next(stream)["done"] is False
        stream.close()
        wait_until(lambda: router.model("a")["in_flight"] == 0, "a is idle")
        assert router.generate("gpt-5")["response"].startswith("b:")
        assert router.model("a")["state"] == "unloaded"
        wait_until(lambda: router.model("b")["in_flight"] == 0, "b is idle")
        assert round(router.model("b")["expires_in_seconds"] / 60) == 7


@pytest.mark.req("R23")
def test_a_file_that_cannot_be_understood_changes_nothing(home: Path) -> None:
    with running_router(home, *fake_config(home, {"a": {"tokens": 2}})) as router:
        config = home / "config.toml"
        good = config.read_text()
        config.write_text('max_queue = "plenty"\n' + good)
        assert "max_queue" in _reload(router, "event=reload_refused")
        assert router.generate("a")["done"] is True
        config.write_text('host = "0.0.0.0"\n' + good)
        assert "waiting_for_restart='host'" in _reload(router, "event=reloaded")
        assert router.generate("a")["done"] is True


@pytest.mark.req("R23")
def test_the_last_file_is_in_force_after_a_storm_of_signals(home: Path) -> None:
    """A signal that arrives while the settings are being read leads to one more reading."""
    with running_router(home, *fake_config(home, {"a": {"tokens": 2}})) as router:
        config = home / "config.toml"
        good = config.read_text()
        for storm in range(12):
            for number in range(8):
                config.write_text(f"keep_alive = {1000 + 10 * storm + number}\n{good}")
                router.process.send_signal(signal.SIGHUP)
            wanted = 1000 + 10 * storm + 7
            wait_until(partial(_keep_alive_is, router, wanted), f"keep_alive is {wanted}", 5)


def _keep_alive_is(router: RouterProcess, seconds: float) -> bool:
    return bool(router.client.get("/admin/config")["settings"]["keep_alive"] == seconds)


@pytest.mark.req("R23", "R31")
def test_a_file_that_is_gone_changes_nothing(home: Path) -> None:
    """Above all it does not take the keys away that the file had."""
    (home / "config.toml").write_text('api_keys = ["secret-of-somebody"]\n')
    with running_router(home) as router:
        assert call(router, "GET", "/admin/config").status == 401
        (home / "config.toml").unlink()
        assert "config.toml" in _reload(router, "event=reload_refused")
        assert call(router, "GET", "/admin/config").status == 401
        (home / "config.toml").write_text('api_keys = ["another-secret"]\n')
        _reload(router, "event=reloaded")
        assert call(router, "GET", "/admin/config", x_api_key="another-secret").status == 200


def test_a_terminal_that_is_closed_ends_the_router(home: Path) -> None:
    """The same signal, another meaning: nobody wants a router to live on without the window it was started in."""
    master, slave = os.openpty()
    environment = {**os.environ, "MLX_ROUTER_HOME": str(home), "HF_HOME": str(home / "hf")}
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "mlx_router_server", "start", "--port", "0", "--standby-workers", "0"],
        env=environment, preexec_fn=lambda: os.login_tty(slave),
    )  # fmt: skip
    os.close(slave)
    said = b""
    while b"event=catalogue" not in said:  # it serves
        said += os.read(master, 4096)
    os.close(master)
    assert process.wait(20) == -signal.SIGHUP
