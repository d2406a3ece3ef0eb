"""What is asked of a service manager, and how its commands are run."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

from mlx_router_server.service.plan import ServicePlan

__all__ = ["LONGEST_LEAVE", "Manager", "ServiceError", "Status", "call", "config_of", "missing"]

LONGEST_LEAVE: Final = 600.0
"""Seconds that an end is waited for where a unit allows no more than that."""
_SECONDS: Final = 60.0


class ServiceError(Exception):
    """A sentence about what a service manager refused, or could not do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """What the manager says of the service."""

    installed: bool
    running: bool
    """It runs, or will without a further word: it starts, is leaving, or waits for its next attempt."""
    pid: int | None
    words: str
    """The manager's own word for it."""


class Manager(Protocol):
    """One of systemd and launchd, for a user or for the machine. Every method may raise ``ServiceError``."""

    name: str

    @property
    def file(self) -> Path:
        """Where the unit lies."""

    @property
    def folders(self) -> tuple[Path, ...]:
        """What has to be there for the unit besides what the router writes to."""

    def carried(self) -> tuple[dict[str, str], Path | None]:
        """What the unit in the file says: its variables, and the configuration that its command names."""

    def render(self, plan: ServicePlan) -> bytes:
        """The unit, as it has to be for this plan."""

    def activate(self) -> None:
        """Take up the unit as it is in its file, have it start at every login or boot, and start it anew, once what
        runs of it has left in order."""

    def forget(self) -> None:
        """End it, no longer start it, and remove the file."""

    def start(self) -> None: ...

    def stop(self) -> None:
        """Returns when the manager says that it has ended."""

    def restart(self) -> None:
        """Also of one that does not run. What runs may finish its requests first."""

    def status(self) -> Status: ...

    def logs(self, follow: bool, log_file: str = "") -> list[str]:
        """The command that shows what it logs; ``log_file`` is what its settings say of that."""


def config_of(command: list[str]) -> Path | None:
    """The file that a command line of the router's names."""
    return Path(command[command.index("--config") + 1]) if "--config" in command[:-1] else None


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
