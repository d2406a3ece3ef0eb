"""Numbers by which people say "off" or "no limit", and numbers out of range: none ends an answer or a worker."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_router_shared.generation import Finish, GenerationRequest, Message, Role, Sampling
from mlx_router_shared.protocol import Load
from mlx_router_worker.engines.text import TextEngine
from mlx_router_worker.generation.parameters import first_said, normalise, read_generation_config
from mlx_router_worker.generation.sampling import Samplers, processors_for
from tests.support.engine import play, text_of
from tests.support.http import call
from tests.support.router import RouterProcess, running_router
from tests.tiny_models.parrot import make_parrot

_PIECES = ["one", " two", " three"]
_numbers = st.one_of(
    st.none(), st.floats(), st.sampled_from([-1.0, -0.0, 0.0, 1.0, 1e-320, 1e308, math.inf, -math.inf, math.nan])
)
_integers = st.one_of(st.none(), st.integers(-(2**63), 2**63 - 1), st.sampled_from([-1, 0, 1]))
_samplings = st.builds(
    Sampling, temperature=_numbers, top_p=_numbers, min_p=_numbers, repeat_penalty=_numbers, presence_penalty=_numbers,
    frequency_penalty=_numbers, top_k=_integers, repeat_last_n=_integers, seed=_integers,
    logit_bias=st.dictionaries(st.integers(0, 31), st.floats(), max_size=3),
)  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(_samplings)
def test_every_normalised_parameter_is_in_range_and_nothing_raises(sampling: Sampling) -> None:
    """Nothing may raise inside the batch generator, and a token is always drawn from the vocabulary."""
    found = normalise(sampling)
    assert normalise(found) == found
    assert found.temperature is None or 0 <= found.temperature <= 1000
    assert found.top_p is None or 0 < found.top_p <= 1
    assert found.min_p is None or 0 <= found.min_p <= 1
    assert found.top_k is None or found.top_k >= 0
    assert found.seed is None or found.seed >= 0
    logits = mx.random.normal((1, 32), key=mx.random.key(0)) * 10
    for processor in processors_for(found, 128):
        logits = processor(mx.array([1, 2, 3]), logits)
    logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    assert Samplers(32).get(found)(logprobs).item() in range(32)
    assert not mx.isnan(logprobs).any().item()


def test_off_in_a_request_overrides_what_the_author_recommends() -> None:
    author, api = Sampling(top_k=20, top_p=0.9, min_p=0.1), Sampling(top_k=40)
    merged = first_said(Sampling(top_k=-1, top_p=-1.0, min_p=-1.0), author, api)
    assert (merged.top_k, merged.top_p, merged.min_p) == (0, 1.0, 0.0)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"top_k": -1}', Sampling(top_k=0)), ('{"top_k": 0}', Sampling(top_k=0)), ('{"top_k": 1e999}', Sampling()),
        ('{"top_k": 50.0}', Sampling(top_k=50)), ('{"temperature": -1}', Sampling()),
        ('{"temperature": NaN, "top_p": Infinity}', Sampling()), ('{"top_p": 0.0}', Sampling(top_p=1e-6)),
        ('{"top_p": 7}', Sampling(top_p=1.0)), ('{"min_p": 3}', Sampling(min_p=1.0)),
        ('{"repetition_penalty": 0}', Sampling(repeat_penalty=1.0)), ('{"top_k": 1' + "0" * 400 + "}", Sampling()),
        ("[" * 100_000, Sampling()),
    ],
)  # fmt: skip
def test_a_generation_config_with_odd_numbers(tmp_path: Path, text: str, expected: Sampling) -> None:
    (tmp_path / "generation_config.json").write_text(text)
    assert read_generation_config(tmp_path) == expected


@pytest.mark.parametrize(
    "odd",
    [{"top_k": -1}, {"top_k": 10**9}, {"temperature": -1}, {"top_p": 0.0}, {"min_p": 5}, {"repetition_penalty": 0}],
)
def test_a_model_whose_files_hold_odd_numbers_answers(tmp_path: Path, odd: dict[str, Any]) -> None:
    make_parrot(tmp_path / "p", _PIECES, generation_config={"do_sample": True, "temperature": 0.6, **odd})
    engine = TextEngine(lambda data: None)
    engine.load(Load(model="p", path=str(tmp_path / "p"), context_tokens=0, parallel=2), lambda stage, fraction: None)
    ask = GenerationRequest(messages=[Message(role=Role.USER, content="go")])
    events = play(engine, {"a": ask, "b": ask})
    assert [text_of(events[name]) for name in "ab"] == ["one two three"] * 2
    assert isinstance(events["a"][-1], Finish)
    engine.close()


@pytest.fixture(scope="module")
def router(tmp_path_factory: pytest.TempPathFactory) -> Any:
    root = tmp_path_factory.mktemp("parrots")
    make_parrot(root / "p", _PIECES)
    with running_router(tmp_path_factory.mktemp("home"), "--models-dir", str(root)) as found:
        yield found


_MESSAGES = [{"role": "user", "content": "go"}]
_OFF: list[tuple[str, dict[str, Any]]] = [
    *(("/v1/chat/completions", {"messages": _MESSAGES, **odd}) for odd in (
        {"max_tokens": -1}, {"max_tokens": 0}, {"max_completion_tokens": -1}, {"top_k": -1}, {"top_k": 0},
        {"top_p": -1}, {"top_p": 0}, {"min_p": -1}, {"seed": -1}, {"num_ctx": 0}, {"num_ctx": -1},
        {"repetition_penalty": 0}, {"repetition_penalty": -1}, {"options": {"top_k": -1, "num_predict": -2}},
    )),
    *(("/v1/completions", {"prompt": "go", **odd}) for odd in ({"max_tokens": -1}, {"top_k": -1}, {"seed": -1})),
    *(("/v1/responses", {"input": "go", **odd}) for odd in ({"max_output_tokens": -1}, {"max_output_tokens": 0},
                                                            {"top_k": -1})),
    *(("/v1/messages", {"messages": _MESSAGES, "max_tokens": 50, **odd}) for odd in ({"top_k": -1}, {"top_p": -1})),
    *(("/api/chat", {"messages": _MESSAGES, "stream": False, "options": odd}) for odd in (
        {"top_k": -1}, {"top_p": -1}, {"min_p": -1}, {"min_p": 2}, {"temperature": -1}, {"repeat_penalty": -1},
        {"num_predict": -1}, {"num_predict": 0}, {"num_predict": -2}, {"num_ctx": -1}, {"num_ctx": 0}, {"seed": -1},
        {"repeat_last_n": -7}, {"presence_penalty": 1e30}, {"temperature": 1e-30},
        {"top_k": 2**40},
    )),
]  # fmt: skip


@pytest.mark.parametrize(("path", "body"), _OFF, ids=lambda value: str(value)[-40:])
def test_a_request_with_an_odd_number_is_answered(router: RouterProcess, path: str, body: dict[str, Any]) -> None:
    reply = call(router, "POST", path, {"model": "p", **body})
    assert reply.status == 200, reply.body
    assert b"one" in reply.body
    assert b"three" in reply.body
    assert router.model("p")["loads"] == 1
