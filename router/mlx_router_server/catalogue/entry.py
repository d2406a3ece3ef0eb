"""What the catalogue knows of one model."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Final

from mlx_router_server.catalogue.names import ModelName

__all__ = ["Capability", "ModelEntry", "ModelFiles"]

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
    kv_bytes_per_token: int
    capabilities: frozenset[Capability]
    info: dict[str, str | int | float] = field(default_factory=dict)
    """``model_info`` of ``/api/show``."""
    template: str = ""
    license: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelEntry:
    """A model under one of its names."""

    name: ModelName
    path: Path
    source: str
    """``demo``, ``config``, ``folder`` or ``hub``."""
    files: ModelFiles

    def estimate_bytes(self, context_tokens: int) -> int:
        """Memory of its worker: weights, cache for a usual context, and the process itself."""
        context = min(context_tokens or self.files.context_tokens, self.files.context_tokens, _RESERVED_CONTEXT)
        process = _PROCESS_BYTES if self.files.engine == "mlx" else 0
        return self.files.weights_bytes + self.files.kv_bytes_per_token * context + process
