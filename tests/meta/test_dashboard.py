"""The Grafana dashboard asks for figures that there are, and for all that matter."""

from __future__ import annotations

import json
import re
from typing import Any

from mlx_router_server.telemetry.metrics import Metrics, ModelFigures, RouterFigures
from tests.meta.render_docs import ROOT

_TEXT = (ROOT / "configs" / "grafana-dashboard.json").read_text()
_DASHBOARD: dict[str, Any] = json.loads(_TEXT)
_ASKED = set(re.findall(r"mlx_router_\w+", json.dumps([panel["targets"] for panel in _DASHBOARD["panels"]])))


def _exported() -> set[str]:
    """Names of samples, of families too that have none yet."""
    metrics = Metrics()
    model = ModelFigures(name="a", state="ready", leases=0, waiting=0, reserved_bytes=0, memory_bytes=0)
    figures = RouterFigures(
        version="1", started_at=0, budget_bytes=0, reserved_bytes=0, available_bytes=0, total_bytes=0,
        standby_workers=0, models=[model],
    )  # fmt: skip
    names: set[str] = set()
    for line in metrics.render("", figures)[0].decode().splitlines():
        if line.startswith("# TYPE "):
            _, _, name, kind = line.split()
            if kind == "histogram":
                names |= {f"{name}_{part}" for part in ("bucket", "sum", "count")}
            elif not name.endswith("_created"):
                names.add(name)
    return names


def test_every_figure_that_is_asked_for_is_exported() -> None:
    assert len(_ASKED) > 15
    assert _ASKED - _exported() == set()


def test_every_family_of_ours_is_on_the_dashboard() -> None:
    families = {re.sub(r"_(bucket|sum|count)$", "", name) for name in _exported()}
    shown = {re.sub(r"_(bucket|sum|count)$", "", name) for name in _ASKED}
    of_the_process = {name for name in families if name.startswith("mlx_router_process_")}
    assert families - shown - of_the_process == {
        "mlx_router_info", "mlx_router_start_time_seconds", "mlx_router_standby_workers",
    }  # fmt: skip


def test_panels_do_not_overlap() -> None:
    places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in _DASHBOARD["panels"]]
    assert len(set(places)) == len(places)
    assert len({panel["id"] for panel in _DASHBOARD["panels"]}) == len(places)
