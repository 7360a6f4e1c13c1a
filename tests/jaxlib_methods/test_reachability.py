"""Directed graphs: what is drawn, what can be reached, and what degrees tell about it."""

import numpy as np
import pytest

from jaxlib_methods.tasks import reachability
from jaxlib_methods.tasks.reachability import Reachability, answer, distance, draw, from_text

PAPER = Reachability()


def seeded(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def hops_by_matrices(graph: reachability.Graph) -> int | None:
    """The first power of the adjacency matrix in which the target's row holds the source."""
    rows = reachability.encode([graph], max_nodes=26)
    step, (source, target) = rows.edges[0].astype(int), rows.endpoints[0]
    within = np.eye(26, dtype=int)
    for hops in range(26):
        if within[target, source]:
            return hops
        within = np.minimum(within @ step, 1)
    return None


def degrees(graph: reachability.Graph) -> tuple[list[int], list[int]]:
    """Edges into and out of each node."""
    edges = reachability.edges_of(graph)
    into, out = [0] * len(graph.parents), [0] * len(graph.parents)
    for u, v in edges:
        out[u] += 1
        into[v] += 1
    return into, out


@pytest.mark.parametrize(
    ("text", "hops"),
    [
        ("2 nodes: A>B; A to B?", 1),
        ("2 nodes: B>A; A to B?", None),  # against the edge
        ("5 nodes: A>B B>D C>A; C to D?", 3),
        ("4 nodes: A>B A>C B>C C>D; A to D?", 2),  # not along A, B, C, D
        ("4 nodes: A>B B>A C>D; A to D?", None),
        ("4 nodes: A>B B>C C>A C>D; B to D?", 2),  # past a cycle
        ("3 nodes: ; A to C?", None),
    ],
)
def test_answers_by_hand(text: str, hops: int | None) -> None:
    graph = from_text(text)
    assert distance(graph) == hops_by_matrices(graph) == hops
    assert answer(graph) == graph.label == int(hops is not None)
    assert reachability.to_text(graph) == text


def test_rows_by_hand() -> None:
    graph = from_text("3 nodes: A>B C>B; C to A?")
    rows = reachability.encode([graph], max_nodes=4)
    assert rows.tokens.tolist() == [[1, 2, 3, 0]]
    assert rows.edges[0].astype(int).tolist() == [
        [1, 0, 0, 0],
        [1, 1, 1, 0],  # B attends to A and C, from which there are edges
        [0, 0, 1, 0],
        [0, 0, 0, 1],
    ]
    assert rows.endpoints.tolist() == [[2, 0]]
    assert (rows.label[0], rows.where[0]) == (0, True)
    assert rows.edges.dtype == bool
    assert rows.tokens.dtype == rows.endpoints.dtype == rows.label.dtype == np.int32


@pytest.mark.parametrize("variant", ["paper", "matched"])
@pytest.mark.parametrize("hops", [1, 2, 3, 5, 8, 12])
def test_paths_are_as_long_as_asked_for_or_absent(variant, hops) -> None:
    task = Reachability(variant=variant)
    random = seeded(hops)
    for label in (0, 1) * 12:
        graph = task.draw(random, hops, label=label, split="validation", hardest=hops)
        expected = hops if label else None
        assert distance(graph) == hops_by_matrices(graph) == expected
        assert graph.source != graph.target
        assert (graph.label, graph.difficulty) == (label, hops)
        assert max(hops + 2, 10) <= len(graph.parents) <= max(hops + 6, 16)
        assert not any(u == v for u, v in reachability.edges_of(graph))


def test_numbers_of_nodes_are_those_of_the_paper() -> None:
    for hops, nodes in {1: (10, 16), 8: (10, 16), 10: (12, 16), 12: (14, 18), 18: (20, 20)}.items():
        for label in (0, 1):
            assert PAPER.nodes("validation", hops, hardest=hops, label=label) == nodes
    assert PAPER.nodes("train", 1, hardest=5, label=1) == (8, 16)
    assert PAPER.nodes("train", 1, hardest=8, label=1) == (10, 16)
    assert PAPER.nodes("train", 1, hardest=8, label=0) == (8, 16)
    matched = Reachability(variant="matched")
    assert matched.nodes("train", 1, hardest=8, label=0) == (10, 16)
    random = seeded(0)
    drawn = [draw(random, 2, label=i % 2, nodes=(8, 12)) for i in range(120)]
    for label in (0, 1):
        assert {len(graph.parents) for graph in drawn if graph.label == label} == {*range(8, 13)}


def test_numbers_of_edges_are_those_of_the_paper() -> None:
    random = seeded(0)
    positive = [draw(random, 3, label=1, nodes=(10, 10)) for _ in range(200)]
    negative = [draw(random, 3, label=0, nodes=(10, 10)) for _ in range(200)]
    few, many = (sum(map(lambda g: sum(degrees(g)[0]), x)) / 200 for x in (negative, positive))
    # 5 to 20 of the 90 possible edges, those drawn twice counted once: about 11.6.
    assert few == pytest.approx(11.6, abs=0.7)
    assert few + 1 < many < few + 3  # the path's three, less what would have been shorter
    assert min(sum(degrees(graph)[0]) for graph in positive) >= 3
    assert max(sum(degrees(graph)[0]) for graph in negative) <= 20


def test_edges_are_between_any_two_nodes() -> None:
    random, counts = seeded(0), np.zeros((5, 5), int)
    for _ in range(600):
        for edge in reachability.edges_of(draw(random, 1, label=0, nodes=(5, 5))):
            counts[edge] += 1
    between = counts[~np.eye(5, dtype=bool)]
    assert between.min() > 0.7 * between.mean()
    assert between.max() < 1.3 * between.mean()
    assert not counts.diagonal().any()


def test_the_source_of_a_negative_is_anybody() -> None:
    """Only targets are rare: the first of a random order has nearly always one out of reach."""
    random = seeded(1)
    graphs = [draw(random, 3, label=0, nodes=(12, 12)) for _ in range(400)]
    into_target = np.mean([degrees(graph)[0][graph.target] for graph in graphs])
    out_of_source = np.mean([degrees(graph)[1][graph.source] for graph in graphs])
    average = np.mean([np.mean(degrees(graph)[0]) for graph in graphs])
    assert into_target < 0.75 * average
    assert 0.85 * average < out_of_source < 1.15 * average


def test_small_graphs_without_a_free_pair_are_drawn_in_halves() -> None:
    random = seeded(0)
    graphs = [draw(random, 1, label=0, nodes=(2, 4)) for _ in range(300)]
    assert not any(answer(graph) for graph in graphs)
    assert {len(graph.parents) for graph in graphs} == {2, 3, 4}


@pytest.mark.parametrize("hops", [1, 3, 6])
def test_matched_pairs_differ_in_edges_but_not_in_degrees(hops) -> None:
    for seed in range(20):
        yes, no = (
            draw(seeded(seed), hops, label=label, nodes=(8, 16), variant="matched")
            for label in (1, 0)
        )
        assert degrees(yes) == degrees(no)
        assert (yes.source, yes.target) == (no.source, no.target)
        assert yes.parents != no.parents
        assert (answer(yes), answer(no)) == (1, 0)


def test_degrees_tell_the_label_unless_matched() -> None:
    """Guesses yes where an edge leaves the source and one enters the target."""
    shares = {}
    for variant in ("paper", "matched"):
        random, clues, labels = seeded(3), [], []
        for i in range(1000):
            graph = draw(random, 1 + i // 2 % 5, label=i % 2, nodes=(8, 16), variant=variant)
            into, out = degrees(graph)
            clues.append(min(into[graph.target], out[graph.source]) > 0)
            labels.append(graph.label)
        shares[variant] = np.mean(np.array(clues) == labels)
    assert shares["paper"] > 0.75
    assert abs(shares["matched"] - 0.5) < 0.05


def test_the_small_configuration_has_no_new_names_in_its_test() -> None:
    task = Reachability(max_nodes=12, train_nodes=(8, 12), test_nodes=(8, 12))
    random = seeded(0)
    train = [task.draw(random, 3, label=1, split="train", hardest=3) for _ in range(50)]
    test = [task.draw(random, 5, label=1, split="validation", hardest=5) for _ in range(50)]
    rows = [task.batch(graphs) for graphs in (train, test)]
    assert rows[0].tokens.shape == (50, 12)
    names = [set(part.tokens.ravel().tolist()) for part in rows]
    assert names[1] <= names[0] == set(range(13))
    assert {len(graph.parents) for graph in test} == {*range(8, 13)}


def test_what_does_not_fit_is_refused_in_one_sentence() -> None:
    small = Reachability(max_nodes=10, train_nodes=(8, 10))
    with pytest.raises(ValueError, match=r"12 hops needs 13 nodes, max_nodes goes to 10; ask.* 9"):
        small.nodes("validation", 12, hardest=12, label=0)
    with pytest.raises(ValueError, match=r"16 hops needs 17 nodes, train_nodes goes to 16"):
        PAPER.nodes("train", 1, hardest=16, label=1)
    assert small.nodes("validation", 9, hardest=9, label=1) == (10, 10)
    with pytest.raises(ValueError, match=r"train_nodes \(8, 16\) .* max_nodes 12"):
        Reachability(max_nodes=12)
    with pytest.raises(ValueError, match="max_nodes 27 must be 2 to 26"):
        Reachability(max_nodes=27)
    with pytest.raises(ValueError, match=r"8 hops needs 9 nodes.* take 1 to 7"):
        draw(seeded(0), 8, label=1)
    with pytest.raises(ValueError, match=r"path of 0 hops"):
        draw(seeded(0), 0, label=1)
    with pytest.raises(ValueError, match="no graph of 3 to 3 nodes"):
        draw(seeded(0), 2, label=0, nodes=(3, 3), variant="matched")
