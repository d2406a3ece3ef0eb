"""Every inference route loads a cold model and answers."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.meta.test_app import INFERENCE_ROUTES
from tests.process.test_names import _TELLS, body_for
from tests.support.fakes import fake_config
from tests.support.router import running_router


@pytest.mark.req("R1", "R2")
@pytest.mark.parametrize("path", sorted(INFERENCE_ROUTES))
def test_a_cold_model_is_loaded_by_every_inference_route(home: Path, path: str) -> None:
    with running_router(home, *fake_config(home, {"a": {"tokens": 2}})) as router:
        answer = str(router.client.post(path, body_for(path, model="a")))
        assert ("a:latest-1 a:latest-2 " in answer) == _TELLS[path]
        assert router.model("a")["loads"] == 1


@pytest.mark.req("R21")
@pytest.mark.parametrize("path", sorted(INFERENCE_ROUTES))
def test_without_on_demand_a_cold_model_is_not_found(home: Path, path: str) -> None:
    with running_router(home, *fake_config(home, {"a": {"tokens": 2}}, on_demand=False)) as router:
        body = body_for(path, model="a")
        with pytest.raises(Exception, match="on_demand is off"):
            router.client.post(path, body)
        assert router.client.get("/api/tags") == {"models": []}
        assert router.children() == []


@pytest.mark.req("R21")
def test_without_on_demand_the_operator_loads_pins_and_plans(home: Path) -> None:
    with running_router(home, *fake_config(home, {"a": {"tokens": 2}}, on_demand=False)) as router:
        assert router.client.post("/admin/plan", {"model": "a"})["action"] == "load"
        assert router.client.post("/admin/models/a/pin")["pinned"] is True
        assert router.client.post("/admin/models/a/load")["state"] == "ready"
        assert router.generate("a")["done"]
        assert router.client.post("/admin/models/a/unload")["state"] == "unloaded"
        router.client.post("/api/copy", {"source": "a", "destination": "b"})
