"""The real engine: mlx-lm's batch generator behind the ``Engine`` protocol.

The only module of the project that imports mlx and mlx_lm, whose internals move fast; a contract test plays the demo
model through it. One thread loads, generates and frees. What must not happen in a step is checked before a request is
inserted, because an exception inside ``BatchGenerator.next`` corrupts the rows of the other requests.
"""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.generate import BatchGenerator, TextStateMachine, make_text_state_machine
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.sample_utils import apply_min_p, apply_top_k, apply_top_p, greedy_sampler, make_logits_processors
from mlx_lm.utils import load_model, load_tokenizer

from mlx_router_shared.errors import ContextLengthExceeded, InvalidRequest, LoadFailed, UnsupportedCapability
from mlx_router_shared.generation import (
    Event,
    Finish,
    FinishReason,
    GenerationRequest,
    Logprobs,
    Sampling,
    Started,
    StreamEvents,
    TokenLogprob,
    Usage,
)
from mlx_router_shared.protocol import Load, ModelFacts, SetLimits
from mlx_router_worker.engine import EngineReading, Report
from mlx_router_worker.sampling import first_said, read_generation_config
from mlx_router_worker.text.answer import AnswerBuilder
from mlx_router_worker.text.prompt import drop_oldest, merge_system, template_messages, template_tools

__all__ = ["MlxEngine"]

# One chunk of a prompt is computed between two decode steps, so this bounds the stutter of running streams; mlx-lm's
# default of 2048 is made for throughput.
_PREFILL_TOKENS: Final = 512
_DEFAULT_CPU_CACHE: Final = 32 * 2**20  # MLX's own choice on Linux, where more is only lost
_EVALUATE_BYTES: Final = 128 * 2**20
_DEFAULT_CONTEXT: Final = 4096
_NO_LOGPROB: Final = -9999.0  # JSON has no infinity

Sampler = Callable[[mx.array], mx.array]


@dataclass(slots=True)
class _Stream:
    request_id: str
    uid: int
    detokenizer: Any
    pieces: Any
    """State of the text state machine; None for a raw prompt, which is all text."""
    answer: AnswerBuilder
    prompt_tokens: int
    full_reason: FinishReason
    """What running out of tokens means: the request's budget or the context."""
    top_logprobs: int | None
    started: float
    budget: int
    """The most tokens that the generator will draw."""
    first_token: float = 0.0
    told_early: bool = False
    """The next token that the generator hands out is the first, and was told already."""
    tokens: int = 0
    reasoning_tokens: int = 0
    logprobs: list[TokenLogprob] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Drawn:
    """A token as the generator has drawn it; ``logprobs`` of the whole vocabulary."""

    token: int
    logprobs: Any
    finish_reason: str | None


class MlxEngine:
    """Implements ``Engine`` for text generation."""

    def __init__(self, _send_bytes: Callable[[bytes], None]) -> None:
        info = mx.device_info()
        self.working_set_bytes = int(info.get("max_recommended_working_set_size", 0))
        self._streams: dict[int, _Stream] = {}
        self._uids: dict[str, int] = {}
        self._samplers: dict[tuple[float, float, int, float], Sampler] = {}
        self._tokens_total = 0
        self._model: Any = None
        self._tokenizer: Any = None
        self._generator: BatchGenerator | None = None
        self._machine: Any = None
        self._generation_config = Sampling()
        self._context_tokens = 0
        self._vocabulary = 0
        self._wired_bytes = 0

    # ------------------------------------------------------------------ loading

    def load(self, load: Load, report: Report) -> ModelFacts:
        self._apply_limits(load.memory_limit_bytes, load.cache_limit_bytes)
        started = time.perf_counter()
        path = Path(load.path)
        report("weights", 0.0)
        model, config = load_model(path, lazy=True)
        self._model, self._tokenizer = model, load_tokenizer(path, eos_token_ids=config.get("eos_token_id"))
        weights_bytes = self._evaluate(report)
        if not all(hasattr(cache, "merge") for cache in make_prompt_cache(model)):
            raise LoadFailed(f"the {config.get('model_type')} architecture keeps a cache that cannot be batched")
        weights_seconds = time.perf_counter() - started
        text_config = config.get("text_config") or config
        limit = int(text_config.get("max_position_embeddings") or _DEFAULT_CONTEXT)
        self._context_tokens = min(limit, load.context_tokens) if load.context_tokens else limit
        self._vocabulary = int(text_config.get("vocab_size") or len(self._tokenizer))
        self._generation_config = read_generation_config(path)
        self._machine = make_text_state_machine(self._tokenizer)
        mx.random.seed(int.from_bytes(os.urandom(8)))
        self._generator = self._new_generator(load.parallel)
        self._wired_bytes = load.wired_limit_bytes
        self._apply_wired_limit()  # the generator has just set it to all there is
        return ModelFacts(
            context_tokens=self._context_tokens,
            has_chat_template=bool(self._tokenizer.has_chat_template),
            has_thinking=bool(self._tokenizer.has_thinking),
            has_tools=bool(self._tokenizer.has_tool_calling),
            weights_bytes=weights_bytes,
            memory_bytes=mx.get_active_memory(),
            weights_seconds=weights_seconds,
            warm_up_seconds=0.0,
        )

    def _evaluate(self, report: Report) -> int:
        """Read the weights in portions, so that progress can be told; the next is begun before the last is waited for.
        Returns their bytes."""
        arrays = [array for _, array in tree_flatten(self._model.parameters())]
        total = sum(array.nbytes for array in arrays)
        portions: list[list[mx.array]] = [[]]
        size = 0
        for array in arrays:
            portions[-1].append(array)
            size += array.nbytes
            if size >= _EVALUATE_BYTES:
                portions.append([])
                size = 0
        done = 0
        mx.async_eval(portions[0])
        for portion, following in zip(portions, [*portions[1:], []], strict=True):
            mx.async_eval(following)
            mx.eval(portion)
            done += sum(array.nbytes for array in portion)
            report("weights", done / max(total, 1))
        return total

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
            prefill_step_size=_PREFILL_TOKENS,
        )

    # ------------------------------------------------------------------- limits

    def set_limits(self, limits: SetLimits) -> None:
        self._apply_limits(limits.memory_limit_bytes, limits.cache_limit_bytes)
        self._wired_bytes = limits.wired_limit_bytes
        self._apply_wired_limit()
        if limits.trim:
            mx.clear_cache()

    @staticmethod
    def _apply_limits(memory_bytes: int, cache_bytes: int) -> None:
        if memory_bytes:
            mx.set_memory_limit(memory_bytes)
        if cache_bytes:
            mx.set_cache_limit(min(cache_bytes, _DEFAULT_CPU_CACHE) if not mx.metal.is_available() else cache_bytes)

    def _apply_wired_limit(self) -> None:
        if self._wired_bytes and mx.metal.is_available():
            mx.set_wired_limit(self._wired_bytes)

    # ----------------------------------------------------------------- requests

    def submit(self, request_id: str, request: GenerationRequest) -> list[Event]:
        assert self._generator is not None
        started = time.perf_counter()
        chat = request.prompt is None and not request.prompt_tokens
        tokens, dropped = self._prompt(request, chat)
        context = min(self._context_tokens, request.context_tokens or self._context_tokens)
        room = context - len(tokens)
        budget = request.max_tokens if request.max_tokens is not None else room
        sampling = first_said(request.sampling, self._generation_config, request.sampling_defaults)
        sampler, processors = self._sampler(sampling), self._processors(sampling)
        tools = template_tools(request.tools)
        parse_tool = (lambda text: self._tokenizer.tool_parser(text, tools)) if tools else None
        (uid,) = self._generator.insert(
            [tokens], [min(budget, room)], samplers=[sampler], logits_processors=[processors]
        )
        detokenizer = self._tokenizer.detokenizer
        if not chat:
            # A fresh detokenizer drops a leading blank, which belongs to the text where a prompt is continued.
            detokenizer.add_token(tokens[-1])
            detokenizer.last_segment  # noqa: B018  # reading it marks it as read
        self._uids[request_id] = uid
        self._streams[uid] = _Stream(
            request_id=request_id,
            uid=uid,
            detokenizer=detokenizer,
            pieces=self._initial_pieces(tokens) if chat else None,
            answer=AnswerBuilder(
                stops=request.stop,
                parse_tool=parse_tool if self._tokenizer.has_tool_calling else None,
                tool_markers=(self._tokenizer.tool_call_start or "", self._tokenizer.tool_call_end or ""),
                make_id=lambda: "call_" + secrets.token_hex(12),
            ),
            prompt_tokens=len(tokens),
            full_reason=FinishReason.LENGTH if budget <= room else FinishReason.CONTEXT,
            top_logprobs=request.top_logprobs,
            started=started,
            budget=min(budget, room),
        )
        return [Started(prompt_tokens=len(tokens), dropped_messages=dropped)]

    def _prompt(self, request: GenerationRequest, chat: bool) -> tuple[list[int], int]:
        """The tokens of the prompt, and how many turns had to be left out. Raises when it does not fit."""
        limit = min(self._context_tokens, request.context_tokens or self._context_tokens)
        messages = request.messages
        tokens = self._chat_tokens(messages, request) if chat else self._raw_tokens(request)
        while chat and request.truncate and len(tokens) >= limit:
            shorter = drop_oldest(messages)
            if shorter is None:
                break
            messages, tokens = shorter, self._chat_tokens(shorter, request)
        if len(tokens) >= limit:
            raise ContextLengthExceeded(
                f"input length ({len(tokens)} tokens) exceeds the model's maximum context length ({limit} tokens)"
            )
        if not tokens:
            raise InvalidRequest("the prompt is empty")
        return tokens, len(request.messages) - len(messages)

    def _raw_tokens(self, request: GenerationRequest) -> list[int]:
        if request.prompt is not None:
            return list(self._tokenizer.encode(request.prompt))
        if any(not 0 <= token < self._vocabulary for token in request.prompt_tokens):
            raise InvalidRequest(
                f"the prompt holds a token id outside of this model's vocabulary of {self._vocabulary}",
                param="prompt",
            )
        return list(request.prompt_tokens)

    def _chat_tokens(self, messages: list[Any], request: GenerationRequest) -> list[int]:
        if not self._tokenizer.has_chat_template:
            raise UnsupportedCapability("this model has no chat template; it can only complete text")
        arguments: dict[str, Any] = {"add_generation_prompt": True, "tools": template_tools(request.tools) or None}
        if request.thinking is not None:
            arguments["enable_thinking"] = request.thinking
        if request.thinking_effort is not None:
            arguments["reasoning_effort"] = request.thinking_effort
        try:
            return list(self._tokenizer.apply_chat_template(template_messages(messages), **arguments))
        except Exception as first:  # templates raise whatever their authors chose
            try:
                merged = template_messages(merge_system(messages))
                return list(self._tokenizer.apply_chat_template(merged, **arguments))
            except Exception:
                raise InvalidRequest(f"the model's chat template refuses these messages: {first}") from first

    def _initial_pieces(self, tokens: list[int]) -> Any:
        """The state in which an answer begins: reasoning when the prompt ends inside an open think block."""
        tokenizer = self._tokenizer
        initial = tokenizer.response_initial_state or "normal"
        if tokenizer.has_thinking:
            start = tokenizer.rfind_think_start(tokens)
            if start >= 0 and start > tokenizer.rfind_think_end(tokens):
                initial = "reasoning"
        return self._machine.make_state(initial)

    def _sampler(self, sampling: Sampling) -> Sampler:
        """One object per set of parameters, because equal objects are called once for the whole batch."""
        temperature = sampling.temperature if sampling.temperature is not None else 1.0
        if temperature == 0:
            return greedy_sampler
        top_k = sampling.top_k or 0
        key = (temperature, sampling.top_p or 1.0, top_k if top_k < self._vocabulary else 0, sampling.min_p or 0.0)
        if sampling.seed is not None:
            return _make_sampler(*key, seed=sampling.seed)
        if key not in self._samplers:
            if len(self._samplers) > 64:
                self._samplers.clear()
            self._samplers[key] = _make_sampler(*key, seed=None)
        return self._samplers[key]

    def _processors(self, sampling: Sampling) -> list[Any]:
        last = 64 if sampling.repeat_last_n is None else sampling.repeat_last_n
        size = self._context_tokens if last < 0 else last
        if any(not 0 <= token < self._vocabulary for token in sampling.logit_bias):
            raise InvalidRequest(
                f"logit_bias names a token id outside of this model's vocabulary of {self._vocabulary}",
                param="logit_bias",
            )
        repeat = None if sampling.repeat_penalty in (None, 1.0) else sampling.repeat_penalty
        return make_logits_processors(
            logit_bias=sampling.logit_bias or None,
            repetition_penalty=repeat if size else None,
            repetition_context_size=size,
            presence_penalty=(sampling.presence_penalty or None) if size else None,
            presence_context_size=size,
            frequency_penalty=(sampling.frequency_penalty or None) if size else None,
            frequency_context_size=size,
        )

    def cancel(self, request_id: str) -> None:
        uid = self._uids.pop(request_id, None)
        if uid is not None and self._generator is not None:
            self._generator.remove([uid])
            del self._streams[uid]

    @property
    def streams(self) -> int:
        return len(self._streams)

    # -------------------------------------------------------------------- steps

    def step(self) -> list[StreamEvents]:
        assert self._generator is not None
        prompts, responses = self._generator.next()
        out: list[StreamEvents] = []
        for response in responses:
            self._tell(response.uid, _Drawn(response.token, response.logprobs, response.finish_reason), out)
        for prompt in prompts:
            if prompt.end_of_prompt and (first := self._first_token(prompt.uid)) is not None:
                self._tell(prompt.uid, first, out)
                if (stream := self._streams.get(prompt.uid)) is not None:
                    stream.told_early = True
        if not self._streams:
            mx.clear_cache()
        return out

    def _tell(self, uid: int, drawn: _Drawn, out: list[StreamEvents]) -> None:
        stream = self._streams.get(uid)
        if stream is not None and (events := self._advance(stream, drawn)):
            out.append(StreamEvents(request_id=stream.request_id, events=events))

    def _first_token(self, uid: int) -> _Drawn | None:
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
        return _Drawn(token, batch._next_logprobs[row], "length" if stream.budget == 1 else None)

    def _advance(self, stream: _Stream, drawn: _Drawn) -> list[Event]:
        if not stream.first_token:
            stream.first_token = time.perf_counter()
        told_early, stream.told_early = stream.told_early, False
        if told_early and drawn.finish_reason is None:
            return []
        ended = drawn.finish_reason == "stop"
        new = not ended and not told_early  # the token that ends a turn is not part of its text
        if new:
            self._tokens_total += 1
            stream.tokens += 1
            stream.detokenizer.add_token(drawn.token)
        if drawn.finish_reason is not None:
            stream.detokenizer.finalize()
        text = stream.detokenizer.last_segment
        if stream.pieces is None:
            pieces = [("normal", text)]
        else:
            stream.pieces, pieces = TextStateMachine.split(stream.pieces, text)
            if drawn.finish_reason is not None:
                stream.pieces, rest, kind = TextStateMachine.flush(stream.pieces)
                pieces.append((kind, rest))
        if new and pieces[-1][0] == "reasoning":
            stream.reasoning_tokens += 1
        elif new and stream.top_logprobs is not None:
            stream.logprobs.append(self._logprob(drawn, stream.top_logprobs))
        events = stream.answer.feed(pieces)
        if drawn.finish_reason is not None:
            events += stream.answer.finish(cut=not ended)
        if stream.logprobs and (events or drawn.finish_reason is not None):
            events.append(Logprobs(tokens=stream.logprobs))
            stream.logprobs = []
        if stream.answer.stop_string is not None:
            reason = FinishReason.STOP
        elif drawn.finish_reason is None:
            return events
        else:
            reason = stream.answer.finish_reason if ended else stream.full_reason
        return events + self._end(stream, reason)

    def _end(self, stream: _Stream, reason: FinishReason) -> list[Event]:
        self.cancel(stream.request_id)
        usage = Usage(
            prompt_tokens=stream.prompt_tokens,
            completion_tokens=stream.tokens,
            reasoning_tokens=stream.reasoning_tokens,
            prefill_seconds=stream.first_token - stream.started,
            decode_seconds=time.perf_counter() - stream.first_token,
        )
        return [usage, Finish(reason=reason, stop_string=stream.answer.stop_string)]

    def _logprob(self, drawn: _Drawn, top: int) -> TokenLogprob:
        logprobs = drawn.logprobs.astype(mx.float32)
        best: list[TokenLogprob] = []
        if top:
            order: Any = mx.argsort(-logprobs)[:top].tolist()
            best = [self._token_logprob(token, logprobs[token].item()) for token in order]
        one = self._token_logprob(drawn.token, logprobs[drawn.token].item())
        return TokenLogprob(token=one.token, data=one.data, logprob=one.logprob, top=best)

    def _token_logprob(self, token: int, logprob: float) -> TokenLogprob:
        text = self._tokenizer.decode([token])
        return TokenLogprob(token=text, data=text.encode(), logprob=max(logprob, _NO_LOGPROB))

    def reading(self) -> EngineReading:
        return EngineReading(
            memory_bytes=mx.get_active_memory() + mx.get_cache_memory(),
            cache_bytes=mx.get_cache_memory(),
            peak_bytes=mx.get_peak_memory(),
            tokens_total=self._tokens_total,
        )

    def close(self) -> None:
        """Wired memory is given back while the process still answers: a hard kill can strand it on macOS."""
        if self._generator is not None:
            self._generator.close()
        self._generator = None
        self._model = self._tokenizer = self._machine = None
        self._streams.clear()
        mx.synchronize()
        mx.clear_cache()


def _make_sampler(temperature: float, top_p: float, top_k: int, min_p: float, *, seed: int | None) -> Sampler:
    """Ollama's order of filters. A seeded sampler has a key of its own: MLX's global one belongs to all requests."""
    key = None if seed is None else mx.random.key(seed & 0xFFFFFFFFFFFFFFFF)

    def sample(logprobs: mx.array) -> mx.array:
        nonlocal key
        if top_k:
            logprobs = apply_top_k(logprobs, top_k)
        logprobs = logprobs.astype(mx.float32) / temperature
        if 0 < top_p < 1:
            logprobs = apply_top_p(logprobs, top_p)
        if min_p > 0:
            logprobs = apply_min_p(logprobs, min_p)
        if key is None:
            return mx.random.categorical(logprobs)
        key, draw = mx.random.split(key)
        return mx.random.categorical(logprobs, key=draw)

    return sample
