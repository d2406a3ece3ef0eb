"""What /v1/chat/completions and /v1/completions share: sampling, stops, and several choices for a prompt."""

from __future__ import annotations

from typing import Any, Final

from msgspec import Struct, field
from msgspec.structs import replace

from mlx_router_server.dialects.body import Int64
from mlx_router_server.dialects.call import Call, Need, Needs
from mlx_router_server.dialects.openai_common import OPENAI_DEFAULTS, SamplingFields, limit_of, sampling_of
from mlx_router_server.dialects.options import Options, checked_stops
from mlx_router_server.durations import parse_duration
from mlx_router_shared.errors import InvalidRequest
from mlx_router_shared.generation import GenerationRequest

__all__ = [
    "ACCOUNTING",
    "FIELD_NOTES",
    "IGNORED_FIELDS",
    "MOST_CHOICES",
    "ChoicesFields",
    "canonical_request",
    "choices_call",
]

MOST_CHOICES: Final = 64
ACCOUNTING: Final = "accounting of a hosted service; nothing here depends on it"
IGNORED_FIELDS: Final = {
    "user": ACCOUNTING,
    "safety_identifier": ACCOUNTING,
    "metadata": ACCOUNTING,
    "store": "nothing of a completion is kept here",
    "service_tier": ACCOUNTING,
    "prompt_cache_key": "what was read of a prompt is not kept for the next request",
    "prompt_cache_retention": "as prompt_cache_key",
    "prompt_cache_options": "as prompt_cache_key",
    "moderation": ACCOUNTING,
    "verbosity": "no model here knows it",
    "prediction": "a hint for speed",
}
FIELD_NOTES: Final = {
    "keep_alive": "Ollama's field, also by the header X-Keep-Alive",
    "options": "Ollama's field; the API's own fields win over it",
    "num_ctx": "Ollama's option: the context of this request",
    "n": f"at most {MOST_CHOICES} choices in one request, prompts times n",
    "seed": "the k-th choice of several is drawn with seed + k",
    "logit_bias": "token ids of the model's own vocabulary",
}


class _StreamOptions(Struct, kw_only=True):
    include_usage: bool = False


class ChoicesFields(SamplingFields, kw_only=True):
    stream_options: _StreamOptions = field(default_factory=_StreamOptions)
    max_tokens: Int64 | None = None
    n: Int64 = 1
    stop: str | list[str] = field(default_factory=list)


def choices_call(
    body: ChoicesFields, prompts: list[GenerationRequest], needs: dict[Needs, Need], options: Options,
    ignored: list[str],
) -> Call:  # fmt: skip
    if not 1 <= body.n <= MOST_CHOICES // len(prompts):
        raise InvalidRequest(f"n times the number of prompts must be between 1 and {MOST_CHOICES}", param="n")
    requests = [_other_choice(request, number) for request in prompts for number in range(body.n)]
    return Call(
        model=body.model,
        requests=tuple(requests),
        stream=body.stream,
        keep_alive_seconds=None if body.keep_alive is None else parse_duration(body.keep_alive),
        needs=needs,
        choices_per_prompt=body.n,
        include_usage=body.stream_options.include_usage,
        ignored=(*ignored, *(f"options.{name}" for name in options.ignored)),
    )


def _other_choice(request: GenerationRequest, number: int) -> GenerationRequest:
    """The same request again; with a seed of its own, or every choice would be the same."""
    seed = request.sampling.seed
    if seed is None or number == 0:
        return request
    return replace(request, sampling=replace(request.sampling, seed=seed + number))


def canonical_request(body: ChoicesFields, options: Options, **more: Any) -> GenerationRequest:
    stop = [body.stop] if isinstance(body.stop, str) else body.stop
    return GenerationRequest(
        sampling=sampling_of(body, options),
        sampling_defaults=OPENAI_DEFAULTS,
        context_tokens=limit_of(body.num_ctx, options.context_tokens),
        stop=checked_stops(stop, "stop") or options.stop,
        **more,
    )
