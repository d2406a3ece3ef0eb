"""From a request to the token ids of its prompt, by the model's own tokenizer and template.

Takes the tokenizer as an object (mlx-lm's wrapper around a Hugging Face one) and knows nothing of MLX, so that prompts
can be counted where no weights are.
"""

from __future__ import annotations

from typing import Any

from mlx_router_shared.errors import ContextLengthExceeded, InvalidRequest, UnsupportedCapability
from mlx_router_shared.generation import GenerationRequest, Message
from mlx_router_shared.infill import infill_format
from mlx_router_worker.text.prompt import droppable, merge_system, template_messages, template_tools, without
from mlx_router_worker.text.token_bytes import is_token

__all__ = ["PromptRenderer", "is_chat"]


def is_chat(request: GenerationRequest) -> bool:
    """Whether its prompt is made by the chat template."""
    return request.prompt is None and not request.prompt_tokens


class PromptRenderer:
    """Knows one tokenizer. ``context_tokens`` is the longest prompt plus answer, ``vocabulary`` the model's ids."""

    def __init__(self, tokenizer: Any, context_tokens: int, vocabulary: int) -> None:
        self._tokenizer = tokenizer
        self._context_tokens = context_tokens
        self._vocabulary = vocabulary

    def context_of(self, request: GenerationRequest) -> int:
        """The limit that prompt and answer of this request stay in."""
        return min(self._context_tokens, request.context_tokens or self._context_tokens)

    def tokens(self, request: GenerationRequest) -> tuple[list[int], int]:
        """The tokens of the prompt, and how many turns had to be left out. Raises when it does not fit."""
        limit = self.context_of(request)
        messages = request.messages
        tokens = self._tokens(request, messages)
        if is_chat(request) and request.truncate and len(tokens) >= limit:
            messages, tokens = self._shortened(request, limit)
        if len(tokens) >= limit:
            raise ContextLengthExceeded(
                f"input length ({len(tokens)} tokens) exceeds the model's maximum context length ({limit} tokens)",
                tokens=len(tokens),
                limit=limit,
            )
        if not tokens:
            raise InvalidRequest("the prompt is empty")
        return tokens, len(request.messages) - len(messages)

    def _shortened(self, request: GenerationRequest, limit: int) -> tuple[list[Message], list[int]]:
        """The longest end of the conversation that fits, or its last turn. Found by halving: each try is a rendering of
        its own, and other requests wait for it."""
        turns = droppable(request.messages)
        low, high = 0, len(turns)
        while low < high:
            middle = (low + high) // 2
            if len(self._tokens(request, without(request.messages, turns[:middle]))) < limit:
                high = middle
            else:
                low = middle + 1
        messages = without(request.messages, turns[:low])
        return messages, self._tokens(request, messages)

    def count(self, request: GenerationRequest) -> tuple[int, str]:
        """The number of tokens of the whole prompt, and its text; does not mind whether it fits."""
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
        arguments: dict[str, Any] = {"tokenize": tokenize, "tools": template_tools(request.tools) or None}
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
