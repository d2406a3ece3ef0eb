"""launchd: a LaunchAgent by default, a LaunchDaemon with ``--system``."""

from __future__ import annotations

import os
import plistlib
import re
from pathlib import Path
from typing import Any, Final

from mlx_router_server.service.manager import Status, call
from mlx_router_server.service.plan import ServicePlan

__all__ = ["LABEL", "Launchd"]

LABEL: Final = "org.mlx-router.server"
_THROTTLE_SECONDS: Final = 10
_FILES: Final = 65536


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
    def _target(self) -> str:
        return f"{self._domain}/{LABEL}"

    def render(self, plan: ServicePlan) -> bytes:
        early = str(self._logs / "launchd.log")  # what is said before the router has a log of its own
        unit: dict[str, Any] = {
            "Label": LABEL,
            "ProgramArguments": list(plan.command),
            # launchd turns no log over; the router does that with its own.
            "EnvironmentVariables": {"MLX_ROUTER_LOG_FILE": str(self._logs / "router.log"), **plan.environment},
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

    def activate(self) -> None:
        self._logs.mkdir(parents=True, exist_ok=True)
        call("launchctl", "bootout", self._target, check=False)  # it may not be loaded
        call("launchctl", "enable", self._target)
        call("launchctl", "bootstrap", self._domain, str(self._file))

    def forget(self) -> None:
        call("launchctl", "bootout", self._target, check=False)
        call("launchctl", "disable", self._target, check=False)
        self._file.unlink(missing_ok=True)

    def start(self) -> None:
        if call("launchctl", "print", self._target, check=False).returncode:
            call("launchctl", "bootstrap", self._domain, str(self._file))
        else:
            call("launchctl", "kickstart", self._target)

    def stop(self) -> None:
        """Without its unit loaded nothing starts it again; the next login, or ``start``, loads it."""
        call("launchctl", "bootout", self._target, seconds=600)

    def restart(self) -> None:
        call("launchctl", "kickstart", "-k", self._target, seconds=600)

    def status(self) -> Status:
        done = call("launchctl", "print", self._target, check=False)
        pid = re.search(r"^\s*pid = (\d+)$", done.stdout, re.MULTILINE)
        state = re.search(r"^\s*state = (.+)$", done.stdout, re.MULTILINE)
        return Status(
            installed=self._file.exists(),
            running=pid is not None,
            pid=int(pid[1]) if pid is not None else None,
            words=state[1] if state is not None else "not loaded",
        )

    def logs(self, follow: bool) -> list[str]:
        return ["tail", "-n", "200", *(["-F"] if follow else []), str(self._logs / "router.log")]
