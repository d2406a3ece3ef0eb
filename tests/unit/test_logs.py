"""Lines of the log: one each, whatever is in them, for people or as JSON."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator

import pytest

from mlx_router_server.telemetry.logs import _Console, configure_logs


@pytest.fixture(autouse=True)
def _as_it_was() -> Iterator[None]:
    root = logging.getLogger()
    before = root.handlers[:], root.level
    yield
    root.handlers[:] = before[0]
    root.setLevel(before[1])


def _written(capsys: pytest.CaptureFixture[str]) -> str:
    for handler in logging.getLogger().handlers:
        handler.flush()
    return capsys.readouterr().err


_EVIL = "a\nERROR event=forged\r x='y' \x1b[31m\u2028"


@pytest.mark.req("R32")
@pytest.mark.parametrize("form", ["text", "json"])
def test_a_line_stays_one_line(capsys: pytest.CaptureFixture[str], form: str) -> None:
    configure_logs("info", form)
    logging.getLogger("x").warning("event=test name=%r plain=%s", _EVIL, _EVIL)
    logging.getLogger("x").warning("a message %s", _EVIL)
    text = _written(capsys)
    assert len(text.rstrip("\n").split("\n")) == 2
    assert not any(char in text for char in "\r\x1b\u2028")


def test_pairs_become_fields_of_their_own(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logs("info", "json")
    logging.getLogger("x").info("event=loaded model=%r seconds=%.3f waiting=%s time=%s", "a 'b\n", 1.5, "", "no")
    line = json.loads(_written(capsys))
    assert (line["event"], line["model"], line["seconds"], line["waiting"]) == ("loaded", "a 'b\n", "1.500", "")
    assert line["level"] == "info"
    assert line["time"].endswith("+00:00")
    try:
        raise ValueError("x")
    except ValueError:
        logging.getLogger("x").exception("event=broke")
    assert "ValueError: x" in json.loads(_written(capsys))["exception"]


def test_lines_that_nobody_reads_are_counted_and_left_out() -> None:
    reading, writing = os.pipe()
    with os.fdopen(reading) as out, os.fdopen(writing, "w") as stream:
        console = _Console(stream)
        for number in range(6000):  # a pipe takes 64 KiB, and the handler some thousands of lines
            console.emit(logging.LogRecord("x", logging.INFO, "", 0, f"line {number} " + "x" * 80, None, None))
        lines: list[str] = []
        while not lines or not lines[-1].startswith("line again"):
            if len(lines) == 4000:
                console.emit(logging.LogRecord("x", logging.INFO, "", 0, "line again", None, None))
            lines.append(out.readline())
        console.close()
    notes = [line for line in lines if "log_lines_dropped" in line]
    dropped = sum(int(note.rpartition("=")[2]) for note in notes)
    assert dropped > 1000
    assert len(lines) - len(notes) - 1 + dropped == 6000, "each line is written or counted"
