"""When prompts are processed beside running requests: the scheduler on simulated times."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_router_worker.generation.schedule import LONGEST_CHUNK, Chunk, PrefillScheduler, WaitingPrompt


class _Machine:
    """A worker whose chunks and steps take known times; with ``decoding``, answers run to the end of the test."""

    def __init__(self, scheduler: PrefillScheduler, *, token: float, step: float, decoding: bool) -> None:
        self.scheduler, self.token, self.step, self.decoding = scheduler, token, step, decoding
        self.now = 0.0
        self.positions: dict[str, int] = {}
        self.lengths: dict[str, int] = {}
        self.arrived: dict[str, float] = {}
        self.priority: dict[str, int] = {}
        self.done: dict[str, float] = {}
        self.decode_seconds = self.prefill_seconds = self.longest_chunk = 0.0
        self.most_begun = 0

    def add(self, name: str, tokens: int, priority: int = 0) -> None:
        self.positions[name], self.lengths[name] = 0, tokens
        self.arrived[name], self.priority[name] = self.now, priority

    def prompts(self) -> list[WaitingPrompt]:
        return [
            WaitingPrompt(key=name, position=at, remaining=self.lengths[name] - at, arrived=self.arrived[name],
                          priority=self.priority[name], has_begun=at > 0)
            for name, at in self.positions.items()
        ]  # fmt: skip

    def turn(self) -> None:
        chunk = self.scheduler.next_chunk(self.now, self.prompts(), decoding_since=-10.0 if self.decoding else None)
        if chunk is None:
            assert self.decoding, "the machine may not stand still"
            self.now += self.step
            self.decode_seconds += self.step
            self.scheduler.note_decode(self.step)
            return
        at = self.positions[chunk.key]
        tokens = min(chunk.tokens, self.lengths[chunk.key] - at)
        seconds = tokens * self.token
        self.now += seconds
        self.prefill_seconds += seconds
        self.longest_chunk = max(self.longest_chunk, seconds)
        self.scheduler.note_chunk(at, tokens, seconds, owes=chunk.owes, priority=self.priority[chunk.key])
        self.positions[chunk.key] += tokens
        self.most_begun = max(self.most_begun, sum(0 < at < self.lengths[n] for n, at in self.positions.items()))
        if self.positions[chunk.key] == self.lengths[chunk.key]:
            del self.positions[chunk.key]
            self.done[chunk.key] = self.now

    def run(self) -> None:
        while self.positions:
            self.turn()


def test_alone_a_prompt_gets_long_chunks_and_all_of_the_time() -> None:
    machine = _Machine(PrefillScheduler(), token=0.001, step=0.01, decoding=False)
    machine.add("p", 10_000)
    machine.run()
    assert machine.decode_seconds == 0
    assert machine.longest_chunk == pytest.approx(LONGEST_CHUNK * 0.001)


@pytest.mark.parametrize(("share", "low", "high"), [(0.5, 0.45, 0.55), (0.3, 0.25, 0.36), (0.8, 0.7, 0.85)])
def test_beside_running_requests_it_gets_its_share_in_chunks_that_fit_the_gap(
    share: float, low: float, high: float
) -> None:
    machine = _Machine(PrefillScheduler(share, 0.15), token=0.0007, step=0.02, decoding=True)
    machine.add("p", 5_000)
    machine.run()
    total = machine.prefill_seconds + machine.decode_seconds
    assert low < machine.prefill_seconds / total < high
    assert machine.longest_chunk + machine.step <= 0.15


def test_a_slow_machine_gets_the_shortest_chunk_and_keeps_the_share() -> None:
    machine = _Machine(PrefillScheduler(0.5, 0.15), token=0.1, step=1.0, decoding=True)
    machine.add("p", 640)
    machine.run()
    assert machine.prefill_seconds == pytest.approx(64)
    assert machine.decode_seconds == pytest.approx(64, rel=0.2)
    # The first chunk is a guess, the others are the shortest.
    assert machine.longest_chunk <= 64 * 0.1 + 1e-9


@pytest.mark.parametrize(("priority", "low", "high"), [(10, 0.6, 0.72), (-10, 0.2, 0.32), (0, 0.42, 0.5)])
def test_a_priority_moves_the_share(priority: int, low: float, high: float) -> None:
    machine = _Machine(PrefillScheduler(0.46), token=0.001, step=0.01, decoding=True)
    machine.add("p", 8_000, priority)
    machine.run()
    assert low < machine.prefill_seconds / (machine.prefill_seconds + machine.decode_seconds) < high


def test_equal_prompts_are_processed_one_after_the_other_in_the_order_of_their_arrival() -> None:
    machine = _Machine(PrefillScheduler(), token=0.001, step=0.01, decoding=False)
    for number in range(8):
        machine.add(str(number), 4_000)
        machine.now += 1e-6
    machine.run()
    assert list(machine.done) == [str(number) for number in range(8)]
    assert sum(machine.done.values()) / 8 / machine.now <= 0.6


def test_a_short_prompt_goes_before_long_ones_that_have_begun() -> None:
    machine = _Machine(PrefillScheduler(), token=0.001, step=0.01, decoding=True)
    for name in ("first", "second", "third"):
        machine.add(name, 30_000)
    for _ in range(40):
        machine.turn()
    began = machine.now
    machine.add("short", 100)
    while "short" not in machine.done:
        machine.turn()
    assert machine.done["short"] - began < 1.0


def test_a_high_priority_goes_first() -> None:
    machine = _Machine(PrefillScheduler(), token=0.001, step=0.01, decoding=False)
    machine.add("short", 600)
    machine.add("urgent", 6_000, priority=10)
    machine.run()
    assert list(machine.done) == ["urgent", "short"]


def test_a_long_prompt_is_overtaken_for_no_longer_than_it_needs_itself() -> None:
    """Short prompts keep coming: one for each that is done."""
    machine = _Machine(PrefillScheduler(), token=0.001, step=0.01, decoding=False)
    machine.add("warm", 1_000)
    machine.run()
    begun, number = machine.now, 0
    machine.add("long", 5_000)
    while "long" not in machine.done:
        number += 1
        machine.add(str(number), 600)
        for _ in range(2):
            if len(machine.positions) > 1:
                machine.turn()
        assert machine.now - begun < 20
    assert machine.done["long"] - begun <= 3 * 5.0


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 9_000), st.sampled_from((-10, 0, 10))), min_size=1, max_size=10),
    st.floats(0.05, 0.95), st.floats(1e-5, 0.05), st.integers(10, 1000), st.booleans(),
)  # fmt: skip
def test_everything_is_processed_and_few_prompts_hold_memory(
    prompts: list[tuple[int, int]], share: float, token: float, tokens_of_a_step: int, decoding: bool
) -> None:
    machine = _Machine(PrefillScheduler(share, 0.15), token=token, step=token * tokens_of_a_step, decoding=decoding)
    for number, (tokens, priority) in enumerate(prompts):
        machine.add(str(number), tokens, priority)
    machine.run()
    assert set(machine.done) == {str(number) for number in range(len(prompts))}
    total = sum(tokens for tokens, _ in prompts)
    assert machine.prefill_seconds == pytest.approx(total * token)
    if not decoding:
        assert machine.now == pytest.approx(machine.prefill_seconds)
    long = sum(tokens > 512 for tokens, _ in prompts)
    assert machine.most_begun <= min(long, 2) + sum(tokens <= 512 for tokens, _ in prompts) + 1


def _prompt(key: str, tokens: int) -> WaitingPrompt:
    return WaitingPrompt(key=key, position=0, remaining=tokens, arrived=0.0)


def test_a_prompt_that_was_processed_alone_leaves_no_debt() -> None:
    scheduler = PrefillScheduler(0.5, 0.15)
    chunk = scheduler.next_chunk(0.0, [_prompt("a", 900)], decoding_since=None)
    assert chunk is not None
    scheduler.note_chunk(0, 900, 5.0, owes=chunk.owes)
    late = scheduler.next_chunk(5.0, [_prompt("b", 900)], decoding_since=0.0)
    assert late is not None, "the first row has had no decode time taken from it"
    assert late.owes


def test_short_prompts_that_arrive_together_are_processed_before_any_of_them_decodes_on() -> None:
    scheduler = PrefillScheduler(0.5, 0.15)
    scheduler.note_chunk(0, 100, 0.3, owes=False)
    for now in (0.3, 0.6, 0.9):
        assert scheduler.next_chunk(now, [_prompt("b", 100)], decoding_since=0.0) == Chunk("b", LONGEST_CHUNK)
        scheduler.note_chunk(0, 100, 0.3, owes=False)
    late = scheduler.next_chunk(1.2, [_prompt("c", 100)], decoding_since=0.0)
    assert late is not None
    assert late.owes, "the first has waited long enough"
    assert scheduler.next_chunk(0.1, [_prompt("long", 129)], decoding_since=0.0) == Chunk("long", 32, owes=True)


def test_chunks_are_whole_multiples_of_the_shortest() -> None:
    scheduler = PrefillScheduler(0.5, 0.15)
    scheduler.note_chunk(0, 64, 0.064, owes=True)
    scheduler.note_decode(1.0)
    prompt = WaitingPrompt(key="p", position=64, remaining=5_000, arrived=0.0)
    chunk = scheduler.next_chunk(1.0, [prompt], decoding_since=-10.0)
    assert chunk is not None
    assert chunk.tokens == 992, "a step takes longer than the gap: the chunk takes as long as a step"
    for _ in range(20):
        scheduler.note_decode(0.01)
    chunk = scheduler.next_chunk(2.0, [prompt], decoding_since=-10.0)
    assert chunk is not None
    assert chunk.tokens == 128
