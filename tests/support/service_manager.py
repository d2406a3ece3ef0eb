"""Plays the part of systemd or launchd, for machines that have neither running: starts what a unit says, listens to its
notify socket, restarts what fails, ends it as told. Real processes and real signals; the unit is read as it is written.

``install_manager`` puts ``systemctl``, ``journalctl`` and ``launchctl`` into a folder for PATH. Each service has a
keeper, a process of its own, which is its parent.
"""

from __future__ import annotations

import contextlib
import json
import os
import plistlib
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["install_manager", "keeper_pids"]

_RESTART_SECONDS = 0.1
_BURST = 5
_ROOT = Path(__file__).resolve().parents[2]


def _wait_until(condition: Callable[[], object]) -> None:
    """Of its own, so that a command of the manager's starts quickly."""
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def install_manager(folder: Path) -> dict[str, str]:
    """Variables for a process that shall find this manager and no other; ``folder`` has its state."""
    programs = folder / "bin"
    programs.mkdir(parents=True)
    for name in ("systemctl", "launchctl", "journalctl"):
        script = programs / name
        script.write_text(
            f'#!/bin/sh\ncd {_ROOT} && exec {sys.executable} -S -m tests.support.service_manager {name} "$@"\n'
        )
        script.chmod(0o755)
    return {"PATH": f"{programs}{os.pathsep}{os.environ['PATH']}", "TEST_MANAGER": str(folder)}


def keeper_pids(folder: Path) -> list[int]:
    """Of services that still have a keeper."""
    return [pid for file in folder.glob("*.json") if (pid := json.loads(file.read_text()).get("keeper"))]


# ------------------------------------------------------------------------------------------------- the keeper


def _read_systemd(file: Path) -> dict[str, Any]:
    """The few lines that matter here, by systemd's rules for words."""
    unit: dict[str, Any] = {"environment": {}, "notify": False, "watchdog": 0.0, "stop": 60.0}
    for line in file.read_text().splitlines():
        key, _, value = line.partition("=")
        value = value.replace("%%", "%")
        if key == "ExecStart":
            unit["command"] = shlex.split(value.replace("$$", "$"))
        elif key == "Environment":
            name, _, text = shlex.split(value)[0].partition("=")
            unit["environment"][name] = text
        elif key == "Type":
            unit["notify"] = value == "notify"
        elif key == "WatchdogSec":
            unit["watchdog"] = float(value)
        elif key == "TimeoutStopSec":
            unit["stop"] = float(value)
    return unit


def _read_launchd(file: Path) -> dict[str, Any]:
    data = plistlib.loads(file.read_bytes())
    return {
        "command": data["ProgramArguments"], "notify": False, "watchdog": 0.0, "stop": float(data["ExitTimeOut"]),
        "environment": {**data["EnvironmentVariables"], "XPC_SERVICE_NAME": data["Label"]},
        "output": data["StandardErrorPath"],
    }  # fmt: skip


class _Keeper:
    def __init__(self, file: Path, state: Path) -> None:
        self._unit = _read_launchd(file) if file.suffix == ".plist" else _read_systemd(file)
        self._launchd = file.suffix == ".plist"
        self._state = state
        self._told: dict[str, Any] = {"active": "activating", "sub": "start", "pid": 0, "keeper": os.getpid()}
        self._leaving = threading.Event()
        self._process: subprocess.Popen[bytes] | None = None

    def _tell(self, **more: Any) -> None:
        self._told |= more
        beside = self._state.with_suffix(".new")
        beside.write_text(json.dumps(self._told))
        beside.replace(self._state)

    def run(self) -> None:
        signal.signal(signal.SIGTERM, lambda *_: self._leave())
        output = self._unit.get("output") or str(self._state.with_suffix(".log"))
        failures = 0
        while True:
            with (
                socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener,
                tempfile.TemporaryDirectory(prefix="keeper-", dir="/tmp") as folder,  # the path of a socket is short
                open(output, "ab") as log,
            ):
                address = f"{folder}/notify"
                listener.bind(address)
                environment = {"PATH": "/usr/bin:/bin", "HOME": os.environ["HOME"], **self._unit["environment"]}
                if self._unit["notify"]:
                    environment |= {"NOTIFY_SOCKET": address, "WATCHDOG_USEC": str(int(self._unit["watchdog"] * 1e6))}
                self._process = subprocess.Popen(
                    self._unit["command"], env=environment, stderr=log, stdout=log, cwd="/"
                )
                ready = not self._unit["notify"]
                self._tell(
                    pid=self._process.pid,
                    active="active" if ready else "activating",
                    sub="running" if ready else "start",
                )
                threading.Thread(target=self._listen, args=(listener,), daemon=True).start()
                status = self._process.wait()
            clean = status == 0 or (status == -signal.SIGTERM and not self._launchd)
            if self._leaving.is_set() or clean:
                self._tell(active="inactive", sub="dead", pid=0, keeper=0)
                return
            failures += 1
            if failures >= _BURST:
                self._tell(active="failed", sub="failed", pid=0, keeper=0)
                return
            self._tell(active="activating", sub="auto-restart", pid=0, restarts=failures)
            self._leaving.wait(_RESTART_SECONDS)
            if self._leaving.is_set():
                self._tell(active="inactive", sub="dead", pid=0, keeper=0)
                return

    def _listen(self, listener: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := listener.recv(65536).decode():
                said = dict(line.partition("=")[::2] for line in data.splitlines())
                if said.get("READY") == "1":
                    self._tell(active="active", sub="running")
                if "STATUS" in said:
                    self._tell(status=said["STATUS"])

    def _leave(self) -> None:
        self._leaving.set()
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()


# ------------------------------------------------------------------------------------------------ the commands


class _Manager:
    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def _state(self, name: str) -> Path:
        return self._folder / f"{name}.json"

    def _told(self, name: str) -> dict[str, Any]:
        file = self._state(name)
        return json.loads(file.read_text()) if file.exists() else {"active": "inactive", "sub": "dead", "pid": 0}

    def start(self, name: str, file: Path) -> int:
        if self._told(name).get("keeper"):
            return 0
        self._state(name).write_text(json.dumps({"active": "activating", "sub": "start", "pid": 0}))
        command = [
            sys.executable,
            "-S",
            "-m",
            "tests.support.service_manager",
            "keep",
            str(file),
            str(self._state(name)),
        ]
        subprocess.Popen(
            command, cwd=_ROOT, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        _wait_until(lambda: self._told(name)["active"] in ("active", "failed"))
        return 0 if self._told(name)["active"] == "active" else 1

    def stop(self, name: str) -> int:
        keeper = self._told(name).get("keeper")
        if keeper:
            with contextlib.suppress(ProcessLookupError):
                os.kill(keeper, signal.SIGTERM)
            _wait_until(lambda: not self._told(name).get("keeper"))
        return 0

    def systemctl(self, *arguments: str) -> int:
        words = [word for word in arguments if not word.startswith("--")]
        verb = words[0]
        file = Path(os.environ["HOME"]) / ".config" / "systemd" / "user" / "mlx-router.service"
        wanted = self._folder / "enabled"
        if verb == "show":
            told = self._told("systemd")
            print(f"ActiveState={told['active']}\nSubState={told['sub']}\nMainPID={told['pid']}")
            return 0
        if verb == "daemon-reload":
            return 0
        failed = self._told("systemd")["active"] == "failed"
        if verb == "reset-failed":
            if failed:
                self._state("systemd").unlink()
            return 0 if failed else 1
        if verb in ("start", "restart") and failed:
            print("Job for mlx-router.service failed: start-limit-hit", file=sys.stderr)
            return 1
        if verb in ("enable", "disable"):
            if not file.exists():
                return 1
            wanted.touch() if verb == "enable" else wanted.unlink(missing_ok=True)
            return 0
        if verb in ("stop", "restart"):
            self.stop("systemd")
        if verb in ("start", "restart") and self.start("systemd", file):
            print("Job for mlx-router.service failed.", file=sys.stderr)
            return 1
        return 0

    def launchctl(self, verb: str, *arguments: str) -> int:
        loaded, leaving = self._folder / "loaded", self._folder / "leaving"
        keeper = self._told("launchd").get("keeper")
        if leaving.exists() and not keeper:
            leaving.unlink()
            loaded.unlink()
        if verb == "bootstrap":
            if loaded.exists():
                print("Bootstrap failed: 5: Input/output error", file=sys.stderr)
                return 5
            loaded.write_text(arguments[1])
            return self.start("launchd", Path(arguments[1]))
        if verb in ("enable", "disable"):
            return 0
        if not loaded.exists():
            print("Could not find service", file=sys.stderr)
            return 113
        if verb == "bootout":
            # It does not wait for the end.
            leaving.touch()
            if keeper:
                os.kill(keeper, signal.SIGTERM)
                print("Boot-out failed: 36: Operation now in progress", file=sys.stderr)
                return 36
        elif verb == "kickstart":
            return self.start("launchd", Path(loaded.read_text()))
        elif verb == "print":
            told = self._told("launchd")
            words = "running" if told["pid"] else "spawn scheduled" if keeper else "not running"
            print(f"{arguments[0]} = {{\n\tstate = {words}")
            if told["pid"]:
                print(f"\tpid = {told['pid']}")
            print("}")
        return 0


def main(program: str, *arguments: str) -> int:
    if program == "keep":
        _Keeper(Path(arguments[0]), Path(arguments[1])).run()
        return 0
    manager = _Manager(Path(os.environ["TEST_MANAGER"]))
    if program == "journalctl":
        print((Path(os.environ["TEST_MANAGER"]) / "systemd.log").read_text(), end="")
        return 0
    return manager.systemctl(*arguments) if program == "systemctl" else manager.launchctl(*arguments)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
