"""One conversation: its turns, what it was set to, and how an answer is shown while it comes."""

from __future__ import annotations

import base64
import re
import sys
from typing import Any, Final

from mlx_router_server.cli.client import ApiError, Client
from mlx_router_server.files import expanded

__all__ = ["Chat"]

_DIM: Final = "\033[2m"
_PLAIN: Final = "\033[0m"
_IMAGE: Final = re.compile(r"(?:[\w~./-]|\\ )+\.(?:png|jpe?g|webp|gif)\b", re.IGNORECASE)


class Chat:
    """Everything that a terminal or a script can set is an attribute; ``ask`` sends a turn."""

    def __init__(self, client: Client, model: str, capabilities: list[str]) -> None:
        self.client = client
        self.model = model
        self.system = ""
        self.options: dict[str, Any] = {}
        self.format: Any = None
        self.think: bool | str | None = None
        self.keep_alive: str | None = None
        self.verbose = False
        self.hide_thinking = False
        self._capabilities = capabilities
        self._messages: list[dict[str, Any]] = []
        self._color = sys.stdout.isatty()

    def load(self) -> None:
        body: dict[str, Any] = {"model": self.model}
        if self.keep_alive is not None:
            body["keep_alive"] = self.keep_alive
        self.client.post("/api/chat", body)

    def change(self, model: str, capabilities: list[str]) -> None:
        self.model, self._capabilities = model, capabilities
        self.clear()

    def clear(self) -> None:
        self._messages.clear()

    def show(self) -> dict[str, Any]:
        data: dict[str, Any] = self.client.post("/api/show", {"model": self.model})
        return data

    def save(self, name: str) -> None:
        """Model, system prompt, options and turns, as a model of its own."""
        turns = [{"role": turn["role"], "content": turn["content"]} for turn in self._messages]
        body = {"model": name, "from": self.model, "system": self.system, "parameters": self.options,
                "messages": turns, "stream": False}  # fmt: skip
        self.client.post("/api/create", body)

    def ask(self, text: str) -> None:
        """Send a turn and print the answer as it comes. Interrupted answers stay in the conversation as they are; a
        turn that was refused does not."""
        text, images = self._take_images(text)
        turn: dict[str, Any] = {"role": "user", "content": text}
        if images:
            turn["images"] = images
        self._messages.append(turn)
        try:
            answer, last = self._answer()
        except ApiError:
            self._messages.pop()
            raise
        print()
        self._messages.append({"role": "assistant", "content": answer})
        if self.verbose:
            _print_metrics(last)

    def _body(self) -> dict[str, Any]:
        system = [{"role": "system", "content": self.system}] if self.system else []
        body: dict[str, Any] = {"model": self.model, "messages": system + self._messages}
        for name, value in (("think", self.think), ("keep_alive", self.keep_alive), ("format", self.format),
                            ("options", self.options or None)):  # fmt: skip
            if value is not None:
                body[name] = value
        return body

    def _answer(self) -> tuple[str, dict[str, Any]]:
        answer, last = "", {}
        thinking = False
        stream = self.client.stream("/api/chat", self._body())
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
        return answer, last

    def _take_images(self, text: str) -> tuple[str, list[str]]:
        """Paths of images that exist become images; for a model that does not see, that is said instead of sending it
        a path that means nothing to it."""
        images = []
        for match in _IMAGE.finditer(text):
            path = expanded(match[0].replace("\\ ", " "))
            if not path.is_file():
                continue
            if "vision" not in self._capabilities:
                raise ApiError(400, f"{self.model} does not see images: {path.name} was not sent")
            images.append(base64.b64encode(path.read_bytes()).decode())
            text = text.replace(match[0], "").strip()
            print(f"Added image {path.name}", file=sys.stderr)
        return text, images

    def _think(self, text: str, *, begun: bool) -> bool:
        if self.hide_thinking:
            return False
        if not begun:
            print(f"{_DIM if self._color else ''}Thinking...", flush=True)
        print(text, end="", flush=True)
        return True

    def _end_thinking(self) -> None:
        print(f"\n...done thinking.{_PLAIN if self._color else ''}\n", flush=True)


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
