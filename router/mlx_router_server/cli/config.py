"""``mlx-router config``: what is in force and why, is a file right, where it lies, and its schema for editors."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

from mlx_router_server.cli.tables import print_json, print_table
from mlx_router_server.settings import Settings, shown_settings
from mlx_router_server.settings_layers import config_file, json_schema, load_settings

__all__ = ["check", "path", "schema", "show"]


def show(options: argparse.Namespace, settings: Settings) -> int:
    """What a router that is started now would work with; a running one tells by /admin/config."""
    shown = shown_settings(settings)
    if options.json:
        return print_json({"settings": shown, "origins": settings.origins})
    tables = {name: shown.pop(name) for name in ("models", "name_map", "model_aliases")}
    rows = [[name, _text(value)] for name, value in shown.items()]
    if options.origin:
        rows = [[*row, settings.origins.get(row[0], "default")] for row in rows]
    print_table(["SETTING", "VALUE", *(["ORIGIN"] if options.origin else [])], rows)
    for name in ("name_map", "model_aliases"):
        if tables[name]:
            print(f"\n[{name}]")
            for key, value in tables[name].items():
                print(f"{_text(key)} = {_text(value)}")
    for key, said in tables["models"].items():
        print(f"\n[models.{_text(key)}]")
        for name, value in said.items():
            print(f"{name} = {_text(value)}")
    return 0


def _text(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def check(options: argparse.Namespace, settings: Settings) -> int:
    """Whether a file can be read; the complaint about a bad one is made where all such complaints are."""
    environment = dict(os.environ)
    file: Path = options.file or config_file(environment, options.config)
    if options.file is not None or options.config is not None or file.exists():
        load_settings({}, environment, file)
        print(f"{file} is in order")
    else:
        print(f"{file} does not exist: the defaults are in force")
    return 0


def path(options: argparse.Namespace, settings: Settings) -> int:
    print(config_file(dict(os.environ), options.config))
    return 0


def schema(options: argparse.Namespace, settings: Settings) -> int:
    return print_json(json_schema())
