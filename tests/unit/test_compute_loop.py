"""The compute loop: preparation on one thread, computation on another."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from queue import SimpleQueue
from typing import Any

import pytest

from mlx_router_shared.errors import InvalidRequest
from mlx_router_shared.generation import (
    Event,
    Failure,
    Finish,
    FinishReason,
    GenerationRequest,
    Started,
    StreamEvents,
    TextDelta,
)
from mlx_router_shared.protocol import Cancel, Load, ModelFacts, Shutdown, Step, Submit
from mlx_router_worker.engine import EngineReading
from mlx_router_worker.link import Progress
from mlx_router_worker.loop import ComputeLoop

_LIMIT = 10.0


class _Engine:
    """Answers with a word a step until it is told to end. The preparation of "slow" waits for ``release``, that of
    "late" until another request is submitted, and then for a step that might come before it."""

    def __init__(self) -> None:
        self.release = threading.Event()
        self.preparing = threading.Event()
        self.submitted = threading.Event()
        self.stepped = threading.Event()
        self.ended = threading.Event()
        self.prepared_on: list[str] = []
        self.running: dict[str, str] = {}
        self.together: list[int] = []
        """Requests in each step."""

    def load(self, load: Load, report: Any) -> ModelFacts:
        return ModelFacts(
            context_tokens=1, has_chat_template=False, has_thinking=False, has_tools=False, weights_bytes=1,
            memory_bytes=1, weights_seconds=0.0, warm_up_seconds=0.0,
        )  # fmt: skip

    def warm_up(self) -> None: ...

    def rest(self) -> None: ...

    def prepare(self, request: Any) -> Any:
        self.prepared_on.append(threading.current_thread().name)
        if request.prompt == "slow":
            self.preparing.set()
            assert self.release.wait(_LIMIT)
        if request.prompt == "late":
            assert self.submitted.wait(_LIMIT)
            self.stepped.wait(0.2)
        if request.prompt == "bad":
            raise InvalidRequest("no such prompt")
        return request.prompt

    def submit(self, request_id: str, prepared: Any) -> list[Event]:
        self.running[request_id] = prepared
        self.submitted.set()
        return [Started(prompt_tokens=1)]

    def cancel(self, request_id: str) -> None:
        self.running.pop(request_id, None)

    @property
    def streams(self) -> int:
        return len(self.running)

    def step(self) -> list[StreamEvents]:
        assert threading.current_thread().name == "compute"
        self.together.append(len(self.running))
        self.stepped.set()
        out = [StreamEvents(request_id=name, events=[TextDelta(text="word")]) for name in self.running]
        if self.ended.is_set():
            out = [StreamEvents(request_id=name, events=[Finish(reason=FinishReason.STOP)]) for name in self.running]
            self.running.clear()
        return out

    def reading(self) -> EngineReading:
        return EngineReading()

    def set_limits(self, limits: Any) -> None: ...

    def close(self) -> None: ...


class _Outlet:
    def __init__(self) -> None:
        self.sent: SimpleQueue[Any] = SimpleQueue()
        self.events: dict[str, list[Event]] = {}

    def send(self, message: Any) -> None:
        self.sent.put(message)

    def until(self, request_id: str, kind: type) -> Event:
        """Return the next event of that kind for a request."""
        while True:
            message = self.sent.get(timeout=_LIMIT)
            if not isinstance(message, Step):
                continue
            for stream in message.streams:
                self.events.setdefault(stream.request_id, []).extend(stream.events)
                for event in stream.events:
                    if stream.request_id == request_id and isinstance(event, kind):
                        return event


class _Link:
    def wake(self) -> None: ...


@contextmanager
def _running() -> Iterator[tuple[_Engine, _Outlet, SimpleQueue[Any]]]:
    engine, outlet, inbox = _Engine(), _Outlet(), SimpleQueue[Any]()
    link: Any = _Link()
    loop = ComputeLoop(engine, outlet, link, inbox, Progress())  # type: ignore[arg-type]  # an outlet without a socket
    threads = [
        threading.Thread(target=loop.run, name="compute"), threading.Thread(target=loop.prepare, name="preparing"),
    ]  # fmt: skip
    for thread in threads:
        thread.start()
    inbox.put(Load(model="m", path="/nowhere", context_tokens=0, parallel=1, warm_up_seconds=0))
    try:
        yield engine, outlet, inbox
    finally:
        engine.release.set()
        inbox.put(Shutdown(reason="the test is over"))
        for thread in threads:
            thread.join(_LIMIT)
            assert not thread.is_alive()


def _ask(name: str, prompt: str) -> Submit:
    return Submit(request_id=name, request=GenerationRequest(prompt=prompt))


def test_requests_that_arrive_together_begin_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlx_router_worker.loop._GATHER_SECONDS", _LIMIT)
    with _running() as (engine, outlet, inbox):
        inbox.put(_ask("first", "slow"))
        assert engine.preparing.wait(_LIMIT)
        inbox.put(_ask("second", "late"))
        inbox.put(_ask("third", "quick"))
        engine.ended.set()
        engine.release.set()
        outlet.until("third", Finish)
        assert engine.together[0] == 3


def test_a_request_that_takes_long_to_prepare_holds_no_other_back() -> None:
    with _running() as (engine, outlet, inbox):
        inbox.put(_ask("first", "quick"))
        inbox.put(_ask("second", "slow"))
        outlet.until("first", TextDelta)
        assert not engine.release.is_set()


def test_running_answers_go_on_while_a_request_is_prepared() -> None:
    with _running() as (engine, outlet, inbox):
        inbox.put(_ask("running", "quick"))
        outlet.until("running", TextDelta)
        inbox.put(_ask("waits", "slow"))
        assert engine.preparing.wait(_LIMIT)
        for _ in range(5):
            outlet.until("running", TextDelta)
        assert "waits" not in outlet.events
        engine.release.set()
        outlet.until("waits", TextDelta)
        assert set(engine.prepared_on) == {"preparing"}


def test_a_request_that_is_cancelled_while_it_is_prepared_is_never_computed() -> None:
    with _running() as (engine, outlet, inbox):
        inbox.put(_ask("gone", "slow"))
        inbox.put(_ask("behind", "quick"))
        assert engine.preparing.wait(_LIMIT)
        inbox.put(Cancel(request_id="gone"))
        inbox.put(Cancel(request_id="behind"))
        inbox.put(_ask("next", "quick"))
        engine.release.set()
        outlet.until("next", TextDelta)
        assert set(outlet.events) == {"next"}
        assert engine.prepared_on.count("preparing") <= 2 + 1


def test_what_goes_wrong_in_the_preparation_fails_that_request_alone() -> None:
    with _running() as (_, outlet, inbox):
        inbox.put(_ask("running", "quick"))
        inbox.put(_ask("bad", "bad"))
        failure = outlet.until("bad", Failure)
        assert isinstance(failure, Failure)
        assert failure.message == "no such prompt"
        outlet.until("running", TextDelta)


@pytest.mark.parametrize("prompt", ["slow", "quick"])
def test_a_shutdown_ends_both_threads(prompt: str) -> None:
    with _running() as (engine, _, inbox):
        inbox.put(_ask("r", prompt))
        assert (engine.preparing if prompt == "slow" else engine.stepped).wait(_LIMIT)
