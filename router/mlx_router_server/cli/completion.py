"""Completion of commands, flags and models in the shell; argcomplete does the shells."""

from __future__ import annotations

import argparse
import os
from typing import Any

from mlx_router_server.cli.client import ApiError, Client, NoRouter, connect
from mlx_router_server.settings import Settings
from mlx_router_server.settings_layers import SettingsError, load_settings

__all__ = ["complete", "completion", "models_completer"]


def completion(options: argparse.Namespace, settings: Settings) -> int:
    import argcomplete  # only where it is asked for: every command would be slower

    print(argcomplete.shellcode(["mlx-router"], shell=options.shell))
    return 0


def complete(parser: argparse.ArgumentParser) -> None:
    """Answers the shell and ends the program, when it is the shell that asks."""
    import argcomplete

    argcomplete.autocomplete(parser, always_complete_options="long")


def models_completer(prefix: str, parsed_args: argparse.Namespace, **_: Any) -> list[str]:
    """Names of models, from the router that runs; none when none does."""
    try:
        settings = load_settings({"host": getattr(parsed_args, "host", None),
                                  "port": getattr(parsed_args, "port", None)}, dict(os.environ))  # fmt: skip
        client: Client = connect(settings)
        names = [model["name"].removesuffix(":latest") for model in client.get("/api/tags")["models"]]
    except (NoRouter, ApiError, SettingsError, OSError, KeyError, TypeError, ValueError):
        return []
    return [name for name in names if name.startswith(prefix)]
