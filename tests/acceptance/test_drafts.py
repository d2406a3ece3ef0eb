"""A draft model guesses ahead: fewer steps, the same answers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from mlx_lm.models.cache import RotatingKVCache, make_prompt_cache

from mlx_router_server.catalogue.catalogue import DEMO_FOLDER
from mlx_router_shared.errors import LoadFailed
from mlx_router_shared.generation import (
    Event,
    Finish,
    FinishReason,
    GenerationRequest,
    Logprobs,
    Message,
    Role,
    Sampling,
    TextDelta,
    Usage,
)
from mlx_router_shared.protocol import Load
from mlx_router_worker.engines.text import TextEngine
from tests.support.command import command_on
from tests.support.engine import submit
from tests.support.router import running_router, write_config
from tests.tiny_models.random_model import make_random_model
from tests.tiny_models.script import GREETING, LONG_STORY


def _load(path: Path, draft: Path | None) -> TextEngine:
    engine = TextEngine(lambda data: None)
    draft_path = str(draft) if draft is not None else ""
    load = Load(model="m", path=str(path), draft_path=draft_path, context_tokens=2048, parallel=4)
    engine.load(load, lambda stage, fraction: None)
    return engine


@pytest.fixture(scope="module")
def engine() -> Any:
    """The demo model guesses for itself, and so is always right."""
    found = _load(DEMO_FOLDER, DEMO_FOLDER)
    yield found
    found.close()


def _ask(text: str, **more: Any) -> GenerationRequest:
    return GenerationRequest(messages=[Message(role=Role.USER, content=text)], **more)


def _play(engine: TextEngine, out: dict[str, list[Event]], steps: int = 10_000) -> int:
    """Returns how many steps it took."""
    taken = 0
    while engine.streams and taken < steps:
        taken += 1
        for stream in engine.step():
            out.setdefault(stream.request_id, []).extend(stream.events)
    return taken


def _text(events: list[Event]) -> str:
    return "".join(event.text for event in events if isinstance(event, TextDelta))


def _usage(events: list[Event]) -> Usage:
    (usage,) = [event for event in events if isinstance(event, Usage)]
    return usage


def test_a_seed_draws_the_same_with_the_lane_free_or_taken(engine: TextEngine) -> None:
    def draw(before: int) -> str:
        out: dict[str, list[Event]] = {}
        for number in range(before):
            submit(engine, f"other{number}", _ask("Tell me a long story."))
        submit(engine, "r", _ask("Hello!", sampling=Sampling(seed=7, temperature=2.0), max_tokens=20))
        _play(engine, out)
        return _text(out["r"])

    assert draw(0) == draw(1)


def test_right_guesses_save_steps_and_change_nothing(engine: TextEngine) -> None:
    out: dict[str, list[Event]] = {}
    submit(engine, "r", _ask("Tell me a long story.", top_logprobs=0))
    steps = _play(engine, out)
    tokens = _usage(out["r"]).completion_tokens
    assert _text(out["r"]) == LONG_STORY
    assert steps < tokens / 3, "four guesses and a token a step, when all guesses are right"
    said = [token for event in out["r"] if isinstance(event, Logprobs) for token in event.tokens]
    assert (len(said), b"".join(token.data for token in said).decode()) == (tokens, LONG_STORY)


def test_who_comes_while_the_lane_is_taken_joins_the_batch(engine: TextEngine) -> None:
    out: dict[str, list[Event]] = {}
    submit(engine, "first", _ask("Tell me a long story."))
    _play(engine, out, 2)
    for name in ("second", "third"):
        submit(engine, name, _ask("Hello!"))
    _play(engine, out, 4)
    assert all(name in out for name in ("second", "third")), "nobody waits for the end of the first"
    _play(engine, out)
    assert [_text(out[name]) for name in ("first", "second", "third")] == [LONG_STORY, GREETING, GREETING]
    submit(engine, "next", _ask("Tell me a long story."))
    assert _play(engine, out) < _usage(out["next"]).completion_tokens / 3, "the lane is free again"


def test_a_cancelled_answer_frees_the_lane(engine: TextEngine) -> None:
    out: dict[str, list[Event]] = {}
    submit(engine, "gone", _ask("Tell me a long story."))
    _play(engine, out, 5)
    told = len(out["gone"])
    engine.cancel("gone")
    assert engine.streams == 0
    submit(engine, "next", _ask("Tell me a long story."))
    assert _play(engine, out) < _usage(out["next"]).completion_tokens / 3
    assert (len(out["gone"]), _text(out["next"])) == (told, LONG_STORY)


@pytest.mark.parametrize("limit", [1, 2, 5, 6, 7])
def test_a_limit_ends_in_the_middle_of_a_round(engine: TextEngine, limit: int) -> None:
    out: dict[str, list[Event]] = {}
    submit(engine, "r", _ask("Tell me a long story.", max_tokens=limit))
    _play(engine, out)
    assert _usage(out["r"]).completion_tokens == limit
    assert out["r"][-1] == Finish(reason=FinishReason.LENGTH)
    assert LONG_STORY.startswith(_text(out["r"]))


def test_a_long_prompt_is_read_in_chunks(engine: TextEngine) -> None:
    """A running stream is not held up for the whole of it."""
    out: dict[str, list[Event]] = {}
    submit(engine, "prompt", _ask("word " * 450, max_tokens=2))
    submit(engine, "beside", _ask("Tell me a long story."))
    steps = 0
    while "prompt" not in out:
        _play(engine, out, 1)
        steps += 1
    assert steps > 1
    assert len(out["beside"]) >= steps / 3
    _play(engine, out)
    assert _text(out["beside"]) == LONG_STORY


@pytest.mark.parametrize(
    "sampling", [Sampling(temperature=0.0), Sampling(temperature=0.0, repeat_penalty=1.3), Sampling(temperature=0.0,
                 logit_bias={5: 3.0})],
)  # fmt: skip
def test_wrong_guesses_cost_nothing_but_time(tmp_path: Path, sampling: Sampling) -> None:
    """Of two models that know nothing one never guesses what the other says; the answer is the model's own."""
    model = make_random_model(tmp_path / "model", size_bytes=500_000, seed=1)
    draft = make_random_model(tmp_path / "draft", size_bytes=300_000, seed=2)
    asked = _ask("go", sampling=sampling, max_tokens=40)
    answers = []
    for with_draft in (None, draft):
        engine = _load(model, with_draft)
        out: dict[str, list[Event]] = {}
        submit(engine, "r", asked)
        _play(engine, out)
        engine.close()
        answers.append(_text(out["r"]))
    assert answers[0] == answers[1]
    assert answers[0]


def test_models_that_cannot_work_together_are_refused_by_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stranger = make_random_model(tmp_path / "stranger", size_bytes=500_000, vocabulary=300)
    with pytest.raises(LoadFailed, match="its tokens are not those of the model"):
        _load(DEMO_FOLDER, stranger)

    def with_a_window(model: Any) -> list[Any]:
        return [RotatingKVCache(16) for _ in make_prompt_cache(model)]

    monkeypatch.setattr("mlx_router_worker.generation.drafts.new_cache", with_a_window)
    with pytest.raises(LoadFailed, match=r"nothing can be taken back \(RotatingKVCache\)"):
        _load(DEMO_FOLDER, DEMO_FOLDER)


def test_a_draft_model_is_a_setting_of_a_model(home: Path) -> None:
    """Through the router: it is loaded beside the model, counted in its memory, and its absence is told."""
    shutil.copytree(DEMO_FOLDER, home / "small")
    models = {
        "big": {"path": str(DEMO_FOLDER), "draft_model": "small"},
        "small": {"path": str(home / "small")},
        "lost": {"path": str(DEMO_FOLDER), "draft_model": "nowhere"},
    }
    config = write_config(home, models)
    with running_router(home, "--config", str(config)) as router:
        answer = router.generate("big", prompt="Hello!", options={"temperature": 0})
        assert answer["response"]
        sizes = {}
        for name in ("big", "small"):
            text = command_on(router, "plan", name, "--json").stdout
            sizes[name] = json.loads(text)["estimate"]
        weights = (DEMO_FOLDER / "model.safetensors").stat().st_size
        extra = sizes["big"]["loaded_bytes"] - sizes["small"]["loaded_bytes"]
        assert weights * 0.9 < extra <= weights
        assert sizes["big"]["cache_bytes"] == 2 * sizes["small"]["cache_bytes"]
        failed = command_on(router, "load", "lost")
        assert failed.returncode == 1
        assert "draft_model 'nowhere' of model 'lost:latest' is not here" in failed.stderr
