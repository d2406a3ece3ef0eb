"""Commands about which models there are: pull, create, cp, rm."""

from __future__ import annotations

import argparse
import hashlib
import re
import sys
from pathlib import Path
from typing import Any, Final

from mlx_router_server.cli.client import ApiError, Client, connect
from mlx_router_server.cli.modelfile import Modelfile, ModelfileError, parse_modelfile
from mlx_router_server.cli.progress import Bars
from mlx_router_server.cli.tables import human_size, print_json
from mlx_router_server.files import expanded
from mlx_router_server.settings import Settings

__all__ = ["copy", "create", "pull", "pull_model", "remove"]

_WANTED: Final = re.compile(r"[\w.-]+\.(?:json|jsonl|jinja|txt|tiktoken|model|safetensors)|LICENSE(?:\.\w+)?", re.ASCII)
_CHUNK: Final = 2**20


def pull(options: argparse.Namespace, settings: Settings) -> int:
    pull_model(connect(settings), options.model)
    return 0


def pull_model(client: Client, model: str) -> None:
    """With bars; what had come stays when it is interrupted. Raises ``ApiError``, with status 404 for a model that
    nobody has."""
    held: dict[str, Any] | None = None
    with Bars() as bars:
        try:
            for line in client.lines("/api/pull", {"model": model}):
                if held is None:
                    held = line  # that it looks is worth a line when it finds something
                    continue
                if held:
                    bars.show(held)
                    held = {}
                bars.show(line)
        except ApiError as error:
            if "file does not exist" in error.message:  # inside a stream there is no status
                raise ApiError(404, error.message) from None
            raise


def copy(options: argparse.Namespace, settings: Settings) -> int:
    connect(settings).post("/api/copy", {"source": options.source, "destination": options.destination})
    print(f"copied '{options.source}' to '{options.destination}'")
    return 0


def remove(options: argparse.Namespace, settings: Settings) -> int:
    """Stops at the first failure."""
    client = connect(settings)
    removed = []
    for model in options.models:
        freed = client.delete("/api/delete", {"model": model, "force": options.force})
        removed.append({"model": model, "freed_bytes": freed})
        if not options.json:
            print(f"deleted '{model}'" + (f", {human_size(freed)} are free again" if freed else ""))
    return print_json(removed) if options.json else 0


def create(options: argparse.Namespace, settings: Settings) -> int:
    """From a Modelfile, whose paths are relative to it."""
    file: Path = options.file
    try:
        said = parse_modelfile(sys.stdin.read() if str(file) == "-" else file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        print(f"mlx-router: {file}: {getattr(error, 'strerror', None) or error}", file=sys.stderr)
        return 1
    except ModelfileError as error:
        print(f"mlx-router: {file}: {error}", file=sys.stderr)
        return 1
    if said.ignored:
        print(f"mlx-router: {', '.join(said.ignored)} mean nothing here and are left out", file=sys.stderr)
    client = connect(settings)
    body: dict[str, Any] = {"model": options.model, **said.body()}
    if options.quantize:
        body["quantize"] = options.quantize
    folder = Path.cwd() if str(file) == "-" else file.parent
    with Bars() as bars:
        body.update(_weights(client, said, folder, bars))
        for line in client.lines("/api/create", body):
            bars.show(line)
    return 0


def _weights(client: Client, said: Modelfile, folder: Path, bars: Bars) -> dict[str, Any]:
    """Where the weights are: a model's name, or the digests of files that are uploaded."""
    body: dict[str, Any] = {}
    base = _path(said.base, folder)
    if base is None:
        body["from"] = said.base
    elif base.is_dir():
        body["files"] = _upload_folder(client, base, bars)
    else:
        raise ApiError(400, f"{base} is not a folder in MLX layout; GGUF files are not served here")
    if said.adapter:
        adapter = _path(said.adapter, folder) or folder / said.adapter
        if not adapter.is_dir():
            raise ApiError(400, f"{adapter} is not a folder with adapter_config.json and adapters.safetensors")
        body["adapters"] = _upload_folder(client, adapter, bars)
    return body


def _path(text: str, folder: Path) -> Path | None:
    """A path, if it is meant as one or there is something at it."""
    path = folder / expanded(text)
    try:
        return path if text.startswith((".", "/", "~")) or path.exists() else None
    except (OSError, ValueError):  # longer than a path may be
        return None


def _upload_folder(client: Client, folder: Path, bars: Bars) -> dict[str, str]:
    digests = {}
    for file in sorted(folder.iterdir()):
        if file.is_file() and _WANTED.fullmatch(file.name):
            digest = digests[file.name] = "sha256:" + _hash(file)
            client.upload(f"/api/blobs/{digest}", file, _shower(bars, digest, file))
    return digests


def _shower(bars: Bars, digest: str, file: Path) -> Any:
    total = file.stat().st_size

    def show(done: int) -> None:
        bars.show({"status": f"uploading {file.name}", "digest": digest, "total": total, "completed": done})

    return show


def _hash(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
