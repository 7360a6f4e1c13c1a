"""Reachability in a directed graph: is there a path from the source to the target?

A graph of n nodes has the names A, B, ... of the first n letters; node i has token i + 1.
"""

import dataclasses
import itertools
import struct
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import numpy as np

from jaxlib_methods.tasks.questions import ATTEMPTS, Draws, Graphs, Split

NAMES = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


class Graph(NamedTuple):
    """One question. Bit u of `parents[v]` is set where there is an edge u -> v."""

    parents: tuple[int, ...]
    source: int
    target: int
    label: int
    difficulty: int


def to_text(example: Graph) -> str:
    """The question for a reader: `5 nodes: A>B B>D C>A; A to D?`."""
    edges = " ".join(f"{NAMES[u]}>{NAMES[v]}" for u, v in edges_of(example))
    ends = f"{NAMES[example.source]} to {NAMES[example.target]}?"
    return f"{len(example.parents)} nodes: {edges}; {ends}"


def from_text(text: str) -> Graph:
    """The question that `to_text` writes, with its answer and its hops (0 where there is none)."""
    size, rest = text.split(" nodes:")
    edges, ends = rest.split(";")
    parents = [0] * int(size)
    for first, second in (edge.split(">") for edge in edges.split()):
        parents[NAMES.index(second)] |= 1 << NAMES.index(first)
    source, target = (NAMES.index(name) for name in ends.strip().rstrip("?").split(" to "))
    graph = Graph(tuple(parents), source, target, 0, 0)
    hops = distance(graph)
    return graph if hops is None else graph._replace(label=1, difficulty=hops)


def edges_of(example: Graph) -> list[tuple[int, int]]:
    """The edges u -> v as pairs (u, v), sorted."""
    return sorted((u, v) for v, parents in enumerate(example.parents) for u in _bits(parents))


def distance(example: Graph) -> int | None:
    """Edges of the shortest path from source to target, None where there is none.

    Breadth-first from the target against the edges, a set of nodes being the bits of a number.
    """
    reached = frontier = 1 << example.target
    hops = 0
    while frontier:
        if frontier >> example.source & 1:
            return hops
        before = 0
        for node in _bits(frontier):
            before |= example.parents[node]
        frontier = before & ~reached
        reached |= frontier
        hops += 1
    return None


def answer(example: Graph) -> int:
    """1 where the target can be reached from the source, else 0."""
    return int(distance(example) is not None)


def _bits(number: int) -> Iterator[int]:
    """Which bits are set, lowest first."""
    while number:
        lowest = number & -number
        yield lowest.bit_length() - 1
        number ^= lowest


def draw(
    random: np.random.Generator,
    hops: int,
    *,
    label: int,
    nodes: tuple[int, int] = (8, 16),
    variant: Literal["paper", "matched"] = "paper",
) -> Graph:
    """One question about a graph with as many nodes as `nodes` says, both ends included.

    Where label is 1 the shortest path has exactly `hops` edges; where it is 0 there is none.
    paper: a positive has edges that a negative has not, and degrees tell much about the label.
    matched: both come in pairs, in which every node has the same degrees.
    """
    low, high = nodes
    if not 2 <= low <= high <= len(NAMES):
        raise ValueError(f"nodes {nodes} must go from 2 or more to {len(NAMES)} or fewer")
    if hops < 1 or (hops >= low and (label == 1 or variant == "matched")):
        raise ValueError(
            f"a path of {hops} hops needs {hops + 1} nodes, and graphs have {low} or more; "
            f"take 1 to {low - 1} hops"
        )
    draws = Draws(random)
    if variant == "matched":
        return _matched(draws, hops, nodes)[1 - label]
    size = draws.between(low, high)
    return _positive(draws, size, hops) if label else _negative(draws, size, hops)


def _pair(draws: Draws, size: int) -> tuple[int, int]:
    """Two different nodes."""
    u, v = draws.below(size), draws.below(size - 1)
    return u, v + (v >= u)


def _positive(draws: Draws, size: int, hops: int) -> Graph:
    """A path of `hops` edges, and n/2 to 2n tries at adding an edge that makes none shorter."""
    path = draws.sample(range(size), hops + 1)
    children, parents = [0] * size, [0] * size
    from_source, to_target = [size] * size, [size] * size  # edges of the shortest path so far
    for i, node in enumerate(path):
        from_source[node], to_target[node] = i, hops - i
    for u, v in itertools.pairwise(path):
        children[u] |= 1 << v
        parents[v] |= 1 << u
    for _ in range(draws.between(size // 2, 2 * size)):
        u, v = _pair(draws, size)
        if from_source[u] + 1 + to_target[v] >= hops:
            children[u] |= 1 << v
            parents[v] |= 1 << u
            _shorten(from_source, children, u, v)
            _shorten(to_target, parents, v, u)
    return Graph(tuple(parents), path[0], path[-1], 1, hops)


def _shorten(distances: list[int], following: list[int], u: int, v: int) -> None:
    """Brings the distances up to date where there is now a step from u to v."""
    if distances[u] + 1 >= distances[v]:
        return
    distances[v] = distances[u] + 1
    changed = [v]
    while changed:
        node = changed.pop()
        for other in _bits(following[node]):
            if distances[node] + 1 < distances[other]:
                distances[other] = distances[node] + 1
                changed.append(other)


def _negative(draws: Draws, size: int, hops: int) -> Graph:
    """n/2 to 2n random edges; in a random order of nodes, the first pair that has no path."""
    count = draws.between(size // 2, 2 * size)
    children, parents = [0] * size, [0] * size
    for _ in range(count):
        u, v = _pair(draws, size)
        children[u] |= 1 << v
        parents[v] |= 1 << u
    order = draws.sample(range(size))
    for i in range(size - 1):
        reached = _closure(children, order[i])
        for target in order[i + 1 :]:
            if not reached >> target & 1:
                return Graph(tuple(parents), order[i], target, 0, hops)
    return _halves(draws, order, count)._replace(difficulty=hops)


def _halves(draws: Draws, order: Sequence[int], count: int) -> Graph:
    """Random edges within either half of the nodes, from one to the other of which none leads."""
    halves = order[: len(order) // 2], order[len(order) // 2 :]
    parents = [0] * len(order)
    for _ in range(count):
        half = draws.pick(halves)
        if len(half) > 1:
            u, v = _pair(draws, len(half))
            parents[half[v]] |= 1 << half[u]
    source, target = (draws.pick(half) for half in halves)
    return Graph(tuple(parents), source, target, 0, 0)


def _closure(following: Sequence[int], node: int) -> int:
    """`node` and what follows it, what follows that and so on, as bits."""
    found = waiting = 1 << node
    while waiting:
        lowest = waiting & -waiting
        new = following[lowest.bit_length() - 1] & ~found
        found |= new
        waiting ^= lowest | new
    return found


def _matched(draws: Draws, hops: int, nodes: tuple[int, int]) -> tuple[Graph, Graph]:
    """A positive, and the negative that swaps of its edges make: all degrees are the same.

    Positives of which no negative comes are not used either: they are the denser ones.
    """
    for _ in range(ATTEMPTS):
        positive = _positive(draws, draws.between(*nodes), hops)
        if (parents := _disconnected(draws, positive)) is not None:
            return positive, positive._replace(parents=parents, label=0)
    raise ValueError(
        f"no graph of {nodes[0]} to {nodes[1]} nodes with a path of {hops} hops loses it by "
        "swapping edges; ask for fewer hops or allow more nodes"
    )


def _disconnected(draws: Draws, graph: Graph) -> tuple[int, ...] | None:
    """Swaps a -> b, c -> d for a -> d, c -> b until no path is left; None if that takes long."""
    edges, parents = edges_of(graph), list(graph.parents)
    if len(edges) < 2:
        return None
    for _ in range(4 * len(edges)):
        i, j = _pair(draws, len(edges))
        (a, b), (c, d) = edges[i], edges[j]
        if a == d or c == b or parents[d] >> a & 1 or parents[b] >> c & 1:
            continue  # an edge from a node to itself, or one that is there already
        edges[i], edges[j] = (a, d), (c, b)
        parents[b] ^= 1 << a | 1 << c
        parents[d] ^= 1 << a | 1 << c
        if not _closure(parents, graph.target) >> graph.source & 1:
            return tuple(parents)
    return None


def encode(examples: Sequence[Graph], *, max_nodes: int = 20) -> Graphs:
    """Stacks questions about graphs of at most `max_nodes` nodes, all of which count."""
    shape = (len(examples), max_nodes)
    padded = [e.parents + (0,) * (max_nodes - len(e.parents)) for e in examples]
    parents = np.array(padded, np.uint32).reshape(shape)
    nodes = np.arange(max_nodes, dtype=np.uint32)
    edges = (parents[:, :, None] >> nodes & 1).astype(bool) | np.eye(max_nodes, dtype=bool)
    sizes = np.array([len(example.parents) for example in examples], np.int32)
    ends = [(example.source, example.target) for example in examples]
    return Graphs(
        tokens=np.where(nodes < sizes[:, None], nodes + 1, 0).astype(np.int32),
        edges=edges,
        endpoints=np.array(ends, np.int32).reshape(shape[0], 2),
        label=np.array([example.label for example in examples], np.int32),
        difficulty=np.array([example.difficulty for example in examples], np.int32),
        where=np.ones(shape[0], bool),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reachability:
    """The task; difficulty is the number of hops.

    max_nodes: rows of a graph. train_nodes, test_nodes: fewest and most nodes of a graph.
    test_nodes None: for k hops max(k + 2, 10) to max(k + 6, 16) as far as max_nodes goes, which
    is more than any graph of the training split has where k is large.
    """

    max_nodes: int = 20
    train_nodes: tuple[int, int] = (8, 16)
    test_nodes: tuple[int, int] | None = None
    variant: Literal["paper", "matched"] = "paper"

    def __post_init__(self) -> None:
        if not 2 <= self.max_nodes <= len(NAMES):
            raise ValueError(f"max_nodes {self.max_nodes} must be 2 to {len(NAMES)}")
        for name, nodes in (("train_nodes", self.train_nodes), ("test_nodes", self.test_nodes)):
            if nodes is not None and not 2 <= nodes[0] <= nodes[1] <= self.max_nodes:
                raise ValueError(
                    f"{name} {nodes} must go from 2 or more to max_nodes {self.max_nodes} or fewer"
                )

    @property
    def balanced(self) -> bool:
        """Half of the targets can be reached."""
        return True

    @property
    def sequence_length(self) -> int:
        """Nodes of a row."""
        return self.max_nodes

    def nodes(self, split: Split, hops: int, *, hardest: int, label: int) -> tuple[int, int]:
        """Fewest and most nodes of a graph; `hardest` is the longest path of the mixture.

        Training negatives do not know about paths: they may have as few nodes as `train_nodes`.
        """
        if split == "train":
            limit = "train_nodes"
            low, high = self.train_nodes
        elif self.test_nodes is not None:
            limit = "test_nodes"
            low, high = self.test_nodes
        else:
            limit = "max_nodes"
            low, high = 10, min(max(hops + 6, 16), self.max_nodes)
        longest = max(hops, hardest)
        if longest >= high:
            raise ValueError(
                f"a path of {longest} hops needs {longest + 1} nodes, {limit} goes to {high}; "
                f"ask for at most {high - 1} hops or allow more nodes"
            )
        if split == "validation" or label == 1 or self.variant == "matched":
            low = max(low, longest + 2)
        return min(low, high), high

    def draw(
        self,
        random: np.random.Generator,
        difficulty: int,
        *,
        label: int | None,
        split: Split,
        hardest: int,
    ) -> Graph:
        """One question; a negative has the difficulty of the positives beside it."""
        assert label is not None, "the task is balanced"
        nodes = self.nodes(split, difficulty, hardest=hardest, label=label)
        return draw(random, difficulty, label=label, nodes=nodes, variant=self.variant)

    def content(self, example: Graph) -> bytes:
        """Nodes, edges and endpoints as bytes."""
        size = len(example.parents)
        return struct.pack(f"<3B{size}I", size, example.source, example.target, *example.parents)

    def to_text(self, example: Graph) -> str:
        """The edges and the endpoints."""
        return to_text(example)

    def batch(self, examples: Sequence[Graph]) -> Graphs:
        """Stacks questions."""
        return encode(examples, max_nodes=self.max_nodes)
