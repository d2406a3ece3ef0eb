"""Progress of long work: bars on a terminal, a line for each step elsewhere."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import Any, Self

__all__ = ["Bars"]


class Bars:
    """Takes the lines of /api/pull and /api/create. On standard error, so that standard output stays for results."""

    def __init__(self) -> None:
        # Here and not above: it takes longer to import than most commands run.
        from rich import progress as rich
        from rich.console import Console

        self._console = Console(stderr=True, highlight=False)
        self._terminal = sys.stderr.isatty()
        self._progress = rich.Progress(
            rich.TextColumn("{task.description}"), rich.BarColumn(), rich.DownloadColumn(),
            rich.TransferSpeedColumn(), rich.TimeRemainingColumn(), console=self._console, disable=not self._terminal,
        )  # fmt: skip
        self._tasks: dict[str, rich.TaskID] = {}
        self._last = ""

    def __enter__(self) -> Self:
        self._progress.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.__exit__(kind, error, trace)

    def show(self, line: dict[str, Any]) -> None:
        """One line of an answer."""
        status = line["status"]
        if "digest" in line:
            self._bar(line["digest"], status, line["total"], line.get("completed", 0))
        elif status != self._last:
            self._console.print(status, markup=False)
        self._last = status

    def _bar(self, key: str, text: str, total: int, completed: int) -> None:
        if key not in self._tasks:
            self._tasks[key] = self._progress.add_task(text, total=total, completed=completed)
            if not self._terminal:
                self._console.print(text, markup=False)
        self._progress.update(self._tasks[key], completed=completed)
