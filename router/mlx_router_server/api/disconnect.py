"""Work that is worth nothing once the client is gone."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from starlette.types import Receive

__all__ = ["ClientLeft", "unless_client_leaves"]

_Result = TypeVar("_Result")


class ClientLeft(Exception):
    """The client closed its connection before there was an answer; nobody reads one."""


async def unless_client_leaves(receive: Receive, work: Coroutine[Any, Any, _Result]) -> _Result:
    """Run ``work`` and cancel it when the client disconnects; then ``ClientLeft`` is raised.

    The request's body has to be read before, because the connection is listened to from here on.
    """
    working = asyncio.create_task(work, name="answer")
    leaving = asyncio.create_task(_leaves(receive), name="client")
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
    finally:
        gone = not working.done()
        leaving.cancel()
        working.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)
    if gone:
        raise ClientLeft
    return working.result()


async def _leaves(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
