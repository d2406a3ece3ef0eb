"""``mlx-router keys``: make keys, list them, take them back. A router that runs follows within a second."""

from __future__ import annotations

import argparse
import os
import sys
from datetime import UTC, datetime

from mlx_router_server.access.keys import Key, KeyFileError, Scope, keys_file, make_key, read_keys, write_keys
from mlx_router_server.cli.tables import ago, print_json, print_table
from mlx_router_server.settings import Settings
from mlx_router_server.settings_layers import SettingsError, home_folder

__all__ = ["add", "list_keys", "remove"]


def add(options: argparse.Namespace, settings: Settings) -> int:
    """Print the new key, once: it is stored as a hash only."""
    file = keys_file(home_folder(dict(os.environ)))
    keys = _read()
    if any(key.name == options.name for key in keys):
        print(f"mlx-router: there is a key {options.name!r} already; take it back first: "
              f"mlx-router keys remove {options.name}", file=sys.stderr)  # fmt: skip
        return 1
    scopes = [Scope(scope) for scope in options.scope or [Scope.INFERENCE]]
    text, key = make_key(options.name, scopes, tuple(options.model))
    write_keys(file, [*keys, key])
    if options.json:
        return print_json({"name": key.name, "key": text, "scopes": sorted(key.scopes), "models": list(key.models)})
    print(text)
    print(f"The key {key.name!r} is shown this once. Clients send it as `Authorization: Bearer KEY`.", file=sys.stderr)
    return 0


def list_keys(options: argparse.Namespace, settings: Settings) -> int:
    keys = _read()
    if options.json:
        items = [
            {"name": key.name, "scopes": sorted(key.scopes), "models": list(key.models), "created_at": key.created_at}
            for key in keys
        ]
        return print_json(items)
    rows = [
        [key.name, ", ".join(sorted(key.scopes)), ", ".join(key.models) or "all", _when(key.created_at)] for key in keys
    ]
    print_table(["NAME", "SCOPES", "MODELS", "MADE"], rows)
    return 0


def _when(created_at: float) -> str:
    return ago(datetime.fromtimestamp(created_at, UTC).isoformat())


def remove(options: argparse.Namespace, settings: Settings) -> int:
    keys = _read()
    kept = [key for key in keys if key.name != options.name]
    if len(kept) == len(keys):
        print(f"mlx-router: there is no key {options.name!r}", file=sys.stderr)
        return 1
    write_keys(keys_file(home_folder(dict(os.environ))), kept)
    print(f"the key {options.name!r} is not valid any more")
    if not kept:
        print("No key is left: a router on an address of this machine lets everybody in again.", file=sys.stderr)
    return 0


def _read() -> list[Key]:
    try:
        return read_keys(keys_file(home_folder(dict(os.environ))))
    except KeyFileError as error:
        raise SettingsError(str(error)) from None
