"""One request of the chaos run, by an API and in a manner that the dice choose, and the judgement of what came back.

Three ends of an answer are right: whole, refused with a reason, or broken off because this client left. Every other is
written down: a stream that ends without its last frame, a status without a reason, another model's words.
"""

from __future__ import annotations

import dataclasses
import http.client
import json
import random
import re
import time
from typing import Any
from urllib.parse import urlsplit

from tests.tiny_models.script import GREETING

__all__ = ["Outcome", "ask"]

_PATIENCE_SECONDS = 90.0
_REASONS = re.compile(
    "|".join(
        ["unexpectedly stopped", "shutting down", "could not begin within", "cannot begin within", "server busy",
         "failed and is tried again", "held by pinned", "still in use after", "the dice say no", "evicted for",
         "did not finish loading", "worker process", "unloaded", "is pinned"]
    )
)  # fmt: skip


@dataclasses.dataclass
class Outcome:
    """What came of one request."""

    kind: str
    silent_seconds: float
    """Until the whole answer or the refusal; for a stream, the longest silence."""
    wrong: str = ""


def ask(url: str, model: str, dice: random.Random) -> Outcome:
    """Send one request and read what comes, or a part of it."""
    stream = dice.random() < 0.6
    path = dice.choice(["/api/chat", "/v1/chat/completions"])
    leaves = dice.random() < 0.15
    headers = {"X-Priority": dice.choice(["low", "normal", "high"])}
    if dice.random() < 0.1:
        headers["X-Deadline-Seconds"] = str(dice.choice([1, 5]))
    body = {"model": model, "messages": [{"role": "user", "content": "Hello!"}], "stream": stream, "temperature": 0}
    if path.startswith("/api"):
        body["options"] = {"temperature": 0}
    limit = {"options": {"temperature": 0, "num_predict": 8}} if path.startswith("/api") else {"max_tokens": 8}
    if model == "random":
        body.update(limit)
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=_PATIENCE_SECONDS)
    began = time.monotonic()
    try:
        connection.request("POST", path, json.dumps(body), headers)
        response = connection.getresponse()
        if leaves:
            response.read(dice.randint(1, 200) if stream else 1)
            return Outcome("left", time.monotonic() - began)
        lines, longest = _read(response, began)
    except TimeoutError:
        return Outcome("silence", time.monotonic() - began, f"{model}: no byte for {_PATIENCE_SECONDS} s")
    except (OSError, http.client.HTTPException) as error:
        return Outcome("broken", time.monotonic() - began, f"{model} {path}: the connection broke: {error!r}")
    finally:
        connection.close()
    return _judge(model, path, stream, response, b"".join(lines), longest)


def _read(response: http.client.HTTPResponse, began: float) -> tuple[list[bytes], float]:
    lines, longest, last = [], 0.0, began
    while line := response.readline():
        now = time.monotonic()
        longest, last = max(longest, now - last), now
        lines.append(line)
    return lines, max(longest, time.monotonic() - last)


def _judge(
    model: str, path: str, stream: bool, response: http.client.HTTPResponse, data: bytes, longest: float
) -> Outcome:
    where = f"{model} {path} stream={stream} status {response.status}"
    if response.status != 200:
        reason = _message(json.loads(data))
        if not _REASONS.search(reason):
            return Outcome("refused", longest, f"{where}: no known reason: {reason!r}")
        if response.status == 503 and response.headers.get("retry-after") is None:
            return Outcome("refused", longest, f"{where}: 503 without Retry-After")
        if response.status not in (400, 500, 503):
            return Outcome("refused", longest, f"{where}: {reason}")
        return Outcome(f"refused {response.status}", longest)
    objects = _objects(path, stream, data)
    errors = [_message(found) for found in objects if "error" in found]
    if errors:
        known = _REASONS.search(errors[-1]) and "error" in objects[-1]
        return Outcome("error in stream", longest, "" if known else f"{where}: {errors[-1]!r}")
    if stream and not (data.endswith(b"data: [DONE]\n\n") if path.startswith("/v1") else objects[-1].get("done")):
        return Outcome("cut", longest, f"{where}: ended without its last frame: {data[-200:]!r}")
    text = "".join(_text(path, found) for found in objects)
    if not _right(model, text):
        return Outcome("wrong", longest, f"{where}: {text!r}")
    return Outcome("answered", longest)


def _objects(path: str, stream: bool, data: bytes) -> list[dict[str, Any]]:
    if not stream:
        return [json.loads(data)]
    if path.startswith("/v1"):
        frames = [line[6:] for line in data.splitlines() if line.startswith(b"data: ")]
        return [json.loads(frame) for frame in frames if frame != b"[DONE]"]
    return [json.loads(line) for line in data.splitlines()]


def _message(found: dict[str, Any]) -> str:
    error = found.get("error", "")
    return str(error.get("message", error) if isinstance(error, dict) else error)


def _text(path: str, found: dict[str, Any]) -> str:
    if path.startswith("/api"):
        return str(found["message"]["content"])
    choices = found["choices"]
    part = (choices[0].get("delta") or choices[0].get("message")) if choices else {}
    return str((part or {}).get("content") or "")


def _right(model: str, text: str) -> bool:
    """Fake models say their name and count; the demo has its greeting by heart; random weights always babble alike."""
    if model == "demo":
        return text == GREETING
    if model == "random":
        return f"{model}:latest" not in text and GREETING not in text and "-1 " not in text
    words = text.split()
    return words == [f"{model}:latest-{number}" for number in range(1, len(words) + 1)] and len(words) > 0
