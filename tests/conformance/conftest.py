"""A router with models of every kind that needs no extra, for the checks of the compatibility lists."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.router import RouterProcess, running_router

FIM = ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>")


@pytest.fixture(scope="session")
def fleet_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``plain`` only chats, ``embedder`` makes vectors, ``filler`` fills in, ``random`` is a weak model of all trades."""
    from tests.tiny_models.random_model import make_random_model
    from tests.tiny_models.tokenizer import PLAIN_TEMPLATE

    root = tmp_path_factory.getbasetemp().parent / "fleet"
    root.mkdir(parents=True, exist_ok=True)
    models: dict[str, dict[str, Any]] = {
        "plain": {"chat_template": PLAIN_TEMPLATE},
        "embedder": {"context": 64},
        "filler": {"more_markers": FIM},
        "random": {},
    }
    with (root / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for seed, (name, more) in enumerate(models.items()):
            if not (root / name / "made").exists():
                make_random_model(root / name, size_bytes=1_000_000, seed=seed, **more)
                if name == "embedder":
                    write_pooling(root / name)
                (root / name / "made").touch()
    return root


def write_pooling(folder: Path) -> None:
    """As sentence-transformers writes it beside a decoder that embeds."""
    modules = [
        {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
        {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
        {"idx": 2, "name": "2", "path": "2_Normalize", "type": "sentence_transformers.models.Normalize"},
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir(exist_ok=True)
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_lasttoken": True}))


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory, fleet_dir: Path) -> Iterator[RouterProcess]:
    """A router with them and the demo model."""
    with running_router(tmp_path_factory.mktemp("fleet-home"), "--models-dir", str(fleet_dir)) as router:
        yield router
