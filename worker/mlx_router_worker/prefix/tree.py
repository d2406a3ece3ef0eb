"""A radix tree over token ids: which states of which prompts are kept.

Pure: what is kept is opaque. A node covers a run of tokens after its parent's. Its *segment* is the state that belongs
to these tokens and can be cut anywhere, as keys and values of full attention can. Its *snapshot* is a state after its
last token that cannot be cut, as that of a recurrent layer or of a sliding window. A model may need either or both.

Every scope has a tree of its own, so that no request can find out, by the time that an answer takes, what another
tenant has asked.
"""

from __future__ import annotations

import heapq
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias

__all__ = ["Match", "Node", "Payload", "PrefixTree", "Source", "Tokens", "as_tokens"]

Tokens: TypeAlias = "array[int]"


def as_tokens(ids: list[int]) -> Tokens:
    """Return token ids in the form that the tree compares, four bytes each."""
    return array("I", ids)


class Payload(Protocol):
    """A kept state. Segments can be split, snapshots are never asked to."""

    @property
    def nbytes(self) -> int: ...

    def split(self, tokens: int) -> tuple[Any, Any]:
        """Return the parts for the first so many tokens and for the rest."""
        ...


class Source(Protocol):
    """The state of a row that stands at the end of the tokens that are inserted."""

    def segment(self, start: int, end: int) -> Any:
        """Return the state that belongs to these positions; None if the model has none that can be cut."""
        ...

    def snapshot(self) -> Any:
        """Return the state after the last token that cannot be cut; None if the model has none."""
        ...


@dataclass(slots=True, eq=False)
class Node:
    tokens: Tokens
    parent: Node | None
    children: dict[int, Node] = field(default_factory=dict)
    """By their first token."""
    segment: Any = None
    """A ``Payload``, or None."""
    snapshot: Any = None
    """The same, after the last of ``tokens``."""
    used: int = 0
    """The tree's clock when it was last found or stored."""

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in (self.segment, self.snapshot) if part is not None)

    @property
    def path(self) -> list[Node]:
        """The nodes from the root's child to this one."""
        path: list[Node] = []
        node: Node | None = self
        while node is not None and node.parent is not None:
            path.append(node)
            node = node.parent
        return path[::-1]

    @property
    def end(self) -> int:
        """The number of tokens up to its end."""
        return sum(len(node.tokens) for node in self.path)


@dataclass(frozen=True, slots=True)
class Match:
    """What is kept for the beginning of a prompt."""

    nodes: list[Node]
    """Whose segments cover the usable tokens; of the last one perhaps only the first part."""
    usable: int
    """Tokens whose complete state is kept."""
    common: int
    """Tokens that the prompt shares with the tree; more than ``usable`` where a snapshot is missing."""

    @property
    def snapshot(self) -> Any:
        """The snapshot at its end, if the model needs one."""
        return self.nodes[-1].snapshot if self.nodes else None


class PrefixTree:
    """Owned by one thread.

    ``needs_snapshot``: a prefix is only usable up to the end of a node with a snapshot. ``longest_edge``: the most
    tokens of one node, the unit of eviction. ``most_snapshots``: from a root to any end.
    """

    def __init__(self, *, needs_snapshot: bool, longest_edge: int = 512, most_snapshots: int = 8) -> None:
        self._needs_snapshot = needs_snapshot
        self._longest_edge = longest_edge
        self._most_snapshots = most_snapshots
        self._roots: dict[str, Node] = {}
        self._clock = 0
        self.nbytes = 0
        self.count = 0
        """Nodes."""
        self.version = 0
        """Changes whenever a match may have become different."""

    # ------------------------------------------------------------------- lookup

    def match(self, scope: str, tokens: Tokens) -> Match:
        """Return the longest usable prefix. Marks nothing as used."""
        nodes, common = self._walk(scope, tokens)
        if not self._needs_snapshot:
            return Match(nodes, common, common)
        usable = position = kept = 0
        for place, node in enumerate(nodes, 1):
            position += len(node.tokens)
            if node.snapshot is not None and position <= common:
                usable, kept = position, place
        return Match(nodes[:kept], usable, common)

    def touch(self, scope: str, tokens: Tokens) -> int:
        """Mark what is kept of these tokens as used now. Returns the number of tokens of which something is kept."""
        nodes, common = self._walk(scope, tokens)
        self._clock += 1
        for node in nodes:
            node.used = self._clock
        return common

    def _walk(self, scope: str, tokens: Tokens) -> tuple[list[Node], int]:
        """Return the nodes that the tokens lead through, the last one perhaps in part, and the tokens in common."""
        nodes: list[Node] = []
        node, position = self._roots.get(scope), 0
        while node is not None and position < len(tokens):
            child = node.children.get(tokens[position])
            if child is None:
                break
            shared = _common(child.tokens, tokens[position : position + len(child.tokens)])
            nodes.append(child)
            position += shared
            if shared < len(child.tokens):
                break
            node = child
        return nodes, position

    # ------------------------------------------------------------------ storing

    def insert(self, scope: str, tokens: Tokens, source: Source, *, with_snapshot: bool = True) -> int:
        """Keep the state of these tokens as far as it is not kept yet. Returns the number of new tokens.

        ``with_snapshot``: whether the state after the last token is kept as well, where the model needs one.
        """
        if not tokens:
            return 0
        self._clock += 1
        self.version += 1
        nodes, position = self._walk(scope, tokens)
        node = nodes[-1] if nodes else self._roots.setdefault(scope, Node(as_tokens([]), None))
        surplus = sum(len(each.tokens) for each in nodes) - position
        if surplus and (position < len(tokens) or (with_snapshot and self._needs_snapshot)):
            node = self._split(node, len(node.tokens) - surplus)
        new = len(tokens) - position
        while position < len(tokens):
            end = min(position + self._longest_edge, len(tokens))
            child = Node(tokens[position:end], node, segment=source.segment(position, end))
            node.children[tokens[position]] = child
            self.count += 1
            self.nbytes += child.nbytes
            node, position = child, end
        if with_snapshot and self._needs_snapshot and node.snapshot is None:
            node.snapshot = source.snapshot()
            self.nbytes += node.snapshot.nbytes if node.snapshot is not None else 0
            self._thin_snapshots(node)
        for each in node.path:
            each.used = self._clock
        return new

    def _thin_snapshots(self, end: Node) -> None:
        """Drop snapshots before ``end`` until no more than the limit are left: the first stays, which is the system
        prompt's, and the distance between the others grows with that from the end. Ends and branches keep theirs."""
        path, position = [], 0
        for node in end.path:
            position += len(node.tokens)
            if node.snapshot is not None:
                path.append((position, node))
        while len(path) > self._most_snapshots:
            costs = [
                ((path[place + 1][0] - path[place - 1][0]) / (position - path[place][0]), place)
                for place in range(1, len(path) - 1)
                if len(path[place][1].children) < 2
            ]
            if not costs:
                return
            self.drop_snapshot(path.pop(min(costs)[1])[1])

    def _split(self, node: Node, tokens: int) -> Node:
        """Cut a node after so many tokens. Returns the new upper half; the lower one stays the same object."""
        parent = node.parent
        assert parent is not None
        assert 0 < tokens < len(node.tokens)
        upper = Node(node.tokens[:tokens], parent, {node.tokens[tokens]: node}, used=node.used)
        self.nbytes -= node.nbytes
        if node.segment is not None:
            upper.segment, node.segment = node.segment.split(tokens)
        parent.children[node.tokens[0]] = upper
        node.tokens, node.parent = node.tokens[tokens:], upper
        self.count += 1
        self.nbytes += node.nbytes + upper.nbytes
        return upper

    # ----------------------------------------------------------------- removing

    def evict(self, most_bytes: int, most_nodes: int) -> int:
        """Drop what was used the longest time ago until the limits hold. Returns the bytes that were dropped.

        Only ends of branches are dropped, so that what is left can be used.
        """
        if self.nbytes <= most_bytes and self.count <= most_nodes:
            return 0
        before = self.nbytes
        leaves = [(node.used, order, node) for order, node in enumerate(self._nodes()) if not node.children]
        heapq.heapify(leaves)
        order = self.count
        while leaves and (self.nbytes > most_bytes or self.count > most_nodes):
            _, _, node = heapq.heappop(leaves)
            parent = node.parent
            self._remove(node)
            if parent is not None and parent.parent is not None and not parent.children:
                order += 1
                heapq.heappush(leaves, (parent.used, order, parent))
        return before - self.nbytes

    def drop_snapshot(self, node: Node) -> None:
        if node.snapshot is not None:
            self.version += 1
            self.nbytes -= node.snapshot.nbytes
            node.snapshot = None

    def forget(self, node: Node) -> None:
        """Drop a node with everything below it."""
        for child in list(node.children.values()):
            self.forget(child)
        self._remove(node)

    def clear(self) -> None:
        self._roots.clear()
        self.nbytes = self.count = 0
        self.version += 1

    def _remove(self, node: Node) -> None:
        parent = node.parent
        if parent is None or parent.children.get(node.tokens[0]) is not node:
            return  # it is no part of the tree any more
        del parent.children[node.tokens[0]]
        self.nbytes -= node.nbytes
        self.count -= 1
        self.version += 1

    def _nodes(self) -> Iterator[Node]:
        open_nodes = [child for root in self._roots.values() for child in root.children.values()]
        while open_nodes:
            node = open_nodes.pop()
            yield node
            open_nodes.extend(node.children.values())


def _common(edge: Tokens, tokens: Tokens) -> int:
    """Return the number of equal tokens at the beginning of both."""
    if edge == tokens:
        return len(edge)
    low, high = 0, min(len(edge), len(tokens))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if edge[:middle] == tokens[:middle] else (low, middle - 1)
    return low
