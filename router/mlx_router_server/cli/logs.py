"""``mlx-router logs``: what the router logged, of everything or of one model."""

from __future__ import annotations

import argparse
import json
from datetime import datetime
from typing import Any

from mlx_router_server.cli.client import connect, in_path
from mlx_router_server.cli.tables import print_json
from mlx_router_server.settings import Settings

__all__ = ["logs"]


def logs(options: argparse.Namespace, settings: Settings) -> int:
    """The last lines; with ``--follow`` those that come, until ctrl-C or the end of the router."""
    client = connect(settings)
    query = f"model={in_path(options.model)}" if options.model else ""
    told = client.get("/admin/logs?" + query)
    lines = told["lines"][-options.lines :] if options.lines else []
    if options.json and not options.follow:
        return print_json(lines)
    for line in lines:
        _print(line, as_json=options.json)
    if options.follow:
        for kind, data in client.events(f"/admin/logs/stream?after={told['last']}&{query}"):
            if kind == "missed":
                data = {"at": None, "level": "warning", "text": f"{data['count']} lines came too quickly"}
            _print(data, as_json=options.json)
    return 0


def _print(line: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        print(json.dumps(line, ensure_ascii=False), flush=True)
        return
    at = "" if line["at"] is None else datetime.fromtimestamp(line["at"]).strftime("%Y-%m-%d %H:%M:%S.%f")[:-3]
    print(f"{at} {line['level'].upper():<7} {line['text']}", flush=True)
