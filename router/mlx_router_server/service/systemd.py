"""systemd: a user unit by default, a unit of the machine with ``--system``."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Final

from mlx_router_server.service.manager import LONGEST_LEAVE, Status, call, config_of
from mlx_router_server.service.plan import ServicePlan

__all__ = ["Systemd"]

UNIT: Final = "mlx-router.service"
_WATCHDOG_SECONDS: Final = 60
_START_SECONDS: Final = 120


class Systemd:
    """Implements ``Manager``. ``folder`` is where units of this kind lie."""

    name = "systemd"

    def __init__(self, *, system: bool, user_home: Path) -> None:
        self._system = system
        self._folder = Path("/etc/systemd/system") if system else user_home / ".config" / "systemd" / "user"
        self._command = ("systemctl",) if system else ("systemctl", "--user")

    @property
    def file(self) -> Path:
        return self._folder / UNIT

    @property
    def folders(self) -> tuple[Path, ...]:
        return ()

    def carried(self) -> tuple[dict[str, str], Path | None]:
        variables: dict[str, str] = {}
        config = None
        for key, value in self._lines():
            if key == "Environment":
                for word in shlex.split(value.replace("%%", "%")):
                    name, _, text = word.partition("=")
                    variables[name] = text
            elif key == "ExecStart":
                config = config_of(shlex.split(value.replace("%%", "%").replace("$$", "$")))
        return variables, config

    def _lines(self) -> list[tuple[str, str]]:
        pairs = (line.partition("=") for line in self.file.read_text(encoding="utf-8").splitlines())
        return [(key, value) for key, separator, value in pairs if separator]

    @property
    def _leave_seconds(self) -> float:
        """How long the unit lets the router take to end."""
        said = dict(self._lines()) if self.file.exists() else {}
        return max(float(said.get("TimeoutStopSec") or 0.0) + 10, LONGEST_LEAVE)

    def render(self, plan: ServicePlan) -> bytes:
        lines = [
            "# Written by `mlx-router service install`, which writes it anew; what is yours belongs into a drop-in:",
            f"# systemctl {'' if plan.system else '--user '}edit {UNIT}",
            "[Unit]",
            "Description=mlx-router: local MLX models by name",
            *(["Wants=network-online.target", "After=network-online.target"] if plan.system else []),
            "StartLimitIntervalSec=300",
            "StartLimitBurst=5",
            "",
            "[Service]",
            "Type=notify",
            "NotifyAccess=main",
            # Dollars are variables here, and only here.
            f"ExecStart={' '.join(_quoted(word).replace('$', '$$') for word in plan.command)}",
            "ExecReload=/bin/kill -HUP $MAINPID",
            *([f"User={plan.user}"] if plan.system else []),
            *(f"Environment={_quoted(f'{name}={value}')}" for name, value in sorted(plan.environment.items())),
            "Restart=on-failure",
            "RestartSec=5",
            f"WatchdogSec={_WATCHDOG_SECONDS}",
            f"TimeoutStartSec={_START_SECONDS}",
            f"TimeoutStopSec={plan.leave_seconds}",
            "# The router ends its workers in order; what is left of them then is killed.",
            "KillMode=mixed",
            "LimitNOFILE=65536",
            "UMask=0077",
            "NoNewPrivileges=yes",
            "LockPersonality=yes",
            "RestrictRealtime=yes",
            "RestrictSUIDSGID=yes",
        ]
        if plan.sandbox:
            lines += [
                # Of a unit of a user, the manager can shut nothing away without a name space of users.
                *([] if plan.system else ["PrivateUsers=yes"]),
                "PrivateTmp=yes",
                "ProtectSystem=strict",
                "ProtectHome=read-only",
                "ProtectControlGroups=yes",
                "ProtectKernelModules=yes",
                "ProtectKernelTunables=yes",
                # The dash: a folder that is not there yet is no reason not to start.
                *(f"ReadWritePaths={_quoted('-' + str(path))}" for path in plan.writable),
            ]
        lines += ["", "[Install]", f"WantedBy={'multi-user' if plan.system else 'default'}.target", ""]
        return "\n".join(lines).encode()

    def activate(self) -> None:
        call(*self._command, "daemon-reload")
        call(*self._command, "enable", UNIT)
        self.restart()

    def forget(self) -> None:
        call(*self._command, "disable", UNIT, check=False)  # it may never have been enabled
        call(*self._command, "stop", UNIT, check=False, seconds=self._leave_seconds)
        self.file.unlink(missing_ok=True)
        call(*self._command, "daemon-reload")
        call(*self._command, "reset-failed", UNIT, check=False)

    def start(self) -> None:
        self._forget_failures()
        call(*self._command, "start", UNIT, seconds=_START_SECONDS + 10)

    def stop(self) -> None:
        call(*self._command, "stop", UNIT, seconds=self._leave_seconds)

    def restart(self) -> None:
        self._forget_failures()
        call(*self._command, "restart", UNIT, seconds=self._leave_seconds + _START_SECONDS)

    def _forget_failures(self) -> None:
        """What failed too often is not started again, by hand neither, before that; there may be none."""
        call(*self._command, "reset-failed", UNIT, check=False)

    def status(self) -> Status:
        done = call(*self._command, "show", "--property=ActiveState,SubState,MainPID", UNIT)
        said = dict(line.partition("=")[::2] for line in done.stdout.splitlines())
        pid = int(said.get("MainPID") or 0)
        active = said.get("ActiveState", "")
        words = f"{active} ({said['SubState']})" if said.get("SubState") else active
        running = active not in ("", "inactive", "failed")
        return Status(installed=self.file.exists(), running=running, pid=pid or None, words=words)

    def logs(self, follow: bool, log_file: str = "") -> list[str]:
        scope = "--unit" if self._system else "--user-unit"
        return ["journalctl", scope, UNIT, "--lines", "200", "--output", "cat", *(["--follow"] if follow else [])]


def _quoted(text: str) -> str:
    """As a unit has it: a percent sign begins something of its own otherwise, and a blank ends a word."""
    text = text.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%")
    return text if text and not any(char.isspace() or char in "'\";" for char in text) else f'"{text}"'
