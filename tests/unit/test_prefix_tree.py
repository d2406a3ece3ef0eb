"""The radix tree of kept prefixes against a model of it that keeps whole prompts."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from mlx_router_worker.prefix.tree import Node, PrefixTree, as_tokens

_EDGE = 4


@dataclass(frozen=True)
class Run:
    """A payload that is the tokens themselves: what a match returns can be compared with what was asked for."""

    tokens: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return 10 * len(self.tokens)

    def split(self, tokens: int) -> tuple[Run, Run]:
        return Run(self.tokens[:tokens]), Run(self.tokens[tokens:])


@dataclass(frozen=True)
class Whole:
    """A source that stands at the end of these tokens."""

    tokens: tuple[int, ...]

    def segment(self, start: int, end: int) -> Run:
        return Run(self.tokens[start:end])

    def snapshot(self) -> Run:
        return Run(self.tokens)


def _nodes(tree: PrefixTree) -> list[Node]:
    return list(tree._nodes())


def _common(one: tuple[int, ...], other: tuple[int, ...]) -> int:
    return next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


_TOKENS = st.lists(st.integers(0, 2), max_size=18).map(tuple)
_SCOPES = st.sampled_from(["", "key-a"])


class Tree(RuleBasedStateMachine):
    """``kept``: the prompts of each scope; ``snapshots``: those with a state at their end. Both only say what may be
    found once something was evicted, and exactly what is found before that."""

    @initialize(needs_snapshot=st.booleans())
    def begin(self, needs_snapshot: bool) -> None:
        self.needs_snapshot = needs_snapshot
        self.tree = PrefixTree(needs_snapshot=needs_snapshot, longest_edge=_EDGE)
        self.kept: dict[str, set[tuple[int, ...]]] = {"": set(), "key-a": set()}
        self.snapshots: dict[str, set[tuple[int, ...]]] = {"": set(), "key-a": set()}
        self.is_complete = True

    @rule(scope=_SCOPES, tokens=_TOKENS, with_snapshot=st.booleans())
    def insert(self, scope: str, tokens: tuple[int, ...], with_snapshot: bool) -> None:
        before = max((_common(tokens, other) for other in self.kept[scope]), default=0)
        new = self.tree.insert(scope, as_tokens(list(tokens)), Whole(tokens), with_snapshot=with_snapshot)
        if self.is_complete:
            assert new == len(tokens) - before
        self.kept[scope].add(tokens)
        if with_snapshot:
            self.snapshots[scope].add(tokens)

    @rule(scope=_SCOPES, tokens=_TOKENS)
    def match(self, scope: str, tokens: tuple[int, ...]) -> None:
        match = self.tree.match(scope, as_tokens(list(tokens)))
        common = max((_common(tokens, other) for other in self.kept[scope]), default=0)
        ends = [len(end) for end in self.snapshots[scope] if end == tokens[: len(end)]]
        usable = max(ends, default=0) if self.needs_snapshot else common
        assert match.usable <= usable
        assert match.common <= common
        if self.is_complete:
            assert (match.usable, match.common) == (usable, common)
        found = [token for node in match.nodes for token in node.segment.tokens]
        assert tuple(found[: match.usable]) == tokens[: match.usable]
        assert len(found) >= match.usable
        if self.needs_snapshot and match.usable:
            assert match.snapshot.tokens == tokens[: match.usable]
        assert self.tree.touch(scope, as_tokens(list(tokens))) == match.common

    @rule(most=st.integers(0, 400), nodes=st.integers(0, 12))
    def evict(self, most: int, nodes: int) -> None:
        before = self.tree.nbytes
        dropped = self.tree.evict(most, nodes)
        assert self.tree.nbytes == before - dropped <= most
        assert self.tree.count <= nodes
        self.is_complete = self.is_complete and not dropped

    @rule(data=st.data())
    def forget_a_branch(self, data: st.DataObject) -> None:
        if nodes := _nodes(self.tree):
            self.tree.forget(data.draw(st.sampled_from(nodes)))
            self.is_complete = False

    @rule(data=st.data())
    def drop_a_snapshot(self, data: st.DataObject) -> None:
        if nodes := _nodes(self.tree):
            self.tree.drop_snapshot(data.draw(st.sampled_from(nodes)))
            self.is_complete = False

    @invariant()
    def books_are_right(self) -> None:
        nodes = _nodes(self.tree)
        assert self.tree.count == len(nodes)
        assert self.tree.nbytes == sum(node.nbytes for node in nodes)
        for node in nodes:
            assert 0 < len(node.tokens) <= _EDGE
            assert node.parent is not None
            assert node.parent.children[node.tokens[0]] is node
            assert node.end == sum(len(each.tokens) for each in node.path)
            assert node.segment.tokens == tuple(node.tokens)
            assert all(node.used >= child.used for child in node.children.values()), "an end is used no later than it"


TestTree = Tree.TestCase
TestTree.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)


def _filled(*prompts: tuple[int, ...], needs_snapshot: bool = False) -> PrefixTree:
    tree = PrefixTree(needs_snapshot=needs_snapshot)
    for prompt in prompts:
        tree.insert("", as_tokens(list(prompt)), Whole(prompt))
    return tree


def test_what_was_used_the_longest_time_ago_is_evicted_first() -> None:
    system = (9,) * 600
    tree = _filled((*system, 1, 1), (*system, 2, 2), (*system, 3, 3))
    tree.touch("", as_tokens([*system, 1, 1]))
    tree.evict(tree.nbytes - 1, 1000)
    assert [tree.match("", as_tokens([*system, end, end])).usable for end in (1, 2, 3)] == [602, 600, 602]
    tree.evict(0, 1000)
    assert tree.count == tree.nbytes == 0


def test_a_long_edge_is_several_nodes_so_that_its_end_can_be_evicted_alone() -> None:
    prompt = tuple(range(1300))
    tree = _filled(prompt)
    tree.evict(tree.nbytes - 1, 1000)
    assert tree.match("", as_tokens(list(prompt))).usable == 1024


def test_a_prefix_without_a_snapshot_is_common_but_not_usable() -> None:
    tree = _filled((1, 2, 3, 4), needs_snapshot=True)
    match = tree.match("", as_tokens([1, 2, 3, 5]))
    assert (match.usable, match.common, match.nodes) == (0, 3, [])
    tree.insert("", as_tokens([1, 2, 3]), Whole((1, 2, 3)))
    assert tree.match("", as_tokens([1, 2, 3, 5])).usable == 3
    assert tree.match("", as_tokens([1, 2, 3, 4])).usable == 4, "the other end still has its own"


def test_a_payload_that_is_missing_takes_no_bytes() -> None:
    class Nothing:
        def segment(self, start: int, end: int) -> None: ...

        def snapshot(self) -> None: ...

    tree = PrefixTree(needs_snapshot=False)
    assert tree.insert("", as_tokens([1, 2, 3]), Nothing()) == 3
    assert (tree.nbytes, tree.match("", as_tokens([1, 2])).common) == (0, 2)


@pytest.mark.parametrize("tokens", [[], [4294967295, 0]])
def test_any_token_id_of_32_bits_is_kept(tokens: list[int]) -> None:
    tree = _filled(tuple(tokens))
    assert tree.match("", as_tokens(tokens)).usable == len(tokens)


def test_snapshots_of_a_long_conversation_are_thinned_out_towards_its_beginning() -> None:
    tree = PrefixTree(needs_snapshot=True, most_snapshots=4)
    turns = [tuple(range(100 * turn)) for turn in range(1, 13)]
    for turn in turns:
        tree.insert("", as_tokens(list(turn)), Whole(turn))
    kept = [node.end for node in _nodes(tree) if node.snapshot is not None]
    assert sorted(kept)[0] == 100
    assert sorted(kept)[-2:] == [1100, 1200]
    assert len(kept) == 4


def test_the_snapshot_of_a_branch_is_not_thinned_out() -> None:
    tree = PrefixTree(needs_snapshot=True, most_snapshots=2)
    tree.insert("", as_tokens(list(range(20))), Whole(tuple(range(20))))
    for end in (100, 101):
        branch = (*range(50), end)
        tree.insert("", as_tokens(list(range(50))), Whole(tuple(range(50))))
        tree.insert("", as_tokens(list(branch)), Whole(branch))
    assert tree.match("", as_tokens([*range(50), 7])).usable == 50


def test_a_node_that_was_split_is_forgotten_with_its_upper_half() -> None:
    tree = _filled((1, 2, 3, 4))
    (reused,) = tree.match("", as_tokens([1, 2, 3, 4])).nodes
    tree.insert("", as_tokens([1, 2, 9]), Whole((1, 2, 9)))
    tree.forget(reused.path[0])
    assert tree.count == tree.nbytes == 0
    tree.forget(reused.path[0])
    assert tree.count == tree.nbytes == 0
