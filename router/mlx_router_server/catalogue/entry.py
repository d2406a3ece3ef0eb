"""What the catalogue knows of one model."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Final

from mlx_router_server.catalogue.cache_size import CacheSize
from mlx_router_server.catalogue.names import ModelName

__all__ = ["Capability", "Estimate", "ModelEntry", "ModelFiles", "install_command"]

# A process with mlx-lm imported and a tokenizer loaded, measured: 75 MB and some.
_PROCESS_BYTES: Final = 120 * 2**20
# The cache grows as it is used; a reservation for the whole context of a 128k model would keep everything else out.
_RESERVED_CONTEXT: Final = 8192


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
    """64 hex digits that change with the content."""
    modified_at: float
    family: str
    parameters: int
    quantization: str
    context_tokens: int
    cache: CacheSize
    work_bytes: int
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
    def unusable(self) -> str:
        """How to make it usable, in one sentence; empty when it is."""
        if self.extra and self.engine in ("encode", "rerank"):
            return f"this model needs an extra that is not installed: {install_command(self.extra)}"
        return ""


def install_command(extra: str) -> str:
    """What a user types to get it."""
    return f"pip install 'mlx-router-server[{extra}]'"


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


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelEntry:
    """A model under one of its names."""

    name: ModelName
    path: Path
    source: str
    """``demo``, ``config``, ``folder`` or ``hub``."""
    files: ModelFiles
    aliases: tuple[str, ...] = ()
    """Other names that lead here."""

    @property
    def names(self) -> tuple[str, ...]:
        """All of them, as people write them."""
        return (self.name.display, self.name.display.removesuffix(":latest"), *self.aliases)

    def estimate(self, context_tokens: int) -> Estimate:
        """Memory of its worker with a usual context."""
        context = min(context_tokens or self.files.context_tokens, self.files.context_tokens, _RESERVED_CONTEXT)
        process = _PROCESS_BYTES if self.files.engine != "fake" else 0
        return Estimate(
            loaded_bytes=self.files.weights_bytes + process,
            cache_bytes=self.files.cache.bytes_for(context),
            work_bytes=self.files.work_bytes,
        )
