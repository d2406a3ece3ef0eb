"""The layers of settings on top of each other: default < file < Ollama's variables < our variables < flags.

Each value remembers its origin, so that ``config show --origin`` can tell, and so that an error can name it.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import sys
import tomllib
from pathlib import Path
from typing import Any, Final

from mlx_router_server import setting_kinds as kinds
from mlx_router_server.catalogue.names import parse_name
from mlx_router_server.settings import ModelSettings, Settings, describe_model_settings, describe_settings
from mlx_router_shared.errors import InvalidRequest

__all__ = ["CONFIG_VERSION", "SettingsError", "config_file", "home_folder", "json_schema", "load_settings"]

CONFIG_VERSION: Final = 1
_TABLES: Final = {
    "models": "What is said of single models, by their names.",
    "name_map": "Patterns of foreign names, with *, and the names of ours that stand in for them.",
    "model_aliases": "Short names, and the repositories that they stand for.",
}


class SettingsError(Exception):
    """A setting that cannot be used; one sentence that names it and where it came from."""


def home_folder(environment: dict[str, str]) -> Path:
    """Where state and the configuration live: ``MLX_ROUTER_HOME``, else the platform's usual place."""
    if path := environment.get("MLX_ROUTER_HOME"):
        return _expanded(path, "MLX_ROUTER_HOME")
    user = Path(environment.get("HOME") or Path.home())
    if sys.platform == "darwin":
        return user / "Library" / "Application Support" / "mlx-router"
    return _expanded(environment.get("XDG_CONFIG_HOME") or str(user / ".config"), "XDG_CONFIG_HOME") / "mlx-router"


def _expanded(path: str, origin: str) -> Path:
    try:
        return kinds.path(path)
    except ValueError as error:
        raise SettingsError(f"{origin}: {path!r}: {error}") from None


def config_file(environment: dict[str, str], named: Path | None = None) -> Path:
    """The file that is read: the one that was named, else ``config.toml`` in the home folder."""
    return named or home_folder(environment) / "config.toml"


def load_settings(
    flags: dict[str, object], environment: dict[str, str], config: Path | None = None, *, ignore_file: bool = False
) -> Settings:
    """Put the layers on top of each other. Raises ``SettingsError``.

    ``config`` None reads ``config.toml`` in the home folder if it is there; a file that was named has to exist.
    ``ignore_file`` leaves the file out.
    """
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    file = config_file(environment, config)
    if not ignore_file and (config is not None or file.exists()):
        values.update(_read_file(file))
        origins.update(dict.fromkeys(values, str(file)))
    for name, (value, variable) in _from_ollama(environment).items():
        values[name], origins[name] = value, variable
    for field in describe_settings():
        variable = f"MLX_ROUTER_{field.name.upper()}"
        if variable in environment:
            values[field.name] = _parse(field, environment[variable], variable)
            origins[field.name] = variable
    for field in describe_settings():
        if flags.get(field.name) is not None:
            flag = "--" + field.name.replace("_", "-")
            values[field.name] = _parse(field, flags[field.name], flag)
            origins[field.name] = flag
    return Settings(**values, origins=origins)


def _parse(field: dataclasses.Field[Any], value: object, origin: str) -> Any:
    try:
        return field.metadata["parse"](value)
    except (ValueError, InvalidRequest) as error:
        shown = "the value" if field.metadata["secret"] else repr(value)
        raise SettingsError(f"{origin}: {shown}: {error}") from None


def _read_file(file: Path) -> dict[str, object]:
    try:
        data = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise SettingsError(f"{file}: {error.strerror}") from None
    except RecursionError:
        raise SettingsError(f"{file}: it is nested too deeply") from None
    except ValueError as error:  # what is no TOML, no UTF-8, or a number of thousands of digits
        raise SettingsError(f"{file}: {error}") from None
    version = data.pop("version", CONFIG_VERSION)
    if version != CONFIG_VERSION:
        raise SettingsError(f"{file}: version {version!r} is not known here; this release reads {CONFIG_VERSION}")
    models = data.pop("models", {})
    fields = {field.name: field for field in describe_settings()}
    values: dict[str, object] = {}
    for name in ("name_map", "model_aliases"):
        table = data.pop(name, {})
        if not isinstance(table, dict) or not all(isinstance(value, str) for value in table.values()):
            raise SettingsError(f"{file}: {name}: not a table of names")
        for short, target in table.items():
            origin = f"{file}: {name}.{short!r}"
            _check_name(target, origin)
            if name == "model_aliases":
                _check_name(short, origin)
        values[name] = table
    for name, value in data.items():
        if name not in fields:
            raise SettingsError(f"{file}: there is no setting {name!r}{_near(name, list(fields) + list(_TABLES))}")
        values[name] = _parse(fields[name], value, f"{file}: {name}")
    if not isinstance(models, dict):
        raise SettingsError(f"{file}: models: not a table")
    values["models"] = {name: _read_model(file, name, table) for name, table in models.items()}
    return values


def _check_name(name: str, origin: str) -> None:
    """The catalogue is built from these; one that it cannot take must not be found out there."""
    try:
        parse_name(name)
    except InvalidRequest as error:
        raise SettingsError(f"{origin}: {name!r}: {error.message}") from None


def _near(name: str, names: list[str]) -> str:
    close = difflib.get_close_matches(name, names, n=1)
    return f", did you mean {close[0]!r}?" if close else ""


def _read_model(file: Path, name: str, table: object) -> ModelSettings:
    origin = f"{file}: models.{name!r}"
    if not isinstance(table, dict):
        raise SettingsError(f"{origin}: not a table")
    _check_name(name, origin)
    fields = {field.name: field for field in describe_model_settings()}
    values: dict[str, Any] = {}
    for key, value in table.items():
        if key not in fields:
            raise SettingsError(f"{origin}: there is no setting {key!r} of a model{_near(key, list(fields))}")
        values[key] = _parse(fields[key], value, f"{origin}: {key}")
    found = ModelSettings(**values)
    for alias in found.aliases:
        _check_name(alias, f"{origin}: aliases")
    return found


def json_schema() -> dict[str, Any]:
    """The configuration file as a JSON schema, for editors."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "mlx-router configuration",
        "type": "object",
        "additionalProperties": False,
        "properties": {
            "version": {"const": CONFIG_VERSION, "description": "The version of this file's form."},
            **_properties(describe_settings()),
            "models": {
                "type": "object",
                "description": _TABLES["models"],
                "additionalProperties": {
                    "type": "object",
                    "additionalProperties": False,
                    "properties": _properties(describe_model_settings()),
                },
            },
            **{
                name: {"type": "object", "description": _TABLES[name], "additionalProperties": {"type": "string"}}
                for name in ("name_map", "model_aliases")
            },
        },
    }


def _properties(fields: list[dataclasses.Field[Any]]) -> dict[str, Any]:
    properties = {}
    for field in fields:
        unit = f" In {field.metadata['unit']}." if field.metadata["unit"] else ""
        properties[field.name] = {
            **kinds.schema_of(field.metadata["parse"]),
            "description": field.metadata["help"] + unit,
        }
        default = kinds.shown(field.default)
        if default is not None:
            properties[field.name]["default"] = default
    return properties


def _from_ollama(environment: dict[str, str]) -> dict[str, tuple[object, str]]:
    """Ollama's own variables, for people who have them set; a value that Ollama would ignore is ignored here too.

    Raises ``SettingsError`` for a host that is none."""
    values: dict[str, tuple[object, str]] = {}
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
            values[field.name] = value, field.metadata["ollama"]
    if host := environment.get("OLLAMA_HOST", "").strip().strip("\"'"):
        fields = {field.name: field for field in describe_settings()}
        for name, value in _split_host(host).items():
            values[name] = _parse(fields[name], value, "OLLAMA_HOST"), "OLLAMA_HOST"
    return values


def _split_host(text: str) -> dict[str, object]:
    """``[scheme://]host[:port][/path]`` with Ollama's default ports."""
    scheme, _, rest = text.rpartition("://")
    rest = rest.split("/", 1)[0]
    default = {"http": 80, "https": 443}.get(scheme, 11434)
    host, colon, port = rest.rpartition(":")
    if not colon or rest.endswith("]") or (":" in host.strip("[]") and not host.startswith("[")):
        host, port = rest, ""
    number = int(port) if port.isascii() and port.isdigit() and len(port) <= 5 and int(port) <= 65535 else default
    return {"host": host.strip("[]") or "0.0.0.0", "port": number}  # noqa: S104  # Ollama binds all for ":8080"
