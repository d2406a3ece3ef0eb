"""Text generation: mlx-lm's batch generator behind the ``Engine`` protocol.

The ``mlx_`` modules are the only ones of the project that import mlx and mlx_lm, and this one alone touches the parts
of mlx-lm that move fast; a contract test plays the demo model through it. One thread loads, generates and frees. What
must not happen in a step is checked before a request is inserted, because an exception inside ``BatchGenerator.next``
corrupts the rows of the other requests.
"""

from __future__ import annotations

import logging
import os
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple

import mlx.core as mx
from mlx_lm.generate import BatchGenerator, make_text_state_machine
from mlx_lm.models.cache import make_prompt_cache

from mlx_router_shared.capabilities import chat_capabilities
from mlx_router_shared.errors import ErrorCode, LoadFailed, MlxRouterError, UnsupportedCapability
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
    StreamEvents,
    Usage,
    failure_of,
)
from mlx_router_shared.protocol import Load, ModelFacts
from mlx_router_worker.engine import Report
from mlx_router_worker.engines.base import BaseEngine
from mlx_router_worker.generation.answers import AnswerStream, Drawn, Vocabulary
from mlx_router_worker.generation.drafts import DraftLane
from mlx_router_worker.generation.guides import Guides
from mlx_router_worker.generation.parameters import first_said, read_generation_config
from mlx_router_worker.generation.sampling import Samplers, processors_for
from mlx_router_worker.generation.scoring import PromptScore
from mlx_router_worker.text.answer import AnswerBuilder
from mlx_router_worker.text.json_calls import repairing, with_objects
from mlx_router_worker.text.prompt import template_tools
from mlx_router_worker.text.renderer import PromptRenderer, is_chat
from mlx_router_worker.text.token_bytes import is_token

log = logging.getLogger(__name__)

__all__ = ["PREFILL_TOKENS", "TextEngine", "Prompt"]

# One chunk of a prompt is computed between two decode steps, so this bounds the stutter of running streams; mlx-lm's
# default of 2048 is made for throughput.
PREFILL_TOKENS: Final = 512
_LEAST_PREFILL_TOKENS: Final = 64
_STEPS_BETWEEN_CACHE_EVALS: Final = 256
_DRAFT_UID: Final = -1  # the generator counts from 0


class Prompt(NamedTuple):
    """The tokens of a prompt, how many turns were left out, and what else its insertion needs."""

    tokens: list[int]
    dropped: int
    extra: dict[str, Any]


@dataclass(slots=True)
class _Scoring:
    """A request whose answer begins when the log probabilities of its prompt are known."""

    request: GenerationRequest
    prompt: Prompt
    score: PromptScore
    started: float


class TextEngine(BaseEngine):
    """Implements ``Engine`` for text generation."""

    def __init__(self, _send_bytes: Callable[[bytes], None]) -> None:
        super().__init__()
        self._streams: dict[int, AnswerStream] = {}
        self._uids: dict[str, int] = {}
        self._scoring: dict[str, _Scoring] = {}
        self._generator: BatchGenerator | None = None
        self._drafts: DraftLane | None = None
        self._machine: Any = None
        self._batch_steps = 0
        self._generation_config = Sampling()
        self._samplers: Samplers | None = None

    # ------------------------------------------------------------------ loading

    def load(self, load: Load, report: Report) -> ModelFacts:
        config = self._load_weights(load, report)
        self._check_cache(config)
        if load.draft_path:
            self._load_draft(Path(load.draft_path))
        self._generation_config = read_generation_config(Path(load.path))
        self._guides = Guides(self._tokenizer, Path(load.path))
        self._machine = make_text_state_machine(self._tokenizer)
        self._renderer = self._new_renderer()
        self._words = Vocabulary(self._tokenizer)
        self._samplers = Samplers(self._vocabulary)
        mx.random.seed(int.from_bytes(os.urandom(8)))
        self._generator = self._new_generator(load.parallel)
        self._apply_wired_limit()  # the generator has just set it to all there is
        can = chat_capabilities(self._tokenizer.chat_template, self._tokenizer.get_vocab(), {})
        return ModelFacts(
            context_tokens=self._context_tokens,
            has_chat_template=bool(self._tokenizer.has_chat_template),
            has_thinking=bool(self._tokenizer.has_thinking and can.thinking),
            has_tools=bool(self._tokenizer.has_tool_calling),
            weights_bytes=self._weights_bytes,
            memory_bytes=mx.get_active_memory(),
            weights_seconds=self._weights_seconds,
            warm_up_seconds=0.0,
        )

    def _new_renderer(self) -> PromptRenderer:
        return PromptRenderer(self._tokenizer, self._context_tokens, self._vocabulary)

    def _check_cache(self, config: dict[str, Any]) -> None:
        if not all(hasattr(cache, "merge") for cache in make_prompt_cache(self._model)):
            raise LoadFailed(f"the {config.get('model_type')} architecture keeps a cache that cannot be batched")

    def _load_draft(self, folder: Path) -> None:
        started = time.perf_counter()
        self._drafts = DraftLane(self._model, self._tokenizer, folder, PREFILL_TOKENS)
        self._weights_bytes += self._drafts.weights_bytes
        self._weights_seconds += time.perf_counter() - started

    def warm_up(self) -> None:
        """Compile kernels with one token. On a CPU there are none, and a token of a large model takes a second."""
        if mx.default_device() != mx.Device(mx.cpu):
            self.compile_kernels()

    def compile_kernels(self) -> None:
        """One token by a generator of the calling thread's own: MLX's streams belong to threads."""
        end = next(iter(self._tokenizer.eos_token_ids), 0)
        generator = self._new_generator(1)
        generator.insert([[end] * 2], [1])
        while generator.next() != ([], []):
            pass
        generator.close()
        self._apply_wired_limit()  # closing has set it to what it was before

    def _new_generator(self, parallel: int) -> BatchGenerator:
        return BatchGenerator(
            self._model,
            stop_tokens=[[token] for token in self._tokenizer.eos_token_ids],
            completion_batch_size=parallel,
            prefill_batch_size=min(8, parallel),
            prefill_step_size=PREFILL_TOKENS,
        )

    # ----------------------------------------------------------------- requests

    def submit(self, request_id: str, request: Request) -> list[Event]:
        if not isinstance(request, GenerationRequest):
            raise UnsupportedCapability("this model generates text; it makes no embeddings")
        started = time.perf_counter()
        prompt = self._prompt(request)
        assert self._renderer is not None
        started_event = Started(
            prompt_tokens=len(prompt.tokens),
            dropped_messages=prompt.dropped,
            unsupported=self._renderer.unsupported(request),
        )
        events: list[Event] = [started_event]
        if request.echo and request.top_logprobs is not None:
            cache = make_prompt_cache(self._model)
            score = PromptScore(tokens=prompt.tokens, cache=cache, top=request.top_logprobs)
            self._scoring[request_id] = _Scoring(request, prompt, score, started)
            return events
        if request.echo:
            events.append(PromptEcho(text=self._prompt_text(request, prompt.tokens)))
        return events + self._insert(request_id, request, prompt, started)

    def _prompt(self, request: GenerationRequest) -> Prompt:
        tokens, dropped = self._renderer.tokens(request)
        return Prompt(tokens, dropped, {})

    def _insert(self, request_id: str, request: GenerationRequest, prompt: Prompt, started: float) -> list[Event]:
        """Have an answer generated; its first events, which are its last ones when nothing may be generated."""
        assert self._generator is not None
        assert self._samplers is not None
        tokens = prompt.tokens
        room = self._renderer.context_of(request) - len(tokens)
        budget = request.max_tokens if request.max_tokens is not None else room
        sampling = first_said(request.sampling, self._generation_config, request.sampling_defaults)
        sampler = self._samplers.get(sampling)
        processors: list[Any] = processors_for(
            sampling, self._context_tokens, lambda token: is_token(self._tokenizer, token, self._vocabulary)
        )
        if budget <= 0:
            usage = Usage(prompt_tokens=len(tokens), completion_tokens=0)
            context = [ContextTokens(tokens=tokens)] if request.wants_context else []
            return [*context, usage, Finish(reason=FinishReason.LENGTH)]
        chat = is_chat(request)
        pieces = self._initial_pieces(tokens) if chat else None
        guide = self._guides.guide(request, pieces, min(budget, room))
        if guide is not None:
            processors.append(guide)  # the last word is the grammar's
        # With a seed the same is to be drawn whether the lane is free or not, and guesses draw as well.
        repeatable = sampling.seed is not None and sampling.temperature != 0
        stream = AnswerStream(
            request_id=request_id,
            vocabulary=self._words,
            detokenizer=self._detokenizer(None if chat and not request.continue_final else tokens[-1]),
            pieces=pieces,
            answer=self._answer_builder(request),
            prompt_tokens=len(tokens),
            full_reason=FinishReason.LENGTH if budget <= room else FinishReason.CONTEXT,
            top_logprobs=request.top_logprobs,
            started=started,
            budget=min(budget, room),
            guide=guide,
            context=list(tokens) if request.wants_context else None,
        )
        # Last of all, because a row without a stream would be generated to its end for nobody.
        if self._drafts is not None and self._drafts.free and not (processors or prompt.extra or repeatable):
            uid = _DRAFT_UID
            self._drafts.begin(uid, tokens, min(budget, room), sampler)
        else:
            (uid,) = self._generator.insert(
                [tokens], [min(budget, room)], samplers=[sampler], logits_processors=[processors], **prompt.extra
            )
        self._uids[request_id] = uid
        self._streams[uid] = stream
        return []

    def _detokenizer(self, continued: int | None) -> Any:
        detokenizer = self._tokenizer.detokenizer
        if continued is not None:
            # A fresh detokenizer drops a leading blank, which belongs to the text where a prompt is continued.
            detokenizer.add_token(continued)
            detokenizer.last_segment  # noqa: B018  # reading it marks it as read
        return detokenizer

    def _prompt_text(self, request: GenerationRequest, tokens: list[int]) -> str:
        return request.prompt if request.prompt is not None else str(self._tokenizer.decode(tokens))

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

    def _initial_pieces(self, tokens: list[int]) -> Any:
        """The state in which an answer begins: reasoning when the prompt ends inside an open think block."""
        tokenizer = self._tokenizer
        initial = tokenizer.response_initial_state or "normal"
        if tokenizer.has_thinking:
            start = tokenizer.rfind_think_start(tokens)
            if start >= 0 and start > tokenizer.rfind_think_end(tokens):
                initial = "reasoning"
        return self._machine.make_state(initial)

    def cancel(self, request_id: str) -> None:
        self._scoring.pop(request_id, None)
        uid = self._uids.pop(request_id, None)
        if uid is None or self._generator is None:
            return
        if uid == _DRAFT_UID and self._drafts is not None:
            self._drafts.cancel()
        else:
            self._generator.remove([uid])
        self._streams.pop(uid, None)

    @property
    def streams(self) -> int:
        return len(self._streams) + len(self._scoring)

    # -------------------------------------------------------------------- steps

    def step(self) -> list[StreamEvents]:
        assert self._generator is not None
        out: list[StreamEvents] = []
        if self._scoring:
            request_id, scoring = next(iter(self._scoring.items()))
            self._score(request_id, scoring, out)
        if not self._streams:
            return out
        if _DRAFT_UID in self._streams and self._drafts is not None:
            for uid, drawn in self._drafts.step():
                self._tell(uid, drawn, out)
        if len(self._streams) > (_DRAFT_UID in self._streams):
            self._step_batch(out)
        if not self._streams:
            mx.clear_cache()
        return out

    def _share_step(self) -> None:
        """The bound of ``PREFILL_TOKENS`` is for a step, not for each of the prompts that are read in it."""
        assert self._generator is not None
        waiting = sum(not stream.first_token for stream in self._streams.values())
        share = PREFILL_TOKENS // max(min(waiting, self._generator.prefill_batch_size), 1)
        self._generator.prefill_step_size = max(share, _LEAST_PREFILL_TOKENS)

    def _step_batch(self, out: list[StreamEvents]) -> None:
        assert self._generator is not None
        self._share_step()
        prompts, responses = self._generator.next()
        self._batch_steps += 1
        if self._batch_steps % _STEPS_BETWEEN_CACHE_EVALS == 0:
            self._eval_caches()
        for response in responses:
            self._tell(response.uid, Drawn(response.token, response.logprobs, response.finish_reason), out)
        for prompt in prompts:
            if prompt.end_of_prompt and (first := self._first_token(prompt.uid)) is not None:
                self._tell(prompt.uid, first, out)
                if (stream := self._streams.get(prompt.uid)) is not None:
                    stream.told_early = True

    def _eval_caches(self) -> None:
        """Evaluate what no token depends on, such as the offset of a layer without positions: each step adds to its
        graph, and the graph keeps a buffer per step until it is evaluated (mlx-lm's generator evaluates tokens only).
        """
        assert self._generator is not None
        mx.eval([cache.state for cache in self._generator._generation_batch.prompt_cache if not cache.empty()])

    def _tell(self, uid: int, drawn: Drawn, out: list[StreamEvents]) -> None:
        stream = self._streams.get(uid)
        if stream is None:
            return
        before = stream.tokens
        try:
            events = stream.advance(drawn)
        except Exception as error:
            # What becomes of a token as text concerns this stream alone; the batch is as it was.
            log.exception("event=stream_failed request=%s", stream.request_id)
            message = f"the answer could not be read: {type(error).__name__}: {error}"
            events = [Failure(code=ErrorCode.ENGINE_FAILED, message=message)]
        self._tokens_total += stream.tokens - before
        if events:
            out.append(StreamEvents(request_id=stream.request_id, events=events))
            if isinstance(events[-1], Finish | Failure):
                self.cancel(stream.request_id)

    def _first_token(self, uid: int) -> Drawn | None:
        """The first token of an answer, as soon as it is drawn.

        The generator hands a token out after it has computed the next one as well; for the first that would make
        everybody wait for a step more than needed. A token that ends the turn is left to it.
        """
        assert self._generator is not None
        stream = self._streams.get(uid)
        batch = self._generator._generation_batch
        if stream is None or uid not in batch.uids:
            return None
        row = batch.uids.index(uid)
        token = int(batch._next_tokens[row].item())
        if token in self._tokenizer.eos_token_ids:
            return None
        return Drawn(token, batch._next_logprobs[row], "length" if stream.budget == 1 else None)

    def _score(self, request_id: str, scoring: _Scoring, out: list[StreamEvents]) -> None:
        """One more chunk of a prompt; at its end the answer is begun."""
        if not scoring.score.read(self._model, self._words, PREFILL_TOKENS):
            return
        del self._scoring[request_id]
        text = self._prompt_text(scoring.request, scoring.prompt.tokens)
        events: list[Event] = [PromptEcho(text=text, tokens=scoring.score.entries)]
        try:
            events += self._insert(request_id, scoring.request, scoring.prompt, scoring.started)
        except MlxRouterError as error:
            events.append(failure_of(error))
        out.append(StreamEvents(request_id=request_id, events=events))

    def close(self) -> None:
        if self._generator is not None:
            self._generator.close()
        self._generator = self._drafts = None
        self._machine = None
        self._streams.clear()
        self._scoring.clear()
        super().close()
