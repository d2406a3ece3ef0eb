"""Keys: what they allow, how they are stored, and that a broken file opens nothing."""

from __future__ import annotations

import json
import stat
from pathlib import Path

import pytest

from mlx_router_server.access.keys import (
    Caller,
    KeyFileError,
    KeyRing,
    Scope,
    key_digest,
    keys_file,
    local_key,
    local_key_file,
    local_proof,
    make_key,
    read_keys,
    renew_local_key,
    write_keys,
)


@pytest.mark.req("R31")
def test_a_key_is_stored_as_a_hash_and_found_by_its_text(tmp_path: Path) -> None:
    text, key = make_key("laptop", [Scope.INFERENCE], ("qwen*",))
    write_keys(keys_file(tmp_path), [key])
    stored = keys_file(tmp_path).read_text()
    assert text not in stored
    assert stat.S_IMODE(keys_file(tmp_path).stat().st_mode) == 0o600
    ring = KeyRing((), keys_file(tmp_path))
    assert not ring
    assert ring.refresh()
    assert ring
    caller = ring.identify(text)
    assert caller == key.caller
    assert ring.identify(text[:-1]) is ring.identify("") is None
    assert not ring.refresh()
    write_keys(keys_file(tmp_path), [])
    assert ring.refresh()
    assert not ring
    assert ring.identify(text) is None


def test_configured_keys_may_be_hashed_and_may_do_everything() -> None:
    digest = "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"  # of "test"
    ring = KeyRing(("plain", f"sha256:{digest}"), None)
    for text in ("plain", "test"):
        caller = ring.identify(text)
        assert caller is not None
        assert all(caller.may(scope) for scope in Scope)
    assert ring.identify(digest) is ring.identify(f"sha256:{digest}") is None


def test_a_path_is_logged_without_the_keys_in_it() -> None:
    text, _ = make_key("laptop", [Scope.INFERENCE])
    ring = KeyRing(("correct-horse",), None)
    assert ring.masked("/v1/chat/completions") == "/v1/chat/completions"
    for path in ("/v1/models/qwen3:4b", "/admin/models/org/multitask-embedding-v2/load", "/v1/models/risk-assessment"):
        assert ring.masked(path) == path
    assert ring.masked("/correct-horse/v1/chat") == "/****/v1/chat"
    assert ring.masked("/v1/Bearer correct-horse") == "/v1/Bearer ****"
    assert ring.masked(f"/v1/{text}/chat") == "/v1/mlxr-****/chat"
    assert ring.masked("/api/sk-ant-api03-0123456789") == "/api/sk-****"


def test_the_local_key_opens_but_does_not_ask(tmp_path: Path) -> None:
    renew_local_key(tmp_path)
    text = local_key(tmp_path)
    assert stat.S_IMODE((tmp_path / "local.key").stat().st_mode) == 0o600
    ring = KeyRing((), None, local_key_file(tmp_path))
    ring.refresh()
    assert not ring
    caller = ring.identify(text)
    assert caller is not None
    assert caller.may(Scope.ADMIN)
    renew_local_key(tmp_path)
    ring.refresh()
    assert ring.identify(text) is None, "it was renewed, maybe by another router"
    assert ring.identify(local_key(tmp_path)) is not None
    proof = ring.prove_local("abc", "127.0.0.1", 11434)
    assert proof == local_proof(key_digest(local_key(tmp_path)), "abc", "127.0.0.1", 11434)
    assert proof == ring.prove_local("abc", "::ffff:127.0.0.1", 11434)
    assert proof != ring.prove_local("abc", "127.0.0.1", 11435)
    assert proof != ring.prove_local("abd", "127.0.0.1", 11434)
    assert proof != ring.prove_local("abc", "::1", 11434)


def test_scopes_and_models() -> None:
    caller = Caller(scopes=frozenset({Scope.INFERENCE}), models=("org/*", "small"))
    assert caller.may(Scope.INFERENCE)
    assert not caller.may(Scope.PULL)
    assert Caller(scopes=frozenset({Scope.ADMIN})).may(Scope.PULL)
    assert caller.may_use(["Small:latest", "Small"])
    assert caller.may_use(["org/x:latest", "org/x"])
    assert not caller.may_use(["other:latest", "other"])


@pytest.mark.req("R31")
@pytest.mark.parametrize(
    "text",
    ["", "[]", "{", '{"keys": [{}]}', '{"keys": [{"name": "x", "sha256": "00", "scopes": []}]}',
     '{"keys": [{"name": "x", "sha256": 5, "scopes": []}]}', '{"keys": 5}', '{"keys": [5]}', '{"keys": {}}',
     '{"keys": ""}',
     '{"keys":' + '[' * 100_000 + ']' * 100_000 + '}', '{"keys": null}'],
)  # fmt: skip
def test_a_broken_file_is_refused_and_the_keys_stay(tmp_path: Path, text: str) -> None:
    good, key = make_key("laptop", [Scope.ADMIN])
    write_keys(keys_file(tmp_path), [key])
    ring = KeyRing((), keys_file(tmp_path))
    ring.refresh()
    keys_file(tmp_path).unlink()
    keys_file(tmp_path).write_text(text)
    with pytest.raises(KeyFileError, match=r"keys\.json"):
        ring.refresh()
    assert ring.identify(good) is not None
    with pytest.raises(KeyFileError):
        read_keys(keys_file(tmp_path))


def test_an_unknown_scope_is_no_scope(tmp_path: Path) -> None:
    item = {"name": "x", "sha256": "00" * 32, "scopes": ["everything"]}
    keys_file(tmp_path).write_text(json.dumps({"keys": [item]}))
    with pytest.raises(KeyFileError, match="everything"):
        read_keys(keys_file(tmp_path))
