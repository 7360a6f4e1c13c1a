"""Kinship: what follows from the facts, and what is drawn."""

import collections

import numpy as np
import pytest

from jaxlib_methods.tasks import kinship
from jaxlib_methods.tasks.kinship import NAMES, OFFSETS, answer, draw, relation


def drawn(length: int, label: int, count: int = 30) -> list[str]:
    random = np.random.default_rng([length, label])
    return [draw(random, length, label=label).text for _ in range(count)]


def parts(text: str) -> tuple[list[list[str]], list[str]]:
    """Facts as [first, kind, second], and the words of the query."""
    told, asked = text.split(" . query : ")
    facts = [fact.split() for fact in told.split(" . ")]
    return [[words[0], words[3], words[5]] for words in facts], asked.split()


def offset_by_union(text: str) -> int:
    """Generations of the query's first person above its second, by a weighted union-find."""
    facts, asked = parts(text)
    root, above = {name: name for name in NAMES}, dict.fromkeys(NAMES, 0)  # above the root
    for first, kind, second in facts:
        step = {"parent": 1, "child": -1, "sibling": 0}[kind]
        old, new = root[first], root[second]
        move = above[second] + step - above[first]
        if old != new:
            for name in NAMES:
                if root[name] == old:
                    root[name], above[name] = new, above[name] + move
    assert root[asked[0]] == root[asked[5]]
    return above[asked[0]] - above[asked[5]]


@pytest.mark.parametrize(
    ("facts", "query", "value"),
    [
        ("Ada is the parent of Bela .", "Ada is the parent of Bela", 1),
        ("Ada is the parent of Bela .", "Bela is the parent of Ada", 0),
        ("Ada is the parent of Bela .", "Bela is the child of Ada", 1),
        (
            "Dan is the parent of Gus . Gus is the parent of Fay .",
            "Dan is the grandparent of Fay",
            1,
        ),
        ("Dan is the parent of Gus . Gus is the parent of Fay .", "Dan is the parent of Fay", 0),
        ("Gus is the child of Fay . Dan is the parent of Gus .", "Dan is the sibling of Fay", 1),
        (
            "Gus is the child of Fay . Uma is the sibling of Max . Fay is the child of Ivo . "
            "Ivo is the child of Pia .",
            "Gus is the great-grandchild of Pia",
            1,
        ),
    ],
)
def test_answers_by_hand(facts: str, query: str, value: int) -> None:
    assert answer(f"{facts} query : {query}") == value


def test_facts_that_do_not_answer_are_refused() -> None:
    with pytest.raises(ValueError, match="do not connect Ada and Max"):
        answer("Ada is the child of Dan . query : Ada is the child of Max")
    with pytest.raises(ValueError, match="contradict"):
        answer(
            "Ada is the child of Dan . Ada is the parent of Dan . query : Ada is the child of Dan"
        )
    with pytest.raises(ValueError, match="'Ada the child of Dan' is not of the form"):
        answer("Ada the child of Dan . query : Ada is the child of Dan")


def test_words_of_generations() -> None:
    assert [relation(offset) for offset in (0, 1, 2, 3, 4)] == [
        "sibling",
        "parent",
        "grandparent",
        "great-grandparent",
        "great-great-grandparent",
    ]
    assert [relation(offset) for offset in (-1, -2, -3)] == [
        "child",
        "grandchild",
        "great-grandchild",
    ]
    assert len(OFFSETS) == 25
    assert len(NAMES) == 20
    assert len(set(kinship.VOCABULARY)) == len(kinship.VOCABULARY) == 9 + 20 + 25


def test_tokens_by_hand() -> None:
    tokens = kinship.encode("Ada is the parent of Bela . query : Ada is the child of Bela")
    words = [kinship.VOCABULARY[token] for token in tokens]
    assert words[0] == "[CLS]"
    assert words[-1] == "[SEP]"
    assert " ".join(words[1:-1]) == "Ada is the parent of Bela . query : Ada is the child of Bela"
    assert list(tokens[:3]) == [1, 9, 5]


@pytest.mark.parametrize("label", [0, 1])
@pytest.mark.parametrize("length", range(1, 13))
def test_offsets_follow_from_the_facts(length, label) -> None:
    for text in drawn(length, label):
        facts, asked = parts(text)
        true, said = offset_by_union(text), OFFSETS[asked[3]]
        chain = {name for first, _, second in facts for name in (first, second)}
        assert answer(text) == label
        assert (said - true in (-4, -2, 2, 4)) if label == 0 else said == true
        assert (said - length) % 2 == 0  # parity says nothing
        assert length + 1 <= len(facts) <= length + 4
        assert length + 3 <= len(chain)
        assert len(kinship.encode(text)) <= 128


def test_chains_are_those_of_the_paper() -> None:
    texts = drawn(4, 1, count=1000)
    offsets = collections.Counter(offset_by_union(text) for text in texts)
    assert set(offsets) == {-4, -2, 0, 2, 4}
    assert min(offsets.values()) > 150  # a fifth each
    first = 0
    for text in texts[:200]:
        facts, asked = parts(text)
        named = {(a, b): kind for a, kind, b in facts}
        following = {a: b for (a, b), kind in named.items() if kind != "sibling"}
        name, kinds = asked[0], []
        while name != asked[5]:
            kinds.append(named[name, following[name]])
            name = following[name]
        assert kinds == sorted(kinds, reverse=True)  # parents first
        assert len(kinds) == 4
        first += facts[0][0] == asked[0]
    assert 10 < first < 60  # facts are shuffled: about one in seven
    wrong = [OFFSETS[parts(text)[1][3]] - offset_by_union(text) for text in drawn(4, 0, count=400)]
    assert all(70 < wrong.count(step) < 130 for step in (-4, -2, 2, 4))


def test_distractors_are_about_nobody_in_the_chain() -> None:
    kinds, counts = set(), set()
    for text in drawn(3, 1, count=200):
        facts, asked = parts(text)
        connected = {asked[0]}
        for _ in facts:
            connected |= {n for a, _, b in facts if {a, b} & connected for n in (a, b)}
        apart = [(frozenset((a, b)), kind) for a, kind, b in facts if a not in connected]
        assert len(connected) == 4
        assert len({pair for pair, _ in apart}) == len(apart) == len(facts) - 3
        kinds |= {kind for _, kind in apart}
        counts.add(len(apart))
    assert kinds == {"parent", "child", "sibling"}
    assert {2, 3, 4} <= counts <= {1, 2, 3, 4}


def test_what_does_not_fit_is_drawn_again_or_refused() -> None:
    random = np.random.default_rng(0)
    for limit, longest in {59: 59, 58: 52}.items():  # a fact is seven words
        texts = [draw(random, 5, label=1, max_length=limit).text for _ in range(50)]
        assert max(len(kinship.encode(text)) for text in texts) == longest
    with pytest.raises(ValueError, match="no chain of 5 facts fits in 40 tokens"):
        draw(random, 5, label=1, max_length=40)
    for length in (0, 13):
        with pytest.raises(
            ValueError, match=f"chain of {length} facts is not possible; take 1 to 12"
        ):
            draw(random, length, label=1)
