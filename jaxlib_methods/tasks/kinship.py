"""Kinship over a chain of facts: is somebody that many generations above somebody else?

    Ada is the parent of Bela . Dan is the parent of Cleo . Bela is the parent of Cleo .
    query : Ada is the grandparent of Cleo

Only generations count: whoever has a child in common is a `sibling`, as is a cousin.
"""

import collections
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

NAMES = (
    *("Ada", "Bela", "Cleo", "Dan", "Emil", "Fay", "Gus", "Hanna", "Ivo", "Jana"),
    *("Kurt", "Lena", "Max", "Nora", "Otto", "Pia", "Ruth", "Sven", "Tara", "Uma"),
)
MAX_OFFSET = 12  # generations that have a word


def relation(offset: int) -> str:
    """The word for somebody `offset` generations above (below where negative)."""
    if offset == 0:
        return "sibling"
    word = "parent" if offset > 0 else "child"
    return "great-" * (abs(offset) - 2) + ("grand" if abs(offset) > 1 else "") + word


OFFSETS = {relation(offset): offset for offset in range(-MAX_OFFSET, MAX_OFFSET + 1)}
VOCABULARY = (
    *("[PAD]", "[CLS]", "[SEP]", "query", ":", "is", "the", "of", "."),
    *NAMES,
    *OFFSETS,
)
_IDS = {word: number for number, word in enumerate(VOCABULARY)}


def encode(text: str) -> bytes:
    """Token ids of a question, `[CLS]` first and `[SEP]` last, one byte each."""
    return b"\1" + bytes(map(_IDS.__getitem__, text.split())) + b"\2"


def to_text(example: Sentence) -> str:
    """The facts and the query."""
    return example.text


def draw(
    random: np.random.Generator, length: int, *, label: int, max_length: int = 128
) -> Sentence:
    """One chain of `length` facts among two to four that do not matter, and a query about its ends.

    Going along the chain, generations first fall and then rise, so that all offsets of the
    length's parity are possible, and where label is 0 the query is off by 2 or 4.
    max_length: tokens with `[CLS]` and `[SEP]`; longer questions are drawn again.
    """
    if not 1 <= length <= MAX_OFFSET:
        raise ValueError(f"a chain of {length} facts is not possible; take 1 to {MAX_OFFSET}")
    draws = Draws(random)
    for _ in range(ATTEMPTS):
        text = _story(draws, length, label)
        if text.count(" ") + 3 <= max_length:
            return Sentence(text, label, length)
    raise ValueError(
        f"in {ATTEMPTS} draws no chain of {length} facts fits in {max_length} tokens; "
        "raise max_length or ask for shorter chains"
    )


def _story(draws: Draws, length: int, label: int) -> str:
    people = draws.sample(NAMES)
    chain, others = people[: length + 1], people[length + 1 :]
    num_parents = draws.below(length + 1)
    facts = [
        _fact(chain[i], "parent" if i < num_parents else "child", chain[i + 1])
        for i in range(length)
    ]
    facts += _distractors(draws, others)
    offset = num_parents - (length - num_parents)
    if label == 0:
        wrong = (offset + step for step in (2, -2, 4, -4))
        offset = draws.pick([offset for offset in wrong if abs(offset) <= MAX_OFFSET])
    told = " ".join(draws.sample(facts))
    return f"{told} query : {chain[0]} is the {relation(offset)} of {chain[-1]}"


def _distractors(draws: Draws, names: Sequence[str]) -> list[str]:
    """Two to four facts, fewer where two of them would be about the same pair."""
    facts = {}
    for _ in range(draws.between(2, 4)):
        first, second = draws.sample(names, 2)
        kind = draws.pick(("parent", "child", "sibling"))
        facts.setdefault(frozenset((first, second)), _fact(first, kind, second))
    return list(facts.values())


def _fact(first: str, kind: str, second: str) -> str:
    return f"{first} is the {kind} of {second} ."


def answer(example: Sentence | str) -> int:
    """1 where the query follows from the facts, 0 where its contrary does.

    Facts that leave it open or contradict each other are a ValueError.
    """
    text = example if isinstance(example, str) else example.text
    told, asked = text.split(" query : ")
    known = collections.defaultdict(list)
    for fact in told.removesuffix(" .").split(" . "):
        first, offset, second = _read(fact)
        known[first].append((second, -offset))  # the second is that many generations above
        known[second].append((first, offset))
    first, offset, second = _read(asked)
    heights = {second: 0}
    waiting = collections.deque([second])
    while waiting:
        name = waiting.popleft()
        for other, step in known[name]:
            if other not in heights:
                heights[other] = heights[name] + step
                waiting.append(other)
            elif heights[other] != heights[name] + step:
                raise ValueError(f"the facts about {name} and {other} contradict each other")
    if first not in heights:
        raise ValueError(f"the facts do not connect {first} and {second}")
    return int(heights[first] == offset)


def _read(fact: str) -> tuple[str, int, str]:
    """`Ada is the child of Dan` -> Ada, -1, Dan."""
    words = fact.split()
    if len(words) != 6 or words[1:3] != ["is", "the"] or words[4] != "of":
        raise ValueError(f"{fact!r} is not of the form 'Ada is the child of Dan'")
    return words[0], OFFSETS[words[3]], words[5]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kinship:
    """The task; difficulty is the number of facts in the chain."""

    max_length: int = 128

    @property
    def balanced(self) -> bool:
        """Half of the queries are right."""
        return True

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
        """One question; both splits and all mixtures draw alike."""
        del split, hardest
        assert label is not None, "the task is balanced"
        return draw(random, difficulty, label=label, max_length=self.max_length)

    def content(self, example: Sentence) -> bytes:
        """The question as bytes."""
        return example.text.encode()

    def to_text(self, example: Sentence) -> str:
        """The facts and the query."""
        return to_text(example)

    def batch(self, examples: Sequence[Sentence]) -> Sentences:
        """Stacks questions."""
        return batch_sentences(examples, encode, self.max_length)
