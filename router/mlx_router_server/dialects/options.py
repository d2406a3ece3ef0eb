"""Ollama's ``options``: names, types, and what each becomes in the canonical request.

Also taken by /v1 as the extra field ``options``. Names that mean nothing to MLX are listed one by one; a name that
nobody knows is ignored too, as Ollama does, and both are told to the log.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Final

from mlx_router_shared.errors import InvalidRequest
from mlx_router_shared.generation import Sampling

__all__ = ["HONOURED_OPTIONS", "IGNORED_OPTIONS", "OLLAMA_DEFAULTS", "Options", "checked_stops", "parse_options"]

OLLAMA_DEFAULTS: Final = Sampling(
    temperature=0.8, top_k=40, top_p=0.9, min_p=0.0, repeat_penalty=1.0, repeat_last_n=64,
    presence_penalty=0.0, frequency_penalty=0.0,
)  # fmt: skip

_MOST_STOPS: Final = 100
_LONGEST_STOP: Final = 4096  # characters
_INTEGERS: Final = frozenset(
    [
        "num_ctx",
        "num_batch",
        "num_gpu",
        "main_gpu",
        "num_thread",
        "draft_num_predict",
        "num_keep",
        "num_predict",
        "seed",
        "top_k",
        "repeat_last_n",
        "num_gqa",
        "mirostat",
    ]
)
_FLOATS: Final = frozenset(
    [
        "temperature",
        "top_p",
        "min_p",
        "typical_p",
        "repeat_penalty",
        "presence_penalty",
        "frequency_penalty",
        "mirostat_tau",
        "mirostat_eta",
        "tfs_z",
        "rope_frequency_base",
        "rope_frequency_scale",
    ]
)
_BOOLEANS: Final = frozenset(
    ["use_mmap", "numa", "low_vram", "f16_kv", "logits_all", "vocab_only", "use_mlock", "penalize_newline"]
)
HONOURED_OPTIONS: Final = frozenset(
    [
        "num_ctx",
        "num_predict",
        "seed",
        "top_k",
        "top_p",
        "min_p",
        "temperature",
        "repeat_penalty",
        "repeat_last_n",
        "presence_penalty",
        "frequency_penalty",
        "stop",
    ]
)

IGNORED_OPTIONS: Final = (_INTEGERS | _FLOATS | _BOOLEANS) - HONOURED_OPTIONS
"""Those that Ollama knows, or knew, and that mean nothing to MLX."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """The options that were given."""

    sampling: Sampling
    max_tokens: int | None
    context_tokens: int | None
    stop: list[str]
    ignored: tuple[str, ...] = field(default=())


def parse_options(options: dict[str, Any]) -> Options:
    """Raises ``InvalidRequest`` in Ollama's words for a wrong type."""
    values: dict[str, Any] = {}
    ignored = []
    for name, value in options.items():
        if value is None:
            continue
        checked = _check(name, value)
        if name in HONOURED_OPTIONS:
            values[name] = checked
        else:
            ignored.append(name)
    predict = values.get("num_predict")
    context = values.get("num_ctx")
    seed = values.get("seed")
    return Options(
        sampling=Sampling(
            temperature=values.get("temperature"),
            top_p=values.get("top_p"),
            top_k=values.get("top_k"),
            min_p=values.get("min_p"),
            repeat_penalty=values.get("repeat_penalty"),
            repeat_last_n=values.get("repeat_last_n"),
            presence_penalty=values.get("presence_penalty"),
            frequency_penalty=values.get("frequency_penalty"),
            seed=None if seed is None or seed < 0 else seed,
        ),
        # Negative: until the model stops. 0 has no meaning of its own in Ollama's MLX engine: no limit either.
        max_tokens=predict if predict is not None and predict > 0 else None,
        context_tokens=max(context, 4) if context is not None and context > 0 else None,
        stop=checked_stops(values.get("stop", []), "options.stop"),
        ignored=tuple(ignored),
    )


def checked_stops(stops: list[str], param: str) -> list[str]:
    """Return the stop strings without empty ones. Raises ``InvalidRequest`` for too many and too long ones: each token
    of an answer is compared with all of them."""
    if len(stops) > _MOST_STOPS:
        raise InvalidRequest(f"{param} holds more than {_MOST_STOPS} strings", param=param)
    if any(len(stop) > _LONGEST_STOP for stop in stops):
        raise InvalidRequest(f"{param} holds a string of more than {_LONGEST_STOP} characters", param=param)
    return [stop for stop in stops if stop]


def _check(name: str, value: Any) -> Any:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if name in _INTEGERS:
        if not number:
            raise InvalidRequest(f'option "{name}" must be of type integer', param=f"options.{name}")
        if not -(2**63) <= value < 2**63:
            raise InvalidRequest(f'option "{name}" is out of range', param=f"options.{name}")
        return int(value)  # toward zero, as Ollama does
    if name in _FLOATS:
        if not number:
            raise InvalidRequest(f'option "{name}" must be of type float32', param=f"options.{name}")
        try:
            return float(value)
        except OverflowError:
            raise InvalidRequest(f'option "{name}" is out of range', param=f"options.{name}") from None
    if name in _BOOLEANS and not isinstance(value, bool):
        raise InvalidRequest(f'option "{name}" must be of type boolean', param=f"options.{name}")
    if name == "stop":
        if not isinstance(value, list):
            raise InvalidRequest('option "stop" must be of type array', param="options.stop")
        if not all(isinstance(part, str) for part in value):
            raise InvalidRequest('option "stop" must be of an array of strings', param="options.stop")
    return value
