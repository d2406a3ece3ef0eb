"""One worker as the router sees it: its process, its messages, its open requests, its end.

The awaited exit of the process is the authority on its death; everything that waits for the worker waits for that
too, so that nobody hangs on a process that is gone.
"""

from __future__ import annotations

import asyncio
import math
import signal
import time
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass
from typing import Final, assert_never

from mlx_router_server.workers.inbox import Inbox
from mlx_router_server.workers.launcher import WorkerProcess
from mlx_router_server.workers.link import WorkerLink
from mlx_router_server.workers.liveness import Liveness
from mlx_router_server.workers.memory import process_bytes, shared_bytes
from mlx_router_shared.errors import (
    ErrorCode,
    InvalidRequest,
    LoadFailed,
    MlxRouterError,
    ProtocolError,
    WorkerDied,
    error_from_code,
)
from mlx_router_shared.generation import Event, Failure, Finish, Request
from mlx_router_shared.protocol import (
    Bye,
    Cancel,
    FromWorker,
    GetStats,
    Hello,
    Load,
    Loading,
    ModelFacts,
    Ready,
    Shutdown,
    Stats,
    Step,
    Submit,
    ToWorker,
)
from mlx_router_shared.protocol import LoadFailed as LoadFailedMessage

__all__ = ["StopReport", "WorkerHandle", "WorkerLeft"]

_HUNG_SECONDS: Final = 1.0
_TERM_SECONDS: Final = 3.0
_KILL_SECONDS: Final = 10.0
_LAST_WORD_SECONDS: Final = 0.5
_POLL_SECONDS: Final = 2.0
_STILL_SECONDS: Final = 20.0
_ENDED_BY_TERM: Final = (-signal.SIGTERM, 128 + signal.SIGTERM)


@dataclass(frozen=True, slots=True, kw_only=True)
class StopReport:
    """How an end went: seconds from the request to leave to the worker's good-bye, and from there to its reaping."""

    exit_seconds: float
    reap_seconds: float
    rung: str
    """The last rung of the ladder that was needed: ``shutdown``, ``term`` or ``kill``."""


class WorkerLeft(WorkerDied):
    """The worker exited, or never got the request, for reasons that have nothing to do with it: try another worker."""


async def _until(event: asyncio.Event, end: float) -> None:
    """Wait for an event, but not beyond ``end`` on the clock that stands still while the machine sleeps; the loop's own
    may go on, and then has had a whole limit pass in no time."""
    while not event.is_set() and (seconds := end - time.monotonic()) > 0:
        try:
            async with asyncio.timeout(seconds if seconds != math.inf else None):
                await event.wait()
                return
        except TimeoutError:
            continue


class WorkerHandle:
    """Created when the process exists; ``exited`` is set when it is reaped."""

    def __init__(
        self, worker_id: str, engine: str, process: WorkerProcess, link: WorkerLink, token: str, *,
        is_forked: bool = False,
    ) -> None:  # fmt: skip
        self.worker_id = worker_id
        self.engine = engine
        self.is_forked = is_forked
        """Whether a fork server has forked it: it shares memory with that and with its siblings."""
        self.shared_bytes = 0
        """Memory of it that is not freed by its end, because others use it too."""
        self.process = process
        self.started_at = time.monotonic()
        self.hello: Hello | None = None
        self.facts: ModelFacts | None = None
        self.stage = "importing"
        self.fraction = 0.0
        self.stats: Stats | None = None
        self.exited = asyncio.Event()
        self.exit_reason = ""
        self.was_stopped = False
        """Whether the worker stopped at the request of another program, which is no failure."""
        self.on_exit: Callable[[], None] | None = None
        """Called when it is reaped, before anyone whose request it served is told."""
        self.on_reaped: Callable[[int], None] | None = None
        """Called with its pid when it is reaped; belongs to whoever started it."""
        self.on_hello: Callable[[Hello], None] | None = None
        self.on_loading: Callable[[Loading], None] | None = None
        self.ready_sent_at = 0.0
        """Wall clock, as the worker says."""
        self.progress_at = self.started_at
        """When work on requests last got on, or began."""
        self._link = link
        self._changed = asyncio.Event()
        self._load_error: MlxRouterError | None = None
        self._broken = ""
        self._bye_at: float | None = None
        self._is_stopping = False
        """Whether its end was asked for here; a service manager or a user may send TERM as well."""
        self._inboxes: dict[str, Inbox] = {}
        self._requests = 0
        self._stats_waiters: list[asyncio.Future[Stats]] = []
        link.expect(worker_id, token, self._on_message, self._on_broken)
        self._watch = asyncio.create_task(self._await_exit(), name=f"exit-{worker_id}")

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def memory_bytes(self) -> int:
        """Bytes that its end would free; 0 when it has ended."""
        return max(process_bytes(self.pid) - self.shared_bytes, 0)

    @property
    def is_stopping(self) -> bool:
        """Whether its end was requested."""
        return self._is_stopping

    @property
    def open_requests(self) -> int:
        """Somebody still reads these, or could."""
        return len(self._inboxes)

    @property
    def unfinished_requests(self) -> int:
        """The worker still works on these; what a slow client has yet to read is none of its business."""
        return sum(not inbox.closed for inbox in self._inboxes.values())

    def send(self, message: ToWorker) -> None:
        """Raises ``WorkerDied`` when it cannot be reached."""
        self._link.send(self.worker_id, message)

    # ----------------------------------------------------------------- handshake and load

    async def wait_hello(self, limit_seconds: float, still_seconds: float = _STILL_SECONDS) -> Hello:
        """Wait for the worker's Hello. Raises ``WorkerDied``, or ``LoadFailed`` at the limit or after ``still_seconds``
        without progress."""
        await self._wait_until(lambda: self.hello is not None, limit_seconds, "did not say hello", still_seconds)
        assert self.hello is not None
        return self.hello

    def measure_shared(self) -> None:
        """Read how much of its memory is shared; walks all of its pages, so call it in a thread."""
        if self.is_forked:
            self.shared_bytes = shared_bytes(self.pid)

    async def load(self, load: Load, limit_seconds: float) -> ModelFacts:
        """Have it load a model. Raises ``LoadFailed``, ``WorkerDied`` or what the worker's code names."""
        self.stage, self.fraction = "weights", 0.0
        self.process.label = load.model
        self._link.send(self.worker_id, load)
        await self._wait_until(
            lambda: self.facts is not None or self._load_error is not None, limit_seconds, "did not finish loading"
        )
        if self._load_error is not None:
            raise self._load_error
        assert self.facts is not None
        self.stage = ""
        return self.facts

    async def _wait_until(
        self, done: Callable[[], bool], limit_seconds: float, what: str, most_still: float = _STILL_SECONDS
    ) -> None:
        end = time.monotonic() + (limit_seconds or math.inf)
        liveness = Liveness(self.pid)
        while not done():
            if self._broken:
                raise WorkerDied(f"its worker process broke the protocol: {self._broken}")
            if self.exited.is_set():
                raise WorkerDied(self.exit_reason)
            if time.monotonic() >= end:
                raise LoadFailed(f"its worker process {what} within {limit_seconds:g} s")
            if liveness.still_seconds() > most_still:
                raise LoadFailed(f"its worker process {what}, and made no progress for {most_still:g} s")
            self._changed.clear()
            await _until(self._changed, min(end, time.monotonic() + min(_POLL_SECONDS, most_still / 4)))
            if self._changed.is_set():
                liveness.note()
            elif self.hello is not None:
                self.send(GetStats())  # its socket thread answers even while it loads

    # ------------------------------------------------------------------------- requests

    async def generate(self, request: Request) -> AsyncGenerator[list[Event], None]:
        """The events of one request, as they come, the last of them ``Finish`` or ``Failure``.

        Closing the generator early cancels the request in the worker. Raises ``WorkerLeft`` when it cannot be sent, or
        when another program has stopped the worker, once its process has ended.
        """
        self._requests += 1
        request_id = f"{self.worker_id}-{self._requests}"
        if not self.unfinished_requests:
            self.progress_at = time.monotonic()
        inbox = self._inboxes[request_id] = Inbox()
        ended = False
        try:
            if self.exited.is_set():
                raise WorkerLeft(self.exit_reason)
            try:
                self._link.send(self.worker_id, Submit(request_id=request_id, request=request))
            except WorkerDied as error:
                await self._exited_within(_TERM_SECONDS)
                raise WorkerLeft(error.message) from None
            except ProtocolError as error:  # larger than any message may be
                raise InvalidRequest(f"the request is too large: {error.message}") from None
            while not ended:
                events = await inbox.take()
                last = events[-1]
                ended = isinstance(last, Finish | Failure)
                if isinstance(last, Failure) and last.code == ErrorCode.SHUTTING_DOWN and not self._is_stopping:
                    if events[:-1]:
                        yield events[:-1]
                    await self._exited_within(_TERM_SECONDS)
                    raise WorkerLeft(
                        "model runner has unexpectedly stopped: another program stopped its worker process"
                    )
                yield events
        finally:
            del self._inboxes[request_id]
            if not ended and not self.exited.is_set():
                try:
                    self._link.send(self.worker_id, Cancel(request_id=request_id))
                except WorkerDied:
                    pass  # then nothing runs any more

    def fail_requests(self, message: str, code: ErrorCode = ErrorCode.WORKER_DIED) -> None:
        """End every open request with a visible error."""
        for request_id, inbox in list(self._inboxes.items()):
            if not inbox.closed:
                inbox.put([Failure(code=code, message=message)])
                if not self.exited.is_set():
                    try:
                        self._link.send(self.worker_id, Cancel(request_id=request_id))
                    except WorkerDied:
                        pass

    async def get_stats(self, limit_seconds: float) -> Stats:
        """Ask for figures now; raises ``TimeoutError`` when the socket thread does not answer."""
        future: asyncio.Future[Stats] = asyncio.get_running_loop().create_future()
        self._stats_waiters.append(future)
        self._link.send(self.worker_id, GetStats())
        async with asyncio.timeout(limit_seconds):
            return await future

    # ------------------------------------------------------------------------------ end

    async def stop(self, reason: str, limit_seconds: float, *, hung: bool = False) -> StopReport:
        """Go down the ladder: ``Shutdown``, TERM, KILL, each with a limit of its own. Returns once it is reaped.

        A worker that is ``hung`` gets no time for an orderly end: its socket thread ends it, if that still lives.
        """
        started = time.monotonic()
        self._is_stopping = True
        rung = "shutdown"
        # The worker's own limit comes after TERM: it is for the case that we are gone by then.
        own_limit = _HUNG_SECONDS / 2 if hung else limit_seconds + 2 * _TERM_SECONDS
        try:
            self.send(Shutdown(reason=reason, limit_seconds=own_limit))
            await self._exited_within(min(limit_seconds, _HUNG_SECONDS) if hung else limit_seconds)
        except WorkerDied:
            pass  # not connected yet, or not any more: TERM reaches it in any case
        if not self.exited.is_set():
            rung = "term"
            self.process.signal_group(signal.SIGTERM)
            await self._exited_within(_TERM_SECONDS)
        if not self.exited.is_set():
            rung = "kill"
            self.process.signal_group(signal.SIGKILL)
            await self._exited_within(_KILL_SECONDS)
        ended = time.monotonic()
        bye = self._bye_at if self._bye_at is not None and self._bye_at >= started else ended
        return StopReport(exit_seconds=bye - started, reap_seconds=ended - bye, rung=rung)

    async def _exited_within(self, seconds: float) -> None:
        await _until(self.exited, time.monotonic() + seconds)

    async def _await_exit(self) -> None:
        status = await self.process.wait()
        await self._hear_last_word(status)
        self._link.forget(self.worker_id)
        if self.on_reaped is not None:
            self.on_reaped(self.pid)
        self.exit_reason = self._broken or self.process.describe_exit(status)
        self.was_stopped = not self._is_stopping and (self._bye_at is not None or status in _ENDED_BY_TERM)
        self.exited.set()
        self._changed.set()
        if self.on_exit is not None:
            self.on_exit()
        reason = "model runner has unexpectedly stopped: " + self.exit_reason
        if self._is_stopping:
            self.fail_requests("unloaded" if self._bye_at is not None else reason)
        else:
            self.fail_requests(reason, ErrorCode.SHUTTING_DOWN if self.was_stopped else ErrorCode.WORKER_DIED)
        for waiter in self._stats_waiters:
            waiter.cancel()

    async def _hear_last_word(self, status: int | None) -> None:
        """An orderly end is announced, and the announcement may still be on its way when the exit is already known."""
        # Of one that was serving, status 1 is an exception that nobody caught: there is no word of that.
        loading = self.facts is None
        awaited = {0: (True, False), 1: (False, loading), None: (True, loading)}.get(status, (False, False))

        def is_announced() -> bool:
            return (awaited[0] and self._bye_at is not None) or (awaited[1] and self._load_error is not None)

        try:
            async with asyncio.timeout(_LAST_WORD_SECONDS):
                while any(awaited) and not is_announced():
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            self._link.read_now()  # this process itself may have been too busy to look

    # ------------------------------------------------------------------------- messages

    def _on_message(self, message: FromWorker) -> None:
        match message:
            case Step():
                self.progress_at = time.monotonic()
                for stream in message.streams:
                    inbox = self._inboxes.get(stream.request_id)
                    if inbox is not None and stream.events and not inbox.put(stream.events):
                        self._give_up_reader(stream.request_id, inbox)
                return
            case Hello():
                self.hello = message
                self.stage = ""
                if self.on_hello is not None:
                    self.on_hello(message)
            case Loading():
                self.stage, self.fraction = message.stage, message.fraction
                if self.on_loading is not None:
                    self.on_loading(message)
            case Ready():
                self.facts = message.facts
                self.ready_sent_at = message.sent_at
            case LoadFailedMessage():
                error = error_from_code(message.code, message.message)
                self._load_error = error if type(error) is not MlxRouterError else LoadFailed(message.message)
            case Stats():
                self.stats = message
                if message.streams:
                    self.progress_at = max(self.progress_at, time.monotonic() - message.step_age_seconds)
                waiters, self._stats_waiters = self._stats_waiters, []
                for waiter in waiters:
                    if not waiter.done():
                        waiter.set_result(message)
            case Bye():
                self._bye_at = time.monotonic()
            case _:
                assert_never(message)
        self._changed.set()

    def _give_up_reader(self, request_id: str, inbox: Inbox) -> None:
        inbox.put([Failure(code=ErrorCode.INTERNAL, message="the client reads too slowly")])
        self._link.send(self.worker_id, Cancel(request_id=request_id))

    def _on_broken(self, reason: str) -> None:
        """It talks nonsense: nothing it says can be trusted any more, so it is ended at once."""
        self._broken = f"its worker process broke the protocol: {reason}"
        self.process.signal_group(signal.SIGKILL)
        self._changed.set()
