"""Text generation from images and text by mlx-vlm: the extra ``vision``.

Everything of an answer but its computation (sampling, grammars, tools, thinking, log probabilities) is the text
engine's code. What differs:

- mlx-vlm's batch generator processes prompts and decodes.
- An image becomes embeddings before its request is inserted; all on the compute thread, and evaluated.
- One sampler belongs to the whole generator. So each row draws inside its last logits processor, which leaves the
  token that it drew as the only possible one.
- A row is admitted only while ``completion_batch_size`` minus the running rows is at least ``prefill_batch_size``.
"""

from __future__ import annotations

import io
import json
import os
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import mlx.core as mx
import numpy as np
from mlx_vlm.generate import BatchGenerator
from mlx_vlm.utils import load, prepare_inputs, should_add_special_tokens
from PIL import Image

from mlx_router_shared.errors import ContextLengthExceeded, InvalidRequest, UnsupportedCapability
from mlx_router_shared.generation import Event, Failure, Finish, GenerationRequest, Message, Request, StreamEvents
from mlx_router_shared.protocol import Load, ModelFacts
from mlx_router_worker.engine import Report
from mlx_router_worker.engines.answering import AnsweringEngine, Prepared
from mlx_router_worker.engines.base import refuse_additions
from mlx_router_worker.engines.load_tokenizer import load_model_tokenizer
from mlx_router_worker.generation.answers import AnswerStream, Drawn
from mlx_router_worker.generation.sampling import Draw, Processor, Sampler, draw, processors_for
from mlx_router_worker.text.renderer import PromptRenderer, is_chat
from mlx_router_worker.text.template_traits import CallStyle

__all__ = ["VisionEngine"]

_PREFILL_TOKENS: Final = 512
_MOST_PIXELS: Final = 64_000_000
_FIELDS_WITH_IMAGE_TOKENS: Final = ("image_token", "video_token", "audio_token")


class _Row:
    """Draws the tokens of one request, and keeps their scores until they are handed out."""

    def __init__(self, stream: AnswerStream, sampler: Sampler, top_logprobs: int | None) -> None:
        self.stream = stream
        self.sampler = sampler
        self.processors: tuple[Processor, ...] = ()
        self.top_logprobs = top_logprobs
        self.draws: deque[Draw] = deque()

    def __call__(self, tokens: mx.array, logits: mx.array) -> mx.array:
        drawn = draw([self], logits, [None])
        self.draws.append(drawn)
        chosen = mx.arange(logits.shape[-1])[None] == drawn.tokens.reshape(-1, 1)
        return mx.where(chosen, mx.array(0.0, logits.dtype), mx.array(-np.inf, logits.dtype))


class VisionEngine(AnsweringEngine):
    """Implements ``Engine`` for models that see."""

    def __init__(self, _send_bytes: Callable[[bytes], None]) -> None:
        super().__init__()
        self._rows: dict[int, _Row] = {}
        self._uids: dict[str, int] = {}

    # ------------------------------------------------------------------ loading

    def _load_weights(self, order: Load, report: Report, *, strict: bool = True) -> dict[str, Any]:
        refuse_additions(order, "vision")
        self._apply_limits(order.memory_limit_bytes, order.cache_limit_bytes)
        started = time.perf_counter()
        report("weights", 0.0)
        trust = {"trust_remote_code": False}
        self._model, self._processor = load(order.path, lazy=True, **trust)
        config: dict[str, Any] = json.loads((Path(order.path) / "config.json").read_text(encoding="utf-8"))
        ends = self._processor.tokenizer.stopping_criteria.eos_token_ids
        self._tokenizer = load_model_tokenizer(Path(order.path), list(ends))
        self._weights_bytes = self._evaluate(report, yields=order.yields)
        self._weights_seconds = time.perf_counter() - started
        self._note_config(order, config)
        return config

    def load(self, load: Load, report: Report) -> ModelFacts:
        self._load_weights(load, report)
        self._load_text(load)
        mx.random.seed(int.from_bytes(os.urandom(8)))
        self._generator = BatchGenerator(
            self._model.language_model, self._processor, completion_batch_size=max(load.parallel, 2),
            prefill_batch_size=1, prefill_step_size=_PREFILL_TOKENS,
        )  # fmt: skip
        self._apply_wired_limit()  # the generator has just set it to all there is
        return self._answering_facts(mx.get_active_memory(), batched=True)

    def warm_up(self) -> None:
        """The first request does it."""

    def _new_renderer(self) -> PromptRenderer:
        return _VisionRenderer(self._tokenizer, self._context_tokens, self._vocabulary, self._markers_in_text())

    # ----------------------------------------------------------------- requests

    def prepare(self, request: Request) -> Any:
        """Return the request and its text: images become tokens on the compute thread, where MLX may be used."""
        if not isinstance(request, GenerationRequest):
            raise UnsupportedCapability("this model generates text; it makes no embeddings")
        started = time.perf_counter()
        if request.echo and request.top_logprobs is not None:
            raise UnsupportedCapability("this model does not score prompts", param="echo")
        if not is_chat(request):
            tokens, _ = self._renderer.tokens(request)
            return request, tokens, started
        assert isinstance(self._renderer, _VisionRenderer)
        return request, self._renderer.text(request), started

    def submit(self, request_id: str, prepared: Any) -> list[Event]:
        request, text, started = prepared
        ready = self._with_images(request, text, started)
        events = self._first_events(ready)
        if ready.ending:
            return events + ready.ending
        processors = processors_for(ready.sampling, self._context_tokens)
        if ready.guide is not None:
            processors.append(ready.guide)  # the last word is the grammar's
        stream = self._open_stream(request_id, ready)
        row = _Row(stream, self._samplers.get(ready.sampling), request.top_logprobs)
        (uid,) = self._generator.insert(
            [ready.tokens], [ready.budget], prompt_kwargs=[ready.extra], logits_processors=[[*processors, row]]
        )
        self._uids[request_id] = uid
        self._rows[uid] = row
        return events

    def cancel(self, request_id: str) -> None:
        uid = self._uids.pop(request_id, None)
        if uid is not None and self._rows.pop(uid, None) is not None:
            self._generator.remove([uid])

    @property
    def streams(self) -> int:
        return len(self._rows)

    def step(self) -> list[StreamEvents]:
        out: list[StreamEvents] = []
        if not self._generator.has_work:
            return out
        for drawn in self._generator.next()[1]:
            row = self._rows.get(drawn.uid)
            if row is None:
                continue
            ((_, scores),) = row.draws.popleft().read([row])
            events = self._advance(row.stream, Drawn(drawn.token, scores, drawn.finish_reason))
            if drawn.finish_reason is not None:
                del self._rows[drawn.uid], self._uids[row.stream.request_id]
            if events:
                out.append(StreamEvents(request_id=row.stream.request_id, events=events))
                if isinstance(events[-1], Finish | Failure):
                    self.cancel(row.stream.request_id)
        return out

    def close(self) -> None:
        self._generator.close()
        self._rows.clear()
        self._uids.clear()
        super().close()

    def _with_images(self, request: GenerationRequest, text: Any, started: float) -> Prepared:
        """Its tokens with room for the images, and the embeddings of both."""
        images = [_open(data) for message in request.messages for data in message.images]
        inputs = self._inputs(text, images) if isinstance(text, str) else {"input_ids": mx.array([text])}
        ids, pixels = inputs.pop("input_ids"), inputs.pop("pixel_values", None)
        mask = inputs.pop("attention_mask", None)
        listed: Any = ids.squeeze(0).tolist()
        tokens = [int(token) for token in listed]
        limit = self._renderer.context_of(request)
        if len(tokens) >= limit:
            raise ContextLengthExceeded(
                f"input length ({len(tokens)} tokens) exceeds the model's maximum context length ({limit} tokens)",
                tokens=len(tokens),
                limit=limit,
            )
        embedded = self._model.get_input_embeddings(ids, pixels, mask=mask, **inputs).to_dict()
        extra = {**inputs, **{name: value for name, value in embedded.items() if value is not None}}
        mx.eval([value for value in extra.values() if isinstance(value, mx.array)])
        return self._prepared(request, tokens, started, extra=extra)

    def _inputs(self, prompt: str, images: list[Any]) -> dict[str, Any]:
        special = should_add_special_tokens(self._model.config.model_type, self._processor)
        try:
            inputs = prepare_inputs(self._processor, images=images or None, prompts=prompt, add_special_tokens=special)
        except (ValueError, TypeError) as error:
            raise InvalidRequest(f"the model cannot take these images: {error}", param="images") from None
        return dict(inputs)

    def _markers_in_text(self) -> list[str]:
        """What stands for an image in a prompt: a user's text must not hold it, or images and text come apart."""
        found = [getattr(self._processor, name, None) for name in _FIELDS_WITH_IMAGE_TOKENS]
        return [text for text in found if isinstance(text, str) and text]


class _VisionRenderer(PromptRenderer):
    """Renders messages with a part for each image."""

    def __init__(self, tokenizer: Any, context_tokens: int, vocabulary: int, markers: list[str]) -> None:
        super().__init__(tokenizer, context_tokens, vocabulary)
        self._markers = markers

    def text(self, request: GenerationRequest) -> str:
        """Return the text of a prompt. Raises ``ContextLengthExceeded`` for one that cannot fit."""
        self._refuse_hopeless(request, request.messages, self.context_of(request))
        return self._chat(request, request.messages)

    def _template_messages(self, messages: list[Message], style: CallStyle) -> list[dict[str, Any]]:
        entries = super()._template_messages(messages, style)
        for entry, message in zip(entries, messages, strict=True):
            text = message.content
            for marker in self._markers:
                text = text.replace(marker, "")
            entry["content"] = text
            if message.images:
                entry["content"] = [*({"type": "image"} for _ in message.images), {"type": "text", "text": text}]
        return entries


def _open(data: bytes) -> Any:
    """A picture in RGB; raises ``InvalidRequest`` for what is none, and for one that would fill the memory."""
    try:
        image = Image.open(io.BytesIO(data))
        if image.width * image.height > _MOST_PIXELS:
            raise InvalidRequest(f"an image of {image.width} x {image.height} is too large", param="images")
        return image.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise InvalidRequest(f"invalid image input: {error}", param="images") from None
