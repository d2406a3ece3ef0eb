"""Downloads that a request sets off: only what the operator's list allows, and only for callers that may pull."""

from __future__ import annotations

import asyncio
import fnmatch
from collections.abc import Awaitable, Callable
from contextlib import aclosing

from mlx_router_server.access.keys import Caller, Scope
from mlx_router_server.api.server import Server
from mlx_router_server.catalogue.entry import ModelEntry
from mlx_router_server.catalogue.names import ModelName, parse_name
from mlx_router_server.dialects.call import Call
from mlx_router_shared.errors import Forbidden, WaitedTooLong
from mlx_router_shared.jobs import JobProgress

__all__ = ["Download", "allowed_download"]


def allowed_download(server: Server, name: str, caller: Caller) -> ModelName | None:
    """What a request for an absent model may have fetched; None when the operator allows nothing of the kind. Raises
    ``Forbidden`` for a caller that may not."""
    if not server.settings.allow_download or server.models is None or not name.strip():
        return None
    parsed = parse_name(name)
    repository = server.catalogue.repository(parsed)
    if repository is None or not any(
        fnmatch.fnmatchcase(repository.lower(), pattern.lower()) for pattern in server.settings.download_allowlist
    ):
        return None
    if not caller.may_use(parsed.spellings):
        return None
    if not caller.may(Scope.PULL):
        raise Forbidden(f"model '{name}' is not here, and downloading it needs a key with the scope {Scope.PULL}")
    return parsed


class Download:
    """A model that a request has fetched, because the operator allows it. One that another request wants as well is
    fetched once; what has come stays, also when nobody waits any more."""

    def __init__(
        self, server: Server, name: ModelName, admit_again: Callable[[], Awaitable[tuple[ModelEntry, Call]]]
    ) -> None:
        self._server = server
        self._name = name
        self._admit_again = admit_again
        self._files: dict[str, tuple[int, int]] = {}

    @property
    def note(self) -> str:
        """How far it is, in words."""
        here, total = (sum(sizes) for sizes in zip(*self._files.values(), strict=True)) if self._files else (0, 0)
        return f"downloading {self._name.display}" + (f": {here / total:.0%}" if total else "")

    async def run(self, deadline_seconds: float | None) -> tuple[ModelEntry, Call]:
        """Raises what the download raises, and ``WaitedTooLong``."""
        models = self._server.models
        assert models is not None
        limits = [self._server.settings.download_timeout_seconds or None, deadline_seconds]
        limit = min((seconds for seconds in limits if seconds is not None), default=None)
        try:
            async with asyncio.timeout(limit), aclosing(models.pull(self._name)) as events:
                async for event in events:
                    if isinstance(event, JobProgress):
                        self._files[event.digest] = (event.completed, event.total)
        except TimeoutError:
            raise WaitedTooLong(f"{self.note}; it takes longer than {limit:g} s", retry_after_seconds=30) from None
        return await self._admit_again()
