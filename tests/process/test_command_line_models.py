"""Commands about which models there are, and what helps at the prompt, as a user runs them."""

from __future__ import annotations

import base64
import json
import os
import pty
import re
import select
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import psutil
import pytest

from mlx_router_server.access.keys import Scope, keys_file, make_key, write_keys
from mlx_router_server.catalogue.catalogue import DEMO_FOLDER
from tests.support.command import command, command_on
from tests.support.hub import running_hub
from tests.support.router import RouterProcess, running_router, wait_until
from tests.tiny_models.script import GREETING

_REPO = "mlx-community/House-0.4M"


@pytest.fixture(scope="module")
def home_of_router(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("house")


@pytest.fixture(scope="module")
def router(home_of_router: Path) -> Iterator[RouterProcess]:
    (home_of_router / "config.toml").write_text(f'[model_aliases]\n"house:0.4m" = "{_REPO}"\n')
    with running_hub() as hub:
        hub.add_folder(_REPO, DEMO_FOLDER)
        with running_router(home_of_router, variables={"HF_ENDPOINT": hub.url}) as found:
            yield found


@pytest.mark.slow
def test_from_pull_to_rm(router: RouterProcess, tmp_path: Path) -> None:
    pulled = command_on(router, "pull", "house:0.4m")
    assert (pulled.returncode, pulled.stdout) == (0, "")
    assert "pulling manifest" in pulled.stderr
    assert "success" in pulled.stderr
    assert "house:0.4m" in command_on(router, "list").stdout
    (tmp_path / "Modelfile").write_text(
        'FROM house:0.4m\nSYSTEM """be brief"""\nPARAMETER temperature 0\nREQUIRES 0.1\n'
    )
    made = command_on(router, "create", "brief", "-f", str(tmp_path / "Modelfile"))
    assert made.returncode == 0, made.stderr
    assert "REQUIRES" in made.stderr
    assert command_on(router, "show", "brief", "--system").stdout == "be brief\n"
    shown = command_on(router, "show", "brief").stdout
    assert "made from           mlx-community/House-0.4M:latest" in shown
    assert "temperature" in shown
    assert command_on(router, "show", "brief", "--system", "--license").returncode == 2
    assert "FROM mlx-community/House-0.4M:latest" in command_on(router, "show", "brief", "--modelfile").stdout
    assert command_on(router, "cp", "brief", "copied").stdout == "copied 'brief' to 'copied'\n"
    assert command_on(router, "run", "copied", "Hello!").stdout.strip() == GREETING
    (told,) = (line for line in command_on(router, "ps").stdout.splitlines() if "House" in line)
    assert told.startswith("mlx-community/House-0.4M:latest")
    assert "copied:latest" in told
    removed = command_on(router, "rm", "copied", "brief", "nosuch")
    assert (removed.returncode, removed.stdout) == (4, "deleted 'copied'\ndeleted 'brief'\n")
    freed = json.loads(command_on(router, "rm", "house:0.4m", "--json").stdout)
    assert freed[0]["freed_bytes"] > 500_000
    assert "house" not in command_on(router, "list").stdout


@pytest.mark.slow
def test_run_pulls_what_is_not_here(router: RouterProcess) -> None:
    ran = command_on(router, "run", "house:0.4m", "Hello!")
    assert (ran.returncode, ran.stdout.strip()) == (0, GREETING)
    assert "pulling manifest" in ran.stderr
    for arguments in (("run", "nosuch", "hi"), ("pull", "nosuch")):
        done = command_on(router, *arguments)
        assert (done.returncode, done.stderr.count("\n")) == (4, 1), done.stderr


@pytest.mark.slow
def test_create_from_folders_and_from_standard_input(router: RouterProcess, tmp_path: Path) -> None:
    from tests.tiny_models.adapter import make_random_adapter

    make_random_adapter(DEMO_FOLDER, tmp_path / "lora")
    made = command_on(
        router,
        "create",
        "own",
        "-f",
        "-",
        text=f"FROM {DEMO_FOLDER}\nADAPTER {tmp_path / 'lora'}\nPARAMETER num_predict 3\n",
    )
    assert made.returncode == 0, made.stderr
    assert "uploading model.safetensors" in made.stderr
    assert command_on(router, "run", "own", "Hello!").returncode == 0
    assert command_on(router, "rm", "own").returncode == 0
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    for text, sentence in (
        (f"FROM {tmp_path / 'x.gguf'}", "GGUF"),
        ("FROM demo\nCOLOUR red", "line 2"),
        ("FROM nosuch", "file does not exist"),
        ("FROM demo\nADAPTER ./nowhere", "adapter"),
    ):
        refused = command_on(router, "create", "bad", "-f", "-", text=text)
        assert (refused.returncode != 0, sentence in refused.stderr) == (True, True), refused.stderr
        assert refused.stderr.count("\n") == 1
    assert command_on(router, "create", "bad", "-f", str(tmp_path / "no")).returncode == 1


def test_short_names_are_listed_without_a_router(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text(f'[model_aliases]\n"qwen3:house" = "{_REPO}"\n')
    listed = json.loads(command("list", "--aliases", "qwen3", "--json", port=1, home=tmp_path).stdout)
    assert listed["qwen3:4b"] == "mlx-community/Qwen3-4B-4bit"
    assert listed["qwen3:house"] == _REPO
    assert all(name.startswith("qwen3") for name in listed)


def test_the_configuration_is_shown_checked_and_described(tmp_path: Path) -> None:
    good, bad = tmp_path / "good.toml", tmp_path / "bad.toml"
    good.write_text('max_queue = 7\n[name_map]\n"claude-*" = "demo"\n[models.demo]\npinned = true\n')
    bad.write_text("max_queu = 7\n")
    shown = command("config", "show", "--origin", "--config", str(good), environment={"MLX_ROUTER_PORT": "5"}).stdout
    lines = {line.split()[0]: line.split()[1:] for line in shown.splitlines() if line.strip()}
    assert lines["max_queue"] == ["7", str(good)]
    assert lines["port"] == ["5", "MLX_ROUTER_PORT"]
    assert lines["host"] == ['"127.0.0.1"', "default"]
    assert '"claude-*" = "demo"' in shown
    assert "pinned = true" in shown
    assert command("config", "check", str(good)).stdout == f"{good} is in order\n"
    refused = command("config", "check", str(bad))
    assert (refused.returncode, "did you mean 'max_queue'" in refused.stderr) == (2, True)
    assert json.loads(command("config", "schema").stdout)["properties"]["max_queue"]["type"] == "integer"
    assert command("config", "path", home=tmp_path).stdout == f"{tmp_path / 'config.toml'}\n"
    assert json.loads(command("config", "show", "--json", "--config", str(good)).stdout)["settings"]["max_queue"] == 7


def _completed(line: str, port: int = 1) -> set[str]:
    """What bash would offer, asked as bash asks."""
    read, write = os.pipe()
    environment = {**os.environ, "MLX_ROUTER_HOME": "/nonexistent", "MLX_ROUTER_PORT": str(port), "_ARGCOMPLETE": "1",
                   "COMP_LINE": line, "COMP_POINT": str(len(line)), "COMP_TYPE": "9", "_ARGCOMPLETE_IFS": "\n",
                   "_ARGCOMPLETE_SHELL": "bash"}  # fmt: skip
    script = Path(sys.executable).with_name("mlx-router")
    done = subprocess.run(["bash", "-c", f"exec {script} 8>&{write} 9>/dev/null"], env=environment, pass_fds=[write],
                          timeout=60, check=False, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
    os.close(write)
    with os.fdopen(read) as stream:
        offered = stream.read()
    assert done.returncode == 0
    return {word.strip() for word in offered.split("\n")} - {""}


@pytest.mark.slow
def test_the_shell_completes_commands_flags_and_models(router: RouterProcess) -> None:
    port = urlsplit(router.url).port or 0
    assert {"pull", "plan", "pin", "ps"} == _completed("mlx-router p")
    assert {"--scope", "--model"} <= _completed("mlx-router keys add x --")
    assert "demo" in _completed("mlx-router run d", port)
    assert _completed("mlx-router run d") == set(), "no router, no models, no noise"
    for shell, mark in (("bash", "complete -o"), ("zsh", "compdef"), ("fish", "complete --command mlx-router")):
        script = command("completion", shell)
        assert (script.returncode, mark in script.stdout) == (0, True)
    checked = subprocess.run(["bash", "-n"], input=command("completion", "bash").stdout, text=True, check=False)
    assert checked.returncode == 0


@pytest.mark.slow
def test_doctor_finds_nothing_wrong_and_what_is_wrong(home: Path, router: RouterProcess) -> None:
    environment = {"HF_HOME": str(home), "HF_ENDPOINT": "http://127.0.0.1:9"}
    port = urlsplit(router.url).port
    healthy = command("doctor", "--json", home=home, port=port, environment=environment)
    found = {finding["about"]: finding for finding in json.loads(healthy.stdout)}
    assert healthy.returncode == 0, healthy.stdout
    assert found["trial"]["level"] == "ok"
    assert "answered in" in found["trial"]["text"]
    source = found["worker source"]
    assert source["level"] == "ok"
    assert ("are forked" if sys.platform == "linux" else "idle workers") in source["text"]
    assert re.search(r"loaded again in \d+ ms", source["text"])
    assert found["port"]["text"].startswith("an mlx-router answers")
    assert (found["hub"]["level"], "HF_ENDPOINT" in found["hub"]["fix"]) == ("warning", True)
    assert found["leftovers"]["level"] == "ok"
    _, key = make_key("x", [Scope.ADMIN])
    write_keys(keys_file(home), [key])
    keys_file(home).chmod(0o644)
    (home / "config.toml").write_text('models_dirs = ["/no/such/folder"]\n')
    sick = command("doctor", home=home, port=port, environment=environment)
    assert sick.returncode == 1
    assert f"chmod 600 {keys_file(home)}" in sick.stdout
    assert "no folder /no/such/folder" in sick.stdout
    assert sick.stdout.rstrip().endswith("warnings")
    assert "1 problem," in sick.stdout


class _Screen:
    """What a program writes to its terminal, read as it comes."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._text = ""

    def wait_for(self, mark: str) -> str:
        """Everything up to the mark, from where the last wait ended."""
        end = time.monotonic() + 20
        while mark not in self._text:
            left = max(end - time.monotonic(), 0)
            assert select.select([self._descriptor], [], [], left)[0], f"no {mark!r} in {self._text!r}"
            self._text += os.read(self._descriptor, 4096).decode()
        seen, _, self._text = self._text.partition(mark)
        return seen

    def type(self, text: str) -> None:
        os.write(self._descriptor, text.encode() + b"\n")


@contextmanager
def _conversation(router: RouterProcess, home: Path, model: str) -> Iterator[tuple[_Screen, subprocess.Popen[bytes]]]:
    master, slave = pty.openpty()
    environment = {**os.environ, "MLX_ROUTER_PORT": str(urlsplit(router.url).port), "MLX_ROUTER_HOME": str(home),
                   "TERM": "dumb"}  # fmt: skip
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "mlx_router_server", "run", model],
        stdin=slave, stdout=slave, stderr=slave, env=environment, start_new_session=True,
    )  # fmt: skip
    os.close(slave)
    try:
        screen = _Screen(master)
        screen.wait_for(">>> ")
        yield screen, process
    finally:
        process.kill()
        process.wait(5)
        os.close(master)


def test_what_can_be_set_and_shown_in_a_conversation(router: RouterProcess, home: Path, tmp_path: Path) -> None:
    image = tmp_path / "picture.png"
    image.write_bytes(
        base64.b64decode(
            "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
        )
    )
    with _conversation(router, home, "demo") as (screen, process):
        for typed, answer in (
            ("/set parameter num_predict 3", "num_predict is 3."),
            ("/set verbose", "Figures are shown."),
            ("Tell me a long story.", "eval:           3 tokens"),
            ("/set quiet", "not shown"),
            ("/show parameters", "num_predict                    3 (set here)"),
            ("/set parameter num_predict 100", "num_predict is 100."),
            ("/clear", "forgotten"),
            ("Hello!", GREETING),
            ("/save kept", "Saved as kept."),
            ("/set system Be a pirate.", "The system prompt is set."),
            ("/show system", "Be a pirate."),
            ("/set system", "There is no system prompt."),
            ("/show template", "enable_thinking"),
            ("/show license", "license"),
            ("/set format json", "keep to the format"),
            ("/set noformat", "free"),
            ("/set format {", "neither json nor a JSON schema"),
            ("/set colour red", "That cannot be set."),
            ("/nonsense", "There is no command /nonsense."),
            (f"What is in {image}?", "demo does not see images: picture.png was not sent"),
            ("/load kept", "kept is loaded"),
            ("/show info", "kept: qwen3"),
            ("/load nosuch", "model 'nosuch' not found"),
            ("/?", "ctrl-C stops an answer"),
        ):  # fmt: skip
            screen.type(typed)
            screen.wait_for(answer)
            screen.wait_for(">>> ")
        screen.type("/bye")
        assert process.wait(10) == 0
    shown = json.loads(command_on(router, "show", "kept", "--json").stdout)
    assert [turn["content"] for turn in shown["messages"]] == ["Hello!", GREETING]
    history = home / "history"
    assert "Tell me a long story." in history.read_text()
    assert stat.S_IMODE(history.stat().st_mode) == 0o600


def test_ctrl_c_stops_the_answer_and_not_the_program(router: RouterProcess, home: Path) -> None:
    with _conversation(router, home, "demo") as (screen, process):
        screen.type("Tell me a long story.")
        screen.wait_for("harbour")
        os.killpg(process.pid, signal.SIGINT)
        screen.wait_for(">>> ")
        screen.type("/clear")
        screen.wait_for("forgotten")
        screen.type("Hello!")
        screen.wait_for(GREETING)
        screen.wait_for(">>> ")
        # Python's readline writes the prompt, then waits for a key, and looks for signals only when they interrupt
        # that wait.
        wait_until(
            lambda: psutil.Process(process.pid).status() == psutil.STATUS_SLEEPING, "the program waits for a key"
        )
        os.killpg(process.pid, signal.SIGINT)
        screen.wait_for("/bye to leave")
        screen.type("/bye")
        assert process.wait(10) == 0


def test_a_table_fits_its_terminal_and_is_whole_in_a_pipe(router: RouterProcess, home: Path) -> None:
    long = "a-model-with-a-name-that-is-quite-a-bit-longer-than-most"
    assert command_on(router, "cp", "demo", long).returncode == 0
    assert f"{long}:latest" in command_on(router, "list").stdout
    master, slave = pty.openpty()
    environment = {**os.environ, "MLX_ROUTER_PORT": str(urlsplit(router.url).port), "COLUMNS": "70"}
    process = subprocess.Popen([sys.executable, "-P", "-m", "mlx_router_server", "list"], stdin=slave, stdout=slave,
                               stderr=slave, env=environment)  # fmt: skip
    os.close(slave)
    text = b""
    try:
        while part := os.read(master, 4096):
            text += part
    except OSError:
        pass  # the other side is gone: that is how a terminal ends
    os.close(master)
    assert process.wait(10) == 0
    lines = text.decode().splitlines()
    assert max(map(len, lines)) <= 70
    assert any("…" in line for line in lines)
    assert command_on(router, "rm", long).returncode == 0


@pytest.mark.slow
def test_run_makes_vectors_with_a_model_of_vectors_and_keeps_to_formats(home: Path, models_dir: Path) -> None:
    (home / "config.toml").write_text(
        f'[models."vectors"]\npath = {json.dumps(str(models_dir / "small"))}\nkind = "embedding"\n'
    )
    with running_router(home) as router:
        ran = command_on(router, "run", "vectors", "hello")
        assert ran.returncode == 0, ran.stderr
        assert len(json.loads(ran.stdout)) > 8
        schema = json.dumps({"type": "object", "properties": {"a": {"enum": [5]}}, "required": ["a"],
                             "additionalProperties": False})  # fmt: skip
        told = command_on(router, "run", "demo", "--think", "false", "--format", schema, "hello")
        assert json.loads(told.stdout) == {"a": 5}
