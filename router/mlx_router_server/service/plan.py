"""What a unit has to say, whichever manager reads it. No secret is ever part of it."""

from __future__ import annotations

import dataclasses
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from mlx_router_server import setting_kinds as kinds
from mlx_router_server.settings import Settings, describe_settings
from mlx_router_server.settings_layers import SettingsError, home_folder

__all__ = ["ServicePlan", "plan_service"]

_CARRIED: Final = ("HF_HOME", "HF_HUB_CACHE", "HF_ENDPOINT", "HF_HUB_DOWNLOAD_TIMEOUT", "SSL_CERT_FILE")
_LEAVING_SECONDS: Final = 30
"""Beyond the limits of draining and stopping: the router's own last words."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServicePlan:
    """Times in seconds; paths are absolute."""

    command: tuple[str, ...]
    environment: dict[str, str]
    home: Path
    """The router's state and configuration."""
    writable: tuple[Path, ...]
    """Everything that the router writes to."""
    leave_seconds: int
    """Longest time from the signal to the end."""
    system: bool
    """For the machine, not for one user."""
    user: str
    """Whose the process is, of a service of the machine."""
    sandbox: bool = True
    """Whether the manager shall shut the file system away, where it can."""


def plan_service(
    settings: Settings, environment: dict[str, str], config: Path | None, *, system: bool, user: str,
    user_home: Path, sandbox: bool,
) -> ServicePlan:  # fmt: skip
    """What a service has to say that shall have these settings. What came from flags or variables is carried along as
    variables, what is in the file stays there. Raises ``SettingsError`` for a secret that would have to be carried."""
    home = home_folder({**environment, "HOME": str(user_home)}).absolute()
    carried = {"MLX_ROUTER_HOME": str(home)}
    carried |= {name: environment[name] for name in _CARRIED if environment.get(name)}
    file = str(config or home / "config.toml")
    for field in describe_settings():
        origin = settings.origins.get(field.name, "")
        if not origin or origin == file:
            continue
        if field.metadata["secret"]:
            raise SettingsError(
                f"{field.name} comes from {origin}, and a unit can be read by others: put it into {file}, or make keys "
                "with `mlx-router keys add`"
            )
        carried[f"MLX_ROUTER_{field.name.upper()}"] = _text(field, getattr(settings, field.name))
    hub = Path(environment.get("HF_HOME") or user_home / ".cache" / "huggingface").expanduser()
    return ServicePlan(
        command=(
            sys.executable, "-P", "-m", "mlx_router_server", "start",
            *(("--config", str(config.absolute())) if config is not None else ()),
        ),
        environment=carried,
        home=home,
        writable=(home, hub, *([Path(settings.log_file).expanduser().parent] if settings.log_file else [])),
        leave_seconds=round(settings.drain_timeout_seconds + settings.stop_timeout_seconds) + _LEAVING_SECONDS,
        system=system,
        user=user,
        sandbox=sandbox,
    )  # fmt: skip


def _text(field: dataclasses.Field[Any], value: Any) -> str:
    """As a variable of the environment has it."""
    shown = kinds.shown(value)
    if isinstance(shown, list):
        return (os.pathsep if field.metadata["parse"] is kinds.paths else ",").join(shown)
    return str(shown).lower() if isinstance(shown, bool) else str(shown)
