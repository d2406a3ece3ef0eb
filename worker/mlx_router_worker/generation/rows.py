"""A row: one request from the processing of its prompt to its last token."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import TokenBuffer

from mlx_router_shared.generation import Event
from mlx_router_worker.generation.answers import AnswerStream
from mlx_router_worker.generation.caches import Cache
from mlx_router_worker.generation.sampling import Processor, Sampler
from mlx_router_worker.generation.schedule import WaitingPrompt
from mlx_router_worker.generation.scoring import PromptScore
from mlx_router_worker.prefix.tree import Node

__all__ = ["Row"]


@dataclass(slots=True, kw_only=True, eq=False)
class Row:
    """Owned by the engine; exactly one of prefill lane, batch and draft lane works on it at a time.

    Only the prefill lane sets ``cache``. A batch takes it over.
    """

    request_id: str
    stream: AnswerStream
    sampler: Sampler
    processors: list[Processor]
    top_logprobs: int | None
    tokens: list[int]
    """The prompt, and what has been drawn after it."""
    arrived: float
    """Seconds, on the engine's clock."""
    priority: int = 0
    repeatable: bool = False
    """The same must be drawn whatever happens beside it: no draft model, which draws as well."""
    score: PromptScore | None = None
    echo: str = ""
    """The text of the prompt, reported with its scores."""
    ending: list[Event] = field(default_factory=list)
    """The events that end the request once its prompt is processed; empty if an answer follows."""
    cache: Cache | None = None
    drawn: int = 0
    """Tokens of the answer, with the one that ends it."""
    position: int = 0
    """The tokens whose state the row's cache holds, wherever that is. While they are decoded, the newest token may be
    held before it is known."""
    context: TokenBuffer | None = None
    """The tokens before the next one, for the processors."""
    scope: str = ""
    """Kept prefixes are only shared by requests with the same one."""
    reuses: bool = True
    """Whether kept prefixes may be used."""
    keeps: bool = True
    """Whether what is processed may be kept for others."""
    cuts: list[int] = field(default_factory=list)
    """Positions in the prompt whose state is worth keeping."""
    kept: int = 0
    """Tokens whose state was kept last."""
    usable: int = 0
    """Tokens of a prompt that has not begun whose state is kept."""
    looked_up: int = -1
    """The version of the prefix tree that ``usable`` is from."""
    reused: Node | None = None
    """The first node of the state that the row began with."""

    @property
    def remaining(self) -> int:
        """Tokens that are not processed."""
        return len(self.tokens) - self.position

    @property
    def waiting_prompt(self) -> WaitingPrompt:
        position = self.position if self.cache is not None else self.usable
        return WaitingPrompt(
            key=self, position=position, remaining=len(self.tokens) - position, arrived=self.arrived,
            priority=self.priority, has_begun=self.cache is not None,
        )  # fmt: skip

    def fetch_context(self, newest: mx.array) -> mx.array | None:
        """Return the tokens so far, the last of which is ``newest``: [1]. None without processors."""
        if not self.processors:
            return None
        if self.context is None:
            self.context = TokenBuffer(self.tokens[:-1])
        context: Any = self.context.update_and_fetch(newest)
        return context

    def start_over(self) -> None:
        """Drop the cache; everything is processed again later."""
        self.cache = self.context = None
        self.position = self.kept = 0
        self.looked_up = -1
