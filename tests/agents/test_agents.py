"""Coding agents, each in one turn with a tool that is really run, against the server with a scripted model.

`make test-agents` installs them and runs this where only the loopback network exists: an agent that wants to talk to
its maker cannot. What counts is not only that they print the answer, but with how many requests.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.support.fakes import fake_config
from tests.support.router import RouterProcess, running_router

_INSTALLED = Path(__file__).parents[2] / ".venv-agents"
_NOTE = "The secret word is vermilion."
_FINAL = "FINAL-ANSWER: {result}"
_ASK = "Read the file note.txt and tell me what it says"
_LIMIT_SECONDS = 90


@dataclass(frozen=True)
class Seen:
    """What an agent did."""

    status: int
    output: str
    requests: int
    seconds: float
    bodies: str
    """What it sent, as far as the log tells."""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    folder = tmp_path / "project"
    folder.mkdir()
    (folder / "note.txt").write_text(_NOTE + "\n")
    return folder


@pytest.fixture
def router(tmp_path: Path, project: Path) -> Iterator[RouterProcess]:
    """Its model calls whichever of the agents' tools for reading a file is offered, and then answers."""
    note = str(project / "note.txt")
    common: dict[str, Any] = {"context_tokens": 200_000, "tokens_per_second": 200}
    reading = [
        {"name": "read_file", "arguments": {"file_path": note}},
        {"name": "read", "arguments": {"filePath": note}},
        {"name": "exec_command", "arguments": {"cmd": f"cat {note}"}},
    ]
    scripts: dict[str, dict[str, Any]] = {
        "agent": {"text": _FINAL, "calls": reading, **common},
        "claude": {"text": _FINAL, "thinking": "I have to read it first.",
                   "calls": [{"name": "Read", "arguments": {"file_path": note}}], **common},
        "continue": {"text": _FINAL, "calls": [{"name": "Read", "arguments": {"filepath": note}}], **common},
        "editor": {"text": "FINAL-ANSWER\n\nhello.py\n```\nprint('howdy')\n```\n", **common},
    }  # fmt: skip
    home = tmp_path / "home"
    home.mkdir()
    with running_router(home, *fake_config(home, scripts)) as found:
        yield found


def _run(router: RouterProcess, cwd: Path, home: Path, command: list[str], **environment: str) -> Seen:
    """One agent, with nothing of the user's environment; its whole process group is ended afterwards."""
    assert _INSTALLED.exists(), "these tests are run by `make test-agents`, which installs what they need"
    home.mkdir(exist_ok=True)
    path = f"{_INSTALLED / 'node' / 'bin'}:/usr/bin:/bin"
    before = len(router.lines)
    began = time.monotonic()
    process = subprocess.Popen(
        command, cwd=cwd, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env={"PATH": path, "HOME": str(home), "LANG": "C.UTF-8", "PWD": str(cwd), **environment}, start_new_session=True,
    )  # fmt: skip
    try:
        output, _ = process.communicate(timeout=_LIMIT_SECONDS)
    finally:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass  # nothing was left
        process.wait(10)
        if process.stdout is not None:
            process.stdout.close()
    lines = [line for line in router.lines[before:] if "event=request " in line]
    return Seen(process.returncode, output, len(lines), time.monotonic() - began, "\n".join(lines))


def _check(seen: Seen, most_requests: int, least: int = 2) -> None:
    assert seen.status == 0, seen.output[-3000:]
    assert "FINAL-ANSWER" in seen.output
    assert least == 1 or _NOTE in seen.output, "its tool was really run: the answer repeats what it gave back"
    assert least <= seen.requests <= most_requests, seen.bodies
    assert "outcome=ok" in seen.bodies


@pytest.mark.covers("O125")
def test_claude_code(router: RouterProcess, project: Path, tmp_path: Path) -> None:
    seen = _run(
        router, project, tmp_path / "claude-home",
        [str(_INSTALLED / "claude/node_modules/.bin/claude"), "-p", _ASK, "--allowedTools", "Read", "--output-format", "stream-json", "--verbose"],
        ANTHROPIC_BASE_URL=router.url, ANTHROPIC_AUTH_TOKEN="x", ANTHROPIC_MODEL="claude",
        CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC="1", DISABLE_TELEMETRY="1", DISABLE_AUTOUPDATER="1",
    )  # fmt: skip
    _check(seen, 3)


@pytest.mark.covers("O102")
def test_codex(router: RouterProcess, project: Path, tmp_path: Path) -> None:
    settings = tmp_path / "codex-home"
    settings.mkdir()
    (settings / "config.toml").write_text(
        'model = "agent"\nmodel_provider = "local"\nsandbox_mode = "danger-full-access"\napproval_policy = "never"\n'
        f'[model_providers.local]\nname = "local"\nbase_url = "{router.url}/v1"\nwire_api = "responses"\n'
    )
    command = [str(_INSTALLED / "codex/node_modules/.bin/codex"), "exec", "--skip-git-repo-check", "--json", _ASK]
    seen = _run(router, project, settings, command, CODEX_HOME=str(settings))
    _check(seen, 3)


@pytest.mark.covers("O131")
def test_opencode(router: RouterProcess, project: Path, tmp_path: Path) -> None:
    model = {"name": "agent", "limit": {"context": 200_000, "output": 8192}, "tool_call": True, "reasoning": True}
    options = {"baseURL": f"{router.url}/v1", "apiKey": "none"}
    provider = {"npm": "@ai-sdk/openai-compatible", "name": "local", "options": options, "models": {"agent": model}}
    config = {"autoupdate": False, "share": "disabled", "provider": {"loc": provider}, "model": "loc/agent"}
    (project / "opencode.json").write_text(json.dumps(config))
    home = tmp_path / "opencode-home"
    folders = {f"XDG_{name}_HOME": str(home / name.lower()) for name in ("CONFIG", "DATA", "CACHE", "STATE")}
    command = [str(_INSTALLED / "opencode/node_modules/.bin/opencode"), "run", "-m", "loc/agent", "--auto", _ASK]
    seen = _run(
        router, project, home, command, OPENCODE_DISABLE_MODELS_FETCH="1", OPENCODE_DISABLE_AUTOUPDATE="1",
        OPENCODE_DISABLE_LSP_DOWNLOAD="1", **folders,
    )  # fmt: skip
    _check(seen, 4)


@pytest.mark.covers("O131")
def test_qwen_code(router: RouterProcess, project: Path, tmp_path: Path) -> None:
    command = [str(_INSTALLED / "node/bin/node"), str(_INSTALLED / "qwen/node_modules/.bin/qwen"), "-p", _ASK,
               "--auth-type", "openai"]  # fmt: skip
    seen = _run(router, project, tmp_path / "qwen-home", command, OPENAI_BASE_URL=f"{router.url}/v1",
                OPENAI_API_KEY="x", OPENAI_MODEL="agent")  # fmt: skip
    _check(seen, 5)


@pytest.mark.covers("O131")
@pytest.mark.parametrize(("provider", "base"), [("openai", "/v1"), ("ollama", ""), ("anthropic", "/v1/")])
def test_continue(router: RouterProcess, project: Path, tmp_path: Path, provider: str, base: str) -> None:
    config = tmp_path / "continue.yaml"
    config.write_text(
        "name: local\nversion: 0.0.1\nschema: v1\nmodels:\n"
        f"  - name: agent\n    provider: {provider}\n    model: continue\n    apiBase: {router.url}{base}\n"
        "    apiKey: none\n    roles: [chat]\n    capabilities: [tool_use]\n"
    )
    home = tmp_path / "continue-home"
    command = [str(_INSTALLED / "node/bin/node"), str(_INSTALLED / "continue/node_modules/.bin/cn"), "--config", str(config),
               "--auto", "-p", _ASK]  # fmt: skip
    seen = _run(
        router, project, home, command, CONTINUE_GLOBAL_DIR=str(home / "global"), CONTINUE_TELEMETRY_ENABLED="0"
    )
    _check(seen, 3)


@pytest.mark.parametrize(
    ("prefix", "variable", "base"), [("openai", "OPENAI_API_BASE", "/v1"), ("ollama_chat", "OLLAMA_API_BASE", "")]
)
def test_aider(router: RouterProcess, tmp_path: Path, prefix: str, variable: str, base: str) -> None:
    """It works by text: the file is changed and committed."""
    folder = tmp_path / "repository"
    folder.mkdir()
    (folder / "hello.py").write_text("print('hi')\n")
    for arguments in (
        ["init", "-q"],
        ["config", "user.email", "a@b.c"],
        ["config", "user.name", "a"],
        ["add", "."],
        ["commit", "-qm", "init"],
    ):
        subprocess.run(["git", *arguments], cwd=folder, check=True, capture_output=True, timeout=30)
    command = [
        str(_INSTALLED / "aider/bin/aider"), "--no-check-update", "--no-show-release-notes", "--analytics-disable",
        "--yes-always", "--no-pretty", "--no-show-model-warnings", "--map-tokens", "0", "--no-gitignore",
        "--edit-format", "whole", "--message", "Change the greeting to howdy", "hello.py", "--model", f"{prefix}/editor",
    ]  # fmt: skip
    seen = _run(router, folder, tmp_path / "aider-home", command, LITELLM_LOCAL_MODEL_COST_MAP="True",
                OPENAI_API_KEY="x", **{variable: router.url + base})  # fmt: skip
    _check(seen, 3, least=1)
    assert (folder / "hello.py").read_text() == "print('howdy')\n"
