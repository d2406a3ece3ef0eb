"""One table of settings behind the file, the environment, the flags, --help, the docs and /admin/config.

Each field of ``Settings`` is one setting: its name is the key in the file, ``MLX_ROUTER_<NAME>`` in the environment
and ``--<name>`` on the command line; ``settings_layers`` puts them on top of each other. Frozen after load; handlers
get the object, never a copy of a value.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_router_server import setting_kinds as kinds

__all__ = [
    "ModelSettings",
    "Settings",
    "describe_model_settings",
    "describe_settings",
    "flags_of",
    "reloaded",
    "shown_settings",
]


# ------------------------------------------------------------------------------------------------ the table


def _setting(
    default: Any,
    parse: Callable[[object], Any],
    text: str,
    *,
    unit: str = "",
    ollama: str = "",
    restart: bool = False,
    secret: bool = False,
) -> Any:
    """``restart``: a change takes effect when the router starts the next time, not when it reloads. ``secret``: its
    value is shown to nobody."""
    metadata = {"parse": parse, "help": text, "unit": unit, "ollama": ollama, "restart": restart, "secret": secret}
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSettings:
    """What the configuration says of one model, under ``[models."name"]``."""

    path: Path | None = _setting(None, kinds.path, "The folder that it lies in.")
    repo: str | None = _setting(
        None, kinds.text, "Instead of a folder: the repository in the Hugging Face cache, as ORG/NAME."
    )
    aliases: tuple[str, ...] = _setting((), kinds.names, "Other names for it.")
    preload: bool = _setting(False, kinds.boolean, "Load it when the router starts.")
    pinned: bool = _setting(False, kinds.boolean, "Never evict it, nor unload it when it is idle.")
    keep_alive: float | None = _setting(None, kinds.duration, "How long it stays loaded when idle.", unit="seconds")
    keep_alive_min: float = _setting(0.0, kinds.duration, "The least that a request may ask for.", unit="seconds")
    keep_alive_max: float = _setting(math.inf, kinds.duration, "The most that a request may ask for.", unit="seconds")
    keep_alive_lock: bool = _setting(False, kinds.boolean, "Requests cannot change keep_alive at all.")
    context_length: int | None = _setting(None, kinds.integer, "Longest prompt plus answer.", unit="tokens")
    memory: int | None = _setting(
        None, kinds.size, "What it needs at most, instead of an estimate and what was measured.", unit="bytes"
    )
    adapter: Path | None = _setting(None, kinds.path, "A folder with a LoRA adapter that is put on its weights.")
    draft_model: str = _setting(
        "", kinds.text, "A smaller model with the same tokens that guesses ahead, by its name: one answer at a time is "
        "written faster.",
    )  # fmt: skip
    system: str = _setting("", kinds.text, "System prompt of conversations that bring none.")
    options: dict[str, Any] | None = _setting(
        None, kinds.options, "Sampling options, by Ollama's names, where a request says nothing."
    )
    kind: str = _setting(
        "", kinds.one_of("", "chat", "embedding"), "What it is taken for, where its content tells it wrong."
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Everything the operator can decide."""

    host: str = _setting("127.0.0.1", kinds.host, "Address to listen on.", restart=True)
    port: int = _setting(11434, kinds.port, "Port to listen on; 0 lets the system choose.", restart=True)
    models_dirs: tuple[Path, ...] = _setting(
        (), kinds.paths, "Folders with MLX models, as MODEL or ORG/MODEL below them."
    )
    hub_cache: bool = _setting(True, kinds.boolean, "Serve the MLX models of the Hugging Face cache.")
    demo_model: bool = _setting(True, kinds.boolean, "Register the bundled demo model as 'demo'.")
    default_model: str = _setting("", kinds.text, "Model for requests that name none; empty refuses them.")
    on_demand: bool = _setting(True, kinds.boolean, "Load a local model when a request names it; off: operators do.")
    allow_download: bool = _setting(
        False, kinds.boolean, "Download a model that a request names, if download_allowlist has it; pulls need no "
        "permission.",
    )  # fmt: skip
    download_allowlist: tuple[str, ...] = _setting(
        (), kinds.names, "Repositories that a request may have downloaded: ORG/NAME, * stands for anything."
    )
    download_timeout_seconds: float = _setting(
        7200.0, kinds.seconds, "Longest time for the download of a model that a request named; 0 is no limit.",
        unit="seconds",
    )  # fmt: skip
    download_streams: int = _setting(
        4, kinds.integer, "Files of a model that are downloaded at the same time.", ollama="OLLAMA_MAX_TRANSFER_STREAMS"
    )
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
    prefill_share: float = _setting(
        0.46,
        kinds.share,
        "Share of the time that new prompts get while a model answers other requests, between 0 and 1.",
    )
    longest_gap_ms: float = _setting(
        150.0, kinds.milliseconds,
        "Longest pause in running answers while a prompt is processed; shorter makes long prompts slower.", unit="ms",
    )  # fmt: skip
    prefix_cache_memory: int = _setting(
        4 * 2**30, kinds.size,
        "Most memory in which a model keeps processed prompts and answers for requests that begin alike; less, where "
        "running requests need it; 0 keeps none.", unit="bytes",
    )  # fmt: skip
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
    worker_source: str = _setting(
        "auto", kinds.one_of("auto", "fork", "standby", "spawn"),
        "How workers are obtained: forked from a process that has done the imports (Linux), taken from idle ones, or "
        "started for each load; auto: fork on Linux, standby elsewhere.",
    )  # fmt: skip
    standby_workers: int = _setting(
        1, kinds.integer,
        "Idle worker processes to keep with worker_source standby, more while loads follow each other closely; 0: auto "
        "and standby start one for each load.",
    )  # fmt: skip
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
    api_keys: tuple[str, ...] = _setting(
        (), kinds.names, "Keys that may do everything: as they are, or as sha256:HEX. `mlx-router keys add` makes keys "
        "with limits.", secret=True,
    )  # fmt: skip
    insecure_bind: bool = _setting(
        False, kinds.boolean, "Listen on an address that others can reach without asking for keys.", restart=True
    )
    allowed_origins: tuple[str, ...] = _setting(
        (), kinds.names, "Web origins that may use the server beside those of this machine; * allows all.",
        ollama="OLLAMA_ORIGINS",
    )  # fmt: skip
    allowed_hosts: tuple[str, ...] = _setting(
        (), kinds.names, "Names by which the server may be called beside those of this machine; * allows all."
    )
    max_body_bytes: int = _setting(
        32 * 2**20, kinds.size, "Longest body of a request; uploads of files for a new model are not bound by it.",
        unit="bytes",
    )  # fmt: skip
    max_header_bytes: int = _setting(64 * 2**10, kinds.size, "All headers of a request together.", unit="bytes")
    max_connections: int = _setting(
        1024, kinds.integer, "Most connections at once; more are closed at once.", restart=True
    )
    request_timeout_seconds: float = _setting(
        60.0, kinds.seconds, "Longest time for a request to arrive: its headers, and then each part of its body.",
        unit="seconds",
    )  # fmt: skip
    reading_timeout_seconds: float = _setting(
        120.0, kinds.seconds, "Longest time that a client may leave unread what was sent to it, or 0.",
        unit="seconds",
    )  # fmt: skip
    log_level: str = _setting(
        "info", kinds.one_of("debug", "info", "warning", "error"), "Least important lines to log."
    )
    log_format: str = _setting(
        "text", kinds.one_of("text", "json"), "How lines are logged: for people, or as JSON, one object a line."
    )
    log_file: str = _setting(
        "", kinds.file, "A file for the log in place of standard error; five older ones of 10 MB are kept beside it."
    )
    log_prompts: bool = _setting(
        False, kinds.boolean, "Log what clients send and what they are answered. Their secrets, too."
    )
    inspect_requests: int = _setting(
        0, kinds.integer, "How many of the last requests are kept in memory with bodies and answers, for "
        "/admin/requests; 0 keeps none.",
    )  # fmt: skip
    models: dict[str, ModelSettings] = dataclasses.field(default_factory=dict)
    name_map: dict[str, str] = dataclasses.field(default_factory=dict)
    """Patterns of foreign names, with ``*``, to names of ours; the first that fits counts."""
    model_aliases: dict[str, str] = dataclasses.field(default_factory=dict)
    """Short names to repositories, beside those that ship."""
    origins: dict[str, str] = dataclasses.field(default_factory=dict, compare=False)
    """Where each setting that is not at its default came from."""

    @property
    def url(self) -> str:
        """Where a client on this machine reaches the server."""
        host = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}.get(self.host, self.host)  # noqa: S104  # read, not bound
        return f"http://[{host}]:{self.port}" if ":" in host else f"http://{host}:{self.port}"


def describe_settings() -> list[dataclasses.Field[Any]]:
    """The fields that are settings, in their order; ``metadata`` has parse, help, unit and Ollama's variable."""
    return [field for field in dataclasses.fields(Settings) if "parse" in field.metadata]


def describe_model_settings() -> list[dataclasses.Field[Any]]:
    """The same for one model's."""
    return list(dataclasses.fields(ModelSettings))


def shown_settings(settings: Settings) -> dict[str, Any]:
    """Plain values for people and JSON, in the order of the table; secrets are masked."""
    shown: dict[str, Any] = {
        field.name: kinds.shown(getattr(settings, field.name), secret=field.metadata["secret"])
        for field in describe_settings()
    }
    shown["models"] = {
        name: {
            field.name: kinds.shown(value)
            for field in describe_model_settings()
            if (value := getattr(said, field.name)) != field.default
        }
        for name, said in settings.models.items()
    }
    shown["name_map"] = dict(settings.name_map)
    shown["model_aliases"] = dict(settings.model_aliases)
    return shown


def flags_of(options: argparse.Namespace) -> dict[str, object]:
    """What the command line says of settings; None for what it does not say."""
    return {field.name: getattr(options, field.name, None) for field in describe_settings()}


def reloaded(old: Settings, new: Settings) -> tuple[Settings, list[str]]:
    """What holds after a reload, and the names of settings that have to wait for the next start."""
    fixed = [field.name for field in describe_settings() if field.metadata["restart"]]
    waiting = [name for name in fixed if getattr(old, name) != getattr(new, name)]
    origins = {**new.origins, **{name: old.origins.get(name, "default") for name in waiting}}
    return dataclasses.replace(new, origins=origins, **{name: getattr(old, name) for name in waiting}), waiting
