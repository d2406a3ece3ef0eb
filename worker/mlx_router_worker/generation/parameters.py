"""The sampling parameters of an answer: the client's, the model author's and the API's, merged and within range."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, Final

from mlx_router_shared.generation import Sampling

__all__ = ["first_said", "normalise", "read_generation_config"]

_LOWEST_TEMPERATURE: Final = 1e-4
"""Below it the most likely token is drawn in any case, and log probabilities divided by it are no numbers any more."""
_HIGHEST_TEMPERATURE: Final = 1000.0
"""Above it every token is about as likely as every other."""
_LOWEST_TOP_P: Final = 1e-6
"""Keeps the most likely token only."""
_REPEAT_PENALTY_RANGE: Final = (0.01, 100.0)
_LARGEST_PENALTY: Final = 1000.0
_LARGEST_BIAS: Final = 10_000.0
_LARGEST_COUNT: Final = 2**31 - 1


def normalise(sampling: Sampling) -> Sampling:
    """Return the parameters with every number in the range that the samplers accept.

    For numbers from requests and from files alike. ``None`` stays "not given"; numbers that are not finite and negative
    temperatures become it. A number by which people say "off" becomes the value that switches off: 0 or less for
    ``top_k``, less than 0 or more than 1 for ``top_p``, 0 or less for ``min_p`` and ``repeat_penalty``. A negative seed
    asks for a random one.
    """
    temperature = _finite(sampling.temperature)
    if temperature is not None:
        temperature = None if temperature < 0 else min(temperature, _HIGHEST_TEMPERATURE)
        temperature = 0.0 if temperature is not None and temperature < _LOWEST_TEMPERATURE else temperature
    top_p = _finite(sampling.top_p)
    if top_p is not None:
        top_p = max(top_p, _LOWEST_TOP_P) if 0 <= top_p <= 1 else 1.0
    min_p = _finite(sampling.min_p)
    repeat_penalty = _finite(sampling.repeat_penalty)
    if repeat_penalty is not None:
        repeat_penalty = _clamp(repeat_penalty, *_REPEAT_PENALTY_RANGE) if repeat_penalty > 0 else 1.0
    last_n = sampling.repeat_last_n
    return Sampling(
        temperature=temperature,
        top_p=top_p,
        top_k=None if sampling.top_k is None else int(_clamp(sampling.top_k, 0, _LARGEST_COUNT)),
        min_p=None if min_p is None else _clamp(min_p, 0.0, 1.0),
        repeat_penalty=repeat_penalty,
        repeat_last_n=None if last_n is None else int(_clamp(last_n, -1, _LARGEST_COUNT)),
        presence_penalty=_penalty(sampling.presence_penalty),
        frequency_penalty=_penalty(sampling.frequency_penalty),
        seed=None if sampling.seed is None or sampling.seed < 0 else sampling.seed,
        logit_bias={
            token: _clamp(bias, -_LARGEST_BIAS, _LARGEST_BIAS)
            for token, bias in sampling.logit_bias.items()
            if math.isfinite(bias)
        },
    )


def _clamp(value: float, low: float, high: float) -> float:
    return min(max(value, low), high)


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _penalty(value: float | None) -> float | None:
    finite = _finite(value)
    return None if finite is None else _clamp(finite, -_LARGEST_PENALTY, _LARGEST_PENALTY)


def first_said(*choices: Sampling) -> Sampling:
    """Merge parameters: field by field the first that is given. All of them are normalised first, so that "off" in a
    request overrides what the model's author recommends."""
    choices = tuple(map(normalise, choices))
    said: dict[str, Any] = {}
    for name in Sampling.__struct_fields__:
        values = [getattr(choice, name) for choice in choices]
        said[name] = next((value for value in values if value not in (None, {})), values[-1])
    return Sampling(**said)


def read_generation_config(path: Path) -> Sampling:
    """The model author's sampling defaults, which mlx-lm does not read."""
    try:
        config = json.loads((path / "generation_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return Sampling()
    if not isinstance(config, dict):
        return Sampling()
    if config.get("do_sample") is False:
        return Sampling(temperature=0.0)

    def number(name: str) -> float | None:
        value = config.get(name)
        if not isinstance(value, int | float) or isinstance(value, bool):
            return None
        try:
            return _finite(float(value))
        except OverflowError:  # an integer of hundreds of digits
            return None

    top_k = number("top_k")
    return normalise(
        Sampling(
            temperature=number("temperature"),
            top_p=number("top_p"),
            top_k=int(_clamp(top_k, 0, _LARGEST_COUNT)) if top_k is not None else None,
            min_p=number("min_p"),
            repeat_penalty=number("repetition_penalty"),
        )
    )
