"""API keys: what each of them allows, and the file that they are kept in.

A key is 256 random bits, so that one round of SHA-256 is all the hashing it needs; only the hash is ever stored. Which
key was presented is found by comparing with every hash in constant time. Used by the router, which reads the file, and
by ``mlx-router keys``, which writes it; the router never writes.
"""

from __future__ import annotations

import fnmatch
import hashlib
import hmac
import json
import re
import secrets
import time
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from stat import S_ISREG
from typing import Any, Final

from mlx_router_server.files import replace_file

__all__ = [
    "EVERYBODY",
    "Caller",
    "Key",
    "KeyFileError",
    "KeyRing",
    "Scope",
    "key_digest",
    "keys_file",
    "local_key",
    "local_key_file",
    "local_proof",
    "make_key",
    "read_keys",
    "renew_local_key",
    "write_keys",
]

_PREFIX: Final = "mlxr-"
_HASHED: Final = "sha256:"
_MOST_BYTES: Final = 2**20
_MASK: Final = "****"
_KEY_LIKE: Final = re.compile(r"(?<![A-Za-z0-9])(mlxr-|sk-|hf_)[A-Za-z0-9_-]{8,}")
"""Keys of this server, of OpenAI, of Anthropic and of Hugging Face."""


class Scope(StrEnum):
    """What a key opens; ``admin`` opens everything."""

    INFERENCE = "inference"
    PULL = "pull"
    ADMIN = "admin"


class KeyFileError(Exception):
    """The file of keys cannot be used; one sentence that names it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Caller:
    """Who a request comes from, and what it may do."""

    name: str = ""
    digest: str = ""
    """Of the key; empty where no keys are asked for."""
    scopes: frozenset[Scope] = frozenset(Scope)
    models: tuple[str, ...] = ()
    """Patterns of model names, with ``*``; none means all."""

    def may(self, scope: Scope) -> bool:
        return scope in self.scopes or Scope.ADMIN in self.scopes

    def may_use(self, names: Iterable[str]) -> bool:
        """Whether one of the names of a model is allowed."""
        if not self.models:
            return True
        patterns = [pattern.lower() for pattern in self.models]
        return any(fnmatch.fnmatchcase(name.lower(), pattern) for name in names for pattern in patterns)


EVERYBODY: Final = Caller()
"""Where no keys are asked for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    """One key as it is stored; ``digest`` is the SHA-256 of its text, in hex."""

    name: str
    digest: str
    scopes: frozenset[Scope]
    models: tuple[str, ...] = ()
    created_at: float = 0.0

    @property
    def caller(self) -> Caller:
        return Caller(name=self.name, digest=self.digest, scopes=self.scopes, models=self.models)


def make_key(name: str, scopes: Iterable[Scope], models: tuple[str, ...] = ()) -> tuple[str, Key]:
    """A new key: its text, which is shown once, and what is stored of it."""
    text = _PREFIX + secrets.token_urlsafe(32)
    return text, Key(
        name=name, digest=key_digest(text), scopes=frozenset(scopes), models=models, created_at=time.time()
    )


def key_digest(text: str) -> str:
    """Return the SHA-256 of a key, in hex."""
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()


class KeyRing:
    """The keys in force. ``refresh`` reads the file again when it has changed; everything else is memory."""

    def __init__(self, configured: tuple[str, ...], file: Path | None, local_file: Path | None = None) -> None:
        """``local_file`` holds the key by which commands of this user on this machine are let in."""
        self._file = file
        self._local_file = local_file
        self._local_stamp: tuple[int, int, int] | None = None
        self._stamp: tuple[int, int, int] | None = None
        self._from_file: tuple[Key, ...] = ()
        self._configured: tuple[Key, ...] = ()
        self._local: tuple[Key, ...] = ()
        self.configure(configured)

    def configure(self, configured: tuple[str, ...]) -> None:
        """Keys of the setting ``api_keys``: as they are, or as ``sha256:HEX``."""
        self._configured = tuple(
            Key(
                name=f"api_keys[{number}]",
                digest=text.removeprefix(_HASHED).lower() if text.startswith(_HASHED) else key_digest(text),
                scopes=frozenset(Scope),
            )
            for number, text in enumerate(configured)
        )

    def _refresh_local(self) -> None:
        """Read the local key, which another router with the same home folder may have renewed. Alone it does not make
        keys be asked for."""
        if self._local_file is None:
            return
        stamp = _stamp(self._local_file)
        if stamp is None or stamp == self._local_stamp:
            return
        text = _read_local_key(self._local_file)
        if text:
            self._local_stamp = stamp
            self._local = (Key(name="local", digest=key_digest(text), scopes=frozenset(Scope)),)

    def prove_local(self, challenge: str, address: str, port: int) -> str:
        """Return the proof that this router has the local key; empty if it has none.

        Address and port of the connection are part of it, so that another program cannot pass the challenge on to a
        router elsewhere."""
        self._refresh_local()
        return local_proof(self._local[0].digest, challenge, address, port) if self._local else ""

    def refresh(self) -> bool:
        """Read the file again if it has changed, and return whether it had. Raises ``KeyFileError``, and then the keys
        stay as they were: a file that is gone or unreadable never opens a server that asked for keys."""
        self._refresh_local()
        if self._file is None:
            return False
        stamp = _stamp(self._file)
        if stamp == self._stamp:
            return False
        if stamp is None and self._from_file:
            raise KeyFileError(
                f"{self._file} is missing: its keys stay in force; `mlx-router keys remove` takes single keys out"
            )
        self._from_file = tuple(read_keys(self._file))
        self._stamp = stamp
        return True

    def __bool__(self) -> bool:
        return bool(self._configured or self._from_file)

    def identify(self, presented: str) -> Caller | None:
        """Whose key this is. Takes the same time whichever it is, and whether or not it is one."""
        digest = key_digest(presented)
        found: Key | None = None
        for key in (*self._configured, *self._from_file, *self._local):
            if hmac.compare_digest(key.digest, digest):
                found = key
        return found.caller if found is not None else None

    def masked(self, path: str) -> str:
        """The path of a URL as it may be logged: without what is a key or looks like one."""
        parts = re.split(r"([/:@=&?; ])", path)
        hidden = [_MASK if part and self.identify(part) is not None else part for part in parts]
        return _KEY_LIKE.sub(rf"\1{_MASK}", "".join(hidden))


# ----------------------------------------------------------------------------------------------------- the file


def _stamp(file: Path) -> tuple[int, int, int] | None:
    """Something that changes with the file; None if there is no file. Raises ``KeyFileError`` if that is unknown."""
    try:
        stat = file.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise KeyFileError(f"{file}: {error.strerror or error}") from None
    return stat.st_mtime_ns, stat.st_ino, stat.st_size


def keys_file(home: Path) -> Path:
    return home / "keys.json"


def local_key_file(home: Path) -> Path:
    """Holds what proves that a command runs as the same user as the router: only this user can read it."""
    return home / "local.key"


def local_key(home: Path) -> str:
    """Return the local key; empty where there is none."""
    return _read_local_key(local_key_file(home))


def renew_local_key(home: Path) -> None:
    """Write a new local key; each start of a router does. Raises ``OSError``."""
    replace_file(local_key_file(home), (_PREFIX + secrets.token_urlsafe(32)).encode())


def _read_local_key(file: Path) -> str:
    try:
        return file.read_text(encoding="ascii").strip() if file.is_file() else ""
    except (OSError, ValueError):
        return ""


def local_proof(digest: str, challenge: str, address: str, port: int) -> str:
    """Return the HMAC-SHA256, in hex, of a challenge and of the router's end of the connection.

    ``digest`` is the SHA-256 of the local key, in hex. An IPv4 address may be written as an IPv6 one.
    """
    bare = address.removeprefix("::ffff:") if "." in address else address
    return hmac.new(digest.encode(), f"{challenge}:{bare}:{port}".encode(), hashlib.sha256).hexdigest()


def read_keys(file: Path) -> list[Key]:
    """The stored keys; none where there is no file. Raises ``KeyFileError``."""
    try:
        stat = file.stat()
        if stat.st_size > _MOST_BYTES:
            raise KeyFileError(f"{file} is too large")
        if not S_ISREG(stat.st_mode):  # reading a pipe would block
            raise KeyFileError(f"{file} is not a regular file")
        data = json.loads(file.read_text(encoding="utf-8"))
        items = data["keys"]
        if not isinstance(items, list):
            raise TypeError("its keys are no list")
        return [_read(item) for item in items]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise KeyFileError(f"{file}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        raise KeyFileError(f"{file} is not a file of keys: {error}") from None


def _read(item: dict[str, Any]) -> Key:
    digest = item["sha256"]
    if not isinstance(digest, str) or len(bytes.fromhex(digest)) != hashlib.sha256().digest_size:
        raise ValueError("a key without its hash")
    return Key(
        name=str(item["name"]),
        digest=digest,
        scopes=frozenset(Scope(scope) for scope in item["scopes"]),
        models=tuple(str(model) for model in item.get("models", ())),
        created_at=float(item.get("created_at", 0.0)),
    )


def write_keys(file: Path, keys: list[Key]) -> None:
    """Replace the file at once and for this user's eyes only. Raises ``OSError``."""
    items = [
        {
            "name": key.name,
            "sha256": key.digest,
            "scopes": sorted(key.scopes),
            "models": list(key.models),
            "created_at": key.created_at,
        }
        for key in keys
    ]
    replace_file(file, json.dumps({"version": 1, "keys": items}, indent=2).encode())
