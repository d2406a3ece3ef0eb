"""Open WebUI, as it is, in front of the server: its lists, a chat with the tools its pages send, a document.

`make test-open-webui` installs it, several gigabytes, and runs this where only the loopback network exists.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import urllib.request
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.fakes import write_fake
from tests.support.router import RouterProcess, running_router, wait_until, write_config

_PROGRAM = Path(__file__).parents[2] / ".venv-agents" / "open-webui" / "bin" / "open-webui"
_PORT = 18090
_BASE = f"http://127.0.0.1:{_PORT}"
_SKY = "Sunlight holds all colours."
# As its pages send them: with every chat, whether the model needs them or not.
_TOOLS = [
    {"type": "function", "function": {"name": f"builtin_{number}", "description": "d", "parameters": {
        "type": "object", "properties": {"a": {"type": "string"}}, "required": []}}} for number in range(27)
] + [{"type": "function", "function": {"name": "get_current_timestamp", "description": "Now", "parameters": {
    "type": "object", "properties": {}, "required": []}}}]  # fmt: skip


@pytest.fixture(scope="module")
def router(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RouterProcess]:
    home = tmp_path_factory.mktemp("home")
    script: dict[str, Any] = {
        "text": "FINAL-ANSWER",
        "calls": [{"name": "get_current_timestamp"}],
        "context_tokens": 200_000,
    }
    models = {"agent": {"path": str(write_fake(home / "agent", **script))}}
    with running_router(home, "--config", str(write_config(home, models, standby_workers=0))) as found:
        yield found


@pytest.fixture(scope="module")
def webui(router: RouterProcess, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The token of its user; the program is ended with everything it started."""
    assert _PROGRAM.exists(), "these tests are run by `make test-open-webui`, which installs what they need"
    home = tmp_path_factory.mktemp("webui")
    environment = {
        "PATH": f"{_PROGRAM.parent}:/usr/bin:/bin", "HOME": str(home), "LANG": "C.UTF-8", "DATA_DIR": str(home / "data"),
        "WEBUI_AUTH": "False", "WEBUI_SECRET_KEY": "x", "OFFLINE_MODE": "True", "HF_HUB_OFFLINE": "1",
        "ENABLE_VERSION_UPDATE_CHECK": "False", "RAG_EMBEDDING_ENGINE": "ollama", "RAG_EMBEDDING_MODEL": "agent",
        "RAG_OLLAMA_BASE_URL": router.url, "OLLAMA_BASE_URL": router.url, "ENABLE_OPENAI_API": "True",
        "OPENAI_API_BASE_URL": f"{router.url}/v1", "OPENAI_API_KEY": "x", "ANONYMIZED_TELEMETRY": "False",
    }  # fmt: skip
    with (home / "log").open("w") as log:
        process = subprocess.Popen(
            [str(_PROGRAM), "serve", "--host", "127.0.0.1", "--port", str(_PORT)], cwd=home, env=environment,
            stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
        try:
            wait_until(_healthy, f"it is up: {(home / 'log').read_text()[-2000:]}", 180)
            signed_in = _call("", "POST", "/api/v1/auths/signin", {"email": "admin@localhost", "password": "admin"})
            yield signed_in["token"]
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(10)


def _healthy() -> bool:
    try:
        return bool(_call("", "GET", "/health")["status"])
    except (OSError, ValueError):
        return False


def _call(
    token: str, method: str, path: str, body: Any = None, raw: bytes | None = None, kind: str = "application/json"
) -> Any:
    data = raw if raw is not None else json.dumps(body).encode() if body is not None else None
    headers = {"content-type": kind, **({"authorization": f"Bearer {token}"} if token else {})}
    request = urllib.request.Request(_BASE + path, data=data, method=method, headers=headers)
    with urllib.request.urlopen(request, timeout=120) as reply:
        text = reply.read().decode()
    try:
        return json.loads(text)
    except ValueError:
        return text


@pytest.mark.covers("O135")
def test_models_are_listed_and_chat(webui: str) -> None:
    names = {model["id"] for model in _call(webui, "GET", "/api/models")["data"]}
    assert {"demo:latest", "agent:latest"} <= names
    ask = {"model": "demo:latest", "messages": [{"role": "user", "content": "Why is the sky blue?"}]}
    whole = _call(webui, "POST", "/api/chat/completions", {**ask, "stream": False})
    assert _SKY in whole["choices"][0]["message"]["content"]
    streamed = _call(webui, "POST", "/api/chat/completions", {**ask, "stream": True})
    parts = [json.loads(line[6:]) for line in streamed.splitlines() if line.startswith("data: {")]
    text = "".join(c["delta"].get("content") or "" for part in parts for c in part.get("choices", []))
    assert _SKY in text
    assert "[DONE]" in streamed


@pytest.mark.covers("O135")
def test_a_chat_with_its_28_tools_calls_the_right_one(webui: str) -> None:
    ask = {
        "model": "agent:latest",
        "stream": False,
        "tools": _TOOLS,
        "messages": [{"role": "user", "content": "What time is it?"}],
    }
    message = _call(webui, "POST", "/api/chat/completions", ask)["choices"][0]["message"]
    assert message["tool_calls"][0]["function"]["name"] == "get_current_timestamp"


@pytest.mark.covers("O135")
def test_a_document_is_embedded_and_found(webui: str, router: RouterProcess) -> None:
    before = router.model("agent")["loads"]
    bound = uuid.uuid4().hex
    head = f'--{bound}\r\nContent-Disposition: form-data; name="file"; filename="facts.txt"\r\nContent-Type: text/plain\r\n\r\n'
    raw = head.encode() + b"The secret colour is vermilion. " * 200 + f"\r\n--{bound}--\r\n".encode()
    path = "/api/v1/files/?process=true&process_in_background=false"
    file = _call(webui, "POST", path, raw=raw, kind=f"multipart/form-data; boundary={bound}")
    found = _call(webui, "POST", "/api/v1/retrieval/query/doc",
                  {"collection_name": f"file-{file['id']}", "query": "secret colour", "k": 2})  # fmt: skip
    assert "vermilion" in json.dumps(found)
    assert router.model("agent")["loads"] >= before
