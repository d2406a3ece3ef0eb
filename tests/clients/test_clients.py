"""Client programs that people use, each in a process of its own, against a router with real models.

`make test-clients` installs them: the clients for Python and Node itself into `.venv-clients`, litellm apart from them,
the clients for Node into `tests/clients/node_modules`.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.fakes import fake_config
from tests.support.router import RouterProcess, running_router
from tests.tiny_models.script import GREETING

_HERE = Path(__file__).parent
_ENVIRONMENT = _HERE.parents[1] / ".venv-clients"
_THOUGHT = "The user wants a sum. 17 + 25: 17 + 20 is 37, and 37 + 5 is 42."
_RESULT = "It is 18 degrees in Paris, and the sky is clear."
_ADA = {"name": "Ada Lovelace", "age": 36}


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RouterProcess]:
    from tests.conformance.conftest import write_pooling
    from tests.tiny_models.random_model import make_random_model

    folder = tmp_path_factory.mktemp("models") / "embedder"
    make_random_model(folder, size_bytes=1_000_000, context=64)
    write_pooling(folder)
    with running_router(tmp_path_factory.mktemp("home"), "--models-dir", str(folder.parent)) as router:
        yield router


@pytest.fixture(scope="module")
def busy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RouterProcess]:
    """One slot, and nobody may wait for it."""
    scripts: dict[str, dict[str, Any]] = {"a": {"tokens": 30, "tokens_per_second": 30}, "b": {"tokens": 2}}
    home = tmp_path_factory.mktemp("busy")
    with running_router(home, *fake_config(home, scripts, max_loaded_models=1, busy_policy="fail")) as router:
        yield router


def _run(
    script: str, *arguments: str, home: Path, python: str = "bin/python", more: dict[str, str] | None = None
) -> Any:
    """What a script prints; the end of what it says when it fails."""
    program = _ENVIRONMENT / ("bin/node" if script.endswith(".mjs") else python)
    assert program.exists(), "these tests are run by `make test-clients`, which installs what they need"
    environment = {"PATH": os.environ["PATH"], "HOME": str(home), **(more or {})}
    done = subprocess.run(
        [str(program), str(_HERE / "scripts" / script), *arguments],
        capture_output=True, text=True, timeout=120, env=environment, cwd=home, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.covers("O57", "O60", "O78", "O127")
def test_the_openai_client_for_node(fleet: RouterProcess, busy: RouterProcess, tmp_path: Path) -> None:
    seen = _run("openai.mjs", fleet.url, busy.url, home=tmp_path)
    assert seen == {
        "chat": GREETING, "stream": GREETING, "helper": GREETING, "tools": _RESULT, "parsed": _ADA,
        "response": GREETING, "responseStream": GREETING, "responseParsed": _ADA, "thinking": _THOUGHT,
        "embedding": seen["embedding"], "error": ["NotFoundError", 404, "model_not_found", True],
        "retried": "b:latest-1 b:latest-2 ", "left": True,
    }  # fmt: skip
    assert seen["embedding"][0] == seen["embedding"][1] > 8


@pytest.mark.covers("O13", "O119", "O127")
def test_the_anthropic_client_for_node(fleet: RouterProcess, busy: RouterProcess, tmp_path: Path) -> None:
    seen = _run("anthropic.mjs", fleet.url, busy.url, home=tmp_path)
    assert seen == {
        "chat": GREETING, "stream": GREETING,
        "call": ["get_weather", {"city": "Paris", "unit": "celsius"}, "tool_use"], "tools": _RESULT, "parsed": _ADA,
        "thinking": ["thinking", "text"], "counted": seen["counted"], "models": seen["models"],
        "error": ["NotFoundError", 404, "not_found_error", True], "retried": "b:latest-1 b:latest-2 ", "left": True,
    }  # fmt: skip
    assert seen["counted"] > 5
    assert set(seen["models"]) == {"demo:latest", "embedder:latest"}


def test_the_ollama_client_for_node(fleet: RouterProcess, tmp_path: Path) -> None:
    seen = _run("ollama.mjs", fleet.url, home=tmp_path)
    assert (seen["chat"], seen["stream"], seen["generate"], seen["tools"]) == (GREETING, GREETING, GREETING, _RESULT)
    assert seen["call"] == ["get_weather", {"city": "Paris", "unit": "celsius"}]
    assert isinstance(seen["format"]["sum"], int)
    assert seen["thinking"] == _THOUGHT
    assert seen["error"] == ["ResponseError", 404, "model 'nosuch' not found"]
    assert (seen["list"], seen["ps"], seen["left"]) == (2, 2, "AbortError")
    assert set(seen["show"]) == {"completion", "tools", "thinking"}


def test_langchain_ollama(fleet: RouterProcess, tmp_path: Path) -> None:
    seen = _run("langchain.py", fleet.url, home=tmp_path)
    assert (seen["chat"], seen["stream"], seen["llm"]) == (GREETING, GREETING, GREETING)
    assert seen["thinking"]["reasoning_content"] == _THOUGHT
    assert (seen["parsed"], seen["call"], seen["tools"]) == (_ADA, {"city": "Paris", "unit": "celsius"}, _RESULT)
    assert seen["embedding"] > 8


@pytest.mark.covers("O134")
def test_litellm(fleet: RouterProcess, tmp_path: Path) -> None:
    seen = _run("litellm_routes.py", fleet.url, home=tmp_path, python="litellm/bin/python")
    for route in ("ollama_chat", "openai", "anthropic"):
        assert (seen[route], seen[route + "_stream"]) == (GREETING, GREETING), route
    assert seen["ollama"], "it writes its own prompt, which the demo model does not know by heart"
    assert seen["embedding"] > 8


@pytest.mark.covers("O65")
def test_pydantic_ai(fleet: RouterProcess, tmp_path: Path) -> None:
    seen = _run("pydantic_agent.py", fleet.url, home=tmp_path)
    for api in ("chat", "responses", "messages"):
        assert seen[api] == GREETING
        assert set(seen[api + "_typed"]) == {"name", "age"}


def test_llm_on_the_command_line(fleet: RouterProcess, tmp_path: Path) -> None:
    program = str(_ENVIRONMENT / "bin" / "llm")
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(tmp_path),
        "OLLAMA_HOST": fleet.url,
        "LLM_USER_PATH": str(tmp_path),
    }

    def llm(*arguments: str) -> str:
        done = subprocess.run([program, *arguments], capture_output=True, text=True, timeout=60, env=environment,
                              stdin=subprocess.DEVNULL, check=False)  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert GREETING in llm("-m", "ollama/demo:latest", "Hello!")
    person = json.loads(llm("-m", "ollama/demo:latest", "--schema", "name, age int", "Give me a person as JSON."))
    assert person == {**person, **_ADA}
    assert len(json.loads(llm("embed", "-m", "ollama/embedder:latest", "-c", "a"))) > 8
