"""The application as an object: it can be started again and again, and every inference route takes the one door."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path

import psutil
import pytest
from starlette.routing import Route

from mlx_router_server.app import create_app
from mlx_router_server.settings import Settings

INFERENCE_ROUTES = {
    "/api/chat", "/api/generate", "/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages",
    "/api/embed", "/api/embeddings", "/v1/embeddings", "/v1/rerank", "/api/rerank",
}  # fmt: skip
_OTHER = {
    "/", "/api/version", "/api/tags", "/api/ps", "/api/show", "/v1/models", "/v1/models/{name:path}", "/health",
    "/ready", "/admin/status", "/admin/config", "/admin/models/{name:path}/load", "/admin/models/{name:path}/unload",
    "/admin/models/{name:path}/pin", "/admin/models/{name:path}/unpin", "/admin/plan", "/admin/events",
    "/admin/shutdown",
    "/admin/logs", "/admin/logs/stream", "/admin/requests", "/admin/requests/{id}", "/metrics",
    "/ui", "/ui/{name}",
    "/v1/messages/count_tokens", "/v1/responses/input_tokens", "/v1/responses/{response_id}",
    "/v1/responses/{response_id}/input_items", "/api/status", "/api/me", "/api/signout", "/api/user/keys/{key}",
    "/api/pull", "/api/push", "/api/create", "/api/copy", "/api/delete", "/api/blobs/{digest}",
    "/api/experimental/web_search", "/api/experimental/web_fetch", "/api/experimental/model-recommendations",
}  # fmt: skip


@pytest.mark.req("R18")
def test_twenty_lives_in_one_interpreter(tmp_path: Path) -> None:
    settings = Settings(standby_workers=0, hub_cache=False)

    async def live() -> None:
        app = create_app(settings)
        async with app.router.lifespan_context(app):
            await app.state.server.catalogue.wait_ready()
        left = asyncio.all_tasks() - {asyncio.current_task()}
        assert not left

    asyncio.run(live())
    descriptors, threads = psutil.Process().num_fds(), threading.active_count()
    for _ in range(20):
        asyncio.run(live())
    assert psutil.Process().num_fds() <= descriptors
    assert threading.active_count() <= threads


@pytest.mark.req("R2")
def test_every_route_is_known_to_the_tests_as_inference_or_not() -> None:
    """A new route has to be put into one of the two lists, and an inference route is then tested for a cold load."""
    routes = {route.path for route in create_app(Settings()).routes if isinstance(route, Route)}
    assert routes == INFERENCE_ROUTES | _OTHER
