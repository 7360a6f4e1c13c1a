"""The parity of bits, as bytes of text: `01101001=0`. Hard without a thought, easy with one.

A thought is the running parities, `01001110` for these bits; the last of them is the answer.
"""

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxlib_methods.method import Batch, TieredBatch
from jaxlib_methods.tasks.questions import ATTEMPTS, SPLITS, Split, split_of

VERSION = 1  # of the drawing: another number where the same index gives another question

MAX_TRAILING = 8  # filler tokens behind a useful thought
ANSWER_TIER = 1  # all answers are alike hard


def _parity(bits: str) -> int:
    if not bits or bits.strip("01"):
        raise ValueError(f"{bits!r} are no bits; a question is one 0 or 1 at least, and no more")
    return bits.count("1") % 2


def question(index: int, *, split: Split, bits: int = 8, seed: int = 0) -> str:
    """The bits at an index: a pure function of its arguments.

    What a string says decides its split, so that none is in both; one in eight is for validation.

    >>> question(0, split="train") == question(0, split="train")
    True
    """
    random = np.random.default_rng([seed, SPLITS.index(split), index])
    for _ in range(ATTEMPTS):
        number = int.from_bytes(random.bytes(-(-bits // 8))) % 2**bits
        text = f"{number:0{bits}b}"
        if split_of(text.encode()) == split:
            return text
    raise ValueError(
        f"no question of {bits} bits belongs to the {split} split in {ATTEMPTS} draws; ask for more"
    )


def answer(bits: str) -> int:
    """1 where an odd number of the bits is 1, else 0.

    >>> answer("0111")
    1
    """
    return _parity(bits)


def thought(bits: str) -> str:
    """The oracle: the parity of the first bit, of the first two, and so on.

    >>> thought("0111")
    '0101'
    """
    return "".join(str(_parity(bits[: end + 1])) for end in range(len(bits)))


def verify(question: str, answer: str) -> bool:
    """Whether a text is exactly the answer to the bits of a question.

    >>> verify("0111", "1"), verify("0111", "1 ")
    (True, False)
    """
    return answer == str(_parity(question))


def _rows(texts: Sequence[Sequence[int]], length: int) -> Batch:
    """Texts of at most `length + 1` token ids as inputs and targets, 0 behind each."""
    sizes = np.array([len(text) for text in texts], np.int64)[:, None]
    tokens = np.zeros((len(texts), length + 1), np.int32)
    for row, text in zip(tokens, texts, strict=True):
        row[: len(text)] = text
    place = np.arange(length)
    where = place + 1 < sizes
    fields: dict[str, Any] = {
        "inputs": np.where(where, tokens[:, :-1], 0),
        "targets": tokens[:, 1:],
        "positions": np.where(where, place, 0).astype(np.int32),
        "segments": where.astype(np.int32),
        "where": where,
    }
    return Batch(**fields)


class _Indexed:
    """What both datasets share: an endless training split and a finite one for validation."""

    bytes_per_token: float | None = None

    def __init__(self, split: Split, bits: int, num_examples: int, seed: int) -> None:
        if bits < 1 or num_examples < 1:
            raise ValueError(f"bits {bits} and num_examples {num_examples} must be at least 1")
        self._split: Split = split
        self._bits, self._seed = bits, seed
        self.num_examples = num_examples if split == "validation" else 2**31
        question(0, split=split, bits=bits, seed=seed)  # refuses now what no index could give

    def _fingerprint(self, *parts: object) -> str:
        parts += (VERSION, self._split, self._bits, self._seed, self.num_examples)
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]

    def _texts(self, indices: Sequence[int] | np.ndarray) -> list[list[int]]:
        """Token ids of the rows; none behind the end of the validation split."""
        exists = [self._split == "train" or index < self.num_examples for index in indices]
        return [
            self._text(int(index)) if there else []
            for index, there in zip(indices, exists, strict=True)
        ]

    def _question(self, index: int) -> str:
        return question(index, split=self._split, bits=self._bits, seed=self._seed)

    def _text(self, index: int) -> list[int]:
        raise NotImplementedError


class ParityDataset(_Indexed):
    """Questions with their answers, as a `jaxlib_methods.method.Dataset`.

    A row reads `bits=` and its targets are one byte further, the answer at the end: the only
    target of a tier, 1. Token ids are byte values. L is bits + 1.
    """

    def __init__(
        self, split: Split, bits: int = 8, *, num_examples: int = 512, seed: int = 0
    ) -> None:
        """num_examples: of the validation split; training is endless."""
        super().__init__(split, bits, num_examples, seed)
        self.sequence_length = bits + 1
        self.fingerprint = self._fingerprint("parity")

    def rows(self, indices: Sequence[int] | np.ndarray) -> TieredBatch:
        """The questions at `indices`, `[len(indices), L]`; padding behind the validation's end."""
        batch = _rows(self._texts(indices), self.sequence_length)
        tier: Any = np.full(batch.where.shape, -1, np.int8)
        tier[batch.where[:, -1], -1] = ANSWER_TIER
        return TieredBatch(*batch, tier=tier)

    def _text(self, index: int) -> list[int]:
        bits = self._question(index)
        return list(f"{bits}={answer(bits)}".encode())


class WarmUpDataset(_Indexed):
    """Thoughts to imitate, half of them useful, before any are rewarded.

    A row reads `bits=`, think, a thought, close, the answer, which is always right, and padding.
    Rows of even index think the running parities and 0 to 8 filler tokens, as many as fit; the
    others think 0 to max_thought filler tokens. `where` is True on the thought, close and the
    answer, and on nothing else. L is bits + max_thought + 3.
    """

    def __init__(
        self,
        split: Split,
        bits: int = 8,
        *,
        think: int,
        close: int,
        filler: int,
        max_thought: int,
        num_examples: int = 512,
        seed: int = 0,
    ) -> None:
        """think, close, filler: token ids. num_examples: of the validation split."""
        if max_thought < bits:
            raise ValueError(
                f"max_thought {max_thought} does not hold the {bits} parities of {bits} bits; "
                f"raise it to {bits}"
            )
        super().__init__(split, bits, num_examples, seed)
        self._think, self._close, self._filler = think, close, filler
        self._max_thought = max_thought
        self.sequence_length = bits + max_thought + 3
        self.fingerprint = self._fingerprint("warm-up", think, close, filler, max_thought)

    def rows(self, indices: Sequence[int] | np.ndarray) -> Batch:
        """The rows at `indices`, `[len(indices), L]`; padding behind the validation's end."""
        batch = _rows(self._texts(indices), self.sequence_length)
        # The last input of the prompt is the think token, behind the bits and the equals sign.
        response = np.arange(self.sequence_length) > self._bits
        return batch._replace(where=batch.where & response)

    def _text(self, index: int) -> list[int]:
        bits = self._question(index)
        random = np.random.default_rng([self._seed, SPLITS.index(self._split), index, 1])
        if index % 2:
            useful, most = b"", self._max_thought
        else:
            useful = thought(bits).encode()
            most = min(MAX_TRAILING, self._max_thought - len(useful))
        fillers = [self._filler] * int(random.integers(0, most + 1))
        prompt = [*f"{bits}=".encode(), self._think]
        return [*prompt, *useful, *fillers, self._close, *str(answer(bits)).encode()]
