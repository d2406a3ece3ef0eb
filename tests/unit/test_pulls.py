"""The events that followers of a download get."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

import pytest

from mlx_router_server.management.pulls import Pulls
from mlx_router_server.telemetry.events import Happenings
from mlx_router_shared.jobs import JobDone, JobEvent, JobProgress, JobStatus, PullJob


def test_a_slow_follower_misses_no_last_word(monkeypatch: pytest.MonkeyPatch) -> None:
    """An event that comes while a follower handles the one before reaches it, too."""
    gates = [asyncio.Event() for _ in range(2)]
    first: list[JobEvent] = [JobStatus(text="pulling"), JobProgress(digest="a", total=2, completed=1)]
    rest: list[JobEvent] = [JobProgress(digest="b", total=2, completed=2), JobDone(revision="r", path="p")]

    async def run(job: Any) -> AsyncGenerator[JobEvent, None]:
        for event in first:
            yield event
        await gates[0].wait()
        for event in rest:
            yield event

    async def done(job: Any, event: JobDone) -> None:
        asyncio.get_running_loop().call_later(0, gates[1].set)  # after it was noted

    async def test() -> list[JobEvent]:
        following = Pulls(done, Happenings()).follow(PullJob(repository="org/name", cache="/nowhere"))
        received: list[JobEvent] = []
        async with (
            asyncio.timeout(30),
            aclosing(following) as events,
        ):
            async for event in events:
                received.append(event)
                if len(received) == 1:  # it has more to take, and all the rest comes meanwhile
                    gates[0].set()
                    await gates[1].wait()
        return received

    monkeypatch.setattr("mlx_router_server.management.pulls.run_job", run)
    assert asyncio.run(test()) == [*first, *rest]
