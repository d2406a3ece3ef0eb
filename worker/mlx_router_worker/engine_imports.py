"""Import the engine kinds. Only what is wanted is imported: the fake engine must not cost a second of mlx."""

from __future__ import annotations

import gc
from collections.abc import Callable
from importlib import import_module
from typing import Any, Final, cast

from mlx_router_worker.engine import Engine
from mlx_router_worker.file_limit import kept_file_limit

__all__ = ["ENGINE_KINDS", "import_engine"]

_ENGINES: Final = {
    "mlx": ("mlx_router_worker.engines.text", "TextEngine"),
    "embed": ("mlx_router_worker.engines.embedding", "EmbeddingEngine"),
    "encode": ("mlx_router_worker.engines.encoders", "EncoderEngine"),
    "rerank": ("mlx_router_worker.engines.encoders", "RerankEngine"),
    "vlm": ("mlx_router_worker.engines.vision", "VisionEngine"),
    "tokenizer": ("mlx_router_worker.engines.tokenizer", "TokenizerEngine"),
    "fake": ("mlx_router_worker.engines.fake", "FakeEngine"),
}
ENGINE_KINDS: Final = frozenset(_ENGINES)


def import_engine(kind: str) -> Callable[[Callable[[bytes], None]], Engine]:
    """Return the class of an engine kind, imported. Raises ``KeyError`` for an unknown kind, ``ImportError``.

    The garbage collector rests meanwhile: imports make many objects and no garbage, and it costs a tenth of their time.
    """
    module, name = _ENGINES[kind]
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        with kept_file_limit():
            imported = import_module(module)
    finally:
        if was_enabled:
            gc.enable()
    return cast(Callable[[Callable[[bytes], None]], Engine], cast(Any, imported).__dict__[name])
