"""What /v1/chat/completions, /v1/completions and /v1/responses have in common: sampling, parts, tools, effort."""

from __future__ import annotations

import re
from typing import Any, Final, NamedTuple

from msgspec import Struct, field

from mlx_router_server.dialects.body import Int64
from mlx_router_server.dialects.images import image_from_url
from mlx_router_server.dialects.options import Options
from mlx_router_shared.errors import InvalidRequest, UnsupportedCapability
from mlx_router_shared.generation import Sampling, Tool

__all__ = [
    "IMAGE_NAMES",
    "OPENAI_DEFAULTS",
    "PART_NAMES",
    "TOOL_CHOICE_NAMES",
    "SamplingFields",
    "ToolUse",
    "check_ranges",
    "first_said",
    "function_name",
    "is_token_ids",
    "limit_of",
    "read_effort",
    "read_part",
    "sampling_of",
    "tool_use",
]

PART_NAMES: Final = frozenset({"type", "text", "refusal", "image_url"})
"""The fields of a message's part that mean something here."""
IMAGE_NAMES: Final = frozenset({"url"})
TOOL_CHOICE_NAMES: Final = {
    "tool_choice": frozenset({"type", "name", "function", "allowed_tools", "mode", "tools"}),
    "tool_choice.function": frozenset({"name"}),
    "tool_choice.allowed_tools": frozenset({"mode", "tools"}),
}
OPENAI_DEFAULTS: Final = Sampling(temperature=1.0, top_p=1.0)
_MOST_BIASES: Final = 1000
_EFFORTS: Final = ("none", "minimal", "low", "medium", "high", "xhigh", "max", "ultra")


class SamplingFields(Struct, kw_only=True):
    """Fields by which the next token is drawn, and how the request is served."""

    model: str = ""
    stream: bool = False
    temperature: float | None = None
    top_p: float | None = None
    seed: Int64 | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    logit_bias: dict[str, float] = field(default_factory=dict)
    # Extensions that are seen in the field.
    top_k: Int64 | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    num_ctx: Int64 | None = None
    keep_alive: Any = None
    options: dict[str, Any] = field(default_factory=dict)


def first_said(said: Any, otherwise: Any) -> Any:
    return otherwise if said is None else said


def sampling_of(body: SamplingFields, options: Options) -> Sampling:
    """The body's own fields, and where it has none those of Ollama's ``options``."""
    said = options.sampling
    return Sampling(
        temperature=first_said(body.temperature, said.temperature),
        top_p=first_said(body.top_p, said.top_p),
        top_k=first_said(body.top_k, said.top_k),
        min_p=first_said(body.min_p, said.min_p),
        repeat_penalty=first_said(body.repetition_penalty, said.repeat_penalty),
        repeat_last_n=said.repeat_last_n,
        presence_penalty=first_said(body.presence_penalty, said.presence_penalty),
        frequency_penalty=first_said(body.frequency_penalty, said.frequency_penalty),
        seed=said.seed if body.seed is None or body.seed < 0 else body.seed,  # a negative one asks for any
        logit_bias=_logit_bias(body.logit_bias),
    )


def check_ranges(body: SamplingFields) -> None:
    """Raise ``InvalidRequest`` that names the first field that is out of range.

    Numbers by which clients say "off" or "no limit" (``top_k`` -1, ``max_tokens`` 0 or -1 and the like) are not
    refused: ``limit_of`` and the worker's ``normalise`` give them their meaning.
    """
    ranges: tuple[tuple[str, float | None, float, float], ...] = (
        ("temperature", body.temperature, 0, 2),
        ("top_p", body.top_p, -1, 1),
        ("min_p", body.min_p, -1, 1),
        ("presence_penalty", body.presence_penalty, -2, 2),
        ("frequency_penalty", body.frequency_penalty, -2, 2),
    )
    for name, value, low, high in ranges:
        if value is not None and not low <= value <= high:
            low = 0 if name in ("top_p", "min_p") else low
            raise InvalidRequest(f"{name} must be between {low} and {high}, not {value:g}", param=name)


def limit_of(*counts: int | None) -> int | None:
    """Return the first count that is given; None if it is 0 or negative, which means "no limit" as in Ollama."""
    given = next((count for count in counts if count is not None), None)
    return given if given is not None and given > 0 else None


def _logit_bias(bias: dict[str, float]) -> dict[int, float]:
    if len(bias) > _MOST_BIASES:
        raise InvalidRequest(f"logit_bias holds more than {_MOST_BIASES} tokens", param="logit_bias")
    found = {}
    for token, value in bias.items():
        if re.fullmatch("[0-9]{1,9}", token) is None or not -100 <= value <= 100:
            raise InvalidRequest("logit_bias maps token ids to numbers from -100 to 100", param="logit_bias")
        found[int(token)] = value
    return found


def read_effort(effort: str | None, param: str) -> tuple[bool | None, str | None]:
    """Whether to think, and how hard; None leaves it to the model."""
    if effort is None:
        return None, None
    if effort not in _EFFORTS:
        raise InvalidRequest(f'invalid reasoning value: "{effort}" (must be one of {", ".join(_EFFORTS)})', param=param)
    if effort == "none":
        return False, None
    return True, {"minimal": "low", "xhigh": "max", "ultra": "max"}.get(effort, effort)


def read_part(part: dict[str, Any], at: str) -> str | bytes:
    """One part of a message: its text, or the file of its image."""
    kind = part.get("type")
    if kind in ("text", "input_text", "output_text", "summary_text", "reasoning_text", "refusal"):
        text = part.get("refusal" if kind == "refusal" else "text")
        if isinstance(text, str):
            return text
    elif kind in ("image_url", "input_image"):
        image = part.get("image_url")
        url = image.get("url") if isinstance(image, dict) else image
        if isinstance(url, str):
            return image_from_url(url, at)
    elif kind in ("input_audio", "audio"):
        raise UnsupportedCapability("this server takes no audio", param=at)
    elif kind in ("file", "input_file"):
        raise UnsupportedCapability("file inputs are not currently supported", param=at)
    raise InvalidRequest("invalid message format", param=at)


class ToolUse(NamedTuple):
    """Which tools a request offers, and which of them it insists on."""

    offered: list[Tool]
    forced: list[str]


def function_name(choice: dict[str, Any]) -> Any:
    """The name in ``{"function": {"name": …}}`` (chat) or ``{"name": …}`` (responses)."""
    inner = choice.get("function")
    return inner.get("name") if isinstance(inner, dict) else choice.get("name")


def tool_use(tools: list[Tool], choice: Any) -> ToolUse:
    """What ``tool_choice`` makes of the tools; raises ``InvalidRequest`` for one that makes no sense."""
    if not choice or choice == "auto":
        return ToolUse(tools, [])
    if choice == "none":
        return ToolUse([], [])  # a call cannot be made where no tool is known
    known = [tool.name for tool in tools]
    if not tools:
        raise InvalidRequest("tool_choice needs tools", param="tool_choice")
    if choice == "required":
        return ToolUse(tools, known)
    if not isinstance(choice, dict):
        raise InvalidRequest("tool_choice must be none, auto, required or an object", param="tool_choice")
    if choice.get("type") == "allowed_tools":
        return _allowed_tools(tools, choice)
    name = function_name(choice)
    if choice.get("type", "function") != "function":
        raise UnsupportedCapability(f"tool_choice of type {choice['type']!r} is not supported", param="tool_choice")
    if name not in known:
        raise InvalidRequest(f"tool_choice names {name!r}, which is not among the tools", param="tool_choice")
    return ToolUse(tools, [name])


def _allowed_tools(tools: list[Tool], choice: dict[str, Any]) -> ToolUse:
    inner = choice.get("allowed_tools")
    said = inner if isinstance(inner, dict) else choice
    items = said.get("tools")
    names = [function_name(item) for item in items if isinstance(item, dict)] if isinstance(items, list) else []
    known = [tool.name for tool in tools]
    unknown = [name for name in names if name not in known]
    if not names or unknown:
        raise InvalidRequest(f"tool_choice allows {unknown or 'nothing'}, which is not among the tools",
                             param="tool_choice")  # fmt: skip
    offered = [tool for tool in tools if tool.name in names]
    return ToolUse(offered, [tool.name for tool in offered] if said.get("mode") == "required" else [])


def is_token_ids(value: Any) -> bool:
    """Whether this is a list of whole numbers that could be token ids; which of them a model has, it says itself."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(token, int) and not isinstance(token, bool) and -(2**31) <= token < 2**31 for token in value)
    )
