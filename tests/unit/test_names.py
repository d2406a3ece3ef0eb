"""Names: one grammar, one rule, and never a path."""

from __future__ import annotations

import pytest

from mlx_router_server.catalogue.names import parse_name
from mlx_router_shared.errors import InvalidRequest


@pytest.mark.req("R4")
@pytest.mark.parametrize(
    "text", ["demo", "demo:latest", "DEMO", "library/demo", "registry.ollama.ai/library/demo:latest", " demo "]
)
def test_all_spellings_are_one_model(text: str) -> None:
    assert parse_name(text).key == parse_name("demo").key


@pytest.mark.parametrize(
    ("text", "display"),
    [
        ("demo", "demo:latest"),
        ("mlx-community/Qwen3-4B-4bit", "mlx-community/Qwen3-4B-4bit:latest"),
        ("hf.co/user/repo:Q4", "hf.co/user/repo:Q4"),
        ("localhost:5000/ns/m", "localhost:5000/ns/m:latest"),
        ("registry.ollama.ai/library/x:7b", "x:7b"),
    ],
)
def test_the_display_form_is_the_shortest_with_a_tag(text: str, display: str) -> None:
    assert parse_name(text).display == display


@pytest.mark.req("R32")
@pytest.mark.parametrize(
    "text",
    [
        "a//b", ":tag", "name:", "m@sha256:00", "../x", "a/../b", "/etc/passwd", "~/x", "-x", "a" * 81, "a" * 1_000_000,
        "bad name!", "a\\b", "a\nb", "a\0b", "http://x/y", "é", "a/b/c/d", ".", "..", "a..b", "%2e%2e/x", "аdemo",
        "a.b/c:d:e", "\\\\host\\share",
    ],
)  # fmt: skip
def test_what_is_not_a_name_is_refused(text: str) -> None:
    with pytest.raises(InvalidRequest, match="invalid model name"):
        parse_name(text)
