"""The contract with mlx-lm's internals: what the engine relies on, played with the demo model in this process."""

from __future__ import annotations

import io
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from transformers import AutoTokenizer

from mlx_router_server.catalogue.catalogue import DEMO_FOLDER
from mlx_router_shared.errors import ContextLengthExceeded, InvalidRequest
from mlx_router_shared.generation import (
    Event,
    Failure,
    Finish,
    GenerationRequest,
    Logprobs,
    Message,
    Role,
    Sampling,
    Started,
    TextDelta,
    Usage,
)
from mlx_router_shared.protocol import Load
from mlx_router_worker.engines.text import TextEngine
from tests.support.engine import submit
from tests.tiny_models.random_model import make_random_model
from tests.tiny_models.script import GREETING, LONG_STORY


@pytest.fixture(scope="module")
def engine() -> Any:
    found = TextEngine(lambda data: None)
    stages: list[tuple[str, float]] = []
    facts = found.load(
        Load(model="demo", path=str(DEMO_FOLDER), context_tokens=2048, parallel=4), lambda *s: stages.append(s)
    )
    assert (facts.context_tokens, facts.has_tools, facts.has_thinking) == (2048, True, True)
    assert stages[0] == ("weights", 0.0)
    assert stages[-1] == ("weights", 1.0)
    yield found
    found.close()


def _ask(text: str, **more: Any) -> GenerationRequest:
    return GenerationRequest(messages=[Message(role=Role.USER, content=text)], **more)


def _play(engine: TextEngine, out: dict[str, list[Event]], steps: int = 10_000) -> None:
    while engine.streams and steps:
        steps -= 1
        for stream in engine.step():
            out.setdefault(stream.request_id, []).extend(stream.events)


def _text(events: list[Event]) -> str:
    return "".join(event.text for event in events if isinstance(event, TextDelta))


@pytest.mark.req("R45")
@pytest.mark.parametrize("yields", [False, True])
def test_a_load_rests_while_others_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, yields: bool) -> None:
    """After each portion, for as long as it took; the model is the same."""
    rests: list[float] = []
    monkeypatch.setattr("mlx_router_worker.engines.base.time.sleep", rests.append)
    model = make_random_model(tmp_path / "model", size_bytes=70_000_000)
    engine = TextEngine(lambda data: None)
    fractions: list[float] = []
    load = Load(model="m", path=str(model), context_tokens=128, parallel=1, yields=yields)
    facts = engine.load(load, lambda stage, fraction: fractions.append(fraction))
    engine.close()
    assert fractions == sorted(fractions)
    assert fractions[-1] == 1.0
    assert (len(rests) > 2) == yields
    assert sum(rests) <= facts.weights_seconds


@pytest.mark.req("R16")
def test_warm_up_in_its_own_thread_leaves_nothing_behind(engine: TextEngine) -> None:
    """It runs by itself where there are kernels to compile; here it is called by hand, from a thread as in the loop."""
    with ThreadPoolExecutor(1) as pool:
        pool.submit(engine.compile_kernels).result(30)
    assert engine.streams == 0
    out: dict[str, list[Event]] = {}
    submit(engine, "after", _ask("Hello!"))
    _play(engine, out)
    assert _text(out["after"]) == GREETING


def test_the_first_token_is_sent_with_the_last_chunk_of_the_prompt_and_once(engine: TextEngine) -> None:
    submit(engine, "r", _ask("Hello!", top_logprobs=0))
    (told,) = engine.step()
    first = _text(told.events)
    assert GREETING.startswith(first)
    assert first
    out: dict[str, list[Event]] = {"r": list(told.events)}
    _play(engine, out)
    assert _text(out["r"]) == GREETING
    (usage,) = [event for event in out["r"] if isinstance(event, Usage)]
    tokens = [token for event in out["r"] if isinstance(event, Logprobs) for token in event.tokens]
    assert len(tokens) == usage.completion_tokens
    assert b"".join(token.data for token in tokens).decode() == GREETING
    submit(engine, "one", _ask("Hello!", max_tokens=1))
    (only,) = engine.step()
    assert isinstance(only.events[-1], Finish)
    assert engine.streams == 0


def test_requests_that_join_late_and_leave_early_do_not_disturb_the_others(engine: TextEngine) -> None:
    out: dict[str, list[Event]] = {}
    assert submit(engine, "long", _ask("Tell me a long story.")) == [Started(prompt_tokens=14)]
    _play(engine, out, 20)
    submit(engine, "gone", _ask("Tell me a long story."))
    submit(engine, "short", _ask("Hello!"))
    while "gone" not in out:
        _play(engine, out, 1)
    engine.cancel("gone")
    engine.cancel("never there")
    told = len(out["gone"])
    _play(engine, out)
    assert _text(out["long"]) == LONG_STORY
    assert _text(out["short"]) == GREETING
    assert len(out["gone"]) == told
    for name in ("long", "short"):
        assert isinstance(out[name][-2], Usage)
        assert isinstance(out[name][-1], Finish)


def test_more_requests_than_the_batch_holds_wait_their_turn(engine: TextEngine) -> None:
    out: dict[str, list[Event]] = {}
    for number in range(9):
        submit(engine, str(number), _ask("Hello!"))
    _play(engine, out)
    assert {_text(events) for events in out.values()} == {GREETING}
    assert len(out) == 9


def test_a_long_prompt_is_processed_in_chunks_between_the_tokens_of_others(engine: TextEngine) -> None:
    out: dict[str, list[Event]] = {}
    submit(engine, "running", _ask("Tell me a long story."))
    _play(engine, out, 5)
    before = len(out["running"])
    submit(engine, "prompt", _ask("word " * 450, max_tokens=1))
    steps = 0
    while "prompt" not in out:
        _play(engine, out, 1)
        steps += 1
    assert steps > 2
    assert len(out["running"]) - before >= steps / 3
    _play(engine, out)
    assert _text(out["running"]) == LONG_STORY


@pytest.mark.parametrize(
    ("request_", "error"),
    [
        (_ask("word " * 3000), ContextLengthExceeded),
        (GenerationRequest(prompt=""), InvalidRequest),
        (GenerationRequest(prompt_tokens=[10**6]), InvalidRequest),
        (_ask("hi", sampling=Sampling(logit_bias={10**6: 1.0})), InvalidRequest),
    ],
)
def test_what_would_break_a_step_is_refused_before_it(
    engine: TextEngine, request_: GenerationRequest, error: type[Exception]
) -> None:
    with pytest.raises(error):
        submit(engine, "bad", request_)
    assert engine.streams == 0


def test_short_prompts_that_come_together_are_processed_in_one_pass(tmp_path: Path) -> None:
    folder = make_random_model(tmp_path / "m", size_bytes=1_000_000)
    engine = TextEngine(lambda data: None)
    engine.load(Load(model="m", path=str(folder), context_tokens=4096, parallel=8), lambda *stage: None)
    for number in range(6):
        submit(engine, f"r{number}", GenerationRequest(prompt="word " * (10 + number), max_tokens=1))
    first = engine.step()
    engine.close()
    assert {stream.request_id for stream in first} == {f"r{number}" for number in range(6)}


def test_a_cancel_takes_effect_within_a_chunk(engine: TextEngine) -> None:
    submit(engine, "long", _ask("word " * 600))
    assert engine.step() == []
    engine.cancel("long")
    assert engine.streams == 0
    out: dict[str, list[Event]] = {}
    submit(engine, "next", _ask("Hello!"))
    _play(engine, out)
    assert set(out) == {"next"}
    assert _text(out["next"]) == GREETING


def test_a_long_row_is_decoded_apart_from_short_ones_until_it_ends(tmp_path: Path) -> None:
    folder = make_random_model(tmp_path / "m", size_bytes=300_000)
    engine = TextEngine(lambda data: None)
    engine.load(Load(model="m", path=str(folder), context_tokens=8192, parallel=8), lambda *stage: None)
    out: dict[str, list[Event]] = {}
    for number in range(3):
        submit(engine, f"short{number}", GenerationRequest(prompt_tokens=[20 + number] * 5, max_tokens=2_000,
                                                           sampling=Sampling(temperature=0.0)))  # fmt: skip
    submit(engine, "long", GenerationRequest(prompt_tokens=[30] * 1_500, max_tokens=4))
    groups = set()
    while "long" in engine._rows:
        _play(engine, out, 1)
        groups.add(tuple(sorted(len(group.rows) for group in engine._batches.groups)))
    engine.close()
    assert (1, 3) in groups
    assert (4,) not in groups


def test_a_prompt_that_can_never_fit_is_refused_with_the_tokens_that_would(tmp_path: Path) -> None:
    folder = make_random_model(tmp_path / "m", size_bytes=300_000)
    engine = TextEngine(lambda data: None)
    load = Load(model="m", path=str(folder), context_tokens=8192, parallel=8, requests_limit_bytes=3_000_000)
    engine.load(load, lambda *stage: None)
    with pytest.raises(ContextLengthExceeded) as refused:
        submit(engine, "r", GenerationRequest(prompt_tokens=[30] * 8_000, max_tokens=4))
    fits = refused.value.limit
    assert fits is not None
    assert 256 <= fits < 8_000
    assert f"up to {fits} tokens" in refused.value.message
    out = {"fits": submit(engine, "fits", GenerationRequest(prompt_tokens=[30] * (fits - 1), max_tokens=1))}
    _play(engine, out)
    engine.close()
    assert isinstance(out["fits"][-1], Finish)


def test_ids_that_the_model_has_and_its_tokenizer_has_not(tmp_path: Path) -> None:
    """Refused from outside; drawn by the model itself they are no text, and break no step."""
    folder = make_random_model(tmp_path / "wide", size_bytes=2_000_000, padding=3000)
    engine = TextEngine(lambda data: None)
    engine.load(Load(model="wide", path=str(folder), context_tokens=512, parallel=4), lambda *stage: None)
    known = len(AutoTokenizer.from_pretrained(folder))
    for request in (
        GenerationRequest(prompt_tokens=[5, known], echo=True, top_logprobs=1, max_tokens=1),
        _ask("hi", sampling=Sampling(logit_bias={known: 100.0})),
    ):
        with pytest.raises(InvalidRequest, match="token id outside"):
            submit(engine, "refused", request)
    out: dict[str, list[Event]] = {}
    submit(engine, "score", GenerationRequest(prompt="word", echo=True, top_logprobs=20, max_tokens=1))
    for seed in range(3):
        submit(engine, f"draw{seed}", GenerationRequest(prompt="word", sampling=Sampling(seed=seed, temperature=1.0),
                                                       top_logprobs=20, max_tokens=40))  # fmt: skip
    _play(engine, out)
    engine.close()
    drawn = [
        token for events in out.values() for event in events if isinstance(event, Logprobs) for token in event.tokens
    ]
    assert any(token.data == b"" for token in drawn), "some of them were drawn"
    assert all(any(isinstance(event, Finish) for event in events) for events in out.values())


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=1.5, top_k=10**9),
        Sampling(temperature=0.7, top_p=0.0, min_p=1.0),
        Sampling(temperature=2.0, top_k=1, top_p=0.01, seed=-1),
        Sampling(repeat_penalty=1.3, presence_penalty=2.0, frequency_penalty=-2.0, repeat_last_n=-1),
        Sampling(repeat_penalty=1.3, repeat_last_n=0),
    ],
)
def test_extreme_sampling_parameters_do_not_raise_in_a_step(engine: TextEngine, sampling: Sampling) -> None:
    out: dict[str, list[Event]] = {}
    submit(engine, "extreme", _ask("Hello!", sampling=sampling, max_tokens=8))
    submit(engine, "beside", _ask("Hello!"))
    _play(engine, out)
    assert isinstance(out["extreme"][-1], Finish)
    assert _text(out["beside"]) == GREETING


def test_an_exception_in_the_text_of_one_stream_fails_that_stream_alone(
    engine: TextEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = {name: submit(engine, name, _ask("Hello!")) for name in ("broken", "sound")}

    def fail(pieces: object) -> list[Event]:
        raise KeyError("hole")

    monkeypatch.setattr(engine._rows["broken"].stream.answer, "feed", fail)
    _play(engine, out)
    failure = out["broken"][-1]
    assert isinstance(failure, Failure)
    assert failure.code == "engine_failed"
    assert _text(out["sound"]) == GREETING
    assert isinstance(out["sound"][-1], Finish)


def test_a_request_whose_stream_cannot_be_built_leaves_nothing_behind(
    engine: TextEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(request: object) -> None:
        raise RuntimeError("no builder")

    with monkeypatch.context() as patched:
        patched.setattr(engine, "_answer_builder", fail)
        with pytest.raises(RuntimeError):
            submit(engine, "r", _ask("Hello!"))
    assert engine.streams == 0
    engine.cancel("r")
    out = {"next": submit(engine, "next", _ask("Hello!"))}
    _play(engine, out)
    assert _text(out["next"]) == GREETING


@pytest.mark.slow
def test_a_long_answer_leaves_no_growing_graph_in_a_cache_that_no_token_depends_on(tmp_path: Path) -> None:
    """SmolLM3 has layers without positions: nothing reads the offset that their caches count up at each step."""
    model = make_random_model(tmp_path / "model", size_bytes=1_000_000, architecture="smollm3")
    engine = TextEngine(lambda data: None)
    engine.load(Load(model="m", path=str(model), context_tokens=2048, parallel=2), lambda *stage: None)
    for name in ("long", "beside"):
        submit(engine, name, _ask("Hello!", max_tokens=2000, sampling=Sampling(temperature=0.0)))
    lengths: list[int] = []
    for step in range(1, 561):
        engine.step()
        assert engine.streams == 2
        if step % 40 == 0:
            graph = io.StringIO()
            mx.export_to_dot(graph, *(cache.offset for cache in engine._batches.groups[0].cache))
            lengths.append(graph.getvalue().count("\n"))
    engine.close()
    assert lengths[5] > 3 * lengths[0], "it grows at each step"
    assert max(lengths) < 1.2 * lengths[5], "and begins again after 256 of them"
