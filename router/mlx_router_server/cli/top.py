"""``mlx-router top``: what the router does now, once a second, until ctrl-C."""

from __future__ import annotations

import argparse
import sys
import time
from typing import TYPE_CHECKING, Any, Final

from mlx_router_server.cli.client import ApiError, Client, NoRouter, connect
from mlx_router_server.cli.tables import human_size, print_json, until
from mlx_router_server.settings import Settings

if TYPE_CHECKING:
    from rich.console import RenderableType

__all__ = ["top"]

_SECONDS: Final = 1.0
_BAR: Final = 40
_WAITERS: Final = 8
_AT_REST: Final = ("unloaded",)


def top(options: argparse.Namespace, settings: Settings) -> int:
    """On a terminal it goes on; elsewhere, and with ``--once``, it is one look."""
    client = connect(settings)
    look = _Look()
    data = client.get("/admin/status")
    if options.json:
        return print_json(data)
    # Here and not above: it takes longer to import than most commands run.
    from rich.console import Console
    from rich.live import Live

    console = Console(highlight=False)
    if options.once or not sys.stdout.isatty():
        console.print(look.draw(client.url, data))
        return 0
    with Live(look.draw(client.url, data), console=console, screen=True, auto_refresh=False) as live:
        while True:
            time.sleep(_SECONDS)
            live.update(_drawn(look, client), refresh=True)


def _drawn(look: _Look, client: Client) -> RenderableType:
    """A router that was restarted is found again."""
    try:
        return look.draw(client.url, client.get("/admin/status"))
    except (NoRouter, ApiError) as error:
        return str(error)


class _Look:
    """Remembers the last look, because speeds are the difference of two."""

    def __init__(self) -> None:
        self._at = 0.0
        self._tokens: dict[str, int] = {}

    def draw(self, url: str, data: dict[str, Any]) -> RenderableType:
        from rich.console import Group
        from rich.text import Text

        router, models = data["router"], data["models"]
        speeds = self._speeds(models)
        up = int(router["uptime_seconds"])
        head = Text(f"mlx-router {router['version']} at {url}, pid {router['pid']}, up {up // 3600}:{up // 60 % 60:02}:{up % 60:02}")  # fmt: skip  # noqa: E501
        parts: list[RenderableType] = [head, self._memory(router, models), Text(), self._models(models, speeds)]
        if router["queue"]:
            parts += [Text(), self._queue(router["queue"])]
        for download in router["downloads"]:
            share = download["completed"] / max(download["total"], 1)
            parts.append(Text(f"downloading {download['repository']}: {share:.0%} of {human_size(download['total'])}"))
        return Group(*parts)

    def _speeds(self, models: list[dict[str, Any]]) -> dict[str, float]:
        now, before = time.monotonic(), self._at
        tokens = {model["runs_as"]: model["tokens_total"] for model in models}
        speeds = {
            name: max(count - self._tokens.get(name, count), 0) / (now - before) if before else 0.0
            for name, count in tokens.items()
        }
        self._at, self._tokens = now, tokens
        return speeds

    @staticmethod
    def _memory(router: dict[str, Any], models: list[dict[str, Any]]) -> RenderableType:
        from rich.text import Text

        budget, reserved = router["budget_bytes"], router["reserved_bytes"]
        measured = sum({model["pid"]: model["memory_bytes"] for model in models if model["pid"]}.values())
        used = max(round(_BAR * min(measured / max(budget, 1), 1)), bool(measured))  # a little is not nothing
        held = max(round(_BAR * min(reserved / max(budget, 1), 1)) - used, 0)
        bar = Text("█" * used, style="green") + Text("▒" * held, style="yellow") + Text("·" * (_BAR - used - held))
        words = f"  {human_size(measured)} used, {human_size(reserved)} reserved of {human_size(budget)}"
        memory = router["memory"]
        if memory is not None:
            words += f"; machine: {human_size(memory['available_bytes'])} free"
            words += "" if memory["pressure"] == "normal" else f", pressure {memory['pressure']}"
        return bar + Text(words)

    @staticmethod
    def _models(models: list[dict[str, Any]], speeds: dict[str, float]) -> RenderableType:
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, pad_edge=False)
        for title in ("MODEL", "STATE", "MEMORY", "ACTIVE", "WAITING", "TOKENS/S", "LOADS", "UNTIL"):
            table.add_column(title, justify="left" if title in ("MODEL", "STATE", "UNTIL") else "right")
        awake = [model for model in models if model["state"] not in _AT_REST and model["name"] == model["runs_as"]]
        for model in awake:
            state = model["state"] + (f": {model['stage']}" if model["stage"] else "")
            state += f" {model['fraction']:.0%}" if model["state"] == "loading" else ""
            table.add_row(
                Text(model["name"] + (" (pinned)" if model["pinned"] else "")), Text(state),
                human_size(model["memory_bytes"]) if model["memory_bytes"] else "-", str(model["in_flight"]),
                str(model["queued"]), f"{speeds[model['runs_as']]:.0f}", str(model["loads"]),
                "in use" if model["in_flight"] else until(model["expires_in_seconds"]),
            )  # fmt: skip
        resting = len(models) - len(awake)
        table.add_row(Text(f"and {resting} at rest", style="dim") if resting else "")
        return table

    @staticmethod
    def _queue(queue: list[dict[str, Any]]) -> RenderableType:
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, pad_edge=False)
        for title in ("POSITION", "MODEL", "WAITED", "REQUEST"):
            table.add_column(title)
        for waiter in queue[:_WAITERS]:
            waited = f"{waiter['waited_seconds']:.1f} s"
            table.add_row(str(waiter["position"]), Text(waiter["model"]), waited, Text(waiter["request"]))
        if len(queue) > _WAITERS:
            table.add_row(f"and {len(queue) - _WAITERS} more")
        return table
