"""What becomes of the lines that a worker writes to standard error."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from mlx_router_server.workers.launcher import WorkerProcess, launch
from mlx_router_shared.protocol import Bootstrap

_TRACEBACK = """Traceback (most recent call last):
  File "x.py", line 1, in <module>
    raise KeyError("weights")
KeyError: 'weights'
"""


class _Process:
    """As much of ``ChildProcess`` as is used."""

    pid, alive = 1, False

    def __init__(self, text: str) -> None:
        self.stderr = asyncio.StreamReader()
        self.stderr.feed_data(text.encode())
        self.stderr.feed_eof()

    async def wait(self) -> int:
        return 0

    def close(self) -> None:
        pass


@pytest.mark.parametrize(
    ("text", "records"),
    [
        ("loading\n" + _TRACEBACK + "done\n", ["INFO loading", "WARNING Traceback", "INFO done"]),
        # One that was caused by another is two, and none is lost when the process ends within it.
        (
            _TRACEBACK + "\nDuring handling of the above exception, another exception occurred:\n\n" + _TRACEBACK[:50],
            ["WARNING Traceback", "INFO ", "INFO During handling", "INFO ", "WARNING Traceback"],
        ),
    ],
)
def test_a_traceback_is_one_record(text: str, records: list[str], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")

    async def relay() -> None:
        process: Any = _Process(text)
        await WorkerProcess("w-1", process).wait()

    asyncio.run(relay())
    said = [
        f"{record.levelname} {(record.args or ('', ''))[1]}"  # type: ignore[index]
        for record in caplog.records
        if record.name.endswith("launcher")
    ]
    assert len(said) == len(records)
    for have, want in zip(said, records, strict=True):
        assert have.startswith(want)


def test_a_traceback_without_an_end_takes_no_more_memory_than_its_last_lines() -> None:
    async def relay() -> int:
        process: Any = _Process("")
        process.stderr = asyncio.StreamReader()
        worker = WorkerProcess("w-1", process)
        process.stderr.feed_data(("Traceback (most recent call last):\n" + "  and so on\n" * 5000).encode())
        await asyncio.sleep(0)  # the reader takes all that is there in one go
        kept = len(worker._traceback)
        process.stderr.feed_eof()
        await worker.wait()
        return kept

    assert asyncio.run(relay()) == 60


def test_a_worker_that_is_ended_at_once_is_told_by_its_status(monkeypatch: pytest.MonkeyPatch) -> None:
    """uvloop refuses to write to a process that has gone already."""

    class _Stdin:
        def write(self, data: bytes) -> None:
            raise RuntimeError("the handler is closed")

        def close(self) -> None:
            pass

    class _Ended(_Process):
        returncode = -15
        stdin: Any = _Stdin()

        async def wait(self) -> int:
            return -15

    async def start(*arguments: object, **options: object) -> Any:
        return _Ended("")

    monkeypatch.setattr("asyncio.create_subprocess_exec", start)

    async def run() -> str:
        worker = await launch("w")
        worker.begin(Bootstrap(endpoint="ipc:///none", worker_id="w", token="t", engine="mlx"))
        return worker.describe_exit(await worker.wait())

    assert asyncio.run(run()) == "its worker process was ended by signal SIGTERM"
