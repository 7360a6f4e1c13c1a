"""Nested boolean expressions: is it true?  `(T&!(F|T))` has depth 2."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from jaxlib_methods.tasks.questions import (
    ATTEMPTS,
    Draws,
    Sentence,
    Sentences,
    Split,
    batch_sentences,
)

VOCABULARY = ("[PAD]", "[CLS]", "T", "F", "&", "|", "!", "(", ")")
_IDS = bytes.maketrans("".join(VOCABULARY[2:]).encode(), bytes(range(2, len(VOCABULARY))))

_LITERALS = ("T", "F")
_OPERATORS = ("&", "|")


def encode(text: str) -> bytes:
    """Token ids of an expression, `[CLS]` first, one byte each."""
    return b"\1" + text.encode().translate(_IDS)


def to_text(example: Sentence) -> str:
    """The expression."""
    return example.text


def draw(
    random: np.random.Generator, depth: int, *, label: int | None = None, max_length: int = 128
) -> Sentence:
    """One expression of `depth` nested parentheses.

    label: 1 or 0 draws until the expression has that value; None takes the one that comes, and
    these are not balanced. max_length: tokens with `[CLS]`; longer expressions are drawn again.
    """
    if depth < 0:
        raise ValueError(f"depth {depth} must be at least 0")
    shortest = 4 * depth + 2
    if shortest <= max_length:
        draws = Draws(random)
        for _ in range(ATTEMPTS):
            text = _expression(draws, depth)
            if len(text) < max_length:
                value = _value(text)
                if label is None or value == label:
                    return Sentence(text, value, depth)
    raise ValueError(
        f"expressions of depth {depth} do not fit in {max_length} tokens: the shortest has "
        f"{shortest}, and {ATTEMPTS} draws must give one; raise max_length or lower the depth"
    )


def _expression(draws: Draws, depth: int) -> str:
    if depth == 0:
        return _atom(draws)
    operator = _OPERATORS[draws.uniform() < 0.5]
    # The sibling has depth j with weight 2^(depth - 1 - j), for j = 0 to depth - 1.
    left = draws.below(2**depth - 1) + 1
    children = (_expression(draws, depth - 1), _expression(draws, depth - left.bit_length()))
    first = draws.uniform() < 0.5
    negation = "!" if draws.uniform() < 0.25 else ""
    return f"{negation}({children[first]}{operator}{children[not first]})"


def _atom(draws: Draws) -> str:
    kind = draws.uniform()
    literal = _LITERALS[draws.uniform() < 0.5]
    if kind < 0.5:
        return literal
    if kind < 0.75:
        return "!" + literal
    return literal + _OPERATORS[draws.uniform() < 0.5] + _LITERALS[draws.uniform() < 0.5]


def _value(text: str) -> int:
    """Value in one pass: each level is a disjunction so far and the conjunction being read."""
    levels = []
    either, both, negated = 0, 1, 0
    for character in text:
        if character == "T":
            both &= 1 ^ negated
            negated = 0
        elif character == "F":
            both &= negated
            negated = 0
        elif character == "!":
            negated ^= 1
        elif character == "|":
            either, both = either | both, 1
        elif character == "(":
            levels.append((either, both, negated))
            either, both, negated = 0, 1, 0
        elif character == ")":
            inside = either | both
            either, both, negated = levels.pop()
            both &= inside ^ negated
            negated = 0
    return either | both


def answer(example: Sentence | str) -> int:
    """1 where the expression is true, else 0: read by the grammar, `!` before `&` before `|`.

    disjunction = conjunction {"|" conjunction}        conjunction = term {"&" term}
    term = "!" term | "(" disjunction ")" | "T" | "F"

    A text that is no expression is a ValueError.
    """
    text = example if isinstance(example, str) else example.text
    value, end = _disjunction(text, 0)
    if end != len(text):
        raise ValueError(f"{text!r} is no expression: {text[end:]!r} is left over")
    return int(value)


def _disjunction(text: str, begin: int) -> tuple[bool, int]:
    value, end = _conjunction(text, begin)
    while text[end : end + 1] == "|":
        other, end = _conjunction(text, end + 1)
        value = value or other
    return value, end


def _conjunction(text: str, begin: int) -> tuple[bool, int]:
    value, end = _term(text, begin)
    while text[end : end + 1] == "&":
        other, end = _term(text, end + 1)
        value = value and other
    return value, end


def _term(text: str, begin: int) -> tuple[bool, int]:
    first = text[begin : begin + 1]
    if first == "!":
        value, end = _term(text, begin + 1)
        return not value, end
    if first == "(":
        value, end = _disjunction(text, begin + 1)
        if text[end : end + 1] == ")":
            return value, end + 1
    elif first in ("T", "F"):
        return first == "T", begin + 1
    raise ValueError(f"{text!r} is no expression: nothing to read at character {begin}")


def nesting(text: str) -> int:
    """The largest number of parentheses open at once."""
    depth = deepest = 0
    for character in text:
        depth += (character == "(") - (character == ")")
        deepest = max(deepest, depth)
    return deepest


@dataclasses.dataclass(frozen=True, kw_only=True)
class BooleanLogic:
    """The task; difficulty is the depth. balanced: as many true as false expressions."""

    max_length: int = 128
    balanced: bool = False

    @property
    def sequence_length(self) -> int:
        """Tokens of a row."""
        return self.max_length

    def draw(
        self,
        random: np.random.Generator,
        difficulty: int,
        *,
        label: int | None,
        split: Split,
        hardest: int,
    ) -> Sentence:
        """One expression; both splits and all mixtures draw alike."""
        del split, hardest
        return draw(random, difficulty, label=label, max_length=self.max_length)

    def content(self, example: Sentence) -> bytes:
        """The expression as bytes."""
        return example.text.encode()

    def to_text(self, example: Sentence) -> str:
        """The expression."""
        return to_text(example)

    def batch(self, examples: Sequence[Sentence]) -> Sentences:
        """Stacks expressions."""
        return batch_sentences(examples, encode, self.max_length)
