"""One table of settings behind the file, the environment, the flags, --help, the docs and /admin/config.

Each field of ``Settings`` is one setting: its name is the key in the file, ``MLX_ROUTER_<NAME>`` in the environment
and ``--<name>`` on the command line. Precedence: default < file < Ollama's variables < our variables < flags. Frozen
after load; handlers get the object, never a copy of a value.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from mlx_router_server import setting_kinds as kinds
from mlx_router_shared.errors import InvalidRequest

__all__ = [
    "CONFIG_VERSION",
    "ModelSettings",
    "Settings",
    "SettingsError",
    "describe_settings",
    "flags_of",
    "home_folder",
    "load_settings",
    "reloaded",
]

CONFIG_VERSION: Final = 1


class SettingsError(Exception):
    """A setting that cannot be used; one sentence that names it and where it came from."""


# ------------------------------------------------------------------------------------------------ the table


def _setting(
    default: Any,
    parse: Callable[[object], Any],
    text: str,
    *,
    unit: str = "",
    ollama: str = "",
    restart: bool = False,
) -> Any:
    """``restart``: a change takes effect when the router starts the next time, not when it reloads."""
    metadata = {"parse": parse, "help": text, "unit": unit, "ollama": ollama, "restart": restart}
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSettings:
    """What the configuration says of one model, under ``[models."name"]``."""

    path: Path | None = None
    repo: str | None = None
    aliases: tuple[str, ...] = ()
    preload: bool = False
    pinned: bool = False
    keep_alive: float | None = None
    keep_alive_min: float = 0.0
    keep_alive_max: float = math.inf
    keep_alive_lock: bool = False
    context_length: int | None = None
    memory: int | None = None


_MODEL_KEYS: Final[dict[str, Callable[[object], Any]]] = {
    "path": lambda value: Path(kinds.text(value)).expanduser().absolute(),
    "repo": kinds.text,
    "aliases": kinds.names,
    "preload": kinds.boolean,
    "pinned": kinds.boolean,
    "keep_alive": kinds.duration,
    "keep_alive_min": kinds.duration,
    "keep_alive_max": kinds.duration,
    "keep_alive_lock": kinds.boolean,
    "context_length": kinds.integer,
    "memory": kinds.size,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Everything the operator can decide."""

    host: str = _setting("127.0.0.1", kinds.text, "Address to listen on.", restart=True)
    port: int = _setting(11434, kinds.port, "Port to listen on; 0 lets the system choose.", restart=True)
    models_dirs: tuple[Path, ...] = _setting(
        (), kinds.paths, "Folders with MLX models, as MODEL or ORG/MODEL below them."
    )
    hub_cache: bool = _setting(True, kinds.boolean, "Serve the MLX models of the Hugging Face cache.")
    demo_model: bool = _setting(True, kinds.boolean, "Register the bundled demo model as 'demo'.")
    default_model: str = _setting("", kinds.text, "Model for requests that name none; empty refuses them.")
    on_demand: bool = _setting(True, kinds.boolean, "Load a local model when a request names it.")
    memory_budget: int = _setting(
        0, kinds.size, "What all loaded models may use together; 0 finds out by itself.", unit="bytes"
    )
    max_loaded_models: int = _setting(
        0, kinds.integer, "Most models loaded at once; 0 means as many as fit.", ollama="OLLAMA_MAX_LOADED_MODELS"
    )
    parallel: int = _setting(
        32,
        kinds.integer,
        "Requests that one model answers at once; more wait their turn.",
        ollama="OLLAMA_NUM_PARALLEL",
    )
    context_length: int = _setting(
        0,
        kinds.integer,
        "Longest prompt plus answer; 0 is the model's own.",
        unit="tokens",
        ollama="OLLAMA_CONTEXT_LENGTH",
    )
    keep_alive: float = _setting(
        300.0, kinds.duration, "How long an idle model stays loaded, e.g. 5m; negative: for ever.", unit="seconds",
        ollama="OLLAMA_KEEP_ALIVE",
    )  # fmt: skip
    max_queue: int = _setting(
        512, kinds.integer, "Most requests that may wait, for a load or for a loaded model.", ollama="OLLAMA_MAX_QUEUE"
    )
    busy_policy: str = _setting(
        "wait", kinds.one_of("wait", "fail", "wait_then_fail"),
        "What a request does when others are in its way: wait (for queue_timeout_seconds at most), fail at once with "
        "503 and Retry-After, or wait_then_fail after busy_wait_seconds.",
    )  # fmt: skip
    queue_timeout_seconds: float = _setting(600.0, kinds.seconds, "Longest wait for others.", unit="seconds")
    busy_wait_seconds: float = _setting(
        30.0, kinds.seconds, "Longest wait for others with busy_policy wait_then_fail.", unit="seconds"
    )
    min_residency_seconds: float = _setting(
        0.0, kinds.seconds, "Shortest stay of a loaded model: before, it is not evicted for another.", unit="seconds"
    )
    turn_seconds: float = _setting(
        10.0, kinds.seconds, "How long a model that was loaded while others wait serves before they get its room.",
        unit="seconds",
    )  # fmt: skip
    turn_requests: int = _setting(
        64,
        kinds.integer,
        "How many requests a model that was loaded while others wait serves before they get its room.",
    )
    standby_workers: int = _setting(1, kinds.integer, "Idle worker processes kept ready, so that a load is quick.")
    load_timeout_seconds: float = _setting(
        600.0, kinds.seconds, "Longest time for loading a model; 0 is no limit.", unit="seconds",
        ollama="OLLAMA_LOAD_TIMEOUT",
    )  # fmt: skip
    warm_up_timeout_seconds: float = _setting(
        60.0, kinds.seconds, "Longest time for a trial token after a load; 0: none. A model is ready without it, too.",
        unit="seconds",
    )  # fmt: skip
    restore_on_failure: bool = _setting(
        False, kinds.boolean, "When a load fails, bring back the models that had to leave for it."
    )
    drain_timeout_seconds: float = _setting(
        300.0, kinds.seconds, "Longest wait for the running requests of a model that shall leave.", unit="seconds"
    )
    drain_policy: str = _setting(
        "keep", kinds.one_of("keep", "cancel"),
        "What happens at that limit: keep the old model and refuse the new one, or cancel what still runs.",
    )  # fmt: skip
    stall_timeout_seconds: float = _setting(
        120.0, kinds.seconds, "A worker that has work and makes no step for so long is ended; 0: never.", unit="seconds"
    )
    heartbeat_seconds: float = _setting(
        5.0, kinds.seconds, "Silence after which a stream gets a sign of life, as a model loads or a prompt is read; "
        "0: none.", unit="seconds",
    )  # fmt: skip
    stop_timeout_seconds: float = _setting(
        10.0, kinds.seconds, "How long a worker may take to exit before it is sent a signal.", unit="seconds"
    )
    strict: bool = _setting(
        False, kinds.boolean, "Refuse requests with fields that this server ignores, instead of naming them in the "
        "header X-Ignored-Fields.",
    )  # fmt: skip
    responses_kept: int = _setting(
        200, kinds.integer, "Most answers of /v1/responses kept in memory for previous_response_id; 0 keeps none."
    )
    responses_keep_seconds: float = _setting(3600.0, kinds.seconds, "How long such an answer is kept.", unit="seconds")
    allowed_origins: tuple[str, ...] = _setting(
        (), kinds.names, "Web origins that may use the server beside those of this machine; * allows all.",
        ollama="OLLAMA_ORIGINS", restart=True,
    )  # fmt: skip
    log_level: str = _setting(
        "info", kinds.one_of("debug", "info", "warning", "error"), "Least important lines to log.", restart=True
    )
    models: dict[str, ModelSettings] = dataclasses.field(default_factory=dict)
    name_map: dict[str, str] = dataclasses.field(default_factory=dict)
    """Patterns of foreign names, with ``*``, to names of ours; the first that fits counts."""

    @property
    def url(self) -> str:
        """Where a client on this machine reaches the server."""
        host = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}.get(self.host, self.host)  # noqa: S104  # read, not bound
        return f"http://[{host}]:{self.port}" if ":" in host else f"http://{host}:{self.port}"


def describe_settings() -> list[dataclasses.Field[Any]]:
    """The fields that are settings, in their order; ``metadata`` has parse, help, unit and Ollama's variable."""
    return [field for field in dataclasses.fields(Settings) if "parse" in field.metadata]


def flags_of(options: argparse.Namespace) -> dict[str, object]:
    """What the command line says of settings; None for what it does not say."""
    return {field.name: getattr(options, field.name, None) for field in describe_settings()}


def reloaded(old: Settings, new: Settings) -> tuple[Settings, list[str]]:
    """What holds after a reload, and the names of settings that have to wait for the next start."""
    fixed = [field.name for field in describe_settings() if field.metadata["restart"]]
    waiting = [name for name in fixed if getattr(old, name) != getattr(new, name)]
    return dataclasses.replace(new, **{name: getattr(old, name) for name in waiting}), waiting


def home_folder(environment: dict[str, str]) -> Path:
    """Where state and the configuration live: ``MLX_ROUTER_HOME``, else the platform's usual place."""
    if path := environment.get("MLX_ROUTER_HOME"):
        return Path(path).expanduser()
    if sys.platform == "darwin":
        return Path("~/Library/Application Support/mlx-router").expanduser()
    return Path(environment.get("XDG_CONFIG_HOME", "~/.config")).expanduser() / "mlx-router"


# ------------------------------------------------------------------------------------------------- loading


def load_settings(flags: dict[str, object], environment: dict[str, str], config: Path | None = None) -> Settings:
    """Put the layers on top of each other. Raises ``SettingsError``.

    ``config`` None reads ``config.toml`` in the home folder if it is there; a file that was named has to exist.
    """
    values: dict[str, object] = {}
    file = config or home_folder(environment) / "config.toml"
    if config is not None or file.exists():
        values.update(_read_file(file))
    values.update(_from_ollama(environment))
    for field in describe_settings():
        variable = f"MLX_ROUTER_{field.name.upper()}"
        if variable in environment:
            values[field.name] = _parse(field, environment[variable], variable)
    for field in describe_settings():
        if flags.get(field.name) is not None:
            flag = "--" + field.name.replace("_", "-")
            values[field.name] = _parse(field, flags[field.name], flag)
    return Settings(**values)  # type: ignore[arg-type]  # each value went through its field's own parser


def _parse(field: dataclasses.Field[Any], value: object, origin: str) -> object:
    try:
        return field.metadata["parse"](value)
    except (ValueError, InvalidRequest) as error:
        raise SettingsError(f"{origin}: {value!r}: {error}") from None


def _read_file(file: Path) -> dict[str, object]:
    try:
        data = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise SettingsError(f"{file}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingsError(f"{file}: {error}") from None
    version = data.pop("version", CONFIG_VERSION)
    if version != CONFIG_VERSION:
        raise SettingsError(f"{file}: version {version!r} is not known here; this release reads {CONFIG_VERSION}")
    models = data.pop("models", {})
    name_map = data.pop("name_map", {})
    fields = {field.name: field for field in describe_settings()}
    values: dict[str, object] = {}
    for name, value in data.items():
        if name not in fields:
            raise SettingsError(f"{file}: there is no setting {name!r}")
        values[name] = _parse(fields[name], value, f"{file}: {name}")
    if not isinstance(models, dict):
        raise SettingsError(f"{file}: models: not a table")
    values["models"] = {name: _read_model(file, name, table) for name, table in models.items()}
    if not isinstance(name_map, dict) or not all(isinstance(name, str) for name in name_map.values()):
        raise SettingsError(f"{file}: name_map: not a table of names")
    values["name_map"] = name_map
    return values


def _read_model(file: Path, name: str, table: object) -> ModelSettings:
    origin = f"{file}: models.{name!r}"
    if not isinstance(table, dict):
        raise SettingsError(f"{origin}: not a table")
    values = {}
    for key, value in table.items():
        if key not in _MODEL_KEYS:
            raise SettingsError(f"{origin}: there is no setting {key!r} of a model")
        try:
            values[key] = _MODEL_KEYS[key](value)
        except (ValueError, InvalidRequest) as error:
            raise SettingsError(f"{origin}: {key}: {value!r}: {error}") from None
    return ModelSettings(**values)


def _from_ollama(environment: dict[str, str]) -> dict[str, object]:
    """Ollama's own variables, for people who have them set; a value that Ollama would ignore is ignored here too."""
    values: dict[str, object] = {}
    for field in describe_settings():
        text = environment.get(field.metadata["ollama"] or "", "").strip().strip("\"'")
        if text:
            parse = kinds.duration if field.name == "load_timeout_seconds" else field.metadata["parse"]
            try:
                value = parse(text)
            except (ValueError, InvalidRequest):
                continue
            if field.name == "load_timeout_seconds" and math.isinf(value):
                value = 0.0
            values[field.name] = value
    if host := environment.get("OLLAMA_HOST", "").strip().strip("\"'"):
        values.update(_split_host(host))
    return values


def _split_host(text: str) -> dict[str, object]:
    """``[scheme://]host[:port][/path]`` with Ollama's default ports."""
    scheme, _, rest = text.rpartition("://")
    rest = rest.split("/", 1)[0]
    default = {"http": 80, "https": 443}.get(scheme, 11434)
    host, colon, port = rest.rpartition(":")
    if not colon or rest.endswith("]") or (":" in host.strip("[]") and not host.startswith("[")):
        host, port = rest, ""
    number = int(port) if port.isdigit() and int(port) <= 65535 else default
    return {"host": host.strip("[]") or "0.0.0.0", "port": number}  # noqa: S104  # Ollama binds all for ":8080"
