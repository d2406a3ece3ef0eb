"""Text generation from images and text by mlx-vlm: the extra ``vision``.

mlx-vlm's own batch generator behind the interface that the text engine uses of mlx-lm's, so that everything else of an
answer (sampling, grammars, tools, thinking, log probabilities) is the same code. What differs:

- An image becomes embeddings before its request is inserted; all on the engine's thread, and evaluated.
- One sampler belongs to the whole generator. So each row draws inside its last logits processor, which leaves the
  token that it drew as the only possible one.
- A row is admitted only while ``completion_batch_size`` minus the running rows is at least ``prefill_batch_size``.
"""

from __future__ import annotations

import io
import json
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, NamedTuple

import mlx.core as mx
import numpy as np
from mlx_vlm.generate import BatchGenerator
from mlx_vlm.utils import load, prepare_inputs, should_add_special_tokens
from PIL import Image

from mlx_router_shared.errors import ContextLengthExceeded, InvalidRequest, UnsupportedCapability
from mlx_router_shared.generation import GenerationRequest, Message
from mlx_router_shared.protocol import Load
from mlx_router_worker.engine import Report
from mlx_router_worker.engines.base import refuse_additions
from mlx_router_worker.engines.load_tokenizer import load_model_tokenizer
from mlx_router_worker.engines.text import PREFILL_TOKENS, Prompt, TextEngine
from mlx_router_worker.text.renderer import PromptRenderer, is_chat
from mlx_router_worker.text.template_traits import CallStyle

__all__ = ["VisionEngine"]

_MOST_PIXELS: Final = 64_000_000
_FIELDS_WITH_IMAGE_TOKENS: Final = ("image_token", "video_token", "audio_token")


class _Response(NamedTuple):
    uid: int
    token: int
    logprobs: Any
    finish_reason: str | None


class _Row:
    """Draws the tokens of one request, and keeps their log probabilities until they are handed out."""

    def __init__(self, sampler: Callable[[mx.array], mx.array]) -> None:
        self._sampler = sampler
        self.logprobs: deque[mx.array] = deque()

    def __call__(self, tokens: mx.array, logits: mx.array) -> mx.array:
        logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        drawn = self._sampler(logprobs)
        self.logprobs.append(logprobs[0])
        chosen = mx.arange(logits.shape[-1])[None] == drawn.reshape(-1, 1)
        return mx.where(chosen, mx.array(0.0, logits.dtype), mx.array(-np.inf, logits.dtype))


class _Generator:
    """mlx-vlm's batch generator with the calls of mlx-lm's."""

    def __init__(self, model: Any, processor: Any, parallel: int) -> None:
        self._inner = BatchGenerator(
            model.language_model, processor, completion_batch_size=max(parallel, 2), prefill_batch_size=1,
            prefill_step_size=PREFILL_TOKENS,
        )  # fmt: skip
        self._rows: dict[int, _Row] = {}

    def insert(
        self, prompts: list[list[int]], max_tokens: list[int], *, samplers: list[Any],
        logits_processors: list[list[Any]], prompt_kwargs: list[dict[str, Any]],
    ) -> list[int]:  # fmt: skip
        row = _Row(samplers[0])
        uids = self._inner.insert(
            prompts, max_tokens, prompt_kwargs=prompt_kwargs, logits_processors=[[*logits_processors[0], row]]
        )
        self._rows[uids[0]] = row
        return list(uids)

    def next(self) -> tuple[list[Any], list[_Response]]:
        if not self._inner.has_work:
            return [], []
        _, tokens = self._inner.next()
        out = []
        for drawn in tokens:
            row = self._rows[drawn.uid]
            out.append(_Response(drawn.uid, drawn.token, row.logprobs.popleft(), drawn.finish_reason))
            if drawn.finish_reason is not None:
                del self._rows[drawn.uid]
        return [], out

    def remove(self, uids: list[int]) -> None:
        for uid in uids:
            if self._rows.pop(uid, None) is not None:
                self._inner.remove(uid)

    def close(self) -> None:
        self._inner.close()


class VisionEngine(TextEngine):
    """Implements ``Engine`` for models that see."""

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

    def _check_cache(self, config: dict[str, Any]) -> None:
        """mlx-vlm batches whatever it can load."""

    def _new_generator(self, parallel: int) -> Any:
        return _Generator(self._model, self._processor, parallel)

    def _new_renderer(self) -> PromptRenderer:
        return _VisionRenderer(self._tokenizer, self._context_tokens, self._vocabulary, self._markers_in_text())

    def _share_step(self) -> None:
        """mlx-vlm reads one prompt at a time here."""

    def _eval_caches(self) -> None:
        """mlx-vlm's generator evaluates its caches at an interval of its own."""

    def compile_kernels(self) -> None:
        """The first request does it."""

    def _first_token(self, uid: int) -> None:
        return None

    def _prompt(self, request: GenerationRequest) -> Prompt:
        """Its tokens with room for the images, and the embeddings of both."""
        if request.echo and request.top_logprobs is not None:
            raise UnsupportedCapability("this model does not score prompts", param="echo")
        images = [_open(data) for message in request.messages for data in message.images]
        if is_chat(request):
            assert isinstance(self._renderer, _VisionRenderer)
            inputs = self._inputs(self._renderer.text(request), images)
        else:
            tokens, _ = self._renderer.tokens(request)
            inputs = {"input_ids": mx.array([tokens])}
        ids, pixels = inputs.pop("input_ids"), inputs.pop("pixel_values", None)
        mask = inputs.pop("attention_mask", None)
        tokens = [int(token) for token in ids.squeeze(0).tolist()]
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
        return Prompt(tokens, 0, {"prompt_kwargs": [extra]})

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
