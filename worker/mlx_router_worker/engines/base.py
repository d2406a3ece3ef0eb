"""What every engine on MLX does alike: read weights with progress, keep to its share of memory, give it all back."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, Final

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.models.switch_layers import SwitchLinear
from mlx_lm.utils import load_model

from mlx_router_shared.errors import LoadFailed
from mlx_router_shared.generation import Request
from mlx_router_shared.model_config import context_tokens, text_config
from mlx_router_shared.protocol import Load, SetLimits
from mlx_router_worker.engine import EngineReading, Report
from mlx_router_worker.engines.load_tokenizer import load_model_tokenizer

__all__ = ["BaseEngine", "refuse_additions"]

_DEFAULT_CPU_CACHE: Final = 32 * 2**20  # MLX's own choice on Linux, where more is only lost
_EVALUATE_BYTES: Final = 128 * 2**20
_POLITE_BYTES: Final = 16 * 2**20
_LONGEST_REST: Final = 0.5  # seconds; a slow disk needs no rest


def refuse_additions(load: Load, kind: str) -> None:
    """Raise ``LoadFailed`` if an adapter or a draft model is configured for a kind of model that cannot use one."""
    for path, setting in ((load.adapter_path, "adapter"), (load.draft_path, "draft_model")):
        if path:
            raise LoadFailed(f"{setting} cannot be used with {kind} models; take the setting out")


class BaseEngine:
    """Half an ``Engine``; what it computes is said by those who derive from it."""

    def __init__(self) -> None:
        info = mx.device_info()
        self.working_set_bytes = int(info.get("max_recommended_working_set_size", 0))
        self._model: Any = None
        self._tokenizer: Any = None
        self._context_tokens = 0
        self._vocabulary = 0
        self._weights_bytes = 0
        self._weights_seconds = 0.0
        self._tokens_total = 0
        self._wired_bytes = 0

    def _load_weights(self, load: Load, report: Report, *, strict: bool = True) -> dict[str, Any]:
        """Model, tokenizer and the figures about them. Returns the model's configuration."""
        self._apply_limits(load.memory_limit_bytes, load.cache_limit_bytes)
        started = time.perf_counter()
        path = Path(load.path)
        report("weights", 0.0)
        model, config = load_model(path, lazy=True, strict=strict)
        if load.adapter_path:
            from mlx_lm.tuner.utils import load_adapters  # brings the trainer; most models have no adapter

            model = load_adapters(model, load.adapter_path)
            model.eval()
        _check_device(model)
        self._model, self._tokenizer = model, load_model_tokenizer(path, config.get("eos_token_id"))
        self._weights_bytes = self._evaluate(report, yields=load.yields)
        self._weights_seconds = time.perf_counter() - started
        self._note_config(load, config)
        return config

    def _note_config(self, load: Load, config: dict[str, Any]) -> None:
        """The figures that the configuration says: context and vocabulary."""
        limit = context_tokens(config)
        self._context_tokens = min(limit, load.context_tokens) if load.context_tokens else limit
        self._vocabulary = int(text_config(config).get("vocab_size") or len(self._tokenizer))
        self._wired_bytes = load.wired_limit_bytes

    def _evaluate(self, report: Report, *, yields: bool = False) -> int:
        """Read the weights in portions, so that progress can be told; the next is begun before the last is waited for,
        unless others shall have half of the memory's bandwidth. Returns their bytes."""
        arrays = [array for _, array in tree_flatten(self._model.parameters())]
        total = sum(array.nbytes for array in arrays)
        portions: list[list[mx.array]] = [[]]
        size = 0
        for array in arrays:
            portions[-1].append(array)
            size += array.nbytes
            if size >= (_POLITE_BYTES if yields else _EVALUATE_BYTES):
                portions.append([])
                size = 0
        done = 0
        for portion, following in zip(portions, [*portions[1:], []], strict=True):
            began = time.perf_counter()
            mx.async_eval(portion)
            if not yields:
                mx.async_eval(following)
            mx.eval(portion)
            if yields:
                time.sleep(min(time.perf_counter() - began, _LONGEST_REST))
            done += sum(array.nbytes for array in portion)
            report("weights", done / max(total, 1))
        return total

    def prepare(self, request: Request) -> Any:
        return request

    # ------------------------------------------------------------------- limits

    def set_limits(self, limits: SetLimits) -> None:
        self._apply_limits(limits.memory_limit_bytes, limits.cache_limit_bytes)
        self._wired_bytes = limits.wired_limit_bytes
        self._apply_wired_limit()
        if limits.trim:
            mx.clear_cache()

    @staticmethod
    def _apply_limits(memory_bytes: int, cache_bytes: int) -> None:
        if memory_bytes:
            mx.set_memory_limit(memory_bytes)
        if cache_bytes:
            mx.set_cache_limit(min(cache_bytes, _DEFAULT_CPU_CACHE) if not mx.metal.is_available() else cache_bytes)

    def _apply_wired_limit(self) -> None:
        if mx.metal.is_available():
            mx.set_wired_limit(self._wired_bytes or self.working_set_bytes)

    def reading(self) -> EngineReading:
        return EngineReading(
            memory_bytes=mx.get_active_memory() + mx.get_cache_memory(),
            cache_bytes=mx.get_cache_memory(),
            peak_bytes=mx.get_peak_memory(),
            tokens_total=self._tokens_total,
        )

    def rest(self) -> None:
        mx.clear_cache()

    def close(self) -> None:
        """Wired memory is given back while the process still answers: a hard kill can strand it on macOS."""
        self._model = self._tokenizer = None
        mx.synchronize()
        mx.clear_cache()


def _check_device(model: nn.Module) -> None:
    """Raises ``LoadFailed`` for what MLX cannot compute on a CPU: the first step would end the worker, each time."""
    if mx.default_device().type != mx.cpu:
        return
    for module in model.modules():
        if isinstance(module, SwitchLinear) and module.weight.dtype != mx.float32:
            kind = str(module.weight.dtype).rpartition(".")[2]
            raise LoadFailed(
                f"its experts have weights in {kind}, which MLX computes on a GPU only; on a CPU, use a quantized or a "
                "float32 version of this model"
            )
