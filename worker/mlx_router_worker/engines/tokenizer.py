"""Counts prompts without weights: the same templates and tokenizers as where the model is loaded.

One such worker serves all models; it keeps the tokenizers that were used last.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from mlx_router_shared.errors import InvalidRequest, LoadFailed
from mlx_router_shared.generation import Counted, CountRequest, Event, Finish, FinishReason, Request, StreamEvents
from mlx_router_shared.model_config import context_tokens, text_config
from mlx_router_shared.protocol import Load, ModelFacts, SetLimits
from mlx_router_worker.engine import EngineReading, Report
from mlx_router_worker.engines.load_tokenizer import load_model_tokenizer
from mlx_router_worker.repository_code import RepositoryCodeGuard
from mlx_router_worker.text.renderer import PromptRenderer

__all__ = ["TokenizerEngine"]

_MOST_TOKENIZERS: Final = 4
_READ: Final = (".json", ".jinja", ".model")


class TokenizerEngine:
    """Implements ``Engine``; needs no ``Load``, and answers ``CountRequest`` alone."""

    def __init__(self, _send_bytes: Callable[[bytes], None]) -> None:
        self._renderers: OrderedDict[str, PromptRenderer] = OrderedDict()
        self._guard = RepositoryCodeGuard()

    def load(self, load: Load, report: Report) -> ModelFacts:
        raise LoadFailed("this worker only counts tokens")

    def warm_up(self) -> None:
        pass

    def set_limits(self, limits: SetLimits) -> None:
        pass

    def prepare(self, request: Request) -> Any:
        if not isinstance(request, CountRequest):
            raise InvalidRequest("this worker only counts tokens")
        tokens, text = self._renderer(request.path).count(request.request)
        return Counted(tokens=tokens, text=text)

    def submit(self, request_id: str, prepared: Any) -> list[Event]:
        return [prepared, Finish(reason=FinishReason.STOP)]

    def cancel(self, request_id: str) -> None:
        pass

    @property
    def streams(self) -> int:
        return 0

    def step(self) -> list[StreamEvents]:
        return []

    def rest(self) -> None:
        pass

    def reading(self) -> EngineReading:
        return EngineReading()

    def close(self) -> None:
        self._renderers.clear()

    def _renderer(self, path: str) -> PromptRenderer:
        key = f"{path}\0{_stamp(path)}"
        renderer = self._renderers.get(key)
        if renderer is None:
            self._guard.refuse(path)
            config: dict[str, Any] = json.loads((Path(path) / "config.json").read_text(encoding="utf-8"))
            tokenizer = load_model_tokenizer(Path(path))
            size = int(text_config(config).get("vocab_size") or len(tokenizer))
            renderer = PromptRenderer(tokenizer, context_tokens(config), size)
        self._renderers[key] = renderer
        self._renderers.move_to_end(key)
        if len(self._renderers) > _MOST_TOKENIZERS:
            self._renderers.popitem(last=False)
        return renderer


def _stamp(folder: str) -> str:
    """What changes when a file is written that the prompts of a model depend on."""
    files = [*Path(folder).iterdir(), *Path(folder).glob("additional_chat_templates/*.jinja")]
    facts = [(file, file.stat()) for file in files if file.suffix in _READ and file.is_file()]
    return repr(sorted((str(file), stat.st_mtime_ns, stat.st_size, stat.st_ino) for file, stat in facts))
