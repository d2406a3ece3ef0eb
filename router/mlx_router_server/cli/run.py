"""``mlx-router run``: a conversation in the terminal, or one answer for a script."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from mlx_router_server.cli.client import ApiError, Client, connect
from mlx_router_server.settings import Settings

__all__ = ["run"]

_DIM = "\033[2m"
_PLAIN = "\033[0m"
_HELP = """\
  /clear          forget the conversation
  /show           what is known of the model
  /bye            leave (ctrl-D does too)
  ctrl-C stops an answer; \"\"\" begins and ends a message of several lines"""


def run(options: argparse.Namespace, settings: Settings) -> int:
    client = connect(settings)
    piped = "" if sys.stdin.isatty() else sys.stdin.read()
    prompt = " ".join(options.prompt)
    prompt = "\n\n".join(part for part in (piped.strip(), prompt) if part)
    chat = _Chat(client, options)
    if prompt:
        chat.ask(prompt)
        return 0
    if not sys.stdin.isatty():
        print("mlx-router: nothing to ask: give a prompt, or pipe one in", file=sys.stderr)
        return 2
    client.post("/api/chat", {"model": options.model})  # loads it, and says at once when there is no such model
    return _converse(chat)


class _Chat:
    """The turns so far."""

    def __init__(self, client: Client, options: argparse.Namespace) -> None:
        self._client = client
        self._options = options
        self._messages: list[dict[str, Any]] = []
        self._color = sys.stdout.isatty()

    def clear(self) -> None:
        self._messages.clear()

    def show(self) -> None:
        data = self._client.post("/api/show", {"model": self._options.model})
        print(f"  {self._options.model}: {data['details']['family']}, {data['details']['parameter_size']} parameters, "
              f"{data['details']['quantization_level']}, {', '.join(data['capabilities'])}")  # fmt: skip

    def ask(self, text: str) -> None:
        """Send a turn and print the answer as it comes. Interrupted answers stay in the conversation as they are."""
        self._messages.append({"role": "user", "content": text})
        body: dict[str, Any] = {"model": self._options.model, "messages": self._messages}
        if self._options.think is not None:
            body["think"] = {"true": True, "false": False}.get(self._options.think, self._options.think)
        if self._options.keepalive is not None:
            body["keep_alive"] = self._options.keepalive
        answer, last = "", {}
        thinking = False
        stream = self._client.stream("/api/chat", body)
        try:
            for part in stream:
                last = part
                message = part["message"]
                if thought := message.get("thinking"):
                    thinking = self._think(thought, begun=thinking)
                if content := message.get("content"):
                    if thinking:
                        self._end_thinking()
                        thinking = False
                    answer += content
                    print(content, end="", flush=True)
                for call in message.get("tool_calls", []):
                    print(f"[calls {call['function']['name']} {call['function']['arguments']}]", end="", flush=True)
        except KeyboardInterrupt:
            if not sys.stdin.isatty():
                raise
        finally:
            stream.close()
            if thinking:
                self._end_thinking()
        print()
        self._messages.append({"role": "assistant", "content": answer})
        if self._options.verbose:
            _print_metrics(last)

    def _think(self, text: str, *, begun: bool) -> bool:
        if self._options.hidethinking:
            return False
        if not begun:
            print(f"{_DIM if self._color else ''}Thinking...", flush=True)
        print(text, end="", flush=True)
        return True

    def _end_thinking(self) -> None:
        print(f"\n...done thinking.{_PLAIN if self._color else ''}\n", flush=True)


def _converse(chat: _Chat) -> int:
    try:
        import readline  # noqa: F401  # line editing and history for input(); not on every Python
    except ImportError:
        pass
    while True:
        try:
            text = _read_message()
        except EOFError:
            print()
            return 0
        except KeyboardInterrupt:
            print("\nUse ctrl-D or /bye to leave.")
            continue
        match text.strip():
            case "":
                continue
            case "/bye" | "/exit":
                return 0
            case "/clear":
                chat.clear()
                print("The conversation is forgotten.")
            case "/show":
                chat.show()
            case command if command.startswith("/"):
                print(_HELP)
            case _:
                try:
                    chat.ask(text)
                except ApiError as error:
                    print(f"\nmlx-router: {error.message}", file=sys.stderr)


def _read_message() -> str:
    text = input(">>> ")
    if not text.startswith('"""'):
        return text
    lines = [text[3:]]
    while not lines[-1].endswith('"""'):
        lines.append(input("... "))
    lines[-1] = lines[-1][:-3]
    return "\n".join(lines)


def _print_metrics(last: dict[str, Any]) -> None:
    def seconds(name: str) -> float:
        return float(last.get(name, 0)) / 1e9

    for count, duration, label in (
        ("prompt_eval_count", "prompt_eval_duration", "prompt eval"),
        ("eval_count", "eval_duration", "eval"),
    ):
        tokens, took = last.get(count, 0), seconds(duration)
        rate = tokens / took if took else 0.0
        print(f"{label + ':':<16}{tokens} tokens, {took:.3f} s, {rate:.2f} tokens/s", file=sys.stderr)
    print(f"{'load:':<16}{seconds('load_duration'):.3f} s", file=sys.stderr)
    print(f"{'total:':<16}{seconds('total_duration'):.3f} s", file=sys.stderr)
