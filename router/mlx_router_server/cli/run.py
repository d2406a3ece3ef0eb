"""``mlx-router run``: a conversation in the terminal, or one answer for a script."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any, Final

from mlx_router_server.cli.chat import Chat
from mlx_router_server.cli.client import ApiError, Client, connect
from mlx_router_server.cli.manage import pull_model
from mlx_router_server.settings import Settings
from mlx_router_server.settings_layers import home_folder

__all__ = ["run"]

_HELP: Final = """\
  /set system TEXT            say how it shall behave; without TEXT nothing
  /set parameter NAME VALUE   an option of sampling, e.g. temperature 0.2
  /set format json | SCHEMA   answers in this form; /set noformat: free again
  /set think [LEVEL]          have it think (low, medium, high); /set nothink
  /set verbose | quiet        figures after each answer, or none
  /set history | nohistory    remember what was typed, or not
  /show [info | system | parameters | template | license | modelfile]
  /load MODEL                 another model, with a new conversation
  /save MODEL                 this model, system prompt, options and conversation under a new name
  /clear                      forget the conversation
  /bye                        leave (ctrl-D does too)
  ctrl-C stops an answer; \"\"\" begins and ends a message of several lines; paths of
  images in a message are shown to models that see"""
_THINK_LEVELS: Final = ("low", "medium", "high", "max", "true", "false")
_HISTORY_LINES: Final = 1000


def run(options: argparse.Namespace, settings: Settings) -> int:
    """A model that is not here is pulled, as Ollama's command does it."""
    client = connect(settings)
    piped = "" if sys.stdin.isatty() else sys.stdin.read()
    prompt = " ".join(options.prompt)
    prompt = "\n\n".join(part for part in (piped.strip(), prompt) if part)
    if not prompt and not sys.stdin.isatty():
        print("mlx-router: nothing to ask: give a prompt, or pipe one in", file=sys.stderr)
        return 2
    capabilities = _find(client, options.model)
    if "completion" not in capabilities and "embedding" in capabilities:
        return _embed(client, options.model, prompt)
    chat = Chat(client, options.model, capabilities)
    chat.think = {"true": True, "false": False}.get(options.think, options.think)
    chat.keep_alive, chat.verbose, chat.hide_thinking = options.keepalive, options.verbose, options.hidethinking
    chat.format = _format(options.format)
    if prompt:
        chat.ask(prompt)
        return 0
    chat.load()  # says at once what is wrong with it
    return _Terminal(chat).converse()


def _find(client: Client, model: str) -> list[str]:
    """What it can do."""
    try:
        shown = client.post("/api/show", {"model": model})
    except ApiError as error:
        if error.status != 404:
            raise
        try:
            pull_model(client, model)
        except ApiError as failed:
            if failed.status == 404:  # there is no such model anywhere
                raise error from None
            raise
        shown = client.post("/api/show", {"model": model})
    return list(shown["capabilities"])


def _embed(client: Client, model: str, text: str) -> int:
    """A model of vectors has nothing to say but one."""
    if not text:
        print("mlx-router: an embedding model needs a text", file=sys.stderr)
        return 2
    print(json.dumps(client.post("/api/embed", {"model": model, "input": text})["embeddings"][0]))
    return 0


def _format(text: str | None) -> Any:
    if not text or text == "json":
        return text or None
    try:
        return json.loads(text)
    except ValueError:
        raise ApiError(400, f"{text[:60]!r} is neither json nor a JSON schema") from None


class _Terminal:
    """Reads what the user types, and does what begins with a slash."""

    def __init__(self, chat: Chat) -> None:
        self._chat = chat
        self._history = home_folder(dict(os.environ)) / "history"
        self._remembers = not os.environ.get("OLLAMA_NOHISTORY")
        self._readline = _load_readline(self._history)

    def converse(self) -> int:
        while True:
            try:
                text = _read_message()
            except EOFError:
                print()
                break
            except KeyboardInterrupt:
                print("\nUse ctrl-D or /bye to leave.")
                continue
            if text.strip() in ("/bye", "/exit"):
                break
            if not text.strip():
                continue
            try:
                if text.startswith("/") and text.split()[0].count("/") == 1:  # more of them: a path
                    self._command(text.strip())
                else:
                    self._chat.ask(text)
            except ApiError as error:
                print(f"mlx-router: {error.message}", file=sys.stderr)
        self._save_history()
        return 0

    def _save_history(self) -> None:
        if self._readline is None or not self._remembers:
            return
        try:
            self._history.parent.mkdir(parents=True, exist_ok=True)
            self._history.touch(mode=0o600)
            self._readline.set_history_length(_HISTORY_LINES)
            self._readline.write_history_file(str(self._history))
        except OSError:
            pass  # a conversation is worth more than its history

    def _command(self, text: str) -> None:
        words = text.split(None, 1)
        rest = words[1] if len(words) > 1 else ""
        match words[0]:
            case "/clear":
                self._chat.clear()
                print("The conversation is forgotten.")
            case "/set":
                self._set(rest)
            case "/show":
                self._show(rest or "info")
            case "/load":
                self._load(rest)
            case "/save":
                self._save(rest)
            case "/?" | "/help":
                print(_HELP)
            case unknown:
                print(f"There is no command {unknown}.\n{_HELP}")

    def _set(self, text: str) -> None:
        what, _, value = text.partition(" ")
        value = value.strip()
        chat = self._chat
        match what:
            case "system":
                chat.system = value.strip('"')
                print("The system prompt is set." if chat.system else "There is no system prompt.")
            case "parameter":
                name, _, said = value.partition(" ")
                if not said.strip():
                    print("Usage: /set parameter NAME VALUE")
                    return
                chat.options[name] = _parameter(name, said.strip())
                print(f"{name} is {chat.options[name]!r}.")
            case "format":
                chat.format = _format(value)
                print("Answers keep to the format." if chat.format else "Answers are free.")
            case "noformat":
                chat.format = None
                print("Answers are free.")
            case "think" if not value or value in _THINK_LEVELS:
                chat.think = value if value in ("low", "medium", "high", "max") else value != "false"
                print("It is asked to think.")
            case "nothink":
                chat.think = False
                print("It is asked not to think.")
            case "verbose" | "quiet":
                chat.verbose = what == "verbose"
                print("Figures are shown." if chat.verbose else "Figures are not shown.")
            case "history" | "nohistory":
                self._remembers = what == "history"
                print("What is typed is remembered." if self._remembers else "What is typed is not remembered.")
            case "wordwrap" | "nowordwrap":
                print("Lines are as the model makes them; the terminal wraps.")
            case _:
                print(f"That cannot be set.\n{_HELP}")

    def _show(self, what: str) -> None:
        data = self._chat.show()
        if what == "info":
            details = data["details"]
            print(f"  {self._chat.model}: {details['family']}, {details['parameter_size']} parameters, "
                  f"{details['quantization_level']}, {', '.join(data['capabilities'])}")  # fmt: skip
        elif what in ("system", "parameters", "template", "license", "modelfile"):
            if what == "system" and self._chat.system:
                print(self._chat.system)
                return
            if what == "parameters":
                for name, value in self._chat.options.items():
                    print(f"{name:<30} {json.dumps(value)} (set here)")
            print(data.get(what) or f"It has no {what}.")
        else:
            print("Usage: /show info, system, parameters, template, license or modelfile")

    def _load(self, model: str) -> None:
        if not model:
            print("Usage: /load MODEL")
            return
        self._chat.change(model, _find(self._chat.client, model))
        self._chat.load()
        print(f"{model} is loaded; a new conversation begins.")

    def _save(self, name: str) -> None:
        if not name:
            print("Usage: /save MODEL")
            return
        self._chat.save(name)
        print(f"Saved as {name}.")


def _parameter(name: str, text: str) -> Any:
    if name == "stop":
        return text.split()
    try:
        return json.loads(text)
    except ValueError:
        return text


def _load_readline(history: Path) -> Any:
    """Line editing and history for input(); not on every Python."""
    try:
        import readline
    except ImportError:
        return None
    try:
        readline.read_history_file(str(history))
    except OSError:
        pass  # there is none yet
    return readline


def _read_message() -> str:
    text = input(">>> ")
    if not text.startswith('"""'):
        return text
    lines = [text[3:]]
    while not lines[-1].endswith('"""'):
        lines.append(input("... "))
    lines[-1] = lines[-1][:-3]
    return "\n".join(lines)
