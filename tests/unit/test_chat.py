"""The conversation of `mlx-router run`, with a router that is played."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import pytest

from mlx_router_server.cli.chat import Chat
from mlx_router_server.cli.client import ApiError, Client


class _Played(Client):
    """Answers with what it has heard, and refuses what says so."""

    def __init__(self) -> None:
        super().__init__("http://127.0.0.1:1")
        self.heard: list[dict[str, Any]] = []

    def stream(self, path: str, body: Any) -> Generator[dict[str, Any], None, None]:
        self.heard.append({**body, "messages": list(body["messages"])})
        if body["messages"][-1]["content"] == "refuse":
            raise ApiError(503, "busy")
        yield {"message": {"role": "assistant", "content": "yes"}, "done": True}


def test_a_turn_that_was_refused_is_not_part_of_the_conversation(capsys: pytest.CaptureFixture[str]) -> None:
    client = _Played()
    chat = Chat(client, "demo", ["completion"])
    chat.ask("one")
    with pytest.raises(ApiError, match="busy"):
        chat.ask("refuse")
    chat.ask("two")
    assert [turn["content"] for turn in client.heard[-1]["messages"]] == ["one", "yes", "two"]
    assert capsys.readouterr().out == "yes\nyes\n"


def test_what_was_set_goes_with_every_turn() -> None:
    client = _Played()
    chat = Chat(client, "demo", ["completion"])
    chat.system, chat.options, chat.format, chat.think, chat.keep_alive = "s", {"seed": 1}, "json", False, "1m"
    chat.ask("one")
    assert client.heard[0]["messages"][0] == {"role": "system", "content": "s"}
    said = {name: client.heard[0][name] for name in ("options", "format", "think", "keep_alive")}
    assert said == {"options": {"seed": 1}, "format": "json", "think": False, "keep_alive": "1m"}
    chat.clear()
    chat.ask("two")
    assert len(client.heard[1]["messages"]) == 2
