"""Entropies of a model's predictions for the tokens of a corpus, measured once and kept in a file.

The file is an ArrayRecord. Its first record says in JSON what it belongs to; then comes one record
for each example of the training set and of the validation set, in the order of their numbers:
float16 `[L]`, the entropy of the prediction FOR each target in nats, NaN on padding.
"""

import hashlib
import json
import os
import secrets
from collections.abc import Iterable, Sequence
from typing import Any, Literal, NamedTuple

import grain
import numpy as np

from jaxlib_methods import curriculum
from jaxlib_methods.method import Batch, TieredBatch
from jaxlib_methods.train.data import TextDataset

VERSION = 1  # of the file
SAMPLE = 4096  # examples of which quantiles are taken


class Provenance(NamedTuple):
    """What entropies belong to.

    model: version of the weights. tokenizer, train, validation: fingerprints. top_k: the tokens
    over which predictions were renormalised; none is the whole vocabulary.
    """

    model: str
    tokenizer: str
    train: str
    validation: str
    sequence_length: int
    num_train: int
    num_validation: int
    top_k: int | None


def write(path: str, provenance: Provenance, rows: Iterable[np.ndarray]) -> None:
    """Writes a file, whole or not at all.

    rows: float `[n, L]`, the examples in order, those of the training set first.
    """
    from array_record.python.array_record_module import ArrayRecordWriter

    part = f"{path}.{secrets.token_hex(4)}.part"
    writer: Any = ArrayRecordWriter(part, "group_size:1")
    try:
        writer.write(json.dumps({"version": VERSION, **provenance._asdict()}).encode())
        for block in rows:
            for row in np.asarray(block, np.float16):
                writer.write(row.tobytes())
        writer.close()
        os.replace(part, path)
    finally:
        if os.path.exists(part):
            os.remove(part)


class Entropies:
    """An entropy file, open. provenance: what it says it belongs to."""

    def __init__(self, path: str) -> None:
        self.path = path
        if not os.path.isfile(path):
            raise FileNotFoundError(
                f"there is no entropy file {path}; make it by python -m jaxlib_methods.infer "
                "--mode=entropy --workdir=MODEL --output=FILE"
            )
        try:
            self._records: Any = grain.sources.ArrayRecordDataSource([path])
            head = json.loads(self._records[0])
            version = head.pop("version")
            self.provenance = Provenance(**head)
        except Exception as error:  # whatever the reader of a foreign file raises
            raise ValueError(f"{path} is no entropy file: {error}") from error
        if version != VERSION:
            raise ValueError(f"{path} has version {version}, this library reads {VERSION}")

    def check(self, train: TextDataset, validation: TextDataset, tokenizer: str) -> None:
        """Raises ValueError where the entropies are of another corpus, tokenizer or length."""
        found = self.provenance
        pairs = (
            ("data.tokenizer", found.tokenizer, tokenizer),
            ("data.sequence_length", found.sequence_length, train.sequence_length),
            ("the training text", found.train, train.fingerprint),
            ("the validation text", found.validation, validation.fingerprint),
        )
        for what, its, mine in pairs:
            if its != mine:
                raise ValueError(
                    f"the entropies in {self.path} belong to another corpus: {what} is {its} "
                    f"there and {mine} here; make them again by --mode=entropy"
                )

    def rows(
        self, split: Literal["train", "validation"], numbers: Sequence[int] | np.ndarray
    ) -> np.ndarray:
        """Entropies `[len(numbers), L]` of examples by number; NaN for a number below 0."""
        first = 1 if split == "train" else 1 + self.provenance.num_train
        found = np.full((len(numbers), self.provenance.sequence_length), np.nan, np.float32)
        there = [i for i, number in enumerate(numbers) if number >= 0]
        asked = [first + int(numbers[i]) for i in there]
        records = self._records.__getitems__(asked) if asked else []  # it refuses to read none
        for i, record in zip(there, records, strict=True):
            found[i] = np.frombuffer(record, np.float16)
        return found

    def sample(self) -> np.ndarray:
        """Entropies of at most `SAMPLE` training examples, evenly spread."""
        total = self.provenance.num_train
        count = min(total, SAMPLE)
        return self.rows("train", [i * total // count for i in range(count)])


class TieredText:
    """A text whose targets belong to tiers, as a `jaxlib_methods.method.Dataset`."""

    def __init__(
        self,
        text: TextDataset,
        entropies: Entropies,
        split: Literal["train", "validation"],
        thresholds: Sequence[float],
    ) -> None:
        self._text, self._entropies, self._split = text, entropies, split
        self._thresholds = tuple(thresholds)
        self.num_examples = text.num_examples
        self.sequence_length = text.sequence_length
        self.bytes_per_token = text.bytes_per_token
        parts = (text.fingerprint, entropies.provenance.model, self._thresholds)
        self.fingerprint = hashlib.sha256(repr(parts).encode()).hexdigest()[:32]

    def rows(self, indices: Sequence[int] | np.ndarray) -> TieredBatch:
        """The examples at `indices`, with the tiers of their targets."""
        batch: Batch = self._text.rows(indices)
        entropy = self._entropies.rows(self._split, self._text.numbers(indices))
        tier: Any = curriculum.assign_tiers(entropy, self._thresholds)
        tier = np.where(batch.where, tier, -1).astype(np.int8)
        return TieredBatch(*batch, tier=tier)
