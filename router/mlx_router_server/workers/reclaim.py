"""The end of a worker, verified: down the stop ladder, reaped, and the machine's memory seen to be back."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Final

from mlx_router_server.lifecycle.events import StopWorker
from mlx_router_server.workers.handle import WorkerHandle
from mlx_router_server.workers.memory import machine_used_bytes
from mlx_router_server.workers.timings import EvictionTimings

__all__ = ["reclaim"]

log = logging.getLogger(__name__)

_BACK_SECONDS: Final = 2.0
_BACK_SHARE: Final = 0.95
_NOISE_BYTES: Final = 24 * 2**20  # what the rest of the machine may take meanwhile
_POLL_SECONDS: Final = 0.01


async def reclaim(
    handle: WorkerHandle, model: str, effect: StopWorker, limit_seconds: float, others: Callable[[], int]
) -> EvictionTimings:
    """End the worker and wait until its memory is back, or until that has taken too long to go on waiting.

    ``others`` says what the router's other processes hold: what they take or give meanwhile is no matter of this one.
    """
    held = 0 if handle.exited.is_set() else handle.memory_bytes
    used_before = machine_used_bytes() - others()
    report = await handle.stop(effect.reason, limit_seconds, hung=effect.hung)
    began = time.monotonic()
    wanted = int(held * _BACK_SHARE) - _NOISE_BYTES
    # There is no event for this: the kernel has to be asked.
    while (returned := used_before - machine_used_bytes() + others()) < wanted:
        if time.monotonic() - began >= _BACK_SECONDS:
            break
        await asyncio.sleep(_POLL_SECONDS)
    timings = EvictionTimings(
        model=model,
        cause=effect.cause,
        reason=effect.reason,
        drain_seconds=effect.drain_seconds,
        exit_seconds=report.exit_seconds,
        reap_seconds=report.reap_seconds,
        memory_back_seconds=time.monotonic() - began,
        held_bytes=held,
        returned_bytes=returned,
        verdict="unknown" if not held else "returned" if returned >= wanted else "stranded",
        rung=report.rung,
    )
    incident = timings.rung == "kill" or timings.verdict == "stranded"
    log.log(
        logging.WARNING if incident else logging.INFO,
        "event=unloaded model=%r reason=%r drain=%.3f exit=%.3f reap=%.3f memory_back=%.3f held=%d returned=%d "
        "verdict=%s rung=%s",
        model, effect.reason, timings.drain_seconds, timings.exit_seconds, timings.reap_seconds,
        timings.memory_back_seconds, held, returned, timings.verdict, timings.rung,
    )  # fmt: skip
    return timings
