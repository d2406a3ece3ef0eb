"""From a request to the token ids of its prompt, by the model's own tokenizer and template.

Takes the tokenizer as an object (mlx-lm's wrapper around a Hugging Face one) and knows nothing of MLX, so that prompts
can be counted where no weights are.
"""

from __future__ import annotations

import json
from typing import Any, Final

from mlx_router_shared.errors import ContextLengthExceeded, InvalidRequest, UnsupportedCapability
from mlx_router_shared.generation import GenerationRequest, Message
from mlx_router_shared.infill import infill_format
from mlx_router_worker.text.prompt import droppable, merge_system, template_messages, template_tools, without
from mlx_router_worker.text.token_bytes import is_token

__all__ = ["PromptRenderer", "is_chat"]


_COUNTED_TOKENS: Final = 500_000
"""Prompts that are longer than this and than eight contexts are not counted."""


def _too_long(tokens: int, limit: int) -> ContextLengthExceeded:
    return ContextLengthExceeded(
        f"input length ({tokens} tokens) exceeds the model's maximum context length ({limit} tokens)",
        tokens=tokens,
        limit=limit,
    )


def is_chat(request: GenerationRequest) -> bool:
    """Whether its prompt is made by the chat template."""
    return request.prompt is None and not request.prompt_tokens


class PromptRenderer:
    """Knows one tokenizer. ``context_tokens`` is the longest prompt plus answer, ``vocabulary`` the model's ids."""

    def __init__(self, tokenizer: Any, context_tokens: int, vocabulary: int) -> None:
        self._tokenizer = tokenizer
        self._context_tokens = context_tokens
        self._vocabulary = vocabulary
        self._longest_token = max(map(len, tokenizer.get_vocab()), default=1)

    def context_of(self, request: GenerationRequest) -> int:
        """The limit that prompt and answer of this request stay in."""
        return min(self._context_tokens, request.context_tokens or self._context_tokens)

    def tokens(self, request: GenerationRequest) -> tuple[list[int], int]:
        """The tokens of the prompt, and how many turns had to be left out. Raises when it does not fit."""
        limit = self.context_of(request)
        messages = request.messages
        shortens = is_chat(request) and request.truncate
        if shortens:
            messages = self._without_hopeless(messages, limit)
        self._refuse_hopeless(request, messages, limit)
        tokens = self._tokens(request, messages)
        if shortens and len(tokens) >= limit:
            messages, tokens = self._shortened(request, messages, limit)
        if len(tokens) >= limit:
            raise _too_long(len(tokens), limit)
        if not tokens:
            raise InvalidRequest("the prompt is empty")
        return tokens, len(request.messages) - len(messages)

    def _least_tokens(self, characters: int) -> int:
        """How many tokens a text of so many characters has at least. Half of that is allowed for tokenizers that
        normalise a text to a shorter one."""
        return characters // (2 * self._longest_token)

    def _refuse_hopeless(self, request: GenerationRequest, messages: list[Message], limit: int) -> None:
        """Raise ``ContextLengthExceeded`` for what cannot fit, before it is tokenised: that takes seconds and a hundred
        bytes of memory for each character."""
        characters = sum(len(message.content) for message in messages) + len(request.prompt or "")
        characters += len(request.suffix or "") + sum(len(tool.parameters) for tool in request.tools)
        tokens = self._least_tokens(characters) + len(request.prompt_tokens) + len(request.prefix_tokens)
        if tokens >= limit:
            raise _too_long(tokens, limit)

    def _without_hopeless(self, messages: list[Message], limit: int) -> list[Message]:
        """Leave out the oldest turns that cannot fit with what follows them."""
        turns = droppable(messages)
        kept = sum(len(message.content) for message in messages)
        dropped = 0
        while dropped < len(turns) and self._least_tokens(kept) >= limit:
            begin, end = turns[dropped]
            kept -= sum(len(message.content) for message in messages[begin:end])
            dropped += 1
        return without(messages, turns[:dropped])

    def _shortened(
        self, request: GenerationRequest, messages: list[Message], limit: int
    ) -> tuple[list[Message], list[int]]:
        """The longest end of the conversation that fits, or its last turn. Found by halving: each try is a rendering of
        its own, and other requests wait for it."""
        turns = droppable(messages)
        low, high = 0, len(turns)
        while low < high:
            middle = (low + high) // 2
            if len(self._tokens(request, without(messages, turns[:middle]))) < limit:
                high = middle
            else:
                low = middle + 1
        messages = without(messages, turns[:low])
        return messages, self._tokens(request, messages)

    def count(self, request: GenerationRequest) -> tuple[int, str]:
        """The number of tokens of the whole prompt, and its text; does not mind whether it fits, within reason."""
        self._refuse_hopeless(request, request.messages, max(8 * self._context_tokens, _COUNTED_TOKENS))
        tokens = self._tokens(request, request.messages)
        text = self._chat(request, request.messages, tokenize=False) if is_chat(request) else None
        return len(tokens), str(text if text is not None else self._tokenizer.decode(tokens))

    def _tokens(self, request: GenerationRequest, messages: list[Message]) -> list[int]:
        prefix = self._checked(request.prefix_tokens, "context")
        if is_chat(request):
            return prefix + list(self._chat(request, messages, tokenize=True))
        if request.prompt is None:
            return prefix + self._checked(request.prompt_tokens, "prompt")
        if request.suffix is None:
            return prefix + list(self._tokenizer.encode(request.prompt))
        known = infill_format(self._tokenizer.get_vocab())
        if known is None:
            raise UnsupportedCapability("this model has no tokens for filling in", param="suffix")
        return prefix + list(self._tokenizer.encode(known.prompt(request.prompt, request.suffix)))

    def _checked(self, tokens: list[int], param: str) -> list[int]:
        if not all(is_token(self._tokenizer, token, self._vocabulary) for token in tokens):
            raise InvalidRequest(f"the {param} holds a token id outside of this model's vocabulary", param=param)
        return list(tokens)

    def _template_messages(self, messages: list[Message]) -> list[dict[str, Any]]:
        return template_messages(messages)

    def _chat(self, request: GenerationRequest, messages: list[Message], *, tokenize: bool) -> Any:
        if not self._tokenizer.has_chat_template:
            raise UnsupportedCapability("this model has no chat template; it can only complete text")
        arguments: dict[str, Any] = json.loads(request.template_arguments or "{}")
        arguments |= {"tokenize": tokenize, "tools": template_tools(request.tools) or None}
        if request.continue_final:
            arguments["continue_final_message"] = True
        else:
            arguments["add_generation_prompt"] = True
        if request.thinking is not None:
            arguments["enable_thinking"] = request.thinking
        if request.thinking_effort is not None:
            arguments["reasoning_effort"] = request.thinking_effort
        try:
            return self._tokenizer.apply_chat_template(self._template_messages(messages), **arguments)
        except Exception as first:  # templates raise whatever their authors chose
            try:
                merged = self._template_messages(merge_system(messages))
                return self._tokenizer.apply_chat_template(merged, **arguments)
            except Exception:
                raise InvalidRequest(f"the model's chat template refuses these messages: {first}") from first
