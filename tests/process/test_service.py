"""The router as a service: installed, killed, upgraded, failed on purpose, stopped, removed; and what it tells systemd.

The manager is a stand-in (tests/support/service_manager.py) that reads the real unit; processes and signals are real.
"""

from __future__ import annotations

import json
import os
import plistlib
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import threading
from argparse import Namespace
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from mlx_router_server.access.keys import Scope, keys_file, make_key, write_keys
from mlx_router_server.cli.client import Client
from mlx_router_server.cli.service import _Service
from mlx_router_server.service.plan import plan_service
from mlx_router_server.settings import Settings
from tests.support.command import command
from tests.support.http import call
from tests.support.router import DEADLINE, RouterProcess, running_router, still_alive, wait_until
from tests.support.service_manager import install_manager, keeper_pids


def _free_port() -> int:
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def _taken_port() -> Iterator[int]:
    """Somebody listens there, and says nothing to anybody."""
    listener = socket.create_server(("127.0.0.1", 0))

    def turn_away() -> None:
        with suppress(OSError):
            while True:
                listener.accept()[0].close()

    thread = threading.Thread(target=turn_away, daemon=True)
    thread.start()
    try:
        yield listener.getsockname()[1]
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        thread.join(DEADLINE)
        listener.close()


class _Machine:
    """A user's home, a service manager, and the commands as that user types them."""

    def __init__(self, folder: Path, manager: str) -> None:
        self.home = folder / "user"
        self.home.mkdir()
        self.state = folder / "manager"
        self.manager = manager
        self.port = _free_port()
        self.variables = {
            **install_manager(self.state), "HOME": str(self.home), "XDG_CONFIG_HOME": "",
            "MLX_ROUTER_STANDBY_WORKERS": "0", "HF_HOME": str(self.home / "hf"), "SSL_CERT_FILE": "",
        }  # fmt: skip
        where = {"systemd": ".config/systemd/user/mlx-router.service",
                 "launchd": "Library/LaunchAgents/org.mlx-router.server.plist"}  # fmt: skip
        self.unit = self.home / where[manager]

    def run(self, *words: str, port: int | None = None, **more: str) -> subprocess.CompletedProcess[str]:
        """The port is named at the installation alone, as by somebody who will not think of it again."""
        named = {"MLX_ROUTER_PORT": str(port or self.port)} if words[0] == "install" else {}
        return command(
            "service", words[0], "--manager", self.manager, *words[1:], home=self.home / "state",
            environment={**self.variables, **named, **more},
        )  # fmt: skip

    @property
    def client(self) -> Client:
        return Client(f"http://127.0.0.1:{self.port}")

    def status(self) -> dict[str, Any]:
        told: dict[str, Any] = json.loads(self.run("status", "--json").stdout)
        return told

    def told(self) -> dict[str, Any]:
        """What the manager itself knows."""
        found: dict[str, Any] = json.loads((self.state / f"{self.manager}.json").read_text())
        return found

    def processes(self) -> list[psutil.Process]:
        """The router and its workers."""
        router = psutil.Process(self.status()["pid"])
        return [router, *router.children(recursive=True)]


@pytest.fixture(params=["systemd", "launchd"])
def machine(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[_Machine]:
    found = _Machine(tmp_path, request.param)
    yield found
    for pid in keeper_pids(found.state):
        os.kill(pid, signal.SIGTERM)
        wait_until(lambda: not keeper_pids(found.state), "the service has ended")


@pytest.mark.slow
@pytest.mark.timeout(150)
def test_a_service_lives_through_what_happens_to_it(machine: _Machine) -> None:
    assert machine.run("status").returncode == 3
    installed = machine.run("install")
    assert installed.returncode == 0, installed.stderr
    assert f"installed {machine.unit}" in installed.stdout
    assert "its demo model says: Hello" in installed.stdout
    first = machine.status()
    assert (first["running"], first["answers"], first["installed"]) == (True, True, True)
    elsewhere = machine.run("status", OLLAMA_HOST="127.0.0.1:2", MLX_ROUTER_PORT="3")
    assert elsewhere.returncode == 0, "what this shell says is not what the service was told"

    assert (machine.home / "hf").is_dir(), "a unit that shuts the disk away could not make it"
    os.kill(first["pid"], signal.SIGKILL)
    wait_until(lambda: (now := machine.status())["answers"] and now["pid"] != first["pid"], "it has come back")

    again = machine.run("install")
    assert again.returncode == 0, "an upgrade is an installation over the former one"
    upgraded = machine.status()
    assert upgraded["answers"]

    unit = machine.unit.read_bytes()
    with _taken_port() as port:
        failed = machine.run("install", port=port)
    assert failed.returncode == 1
    assert "the service does not work, and the former service is back" in failed.stderr
    assert len(failed.stderr.strip().splitlines()) == 1
    assert machine.unit.read_bytes() == unit
    wait_until(lambda: machine.status()["answers"], "the former service answers")

    machine.client.post("/api/generate", {"model": "demo", "prompt": "Hello!", "stream": False})
    processes = machine.processes()
    assert len(processes) == 2, "the router and a worker"
    stopped = machine.run("stop")
    assert (stopped.returncode, stopped.stdout[:7]) == (0, "stopped"), stopped.stderr
    assert still_alive(processes) == []
    assert machine.status()["running"] is False
    assert machine.run("stop").stdout == "it does not run\n"

    assert machine.run("restart").returncode == 0, "also of one that does not run"
    before = machine.status()["pid"]
    assert machine.run("restart").returncode == 0
    assert machine.status()["pid"] != before
    assert machine.run("stop").returncode == 0
    assert machine.run("start").returncode == 0

    processes = machine.processes()
    removed = machine.run("uninstall")
    assert removed.returncode == 0, removed.stderr
    assert not machine.unit.exists()
    assert still_alive(processes) == []
    assert machine.run("status").stdout == "it is not installed: mlx-router service install\n"
    for words in ("start", "stop", "restart", "uninstall"):
        assert machine.run(words).returncode == 1


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_one_that_cannot_start_is_stopped_and_started_once_it_can(machine: _Machine) -> None:
    """It crashes again and again; stopped, it stays so, and when its settings are mended it may start at once."""
    config = machine.home / "mlx-router.toml"
    config.write_text("")
    assert machine.run("install", "--config", str(config)).returncode == 0
    config.write_text("colour = 1\n")
    os.kill(machine.status()["pid"], signal.SIGKILL)
    if machine.manager == "systemd":
        wait_until(lambda: machine.told()["active"] == "failed", "it is given up")
        config.write_text("")
        assert machine.run("start").returncode == 0
    else:
        wait_until(lambda: machine.told().get("restarts", 0) > 1, "it is tried again and again")
        stopped = machine.run("stop")
        assert (stopped.returncode, stopped.stdout[:7]) == (0, "stopped"), stopped.stderr
        assert keeper_pids(machine.state) == []
        logs = machine.run("logs")
        assert "there is no setting 'colour'" in logs.stdout, "why it did not start is shown"
        config.write_text("")
        assert machine.run("start").returncode == 0
    assert machine.status()["answers"]


@pytest.mark.slow
def test_a_service_that_loads_nothing_by_itself_is_installed_too(machine: _Machine) -> None:
    installed = machine.run("install", MLX_ROUTER_ON_DEMAND="false")
    assert installed.returncode == 0, installed.stderr
    assert "its demo model says: Hello" in installed.stdout


def test_a_first_installation_that_fails_leaves_nothing(machine: _Machine) -> None:
    """It starts, is ready, and its demo model cannot be loaded."""
    failed = machine.run("install", MLX_ROUTER_MEMORY_BUDGET="1KB")
    assert failed.returncode == 1
    assert "its demo model does not answer: " in failed.stderr
    assert "the service does not work, and nothing is left of it" in failed.stderr
    assert not machine.unit.exists()
    assert keeper_pids(machine.state) == []


def test_a_router_that_runs_already_is_not_mistaken_for_the_service(machine: _Machine, tmp_path: Path) -> None:
    home = tmp_path / "other"
    home.mkdir()
    with running_router(home) as router:
        failed = machine.run("install", port=int(router.url.rpartition(":")[2]))
        assert failed.returncode == 1
        assert f"another router answers at {router.url} (pid {router.pid})" in failed.stderr
        assert not machine.unit.exists()


def test_a_port_that_somebody_holds_in_silence_is_told_at_once(home: Path) -> None:
    """Whoever is there may accept connections and never answer one."""
    with closing(socket.create_server(("127.0.0.1", 0))) as silent:
        port = silent.getsockname()[1]
        done = command("start", "--port", str(port), home=home)
    assert done.returncode == 1
    assert f"port {port} is taken: another program answers" in done.stderr


def test_the_unit_carries_settings_but_no_secret(machine: _Machine) -> None:
    shown = machine.run(
        "install", "--dry-run", MLX_ROUTER_KEEP_ALIVE="7m", OLLAMA_NUM_PARALLEL="3", HF_TOKEN="hf_secret",
        MLX_ROUTER_MODELS_DIRS="/a folder/with 100%:/other", MLX_ROUTER_API_KEY="sk-secret",
    )  # fmt: skip
    assert shown.returncode == 0, shown.stderr
    assert "secret" not in shown.stdout
    if machine.manager == "launchd":
        carried = plistlib.loads(shown.stdout.encode())["EnvironmentVariables"]
    else:
        lines = [line for line in shown.stdout.splitlines() if line.startswith("Environment=")]
        assert 'Environment="MLX_ROUTER_MODELS_DIRS=/a folder/with 100%%:/other"' in lines
        carried = dict(line.removeprefix("Environment=").strip('"').replace("%%", "%").split("=", 1) for line in lines)
    assert carried["MLX_ROUTER_KEEP_ALIVE"] == "420"
    assert carried["MLX_ROUTER_PARALLEL"] == "3"
    assert carried["MLX_ROUTER_MODELS_DIRS"] == "/a folder/with 100%:/other"
    assert carried["MLX_ROUTER_PORT"] == str(machine.port)
    refused = machine.run("install", "--dry-run", MLX_ROUTER_API_KEYS="sk-secret")
    assert refused.returncode == 2
    assert "api_keys comes from MLX_ROUTER_API_KEYS, and a unit can be read by others" in refused.stderr
    assert "sk-secret" not in refused.stderr
    assert not machine.unit.exists()


def test_what_the_router_writes_to_is_open_to_it_wherever_it_lies(tmp_path: Path) -> None:
    """The cache is named by three variables, and may be a link to another disk."""
    home, disk = tmp_path / "user", tmp_path / "disk"
    (home / ".cache" / "huggingface").mkdir(parents=True)
    disk.mkdir()
    (home / ".cache" / "huggingface" / "hub").symlink_to(disk)

    def writable(**environment: str) -> set[str]:
        said = {"HOME": str(home), "MLX_ROUTER_HOME": str(home / "state"), **environment}
        plan = plan_service(
            Settings(log_file=str(tmp_path / "logs" / "r.log")), said, None, system=False, user="me", user_home=home,
            sandbox=True,
        )  # fmt: skip
        assert {name: plan.environment.get(name, value) for name, value in environment.items()} == environment
        return {str(path.relative_to(tmp_path)) for path in plan.writable}

    always = {"user/state", "logs"}
    assert writable() == always | {"user/.cache/huggingface", "disk"}
    assert writable(HF_HUB_CACHE=str(tmp_path / "hub")) == always | {"user/.cache/huggingface", "hub"}
    assert writable(HUGGINGFACE_HUB_CACHE=str(tmp_path / "h")) == always | {"user/.cache/huggingface", "h"}
    assert writable(XDG_CACHE_HOME=str(tmp_path / "xdg")) == always | {"xdg/huggingface"}
    assert writable(HF_HOME=str(tmp_path / "hf")) == always | {"hf"}


@pytest.mark.skipif(os.geteuid() != 0, reason="only the administrator makes a folder somebody else's")
def test_folders_that_are_made_for_a_service_of_the_machine_are_its_users(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Others are not, of a disk that may not be there yet."""
    theirs = tmp_path / "theirs"
    monkeypatch.setattr("mlx_router_server.cli.service._home_of", lambda user: str(theirs))
    monkeypatch.setenv("MLX_ROUTER_HOME", str(theirs / ".config" / "mlx-router"))
    monkeypatch.setenv("HF_HOME", str(theirs / "hf"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "disk" / "hub"))
    monkeypatch.setenv("MLX_ROUTER_LOG_FILE", str(theirs / "elsewhere" / "router.log"))
    user = pwd.getpwnam("nobody")
    theirs.mkdir()
    (theirs / "elsewhere").symlink_to(tmp_path / "disk")
    chosen = _Service(Namespace(system=True, user="nobody", config=None, manager="systemd", action="install"))
    chosen._make_folders(chosen._plan())
    for folder in (".config", ".config/mlx-router", "hf"):
        found = (theirs / folder).stat()
        assert (found.st_uid, found.st_gid) == (user.pw_uid, user.pw_gid), folder
    assert (theirs / ".config" / "mlx-router").stat().st_mode & 0o777 == 0o700
    assert not (tmp_path / "disk").exists()


def test_a_key_that_is_wanted_is_asked_for_and_not_waited_for(machine: _Machine) -> None:
    state = machine.home / "state"
    state.mkdir()
    write_keys(keys_file(state), [make_key("admin", [Scope.ADMIN])[1]])
    failed = machine.run("install", MLX_ROUTER_API_KEY="wrong")
    assert failed.returncode == 1
    assert "nothing is left of it" in failed.stderr
    assert "name a key of the scope admin in MLX_ROUTER_API_KEY" in failed.stderr


def test_a_user_who_is_not_there_is_a_sentence(tmp_path: Path) -> None:
    done = command("service", "status", "--system", "--user", "nobody-of-that-name", home=tmp_path)
    assert done.returncode == 1
    assert done.stderr == "mlx-router: there is no user 'nobody-of-that-name' on this machine\n"


def test_a_manager_that_is_not_there_is_a_sentence(tmp_path: Path) -> None:
    programs = tmp_path / "bin"
    programs.mkdir()
    done = command("service", "status", "--manager", "launchd", home=tmp_path, environment={"PATH": str(programs)})
    assert done.returncode == 1
    assert done.stderr == "mlx-router: launchctl is not on this machine: there is no such service manager here\n"


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed")
@pytest.mark.parametrize("sandbox", [[], ["--no-sandbox"]])
def test_systemd_itself_finds_nothing_wrong_with_the_unit(tmp_path: Path, sandbox: list[str]) -> None:
    shown = command("service", "install", "--dry-run", "--manager", "systemd", *sandbox, home=tmp_path)
    file = tmp_path / "mlx-router.service"
    file.write_text(shown.stdout)
    done = subprocess.run(
        ["systemd-analyze", "verify", "--recursive-errors=no", "--man=no", str(file)],
        capture_output=True, text=True, timeout=60, check=False, env={**os.environ, "XDG_RUNTIME_DIR": str(tmp_path)},
    )  # fmt: skip
    complaints = [line for line in done.stderr.splitlines() if "mlx-router.service" in line]
    assert complaints == []
    assert done.returncode == 0, done.stderr


# -------------------------------------------------------------------------------------- what it owes its manager


class _Listener:
    """The manager's end of the notify socket."""

    def __init__(self, folder: Path) -> None:
        self.path = str(folder / "notify")
        self.said: list[dict[str, str]] = []
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(self.path)
        self._socket.settimeout(0.2)
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        while not self._done.is_set():
            try:
                data = self._socket.recv(65536).decode()
            except TimeoutError:
                continue
            self.said.append(dict(line.partition("=")[::2] for line in data.splitlines()))

    def close(self) -> None:
        self._done.set()
        self._thread.join(DEADLINE)
        self._socket.close()

    def count(self, key: str) -> int:
        return sum(key in said for said in self.said)


@pytest.fixture
def listener(tmp_path: Path) -> Iterator[_Listener]:
    found = _Listener(tmp_path)
    yield found
    found.close()


def test_systemd_is_told_of_every_turn_in_a_life(home: Path, listener: _Listener) -> None:
    variables = {"NOTIFY_SOCKET": listener.path, "WATCHDOG_USEC": "400000"}
    with running_router(home, variables=variables) as router:
        wait_until(lambda: listener.count("READY") == 1, "READY")
        assert call(router, "GET", "/health").status == 200, "what is said to be ready answers"
        wait_until(lambda: listener.count("WATCHDOG") > 5, "signs of life")
        router.generate("demo", prompt="Hello!")
        wait_until(
            lambda: any("1 loaded" in said.get("STATUS", "") for said in listener.said), "the new state in words"
        )
        for child in router.children():
            assert "NOTIFY_SOCKET" not in child.environ()
        os.kill(router.pid, signal.SIGHUP)
        wait_until(lambda: listener.count("READY") == 2, "READY again")
        kinds = [next(iter(said)) for said in listener.said if {"READY", "RELOADING"} & set(said)]
        assert kinds == ["READY", "RELOADING", "READY"]
        (reloading,) = [said for said in listener.said if "RELOADING" in said]
        assert reloading["MONOTONIC_USEC"].isdigit()
        os.kill(router.pid, signal.SIGTERM)
        router.process.wait(DEADLINE)
        wait_until(lambda: listener.count("STOPPING"), "STOPPING")


def test_a_router_that_does_not_get_on_sends_no_sign_of_life(home: Path, listener: _Listener) -> None:
    """The loop still turns, and answers; the task that owns all models does not."""
    script = (
        "import asyncio, sys\n"
        "from mlx_router_server.workers.supervisor import Supervisor\n"
        "original = Supervisor.nudge\n"
        "def stuck(self):\n"
        "    if self.turns > 3 and self._owner is not None:\n"
        "        self._owner.cancel()\n"
        "    original(self)\n"
        "Supervisor.nudge = stuck\n"
        "from mlx_router_server.cli import main\n"
        "main()\n"
    )
    variables = {"NOTIFY_SOCKET": listener.path, "WATCHDOG_USEC": "400000"}
    environment = {**os.environ, **variables, "MLX_ROUTER_HOME": str(home), "HF_HOME": str(home / "hf")}
    port = _free_port()
    process = subprocess.Popen(
        [sys.executable, "-c", script, "start", "--port", str(port), "--standby-workers", "0"],
        env=environment, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        wait_until(lambda: listener.count("WATCHDOG") > 0, "it lived")
        client = Client(f"http://127.0.0.1:{port}")

        def silent() -> bool:
            before = listener.count("WATCHDOG")
            for _ in range(40):  # several times as long as a sign of life takes
                client.get("/health")
                threading.Event().wait(0.02)
            return listener.count("WATCHDOG") == before

        wait_until(silent, "no sign of life any more, although it answers")
    finally:
        process.kill()
        process.wait(DEADLINE)


def test_sockets_of_the_manager_are_used(home: Path) -> None:
    """Two of them: everything that is said of the address in the settings gives way."""
    first, second = socket.create_server(("127.0.0.1", 0)), socket.create_server(("127.0.0.1", 0))
    starter = (
        "import os, sys\n"
        "os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS='2')\n"
        "os.execv(sys.executable, [sys.executable, '-P', '-m', 'mlx_router_server', 'start', '--port', '1'])\n"
    )

    def hand_over() -> None:
        os.dup2(first.fileno(), 103)
        os.dup2(second.fileno(), 104)
        os.dup2(103, 3)
        os.dup2(104, 4)

    environment = {**os.environ, "MLX_ROUTER_HOME": str(home), "HF_HOME": str(home / "hf")}
    process = subprocess.Popen(
        [sys.executable, "-c", starter], env=environment, close_fds=False, preexec_fn=hand_over,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        clients = [Client(f"http://127.0.0.1:{listener.getsockname()[1]}") for listener in (first, second)]
        for client in clients:
            answer = client.post("/api/generate", {"model": "demo", "prompt": "Hello!", "stream": False})
            assert answer["response"].startswith("Hello")
        told = clients[0].get("/admin/config")
        assert told["settings"]["port"] == first.getsockname()[1]
        assert told["origins"]["port"] == "the service manager"
    finally:
        process.terminate()
        process.wait(DEADLINE)
        first.close()
        second.close()


def test_under_launchd_an_orderly_end_is_no_crash(home: Path) -> None:
    router = RouterProcess(home, [], variables={"XPC_SERVICE_NAME": "org.mlx-router.server"})
    assert router.stop() == 0
    router = RouterProcess(home, [])
    assert router.stop() == -signal.SIGTERM
