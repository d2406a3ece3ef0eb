"""launchd: a LaunchAgent by default, a LaunchDaemon with ``--system``."""

from __future__ import annotations

import os
import plistlib
import re
import time
from pathlib import Path
from typing import Any, Final

from mlx_router_server.files import expanded
from mlx_router_server.service.manager import LONGEST_LEAVE, ServiceError, Status, call, config_of
from mlx_router_server.service.plan import ServicePlan

__all__ = ["LABEL", "Launchd"]

LABEL: Final = "org.mlx-router.server"
_THROTTLE_SECONDS: Final = 10
_FILES: Final = 65536
_LEAVES: Final = (0, 3, 36, 113)  # it ends, has ended, is ending, was not loaded
_NOT_YET: Final = (5, 37)  # the label is still being given up
_TAKING_SECONDS: Final = 15.0
_POLL_SECONDS: Final = 0.2


class Launchd:
    """Implements ``Manager``."""

    name = "launchd"

    def __init__(self, *, system: bool, user_home: Path) -> None:
        self._domain = "system" if system else f"gui/{os.getuid()}"
        folder = Path("/Library/LaunchDaemons") if system else user_home / "Library" / "LaunchAgents"
        self._file = folder / f"{LABEL}.plist"
        self._logs = user_home / "Library" / "Logs" / "mlx-router"

    @property
    def file(self) -> Path:
        return self._file

    @property
    def folders(self) -> tuple[Path, ...]:
        return (self._logs,)

    def carried(self) -> tuple[dict[str, str], Path | None]:
        unit = plistlib.loads(self._file.read_bytes())
        return dict(unit["EnvironmentVariables"]), config_of(unit["ProgramArguments"])

    @property
    def _target(self) -> str:
        return f"{self._domain}/{LABEL}"

    def render(self, plan: ServicePlan) -> bytes:
        early = str(self._early_log)
        unit: dict[str, Any] = {
            "Label": LABEL,
            "ProgramArguments": list(plan.command),
            "EnvironmentVariables": self._variables(plan),
            "RunAtLoad": True,
            "KeepAlive": {"SuccessfulExit": False},
            "ThrottleInterval": _THROTTLE_SECONDS,
            "ExitTimeOut": plan.leave_seconds,
            # No App Nap, and no coalesced timers: somebody waits for every token.
            "ProcessType": "Interactive",
            "LegacyTimers": True,
            "SoftResourceLimits": {"NumberOfFiles": _FILES},
            "HardResourceLimits": {"NumberOfFiles": _FILES},
            "StandardOutPath": early,
            "StandardErrorPath": early,
            "WorkingDirectory": str(plan.home),
            "Umask": 0o077,
        }
        if plan.system:
            unit["UserName"] = plan.user
        return plistlib.dumps(unit)

    @property
    def _early_log(self) -> Path:
        """What is said before the router has a log of its own, and of why it does not start."""
        return self._logs / "launchd.log"

    def _variables(self, plan: ServicePlan) -> dict[str, str]:
        # launchd turns no log over; the router does that with its own.
        log = {} if plan.log_file else {"MLX_ROUTER_LOG_FILE": str(self._logs / "router.log")}
        home = {"HOME": str(plan.user_home)} if plan.system else {}
        return {**log, **home, **plan.environment}

    def activate(self) -> None:
        self._unload()
        call("launchctl", "enable", self._target)
        self._load()

    def forget(self) -> None:
        self._unload()
        call("launchctl", "disable", self._target, check=False)
        self._file.unlink(missing_ok=True)

    def start(self) -> None:
        if self._loaded():
            call("launchctl", "kickstart", self._target)
        else:
            self._load()

    def stop(self) -> None:
        """Without its unit loaded nothing starts it again; the next login, or ``start``, loads it."""
        self._unload()

    def restart(self) -> None:
        """Not by ``kickstart -k``: that kills, and cuts the answers that are under way."""
        self._unload()
        self._load()

    def _loaded(self) -> bool:
        return call("launchctl", "print", self._target, check=False).returncode == 0

    def _unload(self) -> None:
        """``bootout`` may return long before the router has left, and says "in progress" when it does."""
        done = call("launchctl", "bootout", self._target, check=False, seconds=self._leave_seconds)
        end = time.monotonic() + (self._leave_seconds if done.returncode in _LEAVES else _POLL_SECONDS)
        while self._loaded():
            if time.monotonic() > end:
                said = (done.stderr or done.stdout).strip() or "it does not end"
                raise ServiceError(f"`launchctl bootout {self._target}`: {said}")
            time.sleep(_POLL_SECONDS)

    @property
    def _leave_seconds(self) -> float:
        """How long the unit lets the router take to end."""
        unit = plistlib.loads(self._file.read_bytes()) if self._file.exists() else {}
        return max(float(unit.get("ExitTimeOut", 0)) + 10, LONGEST_LEAVE)

    def _load(self) -> None:
        """A label that is just being given up cannot be taken at once."""
        end = time.monotonic() + _TAKING_SECONDS
        while True:
            last = time.monotonic() > end
            done = call("launchctl", "bootstrap", self._domain, str(self._file), check=last)
            if done.returncode not in _NOT_YET:
                break
            time.sleep(_POLL_SECONDS)
        if done.returncode:
            raise ServiceError(f"`launchctl bootstrap`: {(done.stderr or done.stdout).strip()}")

    def status(self) -> Status:
        done = call("launchctl", "print", self._target, check=False)
        pid = re.search(r"^\s*pid = (\d+)$", done.stdout, re.MULTILINE)
        state = re.search(r"^\s*state = (.+)$", done.stdout, re.MULTILINE)
        return Status(
            installed=self._file.exists(),
            running=state is not None and state[1] != "not running",
            pid=int(pid[1]) if pid is not None else None,
            words=state[1] if state is not None else "not loaded",
        )

    def logs(self, follow: bool, log_file: str = "") -> list[str]:
        own = expanded(log_file) if log_file else self._logs / "router.log"
        files = (str(self._early_log), str(own))
        return ["tail", "-n", "200", *(["-F"] if follow else []), *files]
