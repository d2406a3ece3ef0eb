"""A Hugging Face hub on loopback, for the real huggingface_hub client: repositories, and the faults that hubs have.

What it answers was compared with the client's own source (2.4): the description of a model, its tree, and files with
``X-Repo-Commit``, ``ETag``, ``X-Linked-Etag`` and ranges.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

__all__ = ["Hub", "Repository", "running_hub"]

_LFS = (".safetensors", ".bin", ".gguf")


@dataclass
class Repository:
    """Files by path; contents are bytes, or a file of this machine for large ones."""

    name: str
    files: dict[str, bytes | Path]
    private: bool = False
    gated: bool = False
    sizes: dict[str, int] = field(default_factory=dict)
    """What the tree says, where that is not the truth."""
    hashes: dict[str, str] = field(default_factory=dict)

    @property
    def commit(self) -> str:
        said = {path: data if isinstance(data, bytes) else str(data).encode() for path, data in self.files.items()}
        text = "".join(f"{path} {hashlib.sha256(data).hexdigest()}\n" for path, data in sorted(said.items()))
        return hashlib.sha1(text.encode()).hexdigest()

    def size(self, path: str) -> int:
        data = self.files[path]
        return len(data) if isinstance(data, bytes) else data.stat().st_size

    def digest(self, path: str) -> str:
        """As the hub names it: SHA-256 for large files, git's name for the others."""
        if path not in self.hashes:
            data = self.files[path]
            large = path.endswith(_LFS)
            digest = hashlib.sha256() if large else hashlib.sha1(b"blob %d\0" % self.size(path))
            if isinstance(data, bytes):
                digest.update(data)
            else:
                with data.open("rb") as stream:
                    while chunk := stream.read(2**20):
                        digest.update(chunk)
            self.hashes[path] = digest.hexdigest()
        return self.hashes[path]

    def read(self, path: str, begin: int, end: int) -> Iterator[bytes]:
        data = self.files[path]
        if isinstance(data, bytes):
            yield data[begin:end]
            return
        with data.open("rb") as stream:
            stream.seek(begin)
            left = end - begin
            while left and (chunk := stream.read(min(2**18, left))):
                left -= len(chunk)
                yield chunk


class Hub:
    """``repositories`` may be changed at any time; the fields below say what goes wrong, and what was asked for."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.requests: list[tuple[str, str, str]] = []
        """Method, path, and range."""
        self.tokens: set[str] = set()
        self.sent: dict[str, int] = {}
        """Bytes of each file that went out."""
        self.drop_after: dict[str, list[int]] = {}
        """For each file: after how many bytes a connection breaks off; one number for each connection."""
        self.busy: int = 0
        """So many requests are answered with 429."""
        self.busy_files: dict[str, int] = {}
        """So many requests for a file's content are."""
        self.down = False
        self.ignores_ranges = False
        self.gate: threading.Event | None = None
        """Files of weights stop a little after their middle until it is set."""
        self.url = ""
        self.lock = threading.Lock()

    def add(self, name: str, files: dict[str, bytes | Path], **more: Any) -> Repository:
        repository = Repository(name, files, **more)
        self.repositories[name] = repository
        return repository

    def add_folder(self, name: str, folder: Path, **more: bytes) -> Repository:
        """All files below a folder, and further ones."""
        files: dict[str, bytes | Path] = {
            str(path.relative_to(folder)): path for path in sorted(folder.rglob("*")) if path.is_file()
        }
        return self.add(name, {**files, **more})

    def asked(self, mark: str, method: str = "GET") -> list[str]:
        """Ranges of the requests whose path holds the mark."""
        return [said for verb, path, said in self.requests if mark in path and verb == method]


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: Any) -> None:  # noqa: A002  # the standard library's name
            pass

        def do_HEAD(self) -> None:
            self._answer()

        def do_GET(self) -> None:
            self._answer()

        def _answer(self) -> None:
            path = unquote(urlsplit(self.path).path)
            said = self.headers.get("range", "")
            with hub.lock:
                hub.requests.append((self.command, path, said))
                busy, hub.busy = hub.busy, max(hub.busy - 1, 0)
            token = self.headers.get("authorization", "").removeprefix("Bearer ")
            if token:
                hub.tokens.add(token)
            if hub.down:
                self._json({"error": "down"}, 503)
            elif busy:
                self._json({"error": "too many requests"}, 429, {"Retry-After": "1"})
            elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+))?", path):
                self._describe(match[1], match[2], token)
            elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
                self._file(match[1], match[3], token, said)
            else:
                self._json({"error": "not found"}, 404, {"X-Error-Code": "EntryNotFound"})

        def _repository(self, name: str, token: str) -> Repository | None:
            """As the hub does it: what may not be seen is not there."""
            repository = hub.repositories.get(name)
            if repository is None or (repository.private and token != "right"):
                self._json({"error": "Repository not found"}, 401, {"X-Error-Code": "RepoNotFound"})
                return None
            return repository

        def _describe(self, name: str, what: str | None, token: str) -> None:
            repository = self._repository(name, token)
            if repository is None:
                return
            if what == "tree":
                self._json([self._entry(repository, path) for path in repository.files])
            else:
                siblings = [{"rfilename": path} for path in repository.files]
                self._json({"id": name, "modelId": name, "sha": repository.commit, "siblings": siblings,
                            "private": repository.private, "gated": repository.gated})  # fmt: skip

        def _entry(self, repository: Repository, path: str) -> dict[str, Any]:
            size = repository.sizes.get(path, repository.size(path))
            digest = repository.digest(path)
            if path.endswith(_LFS):
                oid = hashlib.sha1(digest.encode()).hexdigest()
                return {"type": "file", "path": path, "size": size, "oid": oid,
                        "lfs": {"oid": digest, "size": size, "pointerSize": 130}}  # fmt: skip
            return {"type": "file", "path": path, "size": size, "oid": digest}

        def _file(self, name: str, path: str, token: str, said: str) -> None:
            repository = self._repository(name, token)
            if repository is None:
                return
            if repository.gated and token != "right":
                self._json({"error": "gated"}, 403, {"X-Error-Code": "GatedRepo"})
                return
            if self.command == "GET" and hub.busy_files.get(path, 0):
                hub.busy_files[path] -= 1
                self._json({"error": "too many requests"}, 429, {"Retry-After": "1"})
                return
            if path not in repository.files:
                self._json({"error": "Entry not found"}, 404, {"X-Error-Code": "EntryNotFound"})
                return
            size = repository.size(path)
            begin = 0
            match = re.fullmatch(r"bytes=(\d+)-", said)
            if match and not hub.ignores_ranges:
                begin = min(int(match[1]), size)
            digest = repository.digest(path)
            self.send_response(206 if begin else 200)
            self.send_header("X-Repo-Commit", repository.commit)
            self.send_header("ETag", f'"{digest}"')
            if path.endswith(_LFS):
                self.send_header("X-Linked-Etag", f'"{digest}"')
                self.send_header("X-Linked-Size", str(repository.sizes.get(path, size)))
            self.send_header("Accept-Ranges", "bytes")
            self.send_header("Content-Length", str(size - begin))
            if begin:
                self.send_header("Content-Range", f"bytes {begin}-{size - 1}/{size}")
            self.end_headers()
            if self.command == "GET":
                self._send(repository, path, begin, size)

        def _send(self, repository: Repository, path: str, begin: int, size: int) -> None:
            drops = hub.drop_after.get(path, [])
            limit = drops.pop(0) if drops else None
            sent = 0
            for chunk in repository.read(path, begin, size):
                if limit is not None and sent + len(chunk) >= limit:
                    chunk = chunk[: limit - sent]
                try:
                    self.wfile.write(chunk)
                    self.wfile.flush()
                except OSError:
                    self.close_connection = True
                    return
                sent += len(chunk)
                with hub.lock:
                    hub.sent[path] = hub.sent.get(path, 0) + len(chunk)
                if limit is not None and sent >= limit:
                    self.close_connection = True
                    self.connection.close()
                    return
                if hub.gate is not None and path.endswith(_LFS) and begin + sent >= size * 0.65:
                    hub.gate.wait(30)

        def _json(self, data: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
            body = json.dumps(data).encode()
            self.send_response(status)
            for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

    return Handler


@contextmanager
def running_hub() -> Iterator[Hub]:
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        if hub.gate is not None:
            hub.gate.set()
        server.shutdown()
        server.server_close()
        thread.join(10)
