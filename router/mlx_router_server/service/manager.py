"""What is asked of a service manager, and how its commands are run."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

from mlx_router_server.service.plan import ServicePlan

__all__ = ["Manager", "ServiceError", "Status", "call", "missing"]

_SECONDS: Final = 60.0


class ServiceError(Exception):
    """A sentence about what a service manager refused, or could not do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """What the manager says of the service."""

    installed: bool
    running: bool
    pid: int | None
    words: str
    """The manager's own word for it."""


class Manager(Protocol):
    """One of systemd and launchd, for a user or for the machine. Every method may raise ``ServiceError``."""

    name: str

    @property
    def file(self) -> Path:
        """Where the unit lies."""

    def render(self, plan: ServicePlan) -> bytes:
        """The unit, as it has to be for this plan."""

    def activate(self) -> None:
        """Take up the unit as it is in its file, have it start at every login or boot, and start it anew."""

    def forget(self) -> None:
        """End it, no longer start it, and remove the file."""

    def start(self) -> None: ...

    def stop(self) -> None:
        """Returns when the manager says that it has ended."""

    def restart(self) -> None: ...

    def status(self) -> Status: ...

    def logs(self, follow: bool) -> list[str]:
        """The command that shows what it logs."""


def call(*command: str, check: bool = True, seconds: float = _SECONDS) -> subprocess.CompletedProcess[str]:
    """Run a command of the manager's; raises ``ServiceError`` with its own words when it fails."""
    if missing(command[0]):
        raise ServiceError(f"{command[0]} is not on this machine: there is no such service manager here")
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired:
        raise ServiceError(f"`{' '.join(command)}` did not end within {seconds:g} s") from None
    if check and done.returncode:
        said = (done.stderr.strip() or done.stdout.strip()).splitlines()
        raise ServiceError(f"`{' '.join(command)}`: {said[0] if said else f'exit status {done.returncode}'}")
    return done


def missing(program: str) -> bool:
    return shutil.which(program) is None
