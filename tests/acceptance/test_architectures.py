"""Real architectures, tiny and random in float32: whatever happens beside a request, its greedy tokens are those of a
bare loop over mlx-lm."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest

from mlx_router_shared.generation import Event
from mlx_router_shared.protocol import SetLimits
from tests.support.architectures import Subject, answer_of, random_prompt
from tests.tiny_models.architectures import ARCHITECTURES


def _slow(*values: int) -> list[Any]:
    return [pytest.param(value, marks=pytest.mark.slow) for value in values]


@pytest.fixture(scope="module", params=list(ARCHITECTURES))
def subject(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Subject]:
    found = Subject(tmp_path_factory.mktemp(request.param), request.param)
    yield found
    found.engine.close()


def test_tokens_far_back_decide_which_one_is_next(subject: Subject) -> None:
    """The control of all the others: a cache with a foreign beginning would show in the tokens."""
    rng = random.Random(1)
    prompts = [random_prompt(rng, 20) + random_prompt(random.Random(2), 40) for _ in range(4)]
    assert len({tuple(subject.bare(prompt)) for prompt in prompts}) > 1


@pytest.mark.parametrize("length", [33, *_slow(1, 2, 31, 32, 70, 257, 300, 700)])
def test_a_prompt_alone(subject: Subject, length: int) -> None:
    prompt = random_prompt(random.Random(length), length)
    out = {"r": subject.submit("r", prompt)}
    subject.play(out)
    assert answer_of(out["r"], prompt) == subject.bare(prompt)


def test_prompts_of_different_lengths_at_once(subject: Subject) -> None:
    rng = random.Random(3)
    prompts = {
        str(number): random_prompt(rng, length) for number, length in enumerate((5, 40, 90, 127, 3, 300, 33, 64))
    }
    out = {name: subject.submit(name, prompt) for name, prompt in prompts.items()}
    subject.play(out)
    for name, prompt in prompts.items():
        assert answer_of(out[name], prompt) == subject.bare(prompt), name


@pytest.mark.parametrize("seed", _slow(0, 1, 2))
def test_requests_that_join_and_are_cancelled_at_random_steps(subject: Subject, seed: int) -> None:
    rng = random.Random(seed)
    prompts = {str(number): random_prompt(rng, rng.choice((3, 30, 100, 200, 330))) for number in range(10)}
    cancelled = set(rng.sample(sorted(prompts), 3))
    out: dict[str, list[Event]] = {}
    running: list[str] = []
    for name, prompt in prompts.items():
        out[name] = subject.submit(name, prompt)
        running.append(name)
        subject.play(out, rng.randrange(8))
        for victim in [name for name in running if name in cancelled and rng.random() < 0.5]:
            subject.engine.cancel(victim)
            running.remove(victim)
    subject.play(out)
    for name in running:
        assert answer_of(out[name], prompts[name]) == subject.bare(prompts[name]), name


@pytest.mark.slow
def test_rows_that_give_their_caches_up_go_on_where_they_were(subject: Subject) -> None:
    """The limit falls while they are answered; there is room for one of them afterwards."""
    rng = random.Random(5)
    prompts: dict[str, list[int]] = {}
    while len(prompts) < 3:
        prompt = random_prompt(rng, 60)
        if len(subject.bare(prompt, 60)) == 60:  # it does not end by itself before
            prompts[str(len(prompts))] = prompt
    out = {name: subject.submit(name, prompt, 60) for name, prompt in prompts.items()}
    engine = subject.engine
    while len(engine._batches.rows) < 3:
        assert engine.streams == 3
        subject.play(out, 1)
    subject.play(out, 3)
    least = engine._admission._ledger.needed_bytes([[256]])
    engine.set_limits(SetLimits(memory_limit_bytes=least, cache_limit_bytes=0, wired_limit_bytes=0))
    subject.play(out, 1)
    assert len(engine._batches.rows) < 3
    subject.play(out)
    engine.set_limits(SetLimits(memory_limit_bytes=0, cache_limit_bytes=0, wired_limit_bytes=0))
    for name, prompt in prompts.items():
        assert answer_of(out[name], prompt) == subject.bare(prompt, 60), name


@pytest.mark.slow
def test_choices_of_one_prompt_process_it_once(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = random_prompt(random.Random(6), 200)
    processed: list[int] = []
    process = subject.engine._lane.process

    def note(row: Any, tokens: int) -> Any:
        before = row.position
        logits = process(row, tokens)
        processed.append(row.position - before)
        return logits

    monkeypatch.setattr(subject.engine._lane, "process", note)
    out = {str(number): subject.submit(str(number), prompt) for number in range(4)}
    subject.play(out)
    assert sum(processed) == len(prompt)
    assert all(answer_of(events, prompt) == subject.bare(prompt) for events in out.values())


@pytest.mark.slow
def test_groups_that_become_one_go_on_with_the_same_tokens(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three short rows and a long one; two of the short ones end, and padding the last one becomes cheap."""
    if not subject.facts.is_batched:
        assert subject.engine._batches._place(10, 1) is None, "each row is decoded by itself"
        return
    engine = subject.engine
    monkeypatch.setattr(engine._batches, "_weights_bytes", int(2.5 * 300))
    monkeypatch.setattr(type(engine._admission), "bytes_per_token", 1)
    monkeypatch.setattr(engine._scheduler, "_share", 0.95)  # the long prompt is processed before the others end
    rng = random.Random(9)
    prompts: dict[str, list[int]] = {}
    while len(prompts) < 4:
        prompt = random_prompt(rng, 330 if not prompts else 30)
        if len(subject.bare(prompt, 60)) == 60:
            prompts[str(len(prompts))] = prompt
    out = {name: subject.submit(name, prompt, 60) for name, prompt in prompts.items()}
    while sorted(len(group.rows) for group in engine._batches.groups) != [1, 3]:
        assert engine.streams == 4
        subject.play(out, 1)
    subject.play(out, 2)
    for name in ("2", "3"):
        engine.cancel(name)
    assert [len(group.rows) for group in engine._batches.groups] == [2]
    subject.play(out)
    for name in ("0", "1"):
        assert answer_of(out[name], prompts[name]) == subject.bare(prompts[name], 60), name
