"""One worker's life for one model: get a process, have it load, watch that it gets on, end it, see its memory back.

Runs in tasks of its own and reports to the supervisor by events; it decides nothing.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Final

from mlx_router_server.lifecycle.events import (
    Event,
    LoadProgressed,
    StartWorker,
    StopWorker,
    WorkerExited,
    WorkerFailed,
    WorkerReady,
    WorkerStarted,
)
from mlx_router_server.lifecycle.spec import Share
from mlx_router_server.telemetry.events import Happenings
from mlx_router_server.workers.handle import WorkerHandle
from mlx_router_server.workers.measured import Measurements
from mlx_router_server.workers.plan import Failure, LoadPlan, SupervisorOptions, WorkerView
from mlx_router_server.workers.reclaim import reclaim
from mlx_router_server.workers.source import WorkerSource
from mlx_router_server.workers.timings import EvictionTimings, SwapTimings
from mlx_router_shared.errors import LoadFailed, MlxRouterError, WorkerDied
from mlx_router_shared.protocol import Load, Loading, ModelFacts, SetLimits

__all__ = ["Run"]

log = logging.getLogger(__name__)

_FIRST_TOKEN_SECONDS: Final = 3.0
_JUST_SECONDS: Final = 0.25
_TOLD_STEP: Final = 0.05  # of a load, between two words about its progress


class Run:
    """Created when the lifecycle has reserved room; ``live`` and ``stop`` are the two tasks of its life."""

    def __init__(
        self, effect: StartWorker, plan: LoadPlan, options: SupervisorOptions, evictions: list[EvictionTimings],
        post: Callable[[Event], None], happenings: Happenings, measurements: Measurements,
        others_answer: Callable[[], bool], on_facts: Callable[[LoadPlan, ModelFacts], None],
    ) -> None:  # fmt: skip
        self.plan = plan
        self.handle: WorkerHandle | None = None
        self.loading = True
        self.granted_at: float | None = None
        self.timings = SwapTimings(model=effect.model, started_at=time.time())
        self.timings.waited_seconds = effect.waited_seconds
        self.timings.evictions = evictions
        self._worker = effect.worker
        self._share = effect.share
        self._options = options
        self._post = post
        self._happenings = happenings
        self._measurements = measurements
        self._others_answer = others_answer
        self._on_facts = on_facts
        self._load_seconds = 0.0
        self._loaded_bytes = 0
        self._told_fraction = -1.0
        self.settled = asyncio.Event()
        """Set once the cores are free again: a first token is out, or there will be none."""
        self._has_process = asyncio.Event()
        """Set once there is a process, or there will be none."""
        self._is_stopped = False

    # ------------------------------------------------------------------- coming

    async def live(self, source: WorkerSource) -> None:
        """Get a process and have it load. Its exit reports what happens to it afterwards."""
        worker = self._worker
        try:
            handle = await self._get_process(source)
            handle.on_exit = lambda: self._post(
                WorkerExited(worker=worker, error=WorkerDied(handle.exit_reason), was_stopped=handle.was_stopped)
            )
            handle.on_loading = self._note_progress
            self._post(WorkerStarted(worker=worker))
            self.timings.yielded = self._others_answer()
            began = time.monotonic()
            facts = await handle.load(self._load_message(), self._options.load_timeout_seconds)
            self._on_facts(self.plan, facts)
            self.timings.ready_seen_seconds = max(time.time() - handle.ready_sent_at, 0.0)
            self.timings.weights_seconds = facts.weights_seconds
            self.timings.warm_up_seconds = facts.warm_up_seconds
            self._load_seconds = time.monotonic() - began
            # A fake engine declares its memory: its process holds less or more than it plays.
            real = self.plan.engine != "fake"
            self._loaded_bytes = max(handle.memory_bytes, facts.memory_bytes) if real else facts.memory_bytes
            self._post(WorkerReady(worker=worker, memory_bytes=self._loaded_bytes, load_seconds=self._load_seconds))
            self._tell_loaded()
        except MlxRouterError as error:
            self._post(WorkerFailed(worker=worker, error=error))
        except OSError as error:
            failure = WorkerDied(f"its worker process could not be started: {error}")
            self._post(WorkerFailed(worker=worker, error=failure))
        except Exception:
            # A defect of ours: nobody may hang on it.
            log.exception("event=load_broke_off model=%r", self.plan.spec.name)
            self._post(WorkerFailed(worker=worker, error=LoadFailed("internal error while loading; see the log")))
        finally:
            self._has_process.set()
            self.loading = False
        await self._wait_for_first_token()
        if self._loaded_bytes and self.handle is not None:
            await self._measure(self.handle)

    async def _measure(self, handle: WorkerHandle) -> None:
        """Note what the model takes. After its first token, because a request waits for that."""
        assumed = handle.shared_bytes
        await asyncio.to_thread(handle.measure_shared)
        if self.plan.engine != "fake":
            self._loaded_bytes += max(assumed - handle.shared_bytes, 0)
        self._note_measured(self._loaded_bytes)

    async def _wait_for_first_token(self) -> None:
        """A request that has waited for the load shall not share the cores with the router's own work."""
        while not self.settled.is_set():
            try:
                async with asyncio.timeout(_FIRST_TOKEN_SECONDS):
                    await self.settled.wait()
            except TimeoutError:
                if self.handle is None or not self.handle.unfinished_requests:  # it was loaded for nobody
                    self.settled.set()

    async def _get_process(self, source: WorkerSource) -> WorkerHandle:
        supply = await source.take(self.plan.engine, self._on_process)
        self.timings.source = supply.origin.value
        self.timings.spawn_seconds = supply.spawn_seconds
        self.timings.import_seconds = supply.import_seconds
        return supply.worker

    def _on_process(self, handle: WorkerHandle) -> None:
        """There is a process, which ``stop`` can end from now on. Raises ``WorkerDied`` if that was called before."""
        if self._is_stopped:
            raise WorkerDied("its load was given up")
        self.handle = handle
        self._has_process.set()

    def _load_message(self) -> Load:
        plan = self.plan
        return Load(
            model=plan.spec.name,
            path=plan.path,
            adapter_path=plan.adapter,
            draft_path=plan.draft,
            context_tokens=plan.context_tokens,
            parallel=plan.parallel,
            yields=self.timings.yielded,
            prefill_share=self._options.prefill_share,
            longest_gap_ms=self._options.longest_gap_ms,
            warm_up_seconds=self._options.warm_up_timeout_seconds,
            memory_limit_bytes=self._share.memory_bytes,
            requests_limit_bytes=self._share.requests_bytes,
            prefix_cache_bytes=self._options.prefix_cache_bytes,
            cache_limit_bytes=self._share.cache_bytes,
            wired_limit_bytes=self._share.wired_bytes,
        )

    def _note_progress(self, message: Loading) -> None:
        if abs(message.fraction - self._told_fraction) >= _TOLD_STEP or message.fraction in (0.0, 1.0):
            self._told_fraction = message.fraction
            if message.stage == "weights":
                self._post(LoadProgressed(worker=self._worker, fraction=message.fraction))
            self._happenings.tell(
                "loading", model=self.plan.spec.name, stage=message.stage, fraction=round(message.fraction, 3)
            )

    def _note_measured(self, peak_bytes: int) -> None:
        if self.plan.engine != "fake":
            self._measurements.note(
                self.plan.measured_as,
                loaded_bytes=self._loaded_bytes,
                peak_bytes=peak_bytes,
                load_seconds=self._load_seconds,
            )

    def _tell_loaded(self) -> None:
        timings = self.timings
        log.info(
            "event=loaded model=%r waited=%.3f source=%s spawn=%.3f import=%.3f weights=%.3f warm_up=%.3f "
            "ready_seen=%.4f evicted=%d yielded=%s",
            timings.model, timings.waited_seconds, timings.source, timings.spawn_seconds, timings.import_seconds,
            timings.weights_seconds, timings.warm_up_seconds, timings.ready_seen_seconds, len(timings.evictions),
            timings.yielded,
        )  # fmt: skip
        self._happenings.tell("loaded", **timings.as_dict())

    # ------------------------------------------------------------------- living

    def view(self) -> WorkerView | None:
        handle = self.handle
        if handle is None:
            return None
        stats = handle.stats
        # The process as the system sees it, or what its engine says (on Metal either may be the larger).
        measured = max(handle.memory_bytes, stats.memory_bytes if stats else 0)
        return WorkerView(
            pid=handle.pid,
            stage=handle.stage,
            fraction=handle.fraction,
            memory_bytes=measured,
            streams=handle.open_requests,
            tokens_total=stats.tokens_total if stats else 0,
            facts=handle.facts,
        )

    def set_share(self, share: Share) -> None:
        self._share = share
        self._send_limits()

    def trim(self) -> None:
        """Have it give freed buffers back."""
        self._send_limits(trim=True)

    def _send_limits(self, *, trim: bool = False) -> None:
        share = self._share
        self._send(
            SetLimits(
                memory_limit_bytes=share.memory_bytes, cache_limit_bytes=share.cache_bytes,
                wired_limit_bytes=share.wired_bytes, requests_limit_bytes=share.requests_bytes,
                prefix_cache_bytes=self._options.prefix_cache_bytes, trim=trim,
            )
        )  # fmt: skip

    def _send(self, message: SetLimits) -> None:
        try:
            if self.handle is not None:
                self.handle.send(message)
        except WorkerDied:
            pass  # its exit is on its way

    def is_answering(self, now: float) -> bool:
        """Whether it computes for somebody, or has just done so."""
        handle = self.handle
        if handle is None or self.loading or self._is_stopped:
            return False
        return bool(handle.unfinished_requests) or now - handle.progress_at < _JUST_SECONDS

    def check_progress(self, now: float, limit_seconds: float) -> None:
        """Report a worker that has work and does not get on with it."""
        handle = self.handle
        if handle is None or self.loading or handle.exited.is_set() or not handle.unfinished_requests:
            return
        still = now - handle.progress_at
        if still > limit_seconds:
            error = WorkerDied(f"its worker process made no progress for {still:.3g} s and was ended")
            log.error("event=worker_stalled model=%r worker=%s seconds=%.1f", self.plan.spec.name, self._worker, still)
            handle.fail_requests(f"model runner has unexpectedly stopped: {error.message}")
            self._post(WorkerFailed(worker=self._worker, error=error, hung=True))

    # ------------------------------------------------------------------ leaving

    async def stop(
        self, effect: StopWorker, limit_seconds: float, others: Callable[[int], int]
    ) -> EvictionTimings | None:
        """End the worker and see its memory back; the reservation is held until this returns."""
        self.settled.set()
        await self._has_process.wait()
        self._is_stopped = True
        if self.handle is None:
            return None
        pid = self.handle.pid
        try:
            timings = await reclaim(self.handle, self.plan.spec.name, effect, limit_seconds, lambda: others(pid))
        except Exception:
            # The room is given free all the same, once the worker is gone.
            log.exception("event=reclaim_broke_off model=%r", self.plan.spec.name)
            try:
                await self.handle.stop(effect.reason, limit_seconds, hung=effect.hung)
            except Exception:
                log.exception("event=stop_broke_off model=%r", self.plan.spec.name)
            return None
        if self._loaded_bytes:
            stats = self.handle.stats
            self._note_measured(max(timings.held_bytes, stats.peak_bytes if stats else 0))
        self._happenings.tell("unloaded", **timings.as_dict())
        return timings

    def failure(self, reason: str) -> Failure:
        """What the operator wants to see of a worker that went wrong."""
        tail = tuple(self.handle.process.stderr_tail) if self.handle is not None else ()
        return Failure(at=time.time(), reason=reason, stderr_tail=tail)
