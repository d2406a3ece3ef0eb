"""Downloads that are under way: one for each repository, shared by all who want it.

A download lives as long as somebody follows it. What has come stays on the disk, and the next one goes on from there.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from typing import Final

from mlx_router_server.jobs.process import run_job
from mlx_router_server.telemetry.events import Happenings
from mlx_router_shared.errors import ErrorCode, Overloaded
from mlx_router_shared.jobs import JobDone, JobEvent, JobFailed, JobProgress, PullJob

__all__ = ["Pulls"]

log = logging.getLogger(__name__)

_MOST: Final = 4
_TOLD_STEP: Final = 0.05


class Pulls:
    """``follow`` a repository; ``on_done`` is awaited before anybody hears that it is there."""

    def __init__(self, on_done: Callable[[PullJob, JobDone], Awaitable[None]], happenings: Happenings) -> None:
        self._on_done = on_done
        self._happenings = happenings
        self._running: dict[str, _Download] = {}

    def progress(self) -> dict[str, tuple[int, int]]:
        """Bytes that are here, and bytes in all, of each download."""
        return {download.job.repository: download.sizes() for download in self._running.values()}

    async def follow(self, job: PullJob) -> AsyncGenerator[JobEvent, None]:
        """What happens, up to ``JobDone`` or ``JobFailed``; who comes late hears in short what was before. Raises
        ``Overloaded``."""
        key = f"{job.repository.lower()}@{job.revision}"
        download = self._running.get(key)
        if download is None:
            if len(self._running) >= _MOST:
                raise Overloaded(f"{_MOST} downloads are under way; more have to wait", retry_after_seconds=30)
            download = self._running[key] = _Download(job)
            download.task = asyncio.create_task(self._run(key, download), name=f"pull-{job.repository}")
        download.followers += 1
        try:
            async for event in download.events():
                yield event
        finally:
            download.followers -= 1
            if not download.followers and not download.task.done():
                self._forget(key, download)  # who comes from now on begins anew, and does not join what is ending
                await self._end(download)

    async def stop(self) -> None:
        """End them all; what has come stays."""
        for download in list(self._running.values()):
            await self._end(download)

    def _forget(self, key: str, download: _Download) -> None:
        if self._running.get(key) is download:
            del self._running[key]

    async def _end(self, download: _Download) -> None:
        download.task.cancel()
        await asyncio.gather(download.task, return_exceptions=True)

    async def _run(self, key: str, download: _Download) -> None:
        repository = download.job.repository
        log.info("event=pull repository=%r", repository)
        self._happenings.tell("pull", repository=repository)
        told = 0.0
        last: JobDone | JobFailed = JobFailed(code=ErrorCode.UNAVAILABLE, message="the download was ended")
        try:
            async with aclosing(run_job(download.job)) as events:
                async for event in events:
                    if isinstance(event, JobDone | JobFailed):
                        last = event
                        break
                    download.note(event)
                    here, total = download.sizes()
                    if total and here / total - told >= _TOLD_STEP:
                        told = here / total
                        self._happenings.tell("pulling", repository=repository, completed=here, total=total)
            if isinstance(last, JobDone):
                await self._on_done(download.job, last)
        except Exception as error:
            log.exception("event=pull_broke_off repository=%r", repository)
            last = JobFailed(code=ErrorCode.INTERNAL, message=f"the download broke off: {type(error).__name__}")
        finally:
            self._forget(key, download)
            download.note(last)
            outcome = "done" if isinstance(last, JobDone) else last.code
            log.info("event=pull_ended repository=%r outcome=%s", repository, outcome)
            self._happenings.tell("pull_ended", repository=repository, outcome=outcome)


class _Download:
    """What one download has told so far, so shortened that it does not grow."""

    def __init__(self, job: PullJob) -> None:
        self.job = job
        self.task: asyncio.Task[None]
        self.followers = 0
        self._told: dict[object, tuple[int, JobEvent]] = {}
        self._count = 0
        self._changed = asyncio.Event()

    def note(self, event: JobEvent) -> None:
        """The newest word about a file replaces the one before."""
        self._count += 1
        key: object = event.digest if isinstance(event, JobProgress) else event
        self._told.pop(key, None)
        self._told[key] = (self._count, event)
        self._changed.set()
        self._changed = asyncio.Event()

    def sizes(self) -> tuple[int, int]:
        files = [event for _, event in self._told.values() if isinstance(event, JobProgress)]
        return sum(file.completed for file in files), sum(file.total for file in files)

    async def events(self) -> AsyncGenerator[JobEvent, None]:
        """Each event once, in order; those that were noted while the last one was taken are not skipped."""
        seen = 0
        while True:
            changed = self._changed
            new = sorted((pair for pair in self._told.values() if pair[0] > seen), key=lambda pair: pair[0])
            for number, event in new:
                seen = number
                yield event
                if isinstance(event, JobDone | JobFailed):
                    return
            if not new:
                await changed.wait()
