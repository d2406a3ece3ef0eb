"""Refuse to run code that lies in a model's folder, whichever library tries to.

``trust_remote_code=False`` is passed wherever a loader takes it, but some loaders of transformers and mlx-vlm drop the
argument, overwrite it or never had it (``model_file`` in mlx-vlm). An audit hook (PEP 578) sees every file that is
opened and every code object that is executed in the process, so it holds for all of them.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import CodeType
from typing import Any, Final

__all__ = ["RepositoryCodeGuard", "RepositoryCodeRefused", "describe_load_error"]

_CODE_SUFFIXES: Final = (".py", ".pyc", ".pyo", ".pyw", ".so", ".dylib", ".pyd", ".pkl", ".pickle")

_SENTENCE: Final = "the model wants to run code of its own, which this server never does"


class RepositoryCodeRefused(RuntimeError):
    """A library tried to read or run code from a model's folder."""


class RepositoryCodeGuard:
    """Refuses, for the life of the process, to run code of the given folders: an audit hook cannot be
    removed. Whoever tries to gets ``RepositoryCodeRefused``."""

    def __init__(self) -> None:
        # transformers copies a repository's code here before it imports it.
        copies = os.environ.get("HF_MODULES_CACHE") or os.path.join(
            os.environ.get("HF_HOME") or os.path.join("~", ".cache", "huggingface"), "modules"
        )
        self._roots: set[str] = {_resolved(os.path.expanduser(copies))}
        self._installed = False

    def refuse(self, *folders: str | Path) -> None:
        """Refuse code below these folders, by the path that is used and by the one that its links lead to; empty names
        are ignored."""
        for folder in filter(None, map(str, folders)):
            self._roots |= {os.path.abspath(folder), _resolved(folder)}
        if not self._installed:
            self._installed = True
            sys.addaudithook(self._audit)

    def _audit(self, event: str, args: tuple[Any, ...]) -> None:
        check = _CHECKS.get(event)
        if check is not None:
            path = check(args)
            if path is not None and self._is_refused(path):
                raise RepositoryCodeRefused(f"{_SENTENCE} ({os.path.basename(path)})")

    def _is_refused(self, path: str) -> bool:
        return any(
            candidate == root or candidate.startswith(root + os.sep)
            for candidate in (os.path.abspath(path), _resolved(path))
            for root in self._roots
        )


def _resolved(path: str) -> str:
    try:
        return os.path.realpath(path)
    except OSError:
        return os.path.abspath(path)


def _opened(args: tuple[Any, ...]) -> str | None:
    path = args[0]
    if isinstance(path, bytes):
        path = os.fsdecode(path)
    return path if isinstance(path, str) and path.lower().endswith(_CODE_SUFFIXES) else None


def _executed(args: tuple[Any, ...]) -> str | None:
    code = args[0]
    # "<string>", "<frozen importlib>" and the like are not files.
    return code.co_filename if isinstance(code, CodeType) and not code.co_filename.startswith("<") else None


def _imported(args: tuple[Any, ...]) -> str | None:
    path = args[1]  # set for extension modules only
    return path if isinstance(path, str) else None


def _library(args: tuple[Any, ...]) -> str | None:
    return args[0] if isinstance(args[0], str) and os.sep in args[0] else None


_CHECKS: Final[dict[str, Callable[[tuple[Any, ...]], str | None]]] = {
    "open": _opened,
    "exec": _executed,
    "import": _imported,
    "ctypes.dlopen": _library,
}


def describe_load_error(error: Exception) -> str:
    """Describe an exception of a model library for people; transformers' advice to trust the code is left out."""
    if isinstance(error, RepositoryCodeRefused):
        return str(error)
    if "trust_remote_code" in str(error):
        return _SENTENCE
    return f"{type(error).__name__}: {error}"
