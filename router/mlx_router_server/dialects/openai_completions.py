"""OpenAI's /v1/completions: prompts of text or token ids."""

from __future__ import annotations

from typing import Any, Final

from mlx_router_server.dialects.body import Int64, convert, read_object
from mlx_router_server.dialects.call import Call, Need, Needs
from mlx_router_server.dialects.fields import FieldRules
from mlx_router_server.dialects.openai_choices import (
    FIELD_NOTES,
    IGNORED_FIELDS,
    MOST_CHOICES,
    ChoicesFields,
    canonical_request,
    choices_call,
)
from mlx_router_server.dialects.openai_common import check_ranges, is_token_ids, limit_of
from mlx_router_server.dialects.options import parse_options
from mlx_router_shared.errors import InvalidRequest, UnsupportedCapability

__all__ = ["COMPLETION_FIELDS", "parse_completion"]

_COMPLETION_TOKENS: Final = 16  # OpenAI's own default for /v1/completions


class _CompletionBody(ChoicesFields, kw_only=True):
    prompt: str | list[Any] = ""
    suffix: str = ""
    echo: bool = False
    best_of: Int64 | None = None
    logprobs: Int64 | None = None


COMPLETION_FIELDS: Final = FieldRules(
    route="POST /v1/completions",
    body=_CompletionBody,
    ignored=IGNORED_FIELDS,
    notes={
        **FIELD_NOTES,
        "best_of": "has to equal n",
        "suffix": "for models whose vocabulary has tokens for filling in",
        "max_tokens": f"{_COMPLETION_TOKENS} if absent; 0 with echo",
    },
)


def parse_completion(body: bytes) -> Call:
    """Raises ``InvalidRequest`` with ``param``; nothing was looked up yet."""
    data = read_object(body, empty="EOF")
    completion = convert(data, _CompletionBody)
    ignored = list(COMPLETION_FIELDS.check(data))
    check_ranges(completion)
    needs = {Needs.COMPLETION: Need('"{name}" does not support completions')}
    if completion.suffix:
        needs[Needs.INSERT] = Need("{full} does not support insert", "suffix")
    if completion.best_of not in (None, completion.n):
        raise UnsupportedCapability("best_of has to equal n", param="best_of")
    if completion.logprobs is not None and not 0 <= completion.logprobs <= 5:
        raise InvalidRequest("logprobs must be between 0 and 5", param="logprobs")
    options = parse_options(completion.options)
    if completion.echo and completion.max_tokens == 0:
        limit: int | None = 0  # the prompt alone
    else:
        limit = limit_of(completion.max_tokens, options.max_tokens, _COMPLETION_TOKENS)
    requests = [
        canonical_request(
            completion,
            options,
            prompt=text,
            prompt_tokens=tokens,
            suffix=completion.suffix or None,
            max_tokens=limit,
            echo=completion.echo,
            top_logprobs=completion.logprobs,
        )
        for text, tokens in _prompts(completion.prompt)
    ]
    if completion.suffix and any(request.prompt is None for request in requests):
        raise InvalidRequest("suffix needs a prompt of text", param="suffix")
    return choices_call(completion, requests, needs, options, ignored)


def _prompts(prompt: str | list[Any]) -> list[tuple[str | None, list[int]]]:
    """Each as text or as token ids."""
    if isinstance(prompt, str):
        return [_prompt(prompt)]
    if prompt and all(isinstance(part, str | list) for part in prompt):
        if len(prompt) > MOST_CHOICES:
            raise InvalidRequest(f"there are more than {MOST_CHOICES} prompts", param="prompt")
        if len({type(part) for part in prompt}) > 1:
            raise InvalidRequest("prompts of text and of token ids cannot be mixed", param="prompt")
        return [_prompt(part) for part in prompt]
    return [_prompt(prompt)]


def _prompt(prompt: Any) -> tuple[str | None, list[int]]:
    if isinstance(prompt, str) and prompt:
        return prompt, []
    if is_token_ids(prompt):
        return None, prompt
    if prompt in ("", []):
        raise InvalidRequest("prompt must not be empty", param="prompt")
    raise InvalidRequest("prompt must be text or a list of token ids", param="prompt")
