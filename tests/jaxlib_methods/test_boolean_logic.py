"""Nested boolean expressions: the grammar, their values, and how often what is drawn."""

import collections

import numpy as np
import pytest

from jaxlib_methods.tasks import boolean_logic
from jaxlib_methods.tasks.boolean_logic import answer, draw, nesting

PYTHON = {"T": " True ", "F": " False ", "&": " and ", "|": " or ", "!": " not "}


def drawn(depth: int, count: int, **fields) -> list[str]:
    random = np.random.default_rng(depth)
    return [draw(random, depth, **fields).text for _ in range(count)]


def pieces(text: str) -> list[str]:
    """What the operators outside of all inner parentheses connect."""
    inside, found, depth = text.removeprefix("!")[1:-1], [""], 0
    for character in inside:
        depth += (character == "(") - (character == ")")
        if depth == 0 and character in "&|":
            found.append("")
        else:
            found[-1] += character
    return found


@pytest.mark.parametrize(
    ("text", "value", "depth"),
    [
        ("T", 1, 0),
        ("!T", 0, 0),
        ("!!T", 1, 0),
        ("!F&F", 0, 0),  # (!F)&F, not !(F&F)
        ("T|T&F", 1, 0),  # T|(T&F), not (T|T)&F
        ("F&F|T", 1, 0),
        ("!T|T", 1, 0),
        ("(T|T)&F", 0, 1),
        ("!(T&!(F|T))", 1, 2),
        ("((F|T)&!(!F&T|F))", 0, 2),
    ],
)
def test_values_by_hand(text: str, value: int, depth: int) -> None:
    assert answer(text) == value
    assert nesting(text) == depth


@pytest.mark.parametrize("depth", range(15))
def test_values_agree_with_python_and_depth_is_exact(depth) -> None:
    random = np.random.default_rng(depth)
    for _ in range(40):
        example = draw(random, depth)
        python = "".join(PYTHON.get(character, character) for character in example.text)
        assert example.label == answer(example) == int(eval(python.strip()))
        assert nesting(example.text) == example.difficulty == depth
        assert len(boolean_logic.encode(example.text)) <= 128


@pytest.mark.parametrize("text", ["", "T&", "(T", "(TF", "T)", "()", "TF", "!", "T&x"])
def test_what_is_no_expression_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is no expression"):
        answer(text)


def test_tokens_by_hand() -> None:
    assert list(boolean_logic.encode("!(T&F|F)")) == [1, 6, 7, 2, 4, 3, 5, 3, 8]
    rows = boolean_logic.BooleanLogic(max_length=5).batch([draw(np.random.default_rng(0), 0)])
    assert rows.tokens.shape == (1, 5)
    assert rows.tokens.dtype == np.int32
    assert rows.tokens[0, 0] == 1
    assert boolean_logic.VOCABULARY[:2] == ("[PAD]", "[CLS]")


def test_atoms_are_as_frequent_as_in_the_paper() -> None:
    count = 4000
    shares = collections.Counter(drawn(0, count))
    assert len(shares) == 12
    for text, share in shares.items():
        expected = {1: 0.25, 2: 0.125, 3: 0.25 / 8}[len(text)]
        assert share / count == pytest.approx(expected, abs=4 * (expected / count) ** 0.5)


def test_siblings_are_as_deep_as_in_the_paper() -> None:
    count = 2000
    texts = drawn(3, count)
    assert sum(text[0] == "!" for text in texts) / count == pytest.approx(0.25, abs=0.04)
    depths = [sorted(map(nesting, pieces(text)), reverse=True)[:2] for text in texts]
    assert all(deep == 2 for deep, _ in depths)
    siblings = collections.Counter(sibling for _, sibling in depths)
    for depth, expected in {0: 4 / 7, 1: 2 / 7, 2: 1 / 7}.items():
        assert siblings[depth] / count == pytest.approx(expected, abs=0.045)
    deep_first = [nesting(pieces(text)[0]) == 2 for text in texts]
    assert np.mean(deep_first) == pytest.approx(1 / 2 + 1 / 14, abs=0.045)


def test_labels_are_drawn_or_asked_for() -> None:
    random = np.random.default_rng(0)
    for label in (0, 1) * 20:
        assert answer(draw(random, 4, label=label)) == label
    assert {draw(random, 4).label for _ in range(40)} == {0, 1}


def test_what_does_not_fit_is_drawn_again_or_refused() -> None:
    lengths = [len(text) + 1 for text in drawn(4, 100, max_length=24)]
    assert max(lengths) == 24
    assert min(lengths) >= 4 * 4 + 2
    assert drawn(3, 1, max_length=16)
    with pytest.raises(
        ValueError, match=r"depth 40 do not fit in 128 tokens: the shortest has 162"
    ):
        draw(np.random.default_rng(0), 40)
    with pytest.raises(ValueError, match=r"depth 10 do not fit in 42 tokens"):
        draw(np.random.default_rng(0), 10, max_length=42)
    with pytest.raises(ValueError, match="depth -1"):
        draw(np.random.default_rng(0), -1)
