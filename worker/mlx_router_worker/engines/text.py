"""Text generation by mlx-lm's models.

One thread loads, generates and frees. A step is one chunk of a prompt or one token for the rows that are decoded; the
scheduler says which. What must not happen in a step is checked before a request is accepted, because an exception
there ends the worker with all of its requests.

A request is a ``Row``: in the prefill lane until its prompt is processed, then in a batch, or in the draft lane while
it is alone. A row whose caches do not fit beside the others waits; one that no longer fits gives its caches up and is
processed again when there is memory for it.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import mlx.core as mx

from mlx_router_shared.cache_size import estimate_cache, estimate_work
from mlx_router_shared.errors import MlxRouterError
from mlx_router_shared.generation import (
    Event,
    Failure,
    Finish,
    FinishReason,
    PromptEcho,
    Request,
    StreamEvents,
    failure_of,
)
from mlx_router_shared.model_config import text_config
from mlx_router_shared.protocol import Load, ModelFacts, SetLimits
from mlx_router_worker.engine import Report
from mlx_router_worker.engines.answering import AnsweringEngine, Prepared
from mlx_router_worker.generation.admission import RowAdmission
from mlx_router_worker.generation.answers import Drawn as DrawnToken
from mlx_router_worker.generation.caches import Cache, can_batch, evaluate, measure, merge, new_cache
from mlx_router_worker.generation.decode import Batches, Drawn
from mlx_router_worker.generation.drafts import DraftLane
from mlx_router_worker.generation.memory import MemoryLedger
from mlx_router_worker.generation.prefill import PrefillLane
from mlx_router_worker.generation.prefixes import PrefixCache
from mlx_router_worker.generation.rows import Row
from mlx_router_worker.generation.sampling import Scores, draw, processors_for
from mlx_router_worker.generation.schedule import LONGEST_CHUNK, Chunk, PrefillScheduler
from mlx_router_worker.generation.scoring import PromptScore
from mlx_router_worker.prefix.boundaries import cut_points

__all__ = ["TextEngine"]

_WARM_UP_TOKENS: Final = 512
_LONGEST_CHUNK_ON_CPU: Final = 512
"""Longer ones are slower there: attention keeps the scores of all pairs of tokens."""


class TextEngine(AnsweringEngine):
    """Implements ``Engine`` for text generation."""

    def __init__(self, _send_bytes: Callable[[bytes], None]) -> None:
        super().__init__()
        self._rows: dict[str, Row] = {}
        self._late: deque[Drawn] = deque()
        """Tokens that were read while a row was removed; told in the next step."""
        self._drafts: DraftLane | None = None

    # ------------------------------------------------------------------ loading

    def load(self, load: Load, report: Report) -> ModelFacts:
        config = self._load_weights(load, report)
        if load.draft_path:
            self._load_draft(Path(load.draft_path))
        self._load_text(load)
        mx.random.seed(int.from_bytes(os.urandom(8)))
        batched = can_batch(new_cache(self._model))
        self._parallel = load.parallel
        self._lane = PrefillLane(self._model, self._vocabulary)
        self._batches = Batches(self._model, can_batch=batched, weights_bytes=self._weights_bytes)
        on_cpu = mx.default_device().type == mx.cpu
        longest_chunk = _LONGEST_CHUNK_ON_CPU if on_cpu else LONGEST_CHUNK
        self._scheduler = PrefillScheduler(load.prefill_share, load.longest_gap_ms / 1000, longest_chunk)
        self._prefixes = PrefixCache(self._model)
        self._prefixes.set_limit(load.prefix_cache_bytes)
        text = dict(text_config(config))
        ledger = MemoryLedger(
            limit_bytes=0,
            weights_bytes=self._weights_bytes,
            cache=estimate_cache(text),
            work=estimate_work(text, fused_attention=not on_cpu),
        )
        self._admission = RowAdmission(ledger, self._lane, self._batches, self._drafts, self._prefixes, longest_chunk)
        self._admission.set_limit(load.memory_limit_bytes, load.requests_limit_bytes)
        self._renderer.spare_bytes = self._admission.spare_bytes
        self._apply_wired_limit()
        return self._answering_facts(mx.get_active_memory(), batched=batched)

    def _load_draft(self, folder: Path) -> None:
        started = time.perf_counter()
        self._drafts = DraftLane(self._model, self._tokenizer, folder)
        self._weights_bytes += self._drafts.weights_bytes
        self._weights_seconds += time.perf_counter() - started

    def warm_up(self) -> None:
        """Compile the kernels of a chunk and of a batch. On a CPU there are none, and this would take seconds."""
        if mx.default_device() != mx.Device(mx.cpu):
            self.compile_kernels()

    def compile_kernels(self) -> None:
        """Process a prompt and decode with two rows, on caches of the calling thread's own."""
        end = next(iter(self._ends), 0)
        rows: list[Cache] = [new_cache(self._model) for _ in range(2)]
        for tokens, cache in ((_WARM_UP_TOKENS, rows[0]), (2, rows[1])):
            self._model(mx.array([[end] * tokens]), cache=cache)
            evaluate(cache)
        mx.eval(self._model(mx.array([[end]]), cache=rows[0]))
        if can_batch(rows[0]):
            mx.eval(self._model(mx.array([[end]] * 2), cache=merge(rows)))

    def set_limits(self, limits: SetLimits) -> None:
        super().set_limits(limits)
        self._admission.set_limit(limits.memory_limit_bytes, limits.requests_limit_bytes)
        self._prefixes.set_limit(limits.prefix_cache_bytes)
        if limits.trim:
            self._prefixes.shrink(self._prefixes.nbytes // 2)
        self._admission.limit_prefixes()
        self._admission.free_unused()

    # ----------------------------------------------------------------- requests

    def prepare(self, request: Request) -> Any:
        prepared = super().prepare(request)
        if not self._prefixes.needs_snapshot:
            return prepared
        return replace(prepared, cuts=cut_points(prepared.tokens, self._renderer.turn_ends))

    def submit(self, request_id: str, prepared: Any) -> list[Event]:
        assert isinstance(prepared, Prepared)
        self._admission.check(len(prepared.tokens))
        request, sampling = prepared.request, prepared.sampling
        events = self._first_events(prepared)
        wants_score = request.echo and request.top_logprobs is not None
        if prepared.ending and not wants_score:
            return events + prepared.ending
        processors = processors_for(sampling, self._context_tokens)
        if prepared.guide is not None:
            processors.append(prepared.guide)  # the last word is the grammar's
        row = Row(
            request_id=request_id,
            stream=self._open_stream(request_id, prepared),
            sampler=self._samplers.get(sampling),
            processors=processors,
            top_logprobs=request.top_logprobs,
            tokens=list(prepared.tokens),
            arrived=time.perf_counter(),
            priority=request.priority,
            repeatable=sampling.seed is not None and sampling.temperature != 0,
            ending=prepared.ending,
            scope=request.cache_scope,
            reuses=request.cache_prompt and not wants_score,
            keeps=request.cache_prompt,
            cuts=prepared.cuts,
        )
        if wants_score and request.top_logprobs is not None:
            row.score = PromptScore(tokens=prepared.tokens, vocabulary=self._words, top=request.top_logprobs)
            row.echo = self._prompt_text(prepared)
        self._rows[request_id] = row
        self._lane.rows.append(row)
        return events

    def cancel(self, request_id: str) -> None:
        row = self._rows.pop(request_id, None)
        if row is None:
            return
        if row in self._lane.rows:
            self._lane.rows.remove(row)
        elif self._drafts is not None and self._drafts.row is row:
            self._drafts.release()
        elif (group := self._batches.group_of(row)) is not None:
            self._prefixes.keep_answer(row, group.cache, group.place(row))
            self._late.extend(self._batches.remove(row, self._admission.bytes_per_token))
        if row.cache is not None:
            self._prefixes.keep_answer(row, row.cache)
        row.cache = None
        self._admission.limit_prefixes()

    @property
    def streams(self) -> int:
        return len(self._rows)

    # -------------------------------------------------------------------- steps

    def step(self) -> list[StreamEvents]:
        out: list[StreamEvents] = []
        self._tell_all(self._late, out)
        chunk = self._next_chunk()
        if chunk is not None:
            self._process(chunk, out)
        elif self._is_decoding:
            self._decode(out)
        else:
            self._refuse_what_no_longer_fits(out)
        self._admission.free_unused()
        return out

    @property
    def _is_decoding(self) -> bool:
        return bool(self._batches.groups) or (self._drafts is not None and self._drafts.row is not None)

    def _next_chunk(self) -> Chunk | None:
        if not self._lane.rows:
            return None
        now = time.perf_counter()
        for row in self._lane.rows:
            self._prefixes.look_up(row)
        prompts = self._scheduler.in_order(now, [row.waiting_prompt for row in self._lane.rows])
        running = len(self._admission.decoding) + len(self._lane.begun)
        allowed = []
        for prompt in prompts:
            if prompt.has_begun:
                allowed.append(prompt)
            elif running < self._parallel and self._scheduler.may_begin(prompt, prompts):
                # The first that may begin does, or waits for memory; nothing overtakes it meanwhile.
                if self._admission.fits([prompt.key]):
                    allowed.append(prompt)
                running = self._parallel
        oldest = min((row.arrived for row in self._admission.decoding), default=None)
        return self._scheduler.next_chunk(now, allowed, decoding_since=oldest)

    def _process(self, chunk: Chunk, out: list[StreamEvents]) -> None:
        first: Row = chunk.key
        self._batches.wait()  # so that the chunk's time is its own
        if first.cache is None:
            self._prefixes.begin(first)
        position = first.position
        tokens = self._prefixes.longest_chunk(first, self._admission.longest_chunk(chunk.tokens))
        rows = self._lane.together(first, tokens)[: max(self._parallel - len(self._admission.decoding), 1)]
        if not self._admission.fits(rows):
            rows = [first]
        started = time.perf_counter()
        cache: Cache | None = None
        logits: mx.array | None
        if len(rows) > 1:
            for row in rows[1:]:
                self._prefixes.begin(row)
            logits, cache = self._lane.process_together(rows)
            tokens = len(rows) * max(len(row.tokens) for row in rows)
        else:
            logits = self._lane.process(first, tokens)
            tokens = first.position - position
        running_priority = max((row.priority for row in self._admission.decoding), default=first.priority)
        seconds = time.perf_counter() - started
        self._scheduler.note_chunk(
            position, tokens, seconds, owes=chunk.owes, priority=first.priority, running_priority=running_priority
        )
        self._prefixes.keep_prompt(first)
        if logits is None:
            self._admission.limit_prefixes()
            return
        # Single tokens may be ruled out by -inf; the largest logit is a number.
        if first.stream.cached_tokens and not mx.isfinite(logits.max()).item():
            self._prefixes.forget(first)
            first.start_over()
            return
        held, length = (first.cache, first.position) if cache is None else (cache, max(len(row.tokens) for row in rows))
        assert held is not None
        self._admission.note_size(measure(held, length, len(rows)))
        if cache is None:
            others = self._choices_beside(first)
            self._lane.share(first, others)
            rows = [first, *others]
            logits = mx.repeat(logits, len(rows), axis=0)
        self._begin_answers(rows, logits, cache, out)

    def _choices_beside(self, row: Row) -> list[Row]:
        """Rows with the same prompt that can begin with a copy of its caches."""
        others: list[Row] = []
        free = self._parallel - len(self._admission.decoding) - len(self._lane.begun)
        for other in self._lane.same_prompt(row)[: max(free, 0)]:
            if self._admission.fits([*others, other]):
                others.append(other)
        return others

    def _begin_answers(self, rows: list[Row], logits: mx.array, cache: Cache | None, out: list[StreamEvents]) -> None:
        """Draw the first token of rows whose prompts are processed, and have the rows decoded."""
        for row in rows:
            self._lane.rows.remove(row)
            if row.score is not None:
                echo = PromptEcho(text=row.echo, tokens=row.score.entries)
                out.append(StreamEvents(request_id=row.request_id, events=[echo]))
                row.score = None
        contexts = [mx.array(row.tokens) if row.processors else None for row in rows]
        for row, (token, scores) in zip(rows, draw(rows, logits, contexts).read(rows), strict=True):
            if row.ending:
                out.append(StreamEvents(request_id=row.request_id, events=row.ending))
                del self._rows[row.request_id]
            else:
                self._tell(row, token, scores, out)
        going_on = [row for row in rows if self._rows.get(row.request_id) is row]
        if not going_on:
            return
        if cache is not None and len(going_on) < len(rows):
            kept = mx.array([place for place, row in enumerate(rows) if row in going_on])
            for layer in cache:
                layer.filter(kept)
        self._have_decoded(going_on, cache)

    def _have_decoded(self, rows: list[Row], cache: Cache | None) -> None:
        if self._drafts is not None:
            (row, *more), waiting = rows, self._lane.rows
            alone = not more and not waiting and not self._is_decoding and cache is None
            if alone and not row.processors and not row.repeatable:
                self._drafts.begin(row)
                return
            if (before := self._drafts.release()) is not None:
                self._batches.join([before], self._admission.bytes_per_token)
        if cache is not None:
            self._batches.join(rows, self._admission.bytes_per_token, cache)
            return
        for row in rows:
            self._batches.join([row], self._admission.bytes_per_token)

    def _decode(self, out: list[StreamEvents]) -> None:
        started = time.perf_counter()
        drafting = self._drafts is not None and self._drafts.row is not None
        drawn = self._drafts.step() if drafting and self._drafts is not None else self._batches.step()
        self._scheduler.note_decode(time.perf_counter() - started)
        self._tell_all(deque(drawn), out)
        self._stay_within_limit(out)

    def _tell_all(self, drawn: deque[Drawn], out: list[StreamEvents]) -> None:
        while drawn:
            row, token, scores = drawn.popleft()
            self._tell(row, token, scores, out)
            if drawn is not self._late:
                drawn.extend(self._late)
                self._late.clear()

    def _tell(self, row: Row, token: int, scores: Scores | None, out: list[StreamEvents]) -> None:
        if self._rows.get(row.request_id) is not row:
            return
        row.tokens.append(token)
        row.drawn += 1
        reason = "stop" if token in self._ends else "length" if row.drawn >= row.stream.budget else None
        events = self._advance(row.stream, DrawnToken(token, scores, reason))
        if events:
            out.append(StreamEvents(request_id=row.request_id, events=events))
        if events and isinstance(events[-1], Finish | Failure):
            self.cancel(row.request_id)

    # ------------------------------------------------------------------- memory

    def _stay_within_limit(self, out: list[StreamEvents]) -> None:
        """Have the newest rows give up their caches until the others fit. The last row ends at the limit."""
        while self._admission.is_exceeded():
            holding = self._admission.holding
            if len(holding) == 1:
                (row,) = holding
                if row.stream.tokens:
                    row.stream.budget = min(row.stream.budget, row.drawn + 1)
                    row.stream.full_reason = FinishReason.CONTEXT
                return
            self._start_over(min(holding, key=lambda row: (row.priority, -row.arrived)), out)

    def _start_over(self, row: Row, out: list[StreamEvents]) -> None:
        if row in self._lane.rows:
            row.start_over()
            return
        group = self._batches.group_of(row)
        assert group is not None, "a row in the draft lane is alone"
        self._tell_all(deque(group.flush()), out)
        if self._rows.get(row.request_id) is not row:
            return  # that token was its last
        self._late.extend(self._batches.remove(row, self._admission.bytes_per_token))
        row.start_over()
        self._lane.rows.append(row)

    def _refuse_what_no_longer_fits(self, out: list[StreamEvents]) -> None:
        """Nothing runs and nothing may begin: the limit has been lowered since these requests were accepted."""
        for row in list(self._lane.rows):
            try:
                self._admission.check(len(row.tokens))
            except MlxRouterError as error:
                out.append(StreamEvents(request_id=row.request_id, events=[failure_of(error)]))
                self.cancel(row.request_id)

    def close(self) -> None:
        self._rows.clear()
        self._late.clear()
        self._drafts = None
        if self._model is not None and hasattr(self, "_lane"):
            del self._lane, self._batches, self._admission, self._prefixes
        super().close()
