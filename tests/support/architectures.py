"""An engine with a tiny model of some architecture, beside the bare loop over mlx-lm that says what is right."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm.generate import generate_step

from mlx_router_shared.generation import ContextTokens, Event, Finish, GenerationRequest, Sampling
from mlx_router_shared.protocol import Load
from mlx_router_worker.engines.text import TextEngine
from tests.support.engine import submit
from tests.tiny_models.architectures import make_architecture

__all__ = ["Subject", "answer_of", "random_prompt"]

_ANSWER = 12


class Subject:
    """An engine with a model, and the bare loop's answers by the prompt."""

    def __init__(self, folder: Path, name: str) -> None:
        make_architecture(folder, name)
        self.engine = TextEngine(lambda data: None)
        load = Load(model=name, path=str(folder), context_tokens=2048, parallel=6)
        self.facts = self.engine.load(load, lambda *stage: None)
        self.ends = self.engine._ends
        self._known: dict[tuple[int, ...], list[int]] = {}

    def bare(self, prompt: list[int], most: int = _ANSWER) -> list[int]:
        key = (most, *prompt)
        if key not in self._known:
            found: list[int] = []
            stream: Any = mx.default_stream(mx.default_device())
            for token, _ in generate_step(
                mx.array(prompt), self.engine._model, stream, max_tokens=most, prefill_step_size=32
            ):
                found.append(int(token))
                if token in self.ends:
                    break
            self._known[key] = found
        return self._known[key]

    def submit(self, name: str, prompt: list[int], most: int = _ANSWER, **more: Any) -> list[Event]:
        request = GenerationRequest(
            prompt_tokens=prompt, max_tokens=most, sampling=Sampling(temperature=0.0), wants_context=True, **more
        )
        return submit(self.engine, name, request)

    def play(self, out: dict[str, list[Event]], steps: int = 100_000) -> None:
        while self.engine.streams and steps:
            steps -= 1
            for stream in self.engine.step():
                out.setdefault(stream.request_id, []).extend(stream.events)


def random_prompt(rng: random.Random, length: int) -> list[int]:
    return [rng.randrange(10, 300) for _ in range(length)]


def answer_of(events: list[Event], prompt: list[int]) -> list[int]:
    (context,) = [event for event in events if isinstance(event, ContextTokens)]
    assert isinstance(events[-1], Finish)
    assert context.tokens[: len(prompt)] == prompt
    return context.tokens[len(prompt) :]
