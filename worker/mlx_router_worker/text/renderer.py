"""From a request to the token ids of its prompt, by the model's own tokenizer and template.

Takes the tokenizer as an object (mlx-lm's wrapper around a Hugging Face one) and knows nothing of MLX, so that prompts
can be counted where no weights are.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cached_property
from typing import Any, Final

from mlx_router_shared.capabilities import chat_capabilities
from mlx_router_shared.errors import ContextLengthExceeded, InvalidRequest, MlxRouterError, UnsupportedCapability
from mlx_router_shared.generation import GenerationRequest, Message, Role
from mlx_router_shared.infill import infill_format
from mlx_router_worker.prefix.boundaries import PROBE, turn_end_tokens
from mlx_router_worker.template_limits import TemplateOverrun, template_limits
from mlx_router_worker.text.conversation import conversation_forms
from mlx_router_worker.text.losses import count_lost_words
from mlx_router_worker.text.prompt import droppable, template_messages, template_tools, tools_as_text, without
from mlx_router_worker.text.template_traits import CallStyle, TemplateTraits, probe_template, show_functions
from mlx_router_worker.text.token_bytes import is_token

__all__ = ["PromptRenderer", "is_chat"]


_SPECIAL_TOKENS: Final = ("bos_token", "eos_token", "pad_token", "unk_token")
_COUNTED_TOKENS: Final = 500_000
"""Prompts that are longer than this and than eight contexts are not tokenised."""

_LONGEST_TEXT: Final = 2**28
"""Characters. More than any request can hold."""
_MOST_GROWTH: Final = 8
"""Characters of a prompt for each character of the request, beyond ``_FREE_CHARACTERS``; JSON takes six for one."""
_FREE_CHARACTERS: Final = 2**20


def _too_long(tokens: int, limit: int) -> ContextLengthExceeded:
    return ContextLengthExceeded(
        f"input length ({tokens} tokens) exceeds the model's maximum context length ({limit} tokens)",
        tokens=tokens,
        limit=limit,
    )


def _characters_of(request: GenerationRequest, messages: list[Message]) -> int:
    """The characters of all that a template is given."""
    characters = len(request.template_arguments) + sum(
        len(tool.name) + len(tool.description) + len(tool.parameters) for tool in request.tools
    )
    for message in messages:
        characters += len(message.content) + len(message.reasoning or "")
        characters += sum(len(call.name) + len(call.arguments) for call in message.tool_calls)
    return characters


def _characters(messages: list[Message], numbers: list[int]) -> int:
    return sum(len(messages[number].content) for number in numbers)


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
        self._overrun = ""
        """The limit that the template exceeded while it was probed; else empty."""
        self.spare_bytes: Callable[[], int] = lambda: 0
        """What other threads may allocate while a template is rendered."""

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
        if shortens and len(tokens) > limit - self._room(request, limit) and droppable(messages):
            messages, tokens = self._shortened(request, messages, limit, len(tokens))
        if len(tokens) >= limit:
            raise _too_long(len(tokens), limit)
        if not tokens:
            raise InvalidRequest("the prompt is empty")
        return tokens, len(request.messages) - len(messages)

    def unsupported(self, request: GenerationRequest) -> tuple[str, ...]:
        """What of a request the chat template has no means to follow: not to think, for a model that always does, and
        how hard to think."""
        if not is_chat(request) or not self._tokenizer.has_chat_template:
            return ()
        names = []
        if request.thinking is False and self._thinks and not self.traits.thinking_switch:
            names.append("thinking")
        if request.thinking_effort is not None and not self.traits.effort:
            names.append("thinking_effort")
        return tuple(names)

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
        kept = sum(len(message.content) for message in messages)
        if self._least_tokens(kept) < limit:
            return messages
        parts = droppable(messages)
        dropped = 0
        while dropped < len(parts) and self._least_tokens(kept) >= limit:
            kept -= _characters(messages, parts[dropped])
            dropped += 1
        return without(messages, parts[:dropped])

    def _shortened(
        self, request: GenerationRequest, messages: list[Message], limit: int, needed: int
    ) -> tuple[list[Message], list[int]]:
        """Leave out the oldest exchanges until there is room for an answer. ``needed`` is the number of tokens now.

        Tokens are left out in portions of half the limit, counted from the beginning of the conversation. So the same
        exchanges are left out in the turns that follow, and what was computed for the prompt's beginning can be used
        again.
        """
        parts = droppable(messages)
        characters = [_characters(messages, part) for part in parts]
        per_token = max(sum(len(message.content) for message in messages), 1) / needed
        portion = max(limit // 2, 1)
        excess = needed - (limit - self._room(request, limit))
        portions = max(-(-excess // portion), 1)
        count, tokens = 0, list[int]()
        while True:
            wanted = portions * portion * per_token
            while count < len(parts) and (count == 0 or sum(characters[:count]) < wanted):
                count += 1
            shorter = without(messages, parts[:count])
            tokens = self._tokens(request, shorter)
            if len(tokens) < limit or count == len(parts):
                return shorter, tokens
            portions += 1

    @staticmethod
    def _room(request: GenerationRequest, limit: int) -> int:
        """Tokens that a shortened conversation leaves for the answer."""
        room = limit // 8
        return min(room, request.max_tokens) if request.max_tokens is not None else room

    def count(self, request: GenerationRequest) -> tuple[int, str]:
        """The number of tokens of the whole prompt, and its text; does not mind whether it fits, within reason."""
        self._refuse_hopeless(request, request.messages, self._most_counted)
        if is_chat(request):
            text = self._chat(request, request.messages)
            return len(self._prefix(request)) + len(self._encoded(text)), text
        tokens = self._tokens(request, request.messages)
        return len(tokens), str(self._tokenizer.decode(tokens))

    @property
    def _most_counted(self) -> int:
        return max(8 * self._context_tokens, _COUNTED_TOKENS)

    def _tokens(self, request: GenerationRequest, messages: list[Message]) -> list[int]:
        prefix = self._prefix(request)
        if is_chat(request):
            return prefix + self._encoded(self._chat(request, messages))
        if request.prompt is None:
            return prefix + self._checked(request.prompt_tokens, "prompt")
        if request.suffix is None:
            # A prompt that begins with the token that begins a text is not given a second one.
            bos = self._tokenizer.bos_token
            special = not (bos and request.prompt.startswith(bos))
            return prefix + list(self._tokenizer.encode(request.prompt, add_special_tokens=special))
        known = infill_format(self._tokenizer.get_vocab())
        if known is None:
            raise UnsupportedCapability("this model has no tokens for filling in", param="suffix")
        return prefix + list(self._tokenizer.encode(known.prompt(request.prompt, request.suffix)))

    def _prefix(self, request: GenerationRequest) -> list[int]:
        return self._checked(request.prefix_tokens, "context")

    def _encoded(self, text: str) -> list[int]:
        """The tokens of what a template has rendered, which has its special tokens already."""
        return list(self._tokenizer.encode(text, add_special_tokens=False))

    def _checked(self, tokens: list[int], param: str) -> list[int]:
        if not all(is_token(self._tokenizer, token, self._vocabulary) for token in tokens):
            raise InvalidRequest(f"the {param} holds a token id outside of this model's vocabulary", param=param)
        return list(tokens)

    @cached_property
    def _thinks(self) -> bool:
        can = chat_capabilities(self._tokenizer.chat_template, self._tokenizer.get_vocab(), {})
        return bool(self._tokenizer.has_thinking and can.thinking)

    @cached_property
    def traits(self) -> TemplateTraits:
        """What the chat template accepts; found out when it is first needed."""
        if not self._tokenizer.has_chat_template:
            return TemplateTraits()
        try:
            with template_limits(spare_bytes=self.spare_bytes()):
                return probe_template(
                    lambda messages, **arguments: self._template_text(
                        messages, add_generation_prompt=True, **self._special_tokens, **arguments
                    )
                )
        except TemplateOverrun as overrun:
            self._overrun = str(overrun)
            return TemplateTraits()

    @cached_property
    def turn_ends(self) -> frozenset[int]:
        """The special tokens that end a turn; none, where the template uses none or renders no simple conversation."""
        messages = [Message(role=Role(role), content=word) for role, word in PROBE]
        try:
            tokens = self._encoded(self._chat(GenerationRequest(messages=messages), messages))
        except MlxRouterError:
            return frozenset()
        special = {*self._tokenizer.all_special_ids, *self._tokenizer.added_tokens_decoder}
        return turn_end_tokens(tokens, self._tokenizer.decode, frozenset(special))

    @property
    def _special_tokens(self) -> dict[str, str]:
        """Templates add these to other text, which raises if the tokenizer does not have them."""
        return {name: "" for name in _SPECIAL_TOKENS if getattr(self._tokenizer, name, None) is None}

    def _template_messages(self, messages: list[Message], style: CallStyle) -> list[dict[str, Any]]:
        return template_messages(messages, self.traits, style)

    def _chat(self, request: GenerationRequest, messages: list[Message]) -> str:
        """The text of the prompt. Raises ``InvalidRequest`` where the template makes none, and
        ``ContextLengthExceeded`` for one that is not worth tokenising."""
        if not self._tokenizer.has_chat_template:
            raise UnsupportedCapability("this model has no chat template; it can only complete text")
        arguments: dict[str, Any] = self._special_tokens | json.loads(request.template_arguments or "{}")
        if request.continue_final:
            arguments["continue_final_message"] = True
        else:
            arguments["add_generation_prompt"] = True
        if request.thinking is not None:
            arguments[self.traits.thinking_switch or "enable_thinking"] = request.thinking
        if request.thinking_effort is not None:
            arguments[self.traits.effort or "reasoning_effort"] = request.thinking_effort
        tools = template_tools(request.tools)
        try:
            if self.traits and self._overrun:  # reading the traits probes the template
                raise TemplateOverrun(self._overrun)
            text = self._render(messages, tools, arguments)
            if len(text) > _MOST_GROWTH * _characters_of(request, messages) + _FREE_CHARACTERS:
                raise TemplateOverrun(f"produces a prompt of {len(text)} characters")
        except TemplateOverrun as overrun:
            raise InvalidRequest(f"the model's chat template {overrun}") from None
        if self._least_tokens(len(text)) >= self._most_counted:
            raise _too_long(self._least_tokens(len(text)), self.context_of(request))
        return text

    def _render(self, messages: list[Message], tools: list[dict[str, Any]], arguments: dict[str, Any]) -> str:
        """The text of the prompt."""
        errors: list[Exception] = []
        text = None
        if not tools or self._shows_tools(messages):
            text = self._best_form(messages, tools, arguments, errors)
        if text is None and tools:
            # The template cannot show these tools: they are described in a system turn.
            described = [Message(role=Role.SYSTEM, content=tools_as_text(tools)), *messages]
            text = self._best_form(described, [], arguments, errors)
        if text is None:
            raise InvalidRequest(f"the model's chat template refuses these messages: {errors[0]}") from errors[0]
        return text

    def _shows_tools(self, messages: list[Message]) -> bool:
        if self.traits.tools_need_system:
            return any(message.role is Role.SYSTEM for message in messages)
        return bool(self.traits.tools)

    def _best_form(
        self, messages: list[Message], tools: list[dict[str, Any]], arguments: dict[str, Any], errors: list[Exception]
    ) -> str | None:
        """Return the first prompt that loses no word, else the one that loses fewest; None if the template raises for
        every form. Append what it raises to ``errors``."""
        best, least = None, 0
        for form, style in conversation_forms(messages, self.traits):
            try:
                with template_limits(spare_bytes=self.spare_bytes()):
                    text = self._apply_template(self._template_messages(form, style), tools, arguments)
            except Exception as error:  # templates raise whatever their authors chose
                errors.append(error)
                continue
            lost = count_lost_words(text, messages)
            if not lost:
                return text
            if best is None or lost < least:
                best, least = text, lost
        return best

    def _apply_template(
        self, messages: list[dict[str, Any]], tools: list[dict[str, Any]], arguments: dict[str, Any]
    ) -> str:
        more: dict[str, Any] = {"tools": [] if self.traits.empty_tools else None}
        if tools:
            more[self.traits.tools] = tools
        messages, functions = show_functions(self.traits.functions, messages, tools)
        return self._template_text(messages, **{**arguments, **more, **functions})

    def _template_text(self, messages: list[dict[str, Any]], **arguments: Any) -> str:
        """Render once. Raises what the template raises, and ``TemplateOverrun``."""
        try:
            text = str(self._tokenizer.apply_chat_template(messages, tokenize=False, **arguments))
        except MemoryError:
            raise TemplateOverrun("needs too much memory") from None
        if len(text) > _LONGEST_TEXT:
            raise TemplateOverrun(f"produces a prompt of {len(text)} characters")
        try:
            text.encode()
        except UnicodeEncodeError:  # half of a surrogate pair, which no tokenizer takes
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        return text
