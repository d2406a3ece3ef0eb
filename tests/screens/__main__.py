"""What a new user sees, typed into a real terminal (tmux) from an empty home folder, against a hub on loopback; writes
docs/cli.md. ``make screens``."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from mlx_router_server.catalogue.catalogue import DEMO_FOLDER
from tests.support.hub import Hub, running_hub
from tests.support.router import wait_until

_ROOT = Path(__file__).parents[2]
_SESSION = f"mlxr-screens-{os.getpid()}"
_PROMPT = "$ "
_COLUMNS, _LINES = 100, 60
_MODELFILE = '''FROM house:0.4m
PARAMETER temperature 0
SYSTEM """You answer like a pirate."""
'''
_CONFIG = """keep_alive = "10m"
[model_aliases]
"house:0.4m" = "mlx-community/House-0.4M"
"""
_INTRODUCTION = """# The command line, as it looks

Typed into a terminal of 100 columns from an empty home folder, and copied from it by `make screens` ({when}; a hub on
loopback stands in for Hugging Face, and its one repository for a real model, hence the sizes). All commands and their
flags: `mlx-router --help`, `mlx-router COMMAND --help`; tables are JSON with `--json`. Errors are one line on standard
error; exit statuses: 0 done, 1 failed, 2 wrong usage, 3 no router answers, 4 no such model.
"""
_SCREENS: list[tuple[str, list[str]]] = [
    ("Look whether everything is in order", ["mlx-router doctor"]),
    ("Fetch a model", ["mlx-router pull house:0.4m", "mlx-router list", "mlx-router show house:0.4m"]),
    ("Ask it", ["mlx-router run house:0.4m 'What is 17 + 25?'", "echo 'Hello!' | mlx-router run house:0.4m"]),
    ("Make one of your own", ["cat Modelfile", "mlx-router create pirate -f Modelfile", "mlx-router show pirate",
                              "mlx-router cp pirate captain", "mlx-router list"]),
    ("See and steer what is loaded", ["mlx-router load pirate", "mlx-router ps", "mlx-router plan demo",
                                      "mlx-router top --once", "mlx-router logs -n 3 pirate",
                                      "mlx-router stop pirate", "mlx-router ps"]),
    ("Remove them", ["mlx-router rm captain pirate", "mlx-router rm house:0.4m", "mlx-router rm demo",
                     "mlx-router list"]),
    ("Keys and settings", ["mlx-router keys add laptop --scope inference --model 'demo'", "mlx-router keys list",
                           "mlx-router keys remove laptop", "mlx-router config check",
                           "mlx-router config show --origin | grep -v default"]),
    ("As a service", ["mlx-router service install --dry-run | head -24"]),
    ("What goes wrong is one line", ["mlx-router show nosuch; echo status $?", "mlx-router pull nosuch; echo status $?",
                                     "mlx-router list --port 1; echo status $?"]),
]  # fmt: skip


class Terminal:
    """A tmux session with a plain shell."""

    def __init__(self, home: Path, environment: dict[str, str]) -> None:
        settings = " ".join(f"{name}={shlex.quote(value)}" for name, value in environment.items())
        shell = f"cd {shlex.quote(str(home))} && env {settings} bash --noprofile --norc"
        self._tmux("new-session", "-d", "-s", _SESSION, "-x", str(_COLUMNS), "-y", str(_LINES), shell)
        self.wait(lambda screen: screen.endswith(_PROMPT.rstrip()))

    def close(self) -> None:
        self._tmux("kill-session", "-t", _SESSION)

    def _tmux(self, *arguments: str) -> str:
        return subprocess.run(["tmux", *arguments], capture_output=True, text=True, check=True).stdout

    def screen(self) -> str:
        return self._tmux("capture-pane", "-p", "-t", _SESSION).rstrip()

    def wait(self, done: Callable[[str], bool]) -> str:
        """The screen, once it is as it shall be."""
        try:
            wait_until(lambda: done(self.screen()), "the terminal gets there", 60)
        except AssertionError:
            print(self.screen(), file=sys.stderr)
            raise
        return self.screen()

    def type(self, text: str, *keys: str) -> None:
        self._tmux("send-keys", "-t", _SESSION, "-l", text)
        self._tmux("send-keys", "-t", _SESSION, *(keys or ("Enter",)))

    def run(self, command: str) -> str:
        """The command and what it wrote."""
        self.clear()
        self.type(command)
        screen = self.wait(lambda now: now.splitlines()[-1:] == [_PROMPT.rstrip()] and len(now.splitlines()) > 1)
        return "\n".join(screen.splitlines()[:-1])

    def clear(self) -> None:
        self._tmux("send-keys", "-t", _SESSION, "C-l")
        self.wait(lambda now: now in (_PROMPT.rstrip(), ""))
        self._tmux("clear-history", "-t", _SESSION)


def conversation(terminal: Terminal) -> str:
    """A chat with a message of several lines, settings, and an answer that is stopped."""
    terminal.clear()
    terminal.type("mlx-router run house:0.4m")
    terminal.wait(lambda now: now.endswith(">>>"))
    _converse(terminal, [('"""Hello!', "..."), ('"""', ">>>"), ("/clear", ">>>")])
    terminal.type("Tell me a long story.")
    terminal.wait(lambda now: len(now.rpartition("story.")[2]) > 150)
    terminal.type("", "C-c")
    terminal.wait(lambda now: now.endswith(">>>"))
    settings = ["/clear", "/set system You are brief.", "/set parameter temperature 0", "/show info", "/set nothink"]
    _converse(terminal, [(line, ">>>") for line in [*settings, "What is 17 + 25?"]])
    terminal.type("/bye")
    screen = terminal.wait(lambda now: now.splitlines()[-1] == _PROMPT.rstrip())
    return "\n".join(screen.splitlines()[:-1])


def _converse(terminal: Terminal, lines: list[tuple[str, str]]) -> None:
    """Each line, and the prompt that has to come after it."""
    for line, end in lines:
        before = terminal.screen()
        terminal.type(line)
        terminal.wait(partial(_moved_on, before, end))


def _moved_on(before: str, end: str, now: str) -> bool:
    return now != before and now.endswith(end)


def _text(home: Path, hub: Hub, screen: str) -> str:
    """Without the folders of this run."""
    screen = screen.replace(str(home), "~").replace(hub.url, "https://huggingface.co")
    screen = re.sub(r"mlxr-[\w-]{30,}", "mlxr-" + "x" * 43, screen)
    return re.sub(r"/\S+/bin/python", "~/mlx-router/.venv/bin/python", screen)


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="mlxr-") as folder, running_hub() as hub:
        home = Path(folder)
        hub.add_folder("mlx-community/House-0.4M", DEMO_FOLDER)
        (home / "Modelfile").write_text(_MODELFILE)
        state = home / ".config" / "mlx-router"
        state.mkdir(parents=True)
        (state / "config.toml").write_text(
            'keep_alive = "10m"\n[model_aliases]\n"house:0.4m" = "mlx-community/House-0.4M"\n'
        )
        environment = {
            "HOME": str(home), "PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin", "HF_ENDPOINT": hub.url,
            "PS1": _PROMPT, "TERM": "xterm", "MLX_ROUTER_PORT": "11534", "LANG": "C.UTF-8",
        }  # fmt: skip
        router = subprocess.Popen(
            [sys.executable, "-P", "-m", "mlx_router_server", "start"], env=environment, cwd=home,
            stderr=(home / "log").open("w"),
        )  # fmt: skip
        terminal = Terminal(home, environment)
        try:
            wait_until(lambda: "listens on" in (home / "log").read_text(), "the router listens")
            parts = [_INTRODUCTION.format(when=time.strftime("%Y-%m-%d"))]
            for title, commands in _SCREENS:
                shown = "\n\n".join(_text(home, hub, terminal.run(command)) for command in commands)
                parts.append(f"## {title}\n\n```console\n{shown}\n```\n")
                if title == "Ask it":
                    talk = _text(home, hub, conversation(terminal))
                    parts.append(f"## Talk with it\n\n```console\n{talk}\n```\n")
        finally:
            terminal.close()
            router.terminate()
            router.wait(30)
        (_ROOT / "docs" / "cli.md").write_text("\n".join(parts))
        print("docs/cli.md")


if __name__ == "__main__":
    main()
