"""Questions with written answers, from a JSONL file: a model answers, a verifier compares.

A line is an object with the texts `question` and `answer`; other fields are left alone. The name
`parity` stands for a set that is made here.
"""

import hashlib
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from jaxlib_methods.method import TieredBatch
from jaxlib_methods.tasks import parity
from jaxlib_methods.tasks.questions import Split, split_of

VERSION = 1  # of the rows: another number where the same file gives others
BUILT_IN = "parity"
BITS = range(5, 9)  # of the questions that are made here


class Written(NamedTuple):
    """A question and its answer; `name` says where they stand."""

    name: str
    question: str
    answer: str


def parities() -> list[Written]:
    """All strings of 5 to 8 bits, in order, each with the parity of its bits.

    >>> parities()[1].question, parities()[1].answer
    ('00001', '1')
    """
    texts = ("".join(bits) for size in BITS for bits in itertools.product("01", repeat=size))
    return [Written(f"{BUILT_IN}:{text}", text, str(parity.answer(text))) for text in texts]


def read(source: str) -> list[Written]:
    """The questions of a JSONL file, local or in a bucket, or `parity`.

    Raises FileNotFoundError, or ValueError with file and line for what is no question.
    """
    if source == BUILT_IN:
        return parities()
    path = epath.Path(source).expanduser()
    if not path.exists() or path.is_dir():
        raise FileNotFoundError(
            f"there is no file of questions {source}; give a .jsonl file whose lines are objects "
            f"with question and answer, or {BUILT_IN}, which is made here"
        )
    with path.open("rb") as lines:
        found = list(_parse(source, lines))
    if not found:
        raise ValueError(f"{source} has no questions: it is empty")
    return found


def _parse(source: str, lines: Any) -> Iterator[Written]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        name = f"{source}:{number}"
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{name} is not JSON: {error}") from error
        for field in ("question", "answer"):
            text = row.get(field) if isinstance(row, dict) else None
            if not isinstance(text, str) or not text:
                kind = f"fields {sorted(row)[:8]}" if isinstance(row, dict) else type(row).__name__
                raise ValueError(
                    f"{name} has no text in field {field!r} ({kind}); a line is "
                    '{"question": "...", "answer": "..."}'
                )
        yield Written(name, row["question"], row["answer"])


def divide(questions: Sequence[Written], source: str) -> dict[Split, list[Written]]:
    """Both splits of one file: the hash of a question decides, one in eight is for validation."""
    parts: dict[Split, list[Written]] = {"train": [], "validation": []}
    for written in questions:
        parts[split_of(written.question.encode())].append(written)
    for split, part in parts.items():
        if not part:
            raise ValueError(
                f"none of the {len(questions)} questions of {source} falls to the {split} split, "
                "which goes by their hash; give reinforcement_midtraining.validation_questions"
            )
    return parts


class WrittenQuestions:
    """The questions of one split, as a `jaxlib_methods.method.Dataset`.

    A row is a question and its answer, one after the other; its targets are one token further. The
    first token of the answer is the only target of a tier, 1. Training is shuffled anew in each
    epoch, validation stays in order.
    """

    bytes_per_token: float | None = None

    def __init__(
        self,
        split: Split,
        questions: Sequence[Written],
        encode: Callable[[str], np.ndarray],
        *,
        sequence_length: int,
        max_question: int,
        max_answer: int,
        vocab_size: int,
        seed: int = 0,
    ) -> None:
        """max_question, max_answer: tokens. Raises ValueError with the name of what is longer."""
        self.sequence_length = sequence_length
        self.num_examples = len(questions)
        self._split: Split = split
        self._tokens: list[np.ndarray] = []  # of question and answer
        self._lengths: list[int] = []  # of questions
        digest = hashlib.sha256(repr(("written", VERSION, split, seed, sequence_length)).encode())
        for written in questions:
            asked, said = encode(written.question), encode(written.answer)
            _check(written, asked, said, max_question, max_answer, vocab_size)
            self._tokens.append(np.concatenate([asked, said]))
            self._lengths.append(len(asked))
            digest.update(repr((asked.tolist(), said.tolist())).encode())
        self.fingerprint = digest.hexdigest()[:32]
        self._order: Any = range(len(questions))
        if split == "train":
            import grain  # here, so that reading questions needs numpy alone

            self._order = grain.MapDataset.range(len(questions)).seed(seed).shuffle().repeat()

    def rows(self, indices: Sequence[int] | np.ndarray) -> TieredBatch:
        """The questions at `indices`, `[len(indices), L]`; padding behind the validation's end."""
        shape = (len(indices), self.sequence_length)
        tokens, tier = np.zeros((shape[0], shape[1] + 1), np.int32), np.full(shape, -1, np.int8)
        where = np.zeros(shape, bool)
        for row, index in enumerate(map(int, indices)):
            if self._split == "train" or index < self.num_examples:
                number = self._order[index]
                ids, length = self._tokens[number], self._lengths[number]
                tokens[row, : len(ids)] = ids
                where[row, : len(ids) - 1] = True
                tier[row, length - 1] = parity.ANSWER_TIER
        fields: dict[str, Any] = {
            "inputs": np.where(where, tokens[:, :-1], 0),
            "targets": np.where(where, tokens[:, 1:], 0),
            "positions": np.where(where, np.arange(shape[1]), 0).astype(np.int32),
            "segments": where.astype(np.int32),
            "where": where,
            "tier": tier,
        }
        return TieredBatch(**fields)


def _check(
    written: Written,
    asked: np.ndarray,
    said: np.ndarray,
    max_question: int,
    max_answer: int,
    vocab_size: int,
) -> None:
    if not 2 <= len(asked) <= max_question:
        raise ValueError(
            f"{written.name} has a question of {len(asked)} tokens, which must be 2 to "
            f"{max_question}; leave it out, or raise data.sequence_length and "
            "reinforcement_midtraining.prompt_length"
        )
    if not 1 <= len(said) <= max_answer:
        raise ValueError(
            f"{written.name} has an answer of {len(said)} tokens, which must be 1 to "
            f"reinforcement_midtraining.max_answer={max_answer}; leave it out, or raise that"
        )
    largest = int(max(asked.max(), said.max()))
    if largest >= vocab_size:
        raise ValueError(
            f"{written.name} has a token {largest}, model.vocab_size={vocab_size} ends below; "
            f"give at least --model.vocab_size={largest + 1}"
        )
