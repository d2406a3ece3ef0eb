"""A router whose every open, spawn and connection is noted."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support.router import RouterProcess, running_router

__all__ = ["Audit", "audited_router", "noting"]

_SPAWNS = {"subprocess.Popen", "os.posix_spawn", "os.exec", "os.system"}
_WALKS = {"os.listdir", "os.scandir"}


@dataclass
class Audit:
    """What was noted from the last ``begin`` on, of one process, or of all that write to the file."""

    file: Path
    pid: int | None
    offset: int = 0

    def begin(self) -> None:
        self.offset = self.file.stat().st_size

    def events(self) -> list[tuple[str, str]]:
        """Kinds and, as they were written down, arguments."""
        with self.file.open("rb") as stream:
            stream.seek(self.offset)
            lines = stream.read().decode("utf-8", "replace").splitlines()
        split = [line.split("\t", 2) for line in lines if line.count("\t") >= 2]
        return [(kind, what) for pid, kind, what in split if self.pid is None or pid == str(self.pid)]

    def spawned(self) -> list[str]:
        return [what for kind, what in self.events() if kind in _SPAWNS]

    def walked(self) -> list[str]:
        return [what for kind, what in self.events() if kind in _WALKS]

    def connected(self) -> list[str]:
        return [what for kind, what in self.events() if kind.startswith("socket.")]

    def opened_outside(self, *roots: str) -> list[str]:
        """Paths that are not below one of these; what is opened by its number is open already."""
        outside = []
        for kind, what in self.events():
            if kind != "open":
                continue
            match = re.match(r"""\((b?'(?:[^'\\]|\\.)*'|b?"(?:[^"\\]|\\.)*")""", what)
            if match is None:
                continue
            path = ast.literal_eval(match[1])
            text = path.decode("utf-8", "replace") if isinstance(path, bytes) else path
            if not text.startswith(roots):
                outside.append(text)
        return outside


def noting(file: Path) -> dict[str, str]:
    """Variables by which a Python process notes what it does."""
    return {"PYTHONPATH": str(Path(__file__).parent / "audit"), "MLXR_AUDIT": str(file)}


@contextmanager
def audited_router(home: Path, *arguments: str, **more: Any) -> Iterator[tuple[RouterProcess, Audit]]:
    file = home / "audit"
    variables = {
        **noting(file),
        **more.pop("variables", {}),
    }
    with running_router(home, *arguments, variables=variables, **more) as router:
        router.client.get("/api/tags")  # waits for the first look at the disk
        audit = Audit(file, router.pid)
        audit.begin()
        yield router, audit
