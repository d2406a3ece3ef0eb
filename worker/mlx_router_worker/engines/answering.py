"""What the engines that generate text have in common: from a request to the stream of its answer.

``prepare`` needs no MLX and runs on the preparing thread: it renders and tokenises the prompt and builds grammars. The
rest belongs to the compute thread.
"""

from __future__ import annotations

import logging
import secrets
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlx_lm.generate import make_text_state_machine

from mlx_router_shared.capabilities import chat_capabilities
from mlx_router_shared.errors import ErrorCode, UnsupportedCapability
from mlx_router_shared.generation import (
    ContextTokens,
    Event,
    Failure,
    Finish,
    FinishReason,
    GenerationRequest,
    PromptEcho,
    Request,
    Sampling,
    Started,
    Usage,
)
from mlx_router_shared.protocol import Load, ModelFacts
from mlx_router_worker.engines.base import BaseEngine
from mlx_router_worker.generation.answers import AnswerStream, Drawn, Vocabulary
from mlx_router_worker.generation.guides import Guides
from mlx_router_worker.generation.parameters import first_said, read_generation_config
from mlx_router_worker.generation.sampling import GuideProcessor, Samplers, check_bias
from mlx_router_worker.text.answer import AnswerBuilder
from mlx_router_worker.text.json_calls import repairing, with_objects
from mlx_router_worker.text.prompt import template_tools
from mlx_router_worker.text.renderer import PromptRenderer, is_chat
from mlx_router_worker.text.token_bytes import is_token

__all__ = ["AnsweringEngine", "Prepared"]

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A request with everything that its answer needs and that is no computation of the model."""

    request: GenerationRequest
    tokens: list[int]
    """Of the prompt."""
    started: float
    """When the preparation began, by ``time.perf_counter``."""
    sampling: Sampling
    budget: int
    """The most tokens of the answer."""
    full_reason: FinishReason
    """What the end of the budget means."""
    pieces: Any
    """The state of the text state machine at the beginning of the answer; None for a raw prompt."""
    guide: GuideProcessor | None
    dropped: int = 0
    """Turns of the conversation that were left out."""
    cuts: list[int] = field(default_factory=list)
    """Positions in the prompt to which later prompts are likely to be equal."""
    unsupported: tuple[str, ...] = ()
    extra: dict[str, Any] = field(default_factory=dict)
    """What else a generator needs."""

    @property
    def ending(self) -> list[Event]:
        """The events of a request for no tokens; empty for any other."""
        if self.budget > 0:
            return []
        usage = Usage(prompt_tokens=len(self.tokens), completion_tokens=0)
        context: list[Event] = [ContextTokens(tokens=self.tokens)] if self.request.wants_context else []
        return [*context, usage, Finish(reason=FinishReason.LENGTH)]


class AnsweringEngine(BaseEngine):
    """The half of a generating ``Engine`` that knows tokenizer, template and grammar."""

    def _load_text(self, load: Load) -> None:
        """Build what depends on the tokenizer; the weights are loaded."""
        self._generation_config = read_generation_config(Path(load.path))
        self._guides = Guides(self._tokenizer, Path(load.path))
        self._machine = make_text_state_machine(self._tokenizer)
        self._renderer = self._new_renderer()
        self._words = Vocabulary(self._tokenizer)
        self._samplers = Samplers(self._vocabulary)
        self._ends = frozenset(self._tokenizer.eos_token_ids)
        # The first call settles the settings of a tokenizer: later ones, from two threads, only read them.
        self._tokenizer.encode("a")

    def _new_renderer(self) -> PromptRenderer:
        return PromptRenderer(self._tokenizer, self._context_tokens, self._vocabulary)

    def _answering_facts(self, memory_bytes: int, *, batched: bool) -> ModelFacts:
        can = chat_capabilities(self._tokenizer.chat_template, self._tokenizer.get_vocab(), {})
        return ModelFacts(
            context_tokens=self._context_tokens,
            has_chat_template=bool(self._tokenizer.has_chat_template),
            has_thinking=bool(self._tokenizer.has_thinking and can.thinking),
            has_tools=bool(self._tokenizer.has_tool_calling),
            is_batched=batched,
            weights_bytes=self._weights_bytes,
            memory_bytes=memory_bytes,
            weights_seconds=self._weights_seconds,
            warm_up_seconds=0.0,
        )

    # -------------------------------------------------------------- preparing thread

    def prepare(self, request: Request) -> Any:
        """Return the request as ``Prepared``. Raises ``MlxRouterError``."""
        if not isinstance(request, GenerationRequest):
            raise UnsupportedCapability("this model generates text; it makes no embeddings")
        started = time.perf_counter()
        tokens, dropped = self._renderer.tokens(request)
        return self._prepared(request, tokens, started, dropped=dropped)

    def _prepared(
        self, request: GenerationRequest, tokens: list[int], started: float, *, dropped: int = 0,
        extra: dict[str, Any] | None = None,
    ) -> Prepared:  # fmt: skip
        room = self._renderer.context_of(request) - len(tokens)
        wanted = request.max_tokens if request.max_tokens is not None else room
        budget = min(wanted, room)
        sampling = first_said(request.sampling, self._generation_config, request.sampling_defaults)
        check_bias(sampling, lambda token: is_token(self._tokenizer, token, self._vocabulary))
        pieces = self._initial_pieces(tokens) if is_chat(request) else None
        return Prepared(
            request=request,
            tokens=tokens,
            started=started,
            sampling=sampling,
            budget=budget,
            full_reason=FinishReason.LENGTH if wanted <= room else FinishReason.CONTEXT,
            pieces=pieces,
            guide=self._guides.guide(request, pieces, budget) if budget > 0 else None,
            dropped=dropped,
            unsupported=self._renderer.unsupported(request),
            extra=extra or {},
        )

    def _initial_pieces(self, tokens: list[int]) -> Any:
        """The state in which an answer begins: reasoning when the prompt ends inside an open think block."""
        tokenizer = self._tokenizer
        initial = tokenizer.response_initial_state or "normal"
        if tokenizer.has_thinking:
            start = tokenizer.rfind_think_start(tokens)
            if start >= 0 and start > tokenizer.rfind_think_end(tokens):
                initial = "reasoning"
        return self._machine.make_state(initial)

    # ---------------------------------------------------------------- compute thread

    def _first_events(self, prepared: Prepared) -> list[Event]:
        """What is reported of a request as soon as it is accepted."""
        events: list[Event] = [
            Started(
                prompt_tokens=len(prepared.tokens), dropped_messages=prepared.dropped, unsupported=prepared.unsupported
            )
        ]
        if prepared.request.echo and prepared.request.top_logprobs is None:
            events.append(PromptEcho(text=self._prompt_text(prepared)))
        return events

    def _prompt_text(self, prepared: Prepared) -> str:
        request = prepared.request
        return request.prompt if request.prompt is not None else str(self._tokenizer.decode(prepared.tokens))

    def _open_stream(self, request_id: str, prepared: Prepared) -> AnswerStream:
        request, tokens = prepared.request, prepared.tokens
        return AnswerStream(
            request_id=request_id,
            vocabulary=self._words,
            detokenizer=self._detokenizer(None if is_chat(request) and not request.continue_final else tokens[-1]),
            pieces=prepared.pieces,
            answer=self._answer_builder(request),
            prompt_tokens=len(tokens),
            full_reason=prepared.full_reason,
            started=prepared.started,
            budget=prepared.budget,
            guide=prepared.guide,
            context=list(tokens) if request.wants_context else None,
        )

    def _detokenizer(self, continued: int | None) -> Any:
        detokenizer = self._tokenizer.detokenizer
        if continued is not None:
            # A fresh detokenizer drops a leading blank, which belongs to the text where a prompt is continued.
            detokenizer.add_token(continued)
            detokenizer.last_segment  # noqa: B018  # reading it marks it as read
        return detokenizer

    def _answer_builder(self, request: GenerationRequest) -> AnswerBuilder:
        tools = template_tools(request.tools)
        parse_tool = (lambda text: with_objects(self._tokenizer.tool_parser(text, tools), tools)) if tools else None
        if parse_tool is not None and self._guides.calls_hold_json:
            parse_tool = repairing(parse_tool)
        return AnswerBuilder(
            stops=request.stop,
            parse_tool=parse_tool if self._tokenizer.has_tool_calling or request.forced_tools else None,
            tool_markers=(self._tokenizer.tool_call_start or "", self._tokenizer.tool_call_end or ""),
            make_id=lambda: "call_" + secrets.token_hex(12),
            json_calls=self._guides.calls_are_json,
            incremental=request.incremental_tools and (self._guides.calls_are_json or bool(request.forced_tools)),
            forced=bool(request.forced_tools),
            max_calls=request.max_tool_calls,
        )

    def _advance(self, stream: AnswerStream, drawn: Drawn) -> list[Event]:
        """Return the events of a drawn token. What goes wrong in its text concerns this stream alone."""
        before = stream.tokens
        try:
            events = stream.advance(drawn)
        except Exception as error:
            log.exception("event=stream_failed request=%s", stream.request_id)
            message = f"the answer could not be read: {type(error).__name__}: {error}"
            events = [Failure(code=ErrorCode.ENGINE_FAILED, message=message)]
        self._tokens_total += stream.tokens - before
        return events
