"""What a unit has to say, whichever manager reads it. No secret is ever part of it."""

from __future__ import annotations

import dataclasses
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from mlx_router_server import setting_kinds as kinds
from mlx_router_server.catalogue.discovery import hub_cache
from mlx_router_server.files import expanded
from mlx_router_server.settings import Settings, describe_settings
from mlx_router_server.settings_layers import SettingsError, home_folder

__all__ = ["ServicePlan", "plan_service"]

_CARRIED: Final = (
    "HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "XDG_CACHE_HOME", "HF_ENDPOINT", "HF_HUB_DOWNLOAD_TIMEOUT",
    "SSL_CERT_FILE",
)  # fmt: skip
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
    """Folders that the router writes to; they are there before it starts."""
    log_file: str
    """Empty: the settings name none."""
    leave_seconds: int
    """Longest time from the signal to the end."""
    system: bool
    """For the machine, not for one user."""
    user: str
    """Whose the process is, of a service of the machine."""
    user_home: Path
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
    return ServicePlan(
        command=(
            sys.executable, "-P", "-m", "mlx_router_server", "start",
            *(("--config", str(config.absolute())) if config is not None else ()),
        ),
        environment=carried,
        home=home,
        writable=_writable(settings, environment, home, user_home),
        log_file=settings.log_file,
        leave_seconds=round(settings.drain_timeout_seconds + settings.stop_timeout_seconds) + _LEAVING_SECONDS,
        system=system,
        user=user,
        user_home=user_home,
        sandbox=sandbox,
    )  # fmt: skip


def _writable(settings: Settings, environment: dict[str, str], home: Path, user_home: Path) -> tuple[Path, ...]:
    """Each once, and none that lies in another. A cache that is a link lies where it leads to as well."""
    caches = {**environment, "XDG_CACHE_HOME": environment.get("XDG_CACHE_HOME") or str(user_home / ".cache")}
    hub = hub_cache(caches)
    huggingface = expanded(environment.get("HF_HOME") or f"{caches['XDG_CACHE_HOME']}/huggingface")
    folders = [home, huggingface, hub, hub.resolve()]
    if settings.log_file:
        folders.append(expanded(settings.log_file).parent)
    absolute = dict.fromkeys(folder.absolute() for folder in folders)
    return tuple(
        folder for folder in absolute
        if not any(folder != other and folder.is_relative_to(other) for other in absolute)
    )  # fmt: skip


def _text(field: dataclasses.Field[Any], value: Any) -> str:
    """As a variable of the environment has it."""
    shown = kinds.shown(value)
    if isinstance(shown, list):
        return (os.pathsep if field.metadata["parse"] is kinds.paths else ",").join(shown)
    return str(shown).lower() if isinstance(shown, bool) else str(shown)
