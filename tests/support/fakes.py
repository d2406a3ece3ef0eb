"""Scripted models for the shipped fake engine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.support.router import write_config

__all__ = ["fake_config", "write_fake"]


def write_fake(folder: Path, **script: Any) -> Path:
    """A model folder whose worker does what the script says."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "fake.json").write_text(json.dumps(script), encoding="utf-8")
    return folder


def fake_config(home: Path, scripts: dict[str, dict[str, Any]], **settings: Any) -> list[str]:
    """Arguments for a router that serves these scripted models and nothing else."""
    models = {name: {"path": str(write_fake(home / "fakes" / name, **script))} for name, script in scripts.items()}
    settings = {"demo_model": False, "standby_workers": 0, **settings}
    return ["--config", str(write_config(home, models, **settings))]
