"""Kept prefixes on real architectures, tiny and random in float32: tokens are those of a bare loop over mlx-lm, and
prompts are processed from where they differ."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import pytest

from mlx_router_shared.generation import Event, Usage
from mlx_router_shared.protocol import SetLimits
from mlx_router_worker.generation.caches import Segment, Snapshot
from mlx_router_worker.prefix.tree import as_tokens
from tests.support.architectures import Subject, answer_of, random_prompt
from tests.tiny_models.architectures import ARCHITECTURES

_ENOUGH = 2**30
_USUAL = ("qwen3", "gpt_oss", "mamba2")
"""In the default run: caches that can be cut, windows beside them, and states without positions."""


@pytest.fixture(
    scope="module",
    params=[name if name in _USUAL else pytest.param(name, marks=pytest.mark.slow) for name in ARCHITECTURES],
)
def subject(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Subject]:
    found = Subject(tmp_path_factory.mktemp(request.param), request.param)
    yield found
    found.engine.close()


@pytest.fixture(autouse=True)
def _empty(subject: Subject) -> None:
    subject.engine._prefixes.clear()
    subject.engine._prefixes.set_limit(_ENOUGH)


def _usage(events: list[Event]) -> Usage:
    (usage,) = [event for event in events if isinstance(event, Usage)]
    return usage


def _ask(subject: Subject, prompt: list[int], **more: Any) -> tuple[list[int], int]:
    """Return the answer's tokens, and how many of the prompt's were kept."""
    out = {"r": subject.submit("r", prompt, **more)}
    subject.play(out)
    return answer_of(out["r"], prompt), _usage(out["r"]).cached_tokens


def test_the_next_turn_is_processed_from_the_end_of_the_last_answer(subject: Subject) -> None:
    rng = random.Random(1)
    prompt, known = random_prompt(rng, 150), 0
    for _ in range(4):
        answer, cached = _ask(subject, prompt)
        assert answer == subject.bare(prompt)
        assert cached == known
        # The token that ends an answer is only processed if another one was.
        known = len(prompt) + (len(answer) if len(answer) > 1 else 0)
        prompt = [*prompt, *answer, *random_prompt(rng, 40)]


def test_a_branch_is_processed_from_where_it_leaves(subject: Subject) -> None:
    """For models whose state cannot be cut: once the place has been seen twice."""
    rng = random.Random(2)
    system = random_prompt(rng, 200)
    cached = []
    for _ in range(4):
        prompt = system + random_prompt(rng, 50)
        answer, kept = _ask(subject, prompt)
        assert answer == subject.bare(prompt)
        cached.append(kept)
    cuts = subject.engine._prefixes.needs_snapshot
    assert cached == ([0, 0, 200, 200] if cuts else [0, 200, 200, 200])


def test_prompts_that_wait_together_share_what_the_first_leaves(subject: Subject) -> None:
    rng = random.Random(3)
    system = random_prompt(rng, 600)
    prompts = {str(number): system + random_prompt(rng, 140) for number in range(4)}
    out: dict[str, list[Event]] = {}
    for name, prompt in prompts.items():
        out[name] = subject.submit(name, prompt)
    subject.play(out)
    for name, prompt in prompts.items():
        assert answer_of(out[name], prompt) == subject.bare(prompt), name
    cached = sorted(_usage(events).cached_tokens for events in out.values())
    assert cached[0] == 0
    assert cached[-1] == 600


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_trees_of_prompts_in_batches_with_cancellations_and_evictions(subject: Subject, seed: int) -> None:
    rng = random.Random(seed)
    known = [random_prompt(rng, 60)]
    hits = 0
    for turn in range(6):
        prompts = {}
        for number in range(4):
            base = rng.choice(known)
            end = len(base) if rng.random() < 0.5 else rng.randrange(20, len(base) + 1)
            prompts[f"{turn}.{number}"] = base[:end] + random_prompt(rng, rng.randrange(1, 90))
        out: dict[str, list[Event]] = {}
        for name, prompt in prompts.items():
            out[name] = subject.submit(name, prompt)
            subject.play(out, rng.randrange(6))
        gone = rng.choice(sorted(prompts))
        subject.engine.cancel(gone)
        if turn == 3:
            subject.engine._prefixes.shrink(0)
            assert subject.engine._prefixes.nbytes == 0
        subject.play(out)
        for name, prompt in prompts.items():
            if name == gone and not any(isinstance(event, Usage) for event in out[name]):
                continue
            answer = answer_of(out[name], prompt)
            assert answer == subject.bare(prompt), name
            hits += _usage(out[name]).cached_tokens
            known.append([*prompt, *answer])
    assert hits > 0


def test_a_foreign_state_would_show(subject: Subject) -> None:
    """The control of the others: with the state of another prompt in its place, the answer is another one."""
    rng = random.Random(4)
    first, second = (random_prompt(rng, 150) for _ in range(2))
    ends = [[*prompt, *_ask(subject, prompt)[0]] for prompt in (first, second)]
    tree = subject.engine._prefixes._tree
    for mine, other in zip(*(tree.match("", as_tokens(end)).nodes for end in ends), strict=True):
        mine.segment, other.segment = other.segment, mine.segment
        mine.snapshot, other.snapshot = other.snapshot, mine.snapshot
    told = 0
    for end in ends:
        longer = end + random_prompt(rng, 3)
        answer, cached = _ask(subject, longer)
        told += cached > 0 and answer != subject.bare(longer)
    assert told


@pytest.mark.parametrize("scope", ["", "other"])
def test_only_requests_of_one_scope_share(subject: Subject, scope: str) -> None:
    prompt = random_prompt(random.Random(5), 100)
    longer = [*prompt, *_ask(subject, prompt)[0], 20, 21]
    answer, cached = _ask(subject, longer, cache_scope=scope)
    assert answer == subject.bare(longer)
    assert (cached > 0) == (not scope)


def test_a_request_may_keep_and_use_nothing(subject: Subject) -> None:
    prompt = random_prompt(random.Random(6), 100)
    _ask(subject, prompt, cache_prompt=False)
    assert subject.engine._prefixes.nodes == 0
    _ask(subject, prompt)
    assert _ask(subject, [*prompt, *subject.bare(prompt), 20], cache_prompt=False)[1] == 0


def test_a_hit_with_logits_that_are_no_numbers_is_dropped(subject: Subject) -> None:
    prompt = random_prompt(random.Random(7), 100)
    longer = [*prompt, *_ask(subject, prompt)[0], 20]
    engine = subject.engine
    for node in engine._prefixes._tree._nodes():
        for kept in (node.segment, node.snapshot):
            if isinstance(kept, Segment):
                node.segment = Segment(tuple(array * float("nan") for array in kept.arrays))
            elif isinstance(kept, Snapshot):
                node.snapshot = Snapshot(tuple(
                    tuple(part * float("nan") if isinstance(part, mx.array) else part for part in state)
                    for state in kept.states
                ))  # fmt: skip
    answer, cached = _ask(subject, longer)
    assert answer == subject.bare(longer)
    assert cached == 0
    assert engine._prefixes.figures.poisoned == 1
    engine._prefixes.figures.poisoned = 0


@pytest.mark.slow
def test_memory_stays_within_the_limit_and_is_given_back(subject: Subject) -> None:
    rng = random.Random(8)
    engine = subject.engine
    before = mx.get_active_memory()
    known = [random_prompt(rng, 100)]
    limit = 2_000_000
    engine._prefixes.set_limit(limit)
    for _ in range(120):
        base = rng.choice(known[-10:])
        prompt = base[: rng.randrange(1, len(base) + 1)] + random_prompt(rng, rng.randrange(1, 60))
        answer, _ = _ask(subject, prompt[-1200:], most=4)
        known.append([*prompt[-1200:], *answer])
        assert engine._prefixes.nbytes <= limit
        held = mx.get_active_memory() - before
        assert held <= engine._prefixes.nbytes * 1.1 + 200_000, "nothing lazy or shared keeps more alive"
    assert engine._prefixes.nbytes > limit / 2
    engine.set_limits(SetLimits(
        memory_limit_bytes=0, cache_limit_bytes=0, wired_limit_bytes=0, prefix_cache_bytes=limit, trim=True
    ))  # fmt: skip
    assert engine._prefixes.nbytes <= limit / 2
