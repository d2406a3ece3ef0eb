"""What Open WebUI asks, recorded from a real one (tests/recorded), asked again of a real router, in its order."""

from __future__ import annotations

import http.client
import json
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from mlx_router_server.catalogue.catalogue import DEMO_FOLDER
from tests.support.hub import running_hub
from tests.support.router import RouterProcess, running_router
from tests.tiny_models.script import GREETING

_RECORDED = json.loads((Path(__file__).parents[1] / "recorded" / "open_webui.json").read_text())


def _again(router: RouterProcess, recorded: dict[str, Any]) -> tuple[int, str]:
    connection = http.client.HTTPConnection(urlsplit(router.url).netloc, timeout=30)
    body = json.dumps(recorded["body"]).encode() if recorded["body"] is not None else None
    connection.request(recorded["method"], recorded["path"], body, recorded["headers"])
    response = connection.getresponse()
    text = response.read().decode()
    connection.close()
    return response.status, text


@pytest.mark.req("R41")
@pytest.mark.covers("O135")
def test_the_calls_of_open_webui(home: Path) -> None:
    """Its lists, chats by both connections, unloading by keep_alive 0, and its pages about models."""
    seen = set()
    with running_hub() as hub:
        hub.add_folder("mlx-community/House-0.4M", DEMO_FOLDER)
        with running_router(home, variables={"HF_ENDPOINT": hub.url}) as router:
            for recorded in _RECORDED["calls"]:
                status, text = _again(router, recorded)
                assert status == recorded["status"] == 200, (recorded["path"], text)
                seen.add((recorded["method"], recorded["path"]))
                match recorded["path"]:
                    case "/api/chat" | "/v1/chat/completions":
                        stream = recorded["body"]["stream"]
                        lines = [line.removeprefix("data: ") for line in text.splitlines() if "{" in line]
                        parts = [json.loads(line) for line in lines] if stream else [json.loads(text)]
                        said = "".join(_said(part) for part in parts)
                        assert said == GREETING
                    case "/api/generate" if recorded["body"].get("keep_alive") == 0:
                        assert json.loads(text)["done_reason"] == "unload"
                    case "/api/generate":
                        assert json.loads(text)["response"] == GREETING
                    case "/api/show":
                        assert json.loads(text)["model_info"]["general.architecture"] == "qwen3"
                    case "/api/pull" | "/api/create":
                        assert json.loads(text.splitlines()[-1]) == {"status": "success"}
                    case "/api/tags":
                        assert any(model["name"] == "demo:latest" for model in json.loads(text)["models"])
                    case _:
                        pass
            assert {model["name"] for model in router.client.get("/api/tags")["models"]} == {
                "demo:latest", "mlx-community/House-0.4M:latest",
            }  # fmt: skip
    assert {path for _, path in seen} >= {
        "/api/version",
        "/api/tags",
        "/api/ps",
        "/api/show",
        "/api/chat",
        "/v1/models",
    }


def _said(part: dict[str, Any]) -> str:
    if "message" in part:
        return str(part["message"]["content"])
    return "".join(choice["delta"].get("content") or "" for choice in part.get("choices", []))
