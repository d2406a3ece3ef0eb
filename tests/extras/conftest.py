"""Models that need the extras, made here, and a router with them."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.support.router import RouterProcess, running_router


@pytest.fixture(scope="module")
def router(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RouterProcess]:
    assert find_spec("mlx_vlm") is not None, "these tests are run by `make test-extras`, which installs what they need"
    from tests.tiny_models.encoders import make_encoder, make_reranker
    from tests.tiny_models.vision import make_qwen2_vl

    root: Path = tmp_path_factory.mktemp("extra-models")
    for kind in ("bert", "xlm-roberta", "modernbert"):
        make_encoder(
            root / f"{kind}-mean", kind, pooling="mean", dtype="float16" if kind == "modernbert" else "float32"
        )
        make_reranker(root / f"{kind}-reranker", kind)
    make_encoder(root / "bert-cls", "bert", pooling="cls", normalize=False)
    make_encoder(root / "bert-max", "bert", pooling="max")
    make_qwen2_vl(root / "seer")
    with running_router(tmp_path_factory.mktemp("extra-home"), "--models-dir", str(root), standby=True) as found:
        yield found
