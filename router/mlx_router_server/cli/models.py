"""Commands that ask the router something or tell it something."""

from __future__ import annotations

import argparse
import sys
import time
from typing import Any

from mlx_router_server.catalogue.aliases import SHIPPED
from mlx_router_server.cli.client import ApiError, Client, NoRouter, OtherProgram, connect, in_path
from mlx_router_server.cli.gone import footprint_of
from mlx_router_server.cli.tables import ago, human_size, print_json, print_table, until
from mlx_router_server.settings import Settings
from mlx_router_server.version import __version__

__all__ = ["list_models", "load", "pin", "plan", "ps", "show", "status", "stop", "unload", "unpin", "version"]

_SHUTDOWN_SECONDS = 30.0
_NOT_RUNNING = ("unloaded", "backoff", "failed")
_PARTS = ("license", "modelfile", "parameters", "template", "system")
_SHOWN_LINES = 4
_POLL_SECONDS = 0.1


def list_models(options: argparse.Namespace, settings: Settings) -> int:
    if options.aliases:
        return _list_aliases(options, settings)
    models = connect(settings).get("/api/tags")["models"]
    models = [model for model in models if model["name"].lower().startswith(options.prefix.lower())]
    if options.json:
        return print_json(models)
    rows = [
        [m["name"], m["digest"][:12], human_size(m["size"]), ago(m["modified_at"]), ", ".join(m["capabilities"])]
        for m in models
    ]
    print_table(["NAME", "ID", "SIZE", "MODIFIED", "CAPABILITIES"], rows)
    return 0


def _list_aliases(options: argparse.Namespace, settings: Settings) -> int:
    """Needs no router: the table ships, and the configuration adds to it."""
    table = {**SHIPPED, **settings.model_aliases}
    found = {short: table[short] for short in sorted(table) if short.startswith(options.prefix.lower())}
    if options.json:
        return print_json(found)
    print_table(["NAME", "REPOSITORY"], [[short, repository] for short, repository in found.items()])
    return 0


def ps(options: argparse.Namespace, settings: Settings) -> int:
    known = [m for m in connect(settings).get("/admin/status")["models"] if m["state"] not in _NOT_RUNNING]
    models = [m for m in known if m["name"] == m["runs_as"]]
    if options.json:
        return print_json(models)
    # Models that were made from another one without weights of their own share its process.
    shared = {m["name"]: [o["name"] for o in known if o["runs_as"] == m["name"] and o is not m] for m in models}
    serves = any(shared.values())
    rows = [
        [
            m["name"],
            _state_words(m),
            str(m["pid"] or "-"),
            human_size(m["memory_bytes"]),
            f"{m['in_flight']} / {m['queued']}",
            until(m["expires_in_seconds"]) if not m["in_flight"] else "in use",
            *([", ".join(shared[m["name"]])] if serves else []),
        ]
        for m in models
    ]
    head = ["NAME", "STATE", "PID", "MEMORY", "ACTIVE / WAITING", "UNTIL"]
    print_table([*head, "ALSO SERVES"] if serves else head, rows)
    return 0


def _state_words(model: dict[str, Any]) -> str:
    words = (
        str(model["state"])
        + (", not batched" if model.get("batched") is False else "")
        + (f": {model['stage']}" if model["stage"] else "")
    )
    return words + (f" {model['fraction']:.0%}" if model["state"] == "loading" else "")


def status(options: argparse.Namespace, settings: Settings) -> int:
    client = connect(settings)
    data = client.get("/admin/status")
    if options.json:
        return print_json(data)
    router = data["router"]
    print(f"mlx-router {router['version']} at {client.url}, pid {router['pid']}, up {int(router['uptime_seconds'])} s")
    used = f"{human_size(router['reserved_bytes'])} of {human_size(router['budget_bytes'])} reserved"
    print(f"memory: {used}{_pressure(router['memory'])}")
    print()
    rows = [
        [
            m["name"],
            m["state"],
            human_size(m["memory_bytes"]) if m["memory_bytes"] else "-",
            str(m["in_flight"]),
            str(m["queued"]),
            str(m["loads"]),
            m["reason"][:60],
        ]
        for m in data["models"]
    ]
    print_table(["MODEL", "STATE", "MEMORY", "ACTIVE", "WAITING", "LOADS", "REASON"], rows)
    if router["queue"]:
        print()
        waiting = [[str(w["position"]), w["model"], w["request"], str(w["priority"]), f"{w['waited_seconds']:.1f} s"]
                   for w in router["queue"]]  # fmt: skip
        print_table(["POSITION", "MODEL", "REQUEST", "PRIORITY", "WAITED"], waiting)
    return 0


def _pressure(memory: dict[str, Any] | None) -> str:
    if memory is None:
        return ""
    tight = "" if memory["pressure"] == "normal" else f", pressure {memory['pressure']}"
    return f"; the machine has {human_size(memory['available_bytes'])} free{tight}"


def show(options: argparse.Namespace, settings: Settings) -> int:
    parts = [part for part in _PARTS if getattr(options, part)]
    if len(parts) > 1:
        flags = ", ".join(f"--{part}" for part in _PARTS)
        print(f"mlx-router: only one of {flags} can be said", file=sys.stderr)
        return 2
    data = connect(settings).post("/api/show", {"model": options.model})
    if options.json:
        return print_json(data)
    if parts:
        print(data.get(parts[0], ""))
        return 0
    info, details = data["model_info"], data["details"]
    architecture = info.get("general.architecture", details["family"])
    rows = [
        ("architecture", architecture),
        ("made from", details["parent_model"] or None),
        ("parameters", details["parameter_size"]),
        ("context length", info.get(f"{architecture}.context_length")),
        ("embedding length", info.get(f"{architecture}.embedding_length")),
        ("quantization", details["quantization_level"]),
    ]
    print("  Model")
    for label, value in rows:
        if value is not None:
            print(f"    {label:<20}{value}")
    sections = {
        "Capabilities": data["capabilities"],
        "Parameters": data.get("parameters", "").splitlines(),
        "System": _first_lines(data.get("system", "")),
        "License": _first_lines(data.get("license", "")),
    }
    for title, lines in sections.items():
        if lines:
            print(f"\n  {title}")
            for line in lines:
                print(f"    {line}")
    return 0


def _first_lines(text: str) -> list[str]:
    lines = text.strip().splitlines()
    return lines[:_SHOWN_LINES] + (["..."] if len(lines) > _SHOWN_LINES else [])


def load(options: argparse.Namespace, settings: Settings) -> int:
    data = connect(settings).post(f"/admin/models/{in_path(options.model)}/load")
    if options.json:
        return print_json(data)
    print(f"{data['name']} is loaded ({data['waited_seconds']:.1f} s)")
    return 0


def unload(options: argparse.Namespace, settings: Settings) -> int:
    data = connect(settings).post(f"/admin/models/{in_path(options.model)}/unload")
    if options.json:
        return print_json(data)
    if data["state"] in _NOT_RUNNING:
        print(f"{data['name']} is unloaded")
    else:
        print(f"{data['name']} is {data['state']}: it leaves once nobody uses it")
    return 0


def pin(options: argparse.Namespace, settings: Settings) -> int:
    return _set_pin(options, settings, "pin")


def unpin(options: argparse.Namespace, settings: Settings) -> int:
    return _set_pin(options, settings, "unpin")


def _set_pin(options: argparse.Namespace, settings: Settings, what: str) -> int:
    data = connect(settings).post(f"/admin/models/{in_path(options.model)}/{what}")
    if options.json:
        return print_json(data)
    print(f"{data['name']} is pinned until the router ends" if data["pinned"] else f"{data['name']} is not pinned")
    return 0


def plan(options: argparse.Namespace, settings: Settings) -> int:
    """What loading a model would do now; nothing is done."""
    data = connect(settings).post("/admin/plan", {"model": options.model})
    if options.json:
        return print_json(data)
    words = {"serve": "is served at once", "join": "joins a load that has begun", "load": "is loaded at once",
             "evict": "is loaded once others have left", "wait": "waits", "refuse": "is refused"}  # fmt: skip
    print(f"{data['model']} ({data['state']}): {words[data['action']]}: {data['reason']}")
    free = data["budget_bytes"] - data["reserved_bytes"]
    print(f"  needs     {human_size(data['estimate_bytes'])}, {_origin(data['estimate'])}")
    print(f"  budget    {human_size(data['budget_bytes'])}, of which {human_size(max(free, 0))} are not reserved")
    for victim in data["evict"]:
        how = "finishes its requests and leaves" if victim["drains_first"] else "leaves"
        print(f"  evicts    {victim['model']}: {how}, frees {human_size(victim['reserved_bytes'])}")
    for label, names in (("waits for", data["wait_for"]), ("pinned", data["pinned"])):
        if names:
            print(f"  {label:<9} {', '.join(names)}")
    if data["wait_seconds"] is not None:
        print(f"  begins    in about {data['wait_seconds']:.1f} s")
    return 0


def _origin(estimate: dict[str, Any]) -> str:
    if estimate["fixed_by_configuration"]:
        return "as the configuration says"
    growth = human_size(estimate["cache_bytes"] + estimate["work_bytes"])
    if estimate["measured_bytes"] is not None:
        return f"{human_size(estimate['measured_bytes'])} measured at an earlier load and {growth} for its caches"
    return f"estimated: {human_size(estimate['loaded_bytes'])} loaded and {growth} for its caches"


def stop(options: argparse.Namespace, settings: Settings) -> int:
    """Without a model: end the router, and say so only when it and its workers are gone."""
    client = connect(settings)
    if options.model is not None:
        client.post("/api/generate", {"model": options.model, "keep_alive": 0})
        return 0
    try:
        footprint = footprint_of(client.get("/admin/status"))
        client.post("/admin/shutdown", answer_seconds=_SHUTDOWN_SECONDS)
    except (KeyError, TypeError):
        print(f"mlx-router: {client.url} is not an mlx-router; it is left alone", file=sys.stderr)
        return 1
    limit = options.timeout or settings.drain_timeout_seconds + settings.stop_timeout_seconds + 20
    began = time.monotonic()
    left = footprint.what_is_left(limit) if footprint is not None else _still_answers(client, limit)
    if left:
        print(f"mlx-router: {left}", file=sys.stderr)
        return 1
    where = f"pid {footprint.router_pid}" if footprint is not None else client.url
    print(f"stopped ({where}, {time.monotonic() - began:.1f} s)")
    return 0


def _still_answers(client: Client, limit_seconds: float) -> str:
    """Wait until nothing answers at the address of a router whose processes cannot be seen from here."""
    began = time.monotonic()
    while time.monotonic() - began < limit_seconds:
        try:
            client.text("/health")
        except NoRouter:
            return ""
        time.sleep(_POLL_SECONDS)
    return f"still answers after {limit_seconds:g} s: {client.url}"


def version(options: argparse.Namespace, settings: Settings) -> int:
    other = ""
    try:
        router = connect(settings).get("/health").get("version")
    except (ApiError, AttributeError):
        router = None
    except OtherProgram as error:
        router, other = None, str(error)
    except NoRouter:
        router = None
    if options.json:
        return print_json({"client": __version__, "router": router})
    print(f"mlx-router {__version__}")
    if router != __version__:
        where = f"the router at {settings.url}"
        print(f"{where} is version {router}" if router else other or f"{where} does not answer")
    return 0
