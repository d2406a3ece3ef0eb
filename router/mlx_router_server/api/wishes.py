"""What a request says in headers about how it wants to be served: for how long, how urgently, until when.

The same headers on all APIs; what a body says of ``keep_alive`` wins over the header.
"""

from __future__ import annotations

import math
from typing import Final

from starlette.requests import Request

from mlx_router_server.api.server import caller_of
from mlx_router_server.durations import parse_duration
from mlx_router_server.workers.plan import Wishes
from mlx_router_shared.errors import InvalidRequest

__all__ = ["read_wishes"]

_WORDS: Final = {"low": -10, "normal": 0, "high": 10}
_MOST: Final = 100


def read_wishes(request: Request, keep_alive_seconds: float | None = None, *, explicit: bool = False) -> Wishes:
    """Raises ``InvalidRequest`` that names the header; nothing has touched a model by then."""
    if keep_alive_seconds is None:
        keep_alive_seconds = _keep_alive(request.headers.get("x-keep-alive"))
    return Wishes(
        keep_alive_seconds=keep_alive_seconds,
        priority=_priority(request.headers.get("x-priority")),
        deadline_seconds=_deadline(request.headers.get("x-deadline-seconds")),
        cache_prompt=_cache_prompt(request.headers.get("x-prefix-cache")),
        cache_scope=caller_of(request).digest,
        explicit=explicit,
    )


def _keep_alive(text: str | None) -> float | None:
    if text is None:
        return None
    try:
        seconds = float(text)
    except ValueError:
        return parse_duration(text)
    return parse_duration(text if math.isnan(seconds) else seconds)


def _cache_prompt(text: str | None) -> bool:
    if text is None:
        return True
    if (word := text.strip().lower()) not in ("on", "off"):
        raise InvalidRequest("X-Prefix-Cache must be on or off", param="X-Prefix-Cache")
    return word == "on"


def _priority(text: str | None) -> int:
    """A word, or a whole number in which larger is more urgent."""
    if text is None:
        return 0
    word = text.strip().lower()
    if word in _WORDS:
        return _WORDS[word]
    try:
        number = int(word)
    except ValueError:
        number = _MOST + 1
    if abs(number) > _MOST:
        raise InvalidRequest(
            f"X-Priority has to be low, normal, high or a whole number from -{_MOST} to {_MOST}", param="X-Priority"
        )
    return number


def _deadline(text: str | None) -> float | None:
    if text is None:
        return None
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not (seconds > 0 and math.isfinite(seconds)):
        raise InvalidRequest("X-Deadline-Seconds has to be a number of seconds above 0", param="X-Deadline-Seconds")
    return seconds
