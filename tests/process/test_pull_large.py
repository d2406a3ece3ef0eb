"""A gigabyte from the hub, interrupted in its middle by kill -9 of the router: run by `make test-slow`."""

from __future__ import annotations

import hashlib
import http.client
import json
import signal
import threading
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from tests.support.hub import running_hub
from tests.support.router import RouterProcess, running_router, still_alive, wait_until

_REPO = "mlx-community/Large-1GB"


def _follow(router: RouterProcess, lines: list[dict[str, Any]]) -> None:
    """A pull as a client sees it, for as long as there is somebody on the other side."""
    connection = http.client.HTTPConnection(urlsplit(router.url).netloc, timeout=60)
    try:
        connection.request("POST", "/api/pull", json.dumps({"model": _REPO}).encode())
        response = connection.getresponse()
        while line := response.readline():
            lines.append(json.loads(line))
    except (OSError, http.client.HTTPException, ValueError):
        pass  # the router was killed
    finally:
        connection.close()


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.req("R19", "R48")
def test_a_gigabyte_is_gone_on_with_after_a_kill(home: Path, large_models_dir: Path) -> None:
    folder = large_models_dir / "large"
    weights = folder / "model.safetensors"
    size = weights.stat().st_size
    assert size > 900_000_000
    with running_hub() as hub:
        hub.add_folder(_REPO, folder)
        hub.gate = threading.Event()  # stops a little after the middle
        part = home / "hf" / "hub" / f"models--{_REPO.replace('/', '--')}" / "blobs"
        variables = {"HF_ENDPOINT": hub.url}
        told: list[dict[str, Any]] = []
        with running_router(home, variables=variables) as router:
            puller = threading.Thread(target=_follow, args=(router, told))
            puller.start()
            wait_until(lambda: sum(path.stat().st_size for path in part.glob("*.incomplete")) > size // 2, "half", 120)
            jobs = router.children()
            router.process.send_signal(signal.SIGKILL)
            router.process.wait(10)
            wait_until(lambda: not still_alive(jobs), "nothing is written any more")
            puller.join(30)
        have = sum(path.stat().st_size for path in part.glob("*.incomplete"))
        assert have > size // 2
        hub.gate.set()
        again: list[dict[str, Any]] = []
        with running_router(home, variables=variables) as router:
            _follow(router, again)
            assert again[-1] == {"status": "success"}
            assert hub.asked("model.safetensors")[-1] == f"bytes={have}-", "the first half was not fetched again"
            for lines in (told, again):
                steps = [line["completed"] for line in lines if line.get("total") == size]
                assert len(steps) > 3
                assert steps == sorted(steps)
            assert next(line["completed"] for line in again if line.get("total") == size) >= have
            (blob,) = (path for path in part.iterdir() if path.stat().st_size == size)
            with blob.open("rb") as stream:
                assert hashlib.file_digest(stream, "sha256").hexdigest() == blob.name
            assert router.generate(_REPO, options={"num_predict": 2})["eval_count"] == 2
