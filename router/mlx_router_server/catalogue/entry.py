"""What the catalogue knows of one model."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Final

from mlx_router_server.catalogue.extras import install_command
from mlx_router_server.catalogue.kinds import Kind
from mlx_router_server.catalogue.names import ModelName
from mlx_router_server.catalogue.overlay import NOTHING, Overlay
from mlx_router_shared.cache_size import CACHE_COPIES, PROCESS_BYTES, SHORTEST_CHUNK, CacheSize, WorkSize

__all__ = ["Capability", "Estimate", "ModelEntry", "ModelFiles"]

# The cache grows as it is used; a reservation for the whole context of a 128k model would keep everything else out.
_RESERVED_CONTEXT: Final = 8192
_CHUNK_TOKENS: Final = 512
"""Of a prompt, processed at once, for which memory is reserved. A worker uses longer chunks where it has more."""


class Capability(StrEnum):
    """What a model can be asked for, in Ollama's words."""

    COMPLETION = "completion"
    TOOLS = "tools"
    THINKING = "thinking"
    EMBEDDING = "embedding"
    INSERT = "insert"
    VISION = "vision"
    RERANK = "rerank"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFiles:
    """Facts read from the files of a model folder; sizes in bytes."""

    engine: str
    size_bytes: int
    weights_bytes: int
    digest: str
    """64 hex digits that change with the content, and with what a created model says on top."""
    stamp: str = ""
    """Something that changes when a file of the model is written."""
    weights_digest: str = ""
    """The same without that; empty where it is the same."""
    modified_at: float
    family: str
    parameters: int
    quantization: str
    context_tokens: int
    cache: CacheSize
    work: WorkSize
    """Activations while a prompt is read."""
    capabilities: frozenset[Capability]
    info: dict[str, str | int | float] = field(default_factory=dict)
    """``model_info`` of ``/api/show``."""
    template: str = ""
    license: str = ""
    extra: str = ""
    """The optional extra that brings what this model can do beyond ``capabilities``, where it is not installed."""
    parameters_text: str = ""
    """The author's sampling defaults, as lines of a Modelfile."""

    @property
    def kind(self) -> Kind:
        """What it is for, in one word."""
        if Capability.RERANK in self.capabilities and Capability.COMPLETION not in self.capabilities:
            return Kind.RERANKER
        if Capability.COMPLETION not in self.capabilities:
            return Kind.EMBEDDING
        if Capability.VISION in self.capabilities:
            return Kind.VISION_CHAT
        return Kind.CHAT if self.template or self.engine == "fake" else Kind.COMPLETION

    @property
    def unusable(self) -> str:
        """How to make it usable, in one sentence; empty when it is."""
        if self.extra and self.engine in ("encode", "rerank"):
            return f"this model needs an extra that is not installed: {install_command(self.extra)}"
        return ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """What a worker of this model is expected to need, by part."""

    loaded_bytes: int
    """Weights, and the process around them."""
    cache_bytes: int
    work_bytes: int

    @property
    def growth_bytes(self) -> int:
        """What comes after the load."""
        return self.cache_bytes + self.work_bytes

    def with_draft(self, draft: Estimate) -> Estimate:
        """The same with another model in the same process."""
        return Estimate(
            loaded_bytes=self.loaded_bytes + draft.loaded_bytes - PROCESS_BYTES,
            cache_bytes=self.cache_bytes + draft.cache_bytes,
            work_bytes=max(self.work_bytes, draft.work_bytes),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelEntry:
    """A model under one of its names."""

    name: ModelName
    path: Path
    source: str
    """``demo``, ``config``, ``folder``, ``hub`` or ``created``."""
    files: ModelFiles
    aliases: tuple[str, ...] = ()
    """Other names that lead here."""
    base: ModelName | None = None
    """The model whose weights a created one uses."""
    overlay: Overlay = NOTHING
    adapter: Path | None = None
    """A LoRA adapter on top of the weights."""
    adapter_bytes: int = 0
    adapter_digest: str = ""
    """Of the adapter's content."""

    @property
    def names(self) -> tuple[str, ...]:
        """All of them, as people write them."""
        return (*self.name.spellings, *self.aliases)

    @property
    def weights_digest(self) -> str:
        """Of what a worker loads; the prompts that go with it do not matter."""
        return f"{self.files.weights_digest or self.files.digest}{f':{self.adapter_digest}' if self.adapter else ''}"

    @property
    def content(self) -> str:
        """Something that changes with what a worker loads, also when a file is written again in its place."""
        return f"{self.weights_digest}:{self.files.stamp}"

    @property
    def runner(self) -> str:
        """The name under which its worker runs: models that differ by what is said to them only share one."""
        shares = self.base is not None and self.adapter is None
        return self.base.display if shares and self.base is not None else self.name.display

    def estimate(self, context_tokens: int) -> Estimate:
        """Memory of its worker with a usual context."""
        context = min(context_tokens or self.files.context_tokens, self.files.context_tokens, _RESERVED_CONTEXT)
        work = self.files.work
        process = PROCESS_BYTES if self.files.engine != "fake" else 0
        return Estimate(
            loaded_bytes=self.files.weights_bytes + self.adapter_bytes + process,
            cache_bytes=CACHE_COPIES * self.files.cache.bytes_for(context),
            work_bytes=max(work.per_token * _CHUNK_TOKENS, work.bytes_for(SHORTEST_CHUNK, context)),
        )
