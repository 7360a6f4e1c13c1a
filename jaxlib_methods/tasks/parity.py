"""The parity of bits, as bytes of text: `01101001=0`. Hard without a thought, easy with one.

A thought is the running parities, `01001110` for these bits; the last of them is the answer.
"""

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxlib_methods.method import TieredBatch
from jaxlib_methods.tasks.questions import ATTEMPTS, SPLITS, Split, split_of

VERSION = 1  # of the drawing: another number where the same index gives another question

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


class ParityDataset:
    """Questions with their answers, as a `jaxlib_methods.method.Dataset`.

    A row reads `bits=` and its targets are one byte further, the answer at the end: the only
    target of a tier, 1. Token ids are byte values. L is bits + 1.
    """

    bytes_per_token: float | None = None

    def __init__(
        self, split: Split, bits: int = 8, *, num_examples: int = 512, seed: int = 0
    ) -> None:
        """num_examples: of the validation split; training is endless."""
        if bits < 1 or num_examples < 1:
            raise ValueError(f"bits {bits} and num_examples {num_examples} must be at least 1")
        self._split: Split = split
        self._bits, self._seed = bits, seed
        self.num_examples = num_examples if split == "validation" else 2**31
        self.sequence_length = bits + 1
        parts = ("parity", VERSION, split, bits, seed, self.num_examples)
        self.fingerprint = hashlib.sha256(repr(parts).encode()).hexdigest()[:32]
        question(0, split=split, bits=bits, seed=seed)  # refuses now what no index could give

    def rows(self, indices: Sequence[int] | np.ndarray) -> TieredBatch:
        """The questions at `indices`, `[len(indices), L]`; padding behind the validation's end."""
        numbers = [int(index) for index in indices]
        exists = [self._split == "train" or number < self.num_examples for number in numbers]
        tokens = np.zeros((len(numbers), self.sequence_length + 1), np.int32)
        for row, number, there in zip(tokens, numbers, exists, strict=True):
            if there:
                bits = question(number, split=self._split, bits=self._bits, seed=self._seed)
                row[:] = list(f"{bits}={answer(bits)}".encode())
        where = np.repeat(np.array(exists, bool)[:, None], self.sequence_length, axis=1)
        tier = np.full(where.shape, -1, np.int8)
        tier[exists, -1] = ANSWER_TIER
        fields: dict[str, Any] = {
            "inputs": tokens[:, :-1],
            "targets": tokens[:, 1:],
            "positions": np.where(where, np.arange(self.sequence_length), 0).astype(np.int32),
            "segments": where.astype(np.int32),
            "where": where,
            "tier": tier,
        }
        return TieredBatch(**fields)
