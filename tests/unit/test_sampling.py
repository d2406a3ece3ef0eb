"""Who decides how tokens are drawn: the client, then the model's author, then the API."""

from __future__ import annotations

from pathlib import Path

import pytest

from mlx_router_shared.generation import Sampling
from mlx_router_worker.generation.parameters import first_said, read_generation_config


def test_field_by_field_the_first_that_said_something_decides() -> None:
    client = Sampling(temperature=0.0, logit_bias={1: 2.0})
    author = Sampling(temperature=0.6, top_k=20)
    api = Sampling(temperature=0.8, top_k=40, top_p=0.9)
    assert first_said(client, author, api) == Sampling(temperature=0.0, top_k=20, top_p=0.9, logit_bias={1: 2.0})


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"do_sample": false, "temperature": 0.7}', Sampling(temperature=0.0)),
        ('{"temperature": 0.6, "top_k": 20, "top_p": 0.95}', Sampling(temperature=0.6, top_k=20, top_p=0.95)),
        ('{"repetition_penalty": 1.05}', Sampling(repeat_penalty=1.05)),
        ('{"temperature": "hot", "top_k": true}', Sampling()),
        ("[1]", Sampling()),
        ("{", Sampling()),
    ],
)
def test_generation_config_is_read_and_never_trusted(tmp_path: Path, text: str, expected: Sampling) -> None:
    (tmp_path / "generation_config.json").write_text(text)
    assert read_generation_config(tmp_path) == expected


def test_no_generation_config_says_nothing(tmp_path: Path) -> None:
    assert read_generation_config(tmp_path) == Sampling()
