"""Fuzzes every route of a running router: ``python -m tests.fuzz --minutes 5`` (`make fuzz`).

Each request is a right one, changed in a place or two: a value of another type, a field too many or too few, text of
every kind, bytes that are no JSON, odd headers. What has to hold:

- no answer has status 500, and none takes longer than its limit;
- a request that ends with a status from 400 to 499 has caused no load and no unload;
- a stream ends with the API's terminal frame or its error frame;
- at the end the router still answers, nothing is leased, and no descriptor was left open.

The same seed plays the same requests.
"""

from __future__ import annotations

import argparse
import copy
import http.client
import json
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote, urlsplit

import psutil

from tests.support.fakes import write_fake
from tests.support.router import RouterProcess, running_router, wait_until, write_config
from tests.tiny_models.script import WEATHER_TOOL

_LIMIT_SECONDS: Final = 30.0
_USER: Final = [{"role": "user", "content": "Hello!"}]
_TOOL: Final = {"name": "get_weather", "input_schema": WEATHER_TOOL["function"]["parameters"]}
_SCHEMA: Final = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
_OPTIONS: Final = {"num_predict": 4, "temperature": 0.5, "seed": 1, "stop": ["x"], "num_ctx": 2048}
_BODIES: Final[dict[str, dict[str, Any]]] = {
    "/api/chat": {"messages": _USER, "stream": True, "options": _OPTIONS, "tools": [WEATHER_TOOL], "format": "",
                  "think": False, "keep_alive": "5m", "logprobs": True, "top_logprobs": 1},
    "/api/generate": {"prompt": "Hello!", "system": "s", "stream": False, "options": _OPTIONS, "format": _SCHEMA,
                      "suffix": "", "template": "{{ .Prompt }}", "context": [300], "raw": False, "images": []},
    "/api/embed": {"input": ["a", "b"], "dimensions": 4, "truncate": True},
    "/api/embeddings": {"prompt": "a"},
    "/api/show": {"model": "demo", "verbose": False},
    "/api/rerank": {"query": "a", "documents": ["a", "b"], "top_n": 1},
    "/v1/rerank": {"query": "a", "documents": ["a", {"text": "b"}]},
    "/v1/chat/completions": {"messages": [{"role": "developer", "content": "s"}, *_USER], "max_tokens": 4, "stream": True,
                             "tools": [WEATHER_TOOL], "tool_choice": "auto", "n": 2, "temperature": 1, "seed": 3,
                             "response_format": {"type": "text"}, "stop": ["x"], "logit_bias": {"300": 1},
                             "logprobs": True, "top_logprobs": 2, "stream_options": {"include_usage": True}},
    "/v1/completions": {"prompt": ["a", "b"], "max_tokens": 3, "echo": True, "logprobs": 1, "n": 2},
    "/v1/embeddings": {"input": ["a", "b"], "encoding_format": "base64", "dimensions": 4},
    "/v1/responses": {"input": [{"role": "user", "content": [{"type": "input_text", "text": "Hello!"}]}],
                      "instructions": "s", "max_output_tokens": 4, "stream": True, "tools": [{"type": "function", **WEATHER_TOOL["function"]}],
                      "text": {"format": {"type": "json_schema", "name": "n", "schema": _SCHEMA}}, "reasoning": {"effort": "low"}},
    "/v1/responses/input_tokens": {"input": "Hello!"},
    "/v1/messages": {"messages": [*_USER, {"role": "assistant", "content": [{"type": "text", "text": "Hi"}]}, *_USER],
                     "max_tokens": 4, "system": [{"type": "text", "text": "s"}], "stream": True, "tools": [_TOOL],
                     "tool_choice": {"type": "auto"}, "thinking": {"type": "enabled", "budget_tokens": 2}, "stop_sequences": ["x"]},
    "/v1/messages/count_tokens": {"messages": _USER, "system": "s", "tools": [_TOOL]},
    "/admin/plan": {"model": "cold"},
}  # fmt: skip
_LOOKS: Final = (
    "/", "/api/version", "/api/tags", "/api/ps", "/api/status", "/v1/models", "/v1/models/demo", "/health", "/ready",
    "/admin/status", "/v1/responses/resp_x", "/v1/responses/resp_x/input_items",
)  # fmt: skip
_ENDS: Final = (b"data: [DONE]\n\n", b'"done":true', b"message_stop", b"response.completed", b"response.incomplete",
                b"response.failed", b'{"error"', b"event: error")  # fmt: skip


class Fuzzer:
    """Makes requests, one after the other."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def _value(self, depth: int = 0) -> Any:
        choose = self._random
        simple: list[Any] = [
            None, True, False, 0, 1, -1, 2**31, 2**63, -(2**70), 0.5, -0.0, 1e308, "", "x", "hot", "demo", "cold", "\x00", "😀" * 3,
            "<|im_end|>", "../../etc/passwd", "{{ .Prompt", "a" * 5000, "5m", "-1", [], {}, [None], [[]], {"": None},
        ]  # fmt: skip
        if depth < 3 and choose.random() < 0.3:
            if choose.random() < 0.5:
                return [self._value(depth + 1) for _ in range(choose.randint(0, 4))]
            return {str(self._value(9))[:8]: self._value(depth + 1) for _ in range(choose.randint(0, 4))}
        return choose.choice(simple)

    def _change(self, node: Any) -> None:
        """One change somewhere inside, in place."""
        choose = self._random
        keys: list[Any] = list(node) if isinstance(node, dict) else list(range(len(node)))
        if not keys:
            if isinstance(node, list):
                node.append(self._value())
            return
        key = choose.choice(keys)
        if isinstance(node[key], dict | list) and node[key] and choose.random() < 0.6:
            self._change(node[key])
        elif choose.random() < 0.15:
            del node[key]
        elif isinstance(node, dict) and choose.random() < 0.15:
            node[str(self._value(9))[:20]] = self._value()
        elif isinstance(node, list) and choose.random() < 0.3:
            node += copy.deepcopy(node) * choose.randint(1, 3)
        else:
            node[key] = self._value()

    def request(self) -> tuple[str, str, bytes | None, dict[str, str]]:
        choose = self._random
        headers: dict[str, str] = {}
        if choose.random() < 0.1:
            headers[
                choose.choice(
                    [
                        "X-Priority",
                        "X-Deadline-Seconds",
                        "X-Keep-Alive",
                        "X-Prefix-Cache",
                        "anthropic-version",
                        "Content-Type",
                    ]
                )
            ] = choose.choice(["5", "high", "x", "-1", "2023-06-01", "nan", "1e99", "5m"])
        if choose.random() < 0.06:
            path = choose.choice(_LOOKS) + choose.choice(["", "/", "?limit=1", "?limit=x&after_id=demo", "/x", "%2F.."])
            return choose.choice(["GET", "HEAD", "POST", "PUT", "DELETE"]), path, None, headers
        path = choose.choice(list(_BODIES))
        body: dict[str, Any] = {
            "model": choose.choice(["demo", "demo", "demo", "fake", "cold", "nosuch"]),
            **copy.deepcopy(_BODIES[path]),
        }
        if choose.random() < 0.5:  # a part of it, so that the fields are seen apart
            for name in list(body):
                if name != "model" and choose.random() < 0.3:
                    del body[name]
        for _ in range(choose.choice([0, 1, 1, 1, 2, 3])):
            self._change(body)
        data = json.dumps(body).encode()
        if choose.random() < 0.05:
            at = choose.randrange(len(data))
            data = choose.choice([data[:at], data[:at] + b"\xff" + data[at:], b"", b"[" * 2000, data + data])
        return "POST", path + choose.choice(["", "", "", "?beta=true"]), data, headers


def _send(
    router: RouterProcess, method: str, path: str, body: bytes | None, headers: dict[str, str]
) -> tuple[int, bytes, str]:
    parts = urlsplit(router.url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=_LIMIT_SECONDS)
    try:
        connection.request(method, quote(path, safe="/?=&%"), body, headers)
        reply = connection.getresponse()
        return reply.status, reply.read(), reply.headers.get("content-type") or ""
    finally:
        connection.close()


def _loads(router: RouterProcess) -> list[tuple[str, int, str]]:
    return [(model["name"], model["loads"], model["state"]) for model in router.status()["models"]]


def fuzz(router: RouterProcess, seed: int, minutes: float) -> list[str]:
    """What went wrong, in words; prints how it went."""
    fuzzer, statuses = Fuzzer(seed), Counter[int]()
    wrong: list[str] = []
    slowest = 0.0
    end = time.monotonic() + 60 * minutes
    before = _loads(router)
    while time.monotonic() < end and len(wrong) < 20:
        method, path, body, headers = fuzzer.request()
        began = time.monotonic()
        told = f"{method} {path} {headers} {(body or b'')[:2000]!r}"
        try:
            status, answer, kind = _send(router, method, path, body, headers)
        except Exception as error:
            wrong.append(f"{type(error).__name__}: {error}: {told}")
            continue
        slowest = max(slowest, time.monotonic() - began)
        statuses[status] += 1
        if status == 500:
            wrong.append(f"status 500 {answer[:300]!r}: {told}")
        streamed = status == 200 and ("event-stream" in kind or "ndjson" in kind)
        if streamed and not any(mark in answer for mark in _ENDS):
            wrong.append(f"a stream without an end {answer[-300:]!r}: {told}")
        if 400 <= status < 500:
            after = _loads(router)
            if [m[:2] for m in after] != [m[:2] for m in before]:
                wrong.append(f"status {status} and a load {before} -> {after}: {told}")
        before = _loads(router)
    print(f"{sum(statuses.values())} requests, slowest {slowest:.1f} s, statuses {dict(sorted(statuses.items()))}")
    return wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--seed", type=int, default=20261124)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        home = Path(scratch)
        models = {name: {"path": str(write_fake(home / "fakes" / name, tokens=4))} for name in ("fake", "cold")}
        arguments = ["--config", str(write_config(home, models, standby_workers=0)), "--log-level", "warning"]
        with running_router(home, *arguments) as router:
            for name in (
                "demo",
                "fake",
                "cold",
            ):  # everything that will hold a descriptor is there before they are counted
                router.generate(name, prompt="Hello!")
                _send(
                    router,
                    "POST",
                    "/v1/messages/count_tokens",
                    json.dumps({"model": name, "messages": _USER}).encode(),
                    {},
                )
            router.client.post("/admin/models/cold/unload", {})
            router.wait_state("cold", "unloaded")
            descriptors = psutil.Process(router.pid).num_fds()
            wrong = fuzz(router, options.seed, options.minutes)
            wait_until(
                lambda: all(model["in_flight"] == 0 for model in router.status()["models"]), "every lease is back"
            )
            assert router.generate("demo", prompt="Hello!")["done"] is True
            wait_until(lambda: psutil.Process(router.pid).num_fds() <= descriptors + 6, "descriptors are closed")
    for text in wrong:
        print(text)
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
