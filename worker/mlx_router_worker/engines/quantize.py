"""The job that packs weights: ``python -P -m mlx_router_worker.engines.quantize``, in a process of its own.

mlx-lm does the packing. The source is read lazily and the packed weights are evaluated in portions, so that the whole
of the unpacked model is never in memory at once.
"""

from __future__ import annotations

import os
import shutil
import sys
import threading
from pathlib import Path
from typing import Any, Final

import mlx.core as mx
from mlx.utils import tree_flatten

from mlx_router_shared.codec import decode_job, encode_job_event
from mlx_router_shared.errors import ErrorCode
from mlx_router_shared.jobs import JobDone, JobEvent, JobFailed, JobProgress, JobStatus, QuantizeJob
from mlx_router_worker.file_limit import kept_file_limit
from mlx_router_worker.repository_code import RepositoryCodeGuard

with kept_file_limit():
    from mlx_lm.utils import load_model, quantize_model, save_config, save_model

__all__ = ["main", "quantize"]

_PORTION_BYTES: Final = 256 * 2**20
_NOT_COPIED: Final = (".safetensors", ".py", ".bin", ".pt", ".pth", ".gguf", ".onnx", ".msgpack", ".h5")


def quantize(job: QuantizeJob, tell: Any) -> JobDone:
    """Write the packed model into ``job.target``, which exists and is empty. Raises what mlx-lm raises."""
    source, target = Path(job.source), Path(job.target)
    RepositoryCodeGuard().refuse(source)
    model, config = load_model(source, lazy=True)
    model, config = quantize_model(model, config, job.group_size, job.bits, mode=job.mode)
    _evaluate(model, tell)
    tell(JobStatus(text="writing weights"))
    save_model(target, model, donate_model=True)
    save_config(config, config_path=target / "config.json")
    for file in source.iterdir():
        known = (target / file.name).exists() or file.name.startswith(("README", ".", "model.safetensors"))
        if file.is_file() and file.suffix not in _NOT_COPIED and not known:
            shutil.copyfile(file, target / file.name)
    return JobDone(path=str(target))


def _evaluate(model: Any, tell: Any) -> None:
    arrays = [array for _, array in tree_flatten(model.parameters())]
    total, done, portion, size = sum(array.nbytes for array in arrays), 0, [], 0
    for array in [*arrays, None]:
        if array is not None:
            portion.append(array)
            size += array.nbytes
        if portion and (array is None or size >= _PORTION_BYTES):
            mx.eval(portion)
            done += size
            portion, size = [], 0
            tell(JobProgress(digest="sha256:quantized", total=total, completed=done, text="quantized weights"))


def main() -> None:
    """Read the job, do it, tell; the process is over when its standard input is."""
    job = decode_job(sys.stdin.buffer.readline())
    assert isinstance(job, QuantizeJob)
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints is not for the router

    def tell(event: JobEvent) -> None:
        out.write(encode_job_event(event))
        out.flush()

    def watch() -> None:
        sys.stdin.buffer.read()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    try:
        last: JobEvent = quantize(job, tell)
    except Exception as error:
        last = JobFailed(code=ErrorCode.INTERNAL, message=f"quantizing failed: {type(error).__name__}: {error}")
    tell(last)
    os._exit(0)


if __name__ == "__main__":
    main()
