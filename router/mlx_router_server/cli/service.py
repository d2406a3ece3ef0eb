"""``mlx-router service``: the router as a service. A new unit has to work before the former one is given up."""

from __future__ import annotations

import argparse
import getpass
import os
import pwd
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Final

from mlx_router_server.cli.client import ApiError, NoRouter, connect
from mlx_router_server.cli.gone import Footprint, footprint_of
from mlx_router_server.cli.tables import print_json
from mlx_router_server.files import replace_file
from mlx_router_server.service.launchd import Launchd
from mlx_router_server.service.manager import Manager, ServiceError, Status, missing
from mlx_router_server.service.plan import ServicePlan, plan_service
from mlx_router_server.service.systemd import Systemd
from mlx_router_server.settings import Settings
from mlx_router_server.settings_layers import SettingsError, load_settings

__all__ = ["service"]

_QUALIFY_SECONDS: Final = 120.0
_GONE_SECONDS: Final = 15.0  # longer than launchd waits before it tries again
_ASKING_SECONDS: Final = 3.0
_POLL_SECONDS: Final = 0.2
_NOT_RUNNING: Final = 3


def service(options: argparse.Namespace, settings: Settings) -> int:
    """What ``options.action`` names; what goes wrong is one line."""
    try:
        found = _Service(options)
        match options.action:
            case "install":
                return found.install(dry_run=options.dry_run)
            case "status":
                return found.status(as_json=options.json)
            case "logs":
                return found.logs(follow=options.follow)
        found.require_rights()
        act = {"uninstall": found.uninstall, "start": found.start, "stop": found.stop, "restart": found.restart}
        return act[options.action]()
    except (ServiceError, OSError) as error:
        print(f"mlx-router: {error}", file=sys.stderr)
        return 1


class _Service:
    """One command's view: whose service it is, who manages it, and the settings that it has."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._system: bool = options.system
        caller = os.environ.get("SUDO_USER") if self._system else None
        self._user: str = options.user or caller or getpass.getuser()
        environment = dict(os.environ)
        if self._system and self._user != getpass.getuser():
            # The service is theirs, and so are the settings.
            environment["HOME"] = _home_of(self._user)
            environment.pop("XDG_CONFIG_HOME", None)
        self._sandbox = not getattr(options, "no_sandbox", False)
        self._user_home = Path(environment.get("HOME") or Path.home())
        self._manager = self._choose(options.manager)
        self._config: Path | None = options.config
        if options.action != "install" and self._manager.file.exists():
            # It was installed with settings of its own, and is to be found where those say.
            carried, config = self._manager.carried()
            environment = {name: value for name, value in environment.items() if not _is_setting(name)} | carried
            self._config = self._config or config
        self._environment = environment
        try:
            self._settings = load_settings({}, environment, self._config)
        except SettingsError:
            if options.action in ("install", "start", "restart"):
                raise
            self._settings = Settings()  # nothing can start with those; it can be looked at and ended all the same

    def _choose(self, named: str | None) -> Manager:
        kind = named or ("launchd" if sys.platform == "darwin" else "systemd")
        return (Launchd if kind == "launchd" else Systemd)(system=self._system, user_home=self._user_home)

    def require_rights(self) -> None:
        """Raise ``ServiceError`` for whoever may not change a service of the machine."""
        if self._system and os.geteuid() != 0:
            raise ServiceError("a service of the machine is the administrator's: put sudo before the command")

    def _plan(self) -> ServicePlan:
        return plan_service(
            self._settings, self._environment, self._config, system=self._system, user=self._user,
            user_home=self._user_home, sandbox=self._sandbox,
        )  # fmt: skip

    # ------------------------------------------------------------------ install

    def install(self, *, dry_run: bool) -> int:
        """Write the unit, start it, ask it something; put back what was there before when it does not answer."""
        plan = self._plan()
        unit = self._manager.render(plan)
        if dry_run:
            sys.stdout.buffer.write(unit)
            return 0
        self.require_rights()
        manager, file = self._manager, self._manager.file
        before = manager.status()
        self._refuse_strangers(before)
        self._make_folders(plan)
        former = file.read_bytes() if file.exists() else None
        self._write(unit)
        try:
            manager.activate()
            said = self._qualify()
        except (ServiceError, KeyboardInterrupt) as error:
            reason = "interrupted" if isinstance(error, KeyboardInterrupt) else str(error)
            kept = "the former service is back" if former is not None else "nothing is left of it"
            try:
                self._roll_back(former, before)
            except ServiceError as second:
                kept = f"what was there before could not be restored ({second})"
            raise ServiceError(f"the service does not work, and {kept}: {reason}") from None
        print(f"installed {file}")
        print(f"{self._settings.url} answers{said}")
        for hint in self._hints():
            print(hint)
        return 0

    def _make_folders(self, plan: ServicePlan) -> None:
        """What the service needs to be there, each new folder its user's: it could not make them itself where the unit
        shuts the rest of the disk away. Elsewhere than at home nothing is made: a disk may not be mounted yet."""
        for folder in (plan.home, *plan.writable, *self._manager.folders):
            missing_ones = [one for one in (folder, *folder.parents) if not one.exists()]
            at_home = folder.is_relative_to(plan.home) or folder.is_relative_to(self._user_home)
            if not at_home or any(one.is_symlink() for one in missing_ones):
                continue
            for one in reversed(missing_ones):
                one.mkdir(mode=0o700 if one == plan.home else 0o755)
                if self._system:
                    shutil.chown(one, self._user, pwd.getpwnam(self._user).pw_gid)

    def _write(self, unit: bytes) -> None:
        replace_file(self._manager.file, unit)
        if self._system:
            self._manager.file.chmod(0o644)

    def _refuse_strangers(self, before: Status) -> None:
        """Whoever answers at the address has to be the service itself, or what is seen there means nothing."""
        pid = self._router_pid(has_to_say=True)
        if pid is not None and pid != before.pid:
            raise ServiceError(
                f"another router answers at {self._settings.url} (pid {pid}): end it with `mlx-router stop` first"
            )

    def _router_pid(self, *, has_to_say: bool = False) -> int | None:
        """Of whoever answers. ``has_to_say``: raise when it wants another key for that."""
        try:
            return int(self._client().get("/admin/status")["router"]["pid"])
        except ApiError as error:
            if has_to_say and error.status in (401, 403):
                hint = "name a key of the scope admin in MLX_ROUTER_API_KEY"
                raise ServiceError(f"{self._settings.url} answers: {error}; {hint}") from None
            return None
        except (NoRouter, KeyError, TypeError, ValueError):
            return None

    def _client(self, answer_seconds: float = _ASKING_SECONDS) -> Any:
        return connect(self._settings, self._environment, answer_seconds=answer_seconds)

    def _qualify(self) -> str:
        """Wait until the new service is ready, and have it answer. Returns what it was asked."""
        seen = time.monotonic()
        end = seen + _QUALIFY_SECONDS
        while True:
            found = self._manager.status()
            if found.pid is not None:
                seen = time.monotonic()
            elif found.words.startswith("failed") or time.monotonic() - seen > _GONE_SECONDS:
                words = " ".join(self._log_command(False))
                raise ServiceError(f"it has ended, and is {found.words}; its last words are shown by `{words}`")
            if found.pid is not None and self._router_pid(has_to_say=True) == found.pid and self._is_ready():
                break
            if time.monotonic() > end:
                raise ServiceError(f"it is not ready after {_QUALIFY_SECONDS:g} s ({found.words})")
            time.sleep(_POLL_SECONDS)
        if not self._settings.demo_model:
            return ", and is ready"
        try:
            client = self._client(_QUALIFY_SECONDS)
            if not self._settings.on_demand:
                client.post("/admin/models/demo/load")
            answer = client.post("/api/generate", {"model": "demo", "prompt": "Hello!", "stream": False})["response"]
        except (ApiError, NoRouter, KeyError) as error:
            raise ServiceError(f"its demo model does not answer: {error}") from None
        if not answer.strip():
            raise ServiceError("its demo model answers nothing")
        return f", and its demo model says: {answer.strip().splitlines()[0][:60]}"

    def _is_ready(self) -> bool:
        try:
            return bool(self._client().get("/ready")["ready"])
        except (NoRouter, ApiError):
            return False

    def _roll_back(self, former: bytes | None, before: Status) -> None:
        if former is None:
            self._manager.forget()
            return
        self._write(former)
        if before.running:
            self._manager.activate()
        else:
            self._manager.stop()

    def _hints(self) -> list[str]:
        if self._manager.name != "systemd" or self._system or missing("loginctl"):
            return []
        done = subprocess.run(["loginctl", "show-user", self._user, "--property=Linger"], capture_output=True, text=True, check=False)  # fmt: skip  # noqa: E501
        if done.stdout.strip() == "Linger=yes":
            return []
        return [f"it runs while {self._user} is logged in; for always: loginctl enable-linger {self._user}"]

    # ------------------------------------------------------------------- the rest

    def uninstall(self) -> int:
        if not self._manager.file.exists():
            raise ServiceError(f"there is no {self._manager.file}")
        self._leave(self._manager.forget)
        print(f"removed {self._manager.file}; settings and models are untouched")
        return 0

    def start(self) -> int:
        self._must_be_installed()
        self._refuse_strangers(self._manager.status())
        self._manager.start()
        print(f"{self._settings.url} answers{self._qualify()}")
        return 0

    def stop(self) -> int:
        self._must_be_installed()
        if not self._manager.status().running:
            print("it does not run")
            return 0
        began = time.monotonic()
        self._leave(self._manager.stop)
        print(f"stopped ({time.monotonic() - began:.1f} s)")
        return 0

    def restart(self) -> int:
        self._must_be_installed()
        self._refuse_strangers(self._manager.status())
        self._manager.restart()
        print(f"{self._settings.url} answers{self._qualify()}")
        return 0

    def _must_be_installed(self) -> None:
        if not self._manager.file.exists():
            raise ServiceError("it is not installed: mlx-router service install")

    def _leave(self, act: Any) -> None:
        """Have it end, and say so only when all of its processes and their memory are gone."""
        footprint: Footprint | None = None
        try:
            data = self._client().get("/admin/status")
            if data["router"]["pid"] == self._manager.status().pid:
                footprint = footprint_of(data)
        except (NoRouter, ApiError, KeyError, TypeError):
            pass  # then the manager's word is all there is
        act()
        if footprint is not None and (left := footprint.what_is_left(self._settings.stop_timeout_seconds + 20)):
            raise ServiceError(left)

    def status(self, *, as_json: bool) -> int:
        found = self._manager.status()
        answers = found.pid is not None and self._router_pid() == found.pid
        data = {
            "manager": self._manager.name, "unit": str(self._manager.file), "installed": found.installed,
            "running": found.running, "state": found.words, "pid": found.pid, "url": self._settings.url,
            "answers": answers,
        }  # fmt: skip
        if as_json:
            print_json(data)
        elif not found.installed:
            print("it is not installed: mlx-router service install")
        else:
            pid = f", pid {found.pid}" if found.pid else ""
            print(f"{found.words}{pid} ({self._manager.file})")
            print(f"{self._settings.url} {'answers' if answers else 'does not answer as this service'}")
        return 0 if found.running and answers else _NOT_RUNNING

    def _log_command(self, follow: bool) -> list[str]:
        return self._manager.logs(follow, self._settings.log_file)

    def logs(self, *, follow: bool) -> int:
        command = self._log_command(follow)
        if missing(command[0]):
            raise ServiceError(f"{command[0]} is not on this machine")
        return subprocess.call(command)


def _is_setting(variable: str) -> bool:
    """Whether a router would take it for one of its settings; those of this shell are not the service's."""
    return variable != "MLX_ROUTER_API_KEY" and variable.startswith(("MLX_ROUTER_", "OLLAMA_", "HF_", "XDG_CACHE_"))


def _home_of(user: str) -> str:
    try:
        return pwd.getpwnam(user).pw_dir
    except KeyError:
        raise ServiceError(f"there is no user {user!r} on this machine") from None
