"""The compute loop: take, step, emit.

Promises
- One thread, ``compute``, loads, generates and frees. What a request needs before that (``Engine.prepare``) is done by
  the process's main thread meanwhile, where the time of a chat template can be limited by a signal. The trial token
  after a load has a thread of its own and a limit.
- Commands that have arrived are taken before each step, so a cancel takes effect within one step.
- Each step sends at most one message, with the events of all streams; each request ends with exactly one ``Finish``
  or ``Failure``, unless it was cancelled.
- ``Progress.steps`` moves with every step and with nothing else: it is what a stall watchdog may believe.
- Without work the loop sleeps in its queue and costs nothing.
"""

from __future__ import annotations

import gc
import logging
import threading
import time
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Any, Final, assert_never

import msgspec

from mlx_router_shared.errors import EngineFailed, ErrorCode, MlxRouterError
from mlx_router_shared.generation import CountRequest, Failure, Finish, StreamEvents, failure_of
from mlx_router_shared.protocol import (
    Bye,
    Cancel,
    GetStats,
    Load,
    LoadFailed,
    Loading,
    Ready,
    SetLimits,
    Shutdown,
    Step,
    Submit,
    ToWorker,
    Welcome,
)
from mlx_router_worker.engine import Engine, EngineReading
from mlx_router_worker.link import Link, Outlet, Progress
from mlx_router_worker.repository_code import RepositoryCodeGuard, describe_load_error

__all__ = ["ComputeLoop"]

log = logging.getLogger(__name__)

_EXIT_LOAD_FAILED = 1
_EXIT_ENGINE_FAILED = 5
_TOLD_STEP = 0.01  # of a stage, between two words about its progress
_REST_AFTER_SECONDS: Final = 5.0
_GATHER_SECONDS: Final = 0.01
"""The longest that a request on an idle engine waits for those that are being prepared: processed together, all of them
are faster."""
_READ_MEMORY_EVERY = 32  # steps; a reading is cheap but not free


@dataclass(frozen=True, slots=True)
class PreparedRequest:
    """A message of the preparing thread to the compute thread: what ``Engine.prepare`` returned or raised."""

    request_id: str
    result: Any


class ComputeLoop:
    """Runs one engine for one router until it is told to stop."""

    def __init__(self, engine: Engine, outlet: Outlet, link: Link, inbox: SimpleQueue[Any], progress: Progress) -> None:
        self._engine = engine
        self._outlet = outlet
        self._link = link
        self._inbox = inbox
        self._progress = progress
        self._guard = RepositoryCodeGuard()
        self._live: set[str] = set()
        self._preparing: set[str] = set()
        """Requests that are being prepared, of those in ``_live``."""
        self._to_prepare: SimpleQueue[Submit | None] = SimpleQueue()
        self._gather_until = 0.0
        self._is_resting = True
        self._loaded = False
        self._told = "", 0.0

    def run(self) -> int:
        """For the compute thread: serve until ``Shutdown`` or a failure that ends the worker. Returns the exit
        status."""
        try:
            return self._run()
        finally:
            self._to_prepare.put(None)

    def prepare(self) -> None:
        """For the main thread: prepare requests until ``run`` has returned."""
        while (command := self._to_prepare.get()) is not None:
            if command.request_id not in self._live:
                continue  # cancelled meanwhile
            try:
                if not self._loaded and not isinstance(command.request, CountRequest):
                    raise EngineFailed("this worker has no model")
                result = self._engine.prepare(command.request)
            except Exception as error:
                result = error
            self._inbox.put(PreparedRequest(command.request_id, result))

    def _run(self) -> int:
        while True:
            try:
                while (command := self._take()) is not None:
                    status = self._obey(command)
                    if status is not None:
                        return status
                if self._engine.streams:
                    self._step()
            except Exception as error:
                # Caches and batch are in an unknown state after this: better a fresh process than wrong answers.
                log.exception("event=engine_failed")
                self._fail_all(f"the engine failed: {type(error).__name__}: {error}")
                return _EXIT_ENGINE_FAILED

    def _take(self) -> ToWorker | PreparedRequest | None:
        """The next command; waits for one when there is nothing to compute."""
        try:
            if not self._engine.streams:
                command: ToWorker | PreparedRequest = self._inbox.get(
                    timeout=None if self._is_resting else _REST_AFTER_SECONDS
                )
                self._is_resting = False
                return command
        except Empty:
            self._is_resting = True
            self._engine.rest()
            return None
        seconds = self._gather_until - time.monotonic() if self._preparing else 0.0
        try:
            next_command: ToWorker | PreparedRequest = (
                self._inbox.get(timeout=seconds) if seconds > 0 else self._inbox.get_nowait()
            )
            return next_command
        except Empty:
            return None

    def _obey(self, command: ToWorker | PreparedRequest) -> int | None:
        match command:
            case PreparedRequest():
                self._submit(command)
            case Load():
                return self._load(command)
            case Submit():
                if not self._progress.streams:
                    self._progress.moved_at = time.monotonic()
                self._live.add(command.request_id)
                self._preparing.add(command.request_id)
                self._to_prepare.put(command)
                self._note()
            case Cancel():
                self._live.discard(command.request_id)
                self._preparing.discard(command.request_id)
                self._engine.cancel(command.request_id)
                self._note()
            case SetLimits():
                self._engine.set_limits(command)
                self._progress.reading = self._engine.reading()
            case Shutdown():
                self._fail_all("the model is being unloaded", ErrorCode.SHUTTING_DOWN)
                self._engine.close()
                self._outlet.send(Bye(reason=command.reason))
                return 0
            case Welcome() | GetStats():
                pass  # the socket thread has dealt with them
            case _:
                assert_never(command)
        return None

    def _load(self, command: Load) -> int | None:
        if self._loaded:
            self._outlet.send(LoadFailed(code=ErrorCode.INTERNAL, message="this worker already has a model"))
            return _EXIT_LOAD_FAILED
        try:
            self._guard.refuse(command.path, command.adapter_path, command.draft_path)
            facts = self._engine.load(command, self._report)
        except Exception as error:
            log.exception("event=load_failed model=%s", command.model)
            text = error.message if isinstance(error, MlxRouterError) else describe_load_error(error)
            code = error.code if isinstance(error, MlxRouterError) else ErrorCode.LOAD_FAILED
            self._outlet.send(LoadFailed(code=code, message=text))
            return _EXIT_LOAD_FAILED
        facts = msgspec.structs.replace(facts, warm_up_seconds=self._warm_up(command.warm_up_seconds))
        self._loaded = True
        self._progress.reading = self._engine.reading()
        gc.freeze()  # a tokenizer's vocabulary is no garbage: the collector need not look through it again
        self._outlet.send(Ready(facts=facts, sent_at=time.time()))
        return None

    def _report(self, stage: str, fraction: float) -> None:
        """However often an engine tells how far it is, the router hears of steps that somebody could see."""
        told_stage, told = self._told
        if stage != told_stage or fraction - told >= _TOLD_STEP or fraction == 1.0:
            self._told = stage, fraction
            self._outlet.send(Loading(stage=stage, fraction=fraction))

    def _warm_up(self, limit_seconds: float) -> float:
        """Best effort: whatever happens in it, the model is ready afterwards. Returns the seconds it took.

        In a thread of its own, because a step that does not come back could not be left otherwise.
        """
        if limit_seconds <= 0:
            return 0.0
        began = time.monotonic()
        self._outlet.send(Loading(stage="warm_up", fraction=0.0))
        thread = threading.Thread(target=self._try_warm_up, name="warm-up", daemon=True)
        thread.start()
        thread.join(limit_seconds)
        if thread.is_alive():
            log.warning("event=warm_up_left reason='not done within %g s'", limit_seconds)
        return time.monotonic() - began

    def _try_warm_up(self) -> None:
        try:
            self._engine.warm_up()
        except Exception as error:  # what the model raises here it will raise again where it can be reported
            log.warning("event=warm_up_failed error=%r", error)

    def _submit(self, prepared: PreparedRequest) -> None:
        request_id = prepared.request_id
        if request_id not in self._preparing:
            return  # cancelled meanwhile
        self._preparing.discard(request_id)
        if not self._engine.streams:
            self._gather_until = time.monotonic() + _GATHER_SECONDS
        try:
            if isinstance(prepared.result, Exception):
                raise prepared.result
            events = self._engine.submit(request_id, prepared.result)
        except MlxRouterError as error:
            events = [failure_of(error)]
        except Exception as error:
            log.exception("event=submit_failed request=%s", request_id)
            events = [Failure(code=ErrorCode.ENGINE_FAILED, message=f"{type(error).__name__}: {error}")]
        self._note()
        self._send([StreamEvents(request_id=request_id, events=events)])

    def _step(self) -> None:
        streams = self._engine.step()
        self._progress.steps += 1
        self._progress.moved_at = time.monotonic()
        if self._progress.steps % _READ_MEMORY_EVERY == 0:
            self._progress.reading = self._engine.reading()
        self._note()
        if streams:
            self._send(streams)

    def _note(self) -> None:
        """Publish the number of streams. The socket thread is woken when it changes from or to zero: it sends ``Stats``
        on a timer only while there is work, and must not wait for a message from the router to notice."""
        was_busy = self._progress.streams > 0
        self._progress.streams = self._engine.streams + len(self._preparing)
        is_busy = self._progress.streams > 0
        if was_busy and not is_busy:
            self._progress.reading = self._engine.reading()
        if was_busy != is_busy:
            self._link.wake()

    def _send(self, streams: list[StreamEvents]) -> None:
        for stream in streams:
            if stream.events and isinstance(stream.events[-1], Finish | Failure):
                self._live.discard(stream.request_id)
        self._outlet.send(Step(number=self._progress.steps, streams=streams))

    def _fail_all(self, message: str, code: ErrorCode = ErrorCode.ENGINE_FAILED) -> None:
        self._progress.reading = EngineReading()
        if self._live:
            failure = Failure(code=code, message=message)
            self._send([StreamEvents(request_id=r, events=[failure]) for r in sorted(self._live)])
