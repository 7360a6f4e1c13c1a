"""Questions from a file: reading, splitting, rows, and every line that is none."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxlib_methods.method import TieredBatch
from jaxlib_methods.tasks import parity
from jaxlib_methods.tasks.questions import SPLITS, split_of
from jaxlib_methods.tasks.written_questions import (
    BITS,
    Written,
    WrittenQuestions,
    divide,
    parities,
    read,
)
from jaxlib_methods.train.tokenizer import ByteTokenizer

LINES = [{"question": "1+1=", "answer": "2"}, {"question": "7*8=", "answer": "56", "topic": "x"}]
SHAPE: dict[str, Any] = {
    "sequence_length": 8,
    "max_question": 7,
    "max_answer": 2,
    "vocab_size": 256,
}


def file_of(folder: Path, *lines: str) -> str:
    path = folder / "questions.jsonl"
    path.write_text("".join(f"{line}\n" for line in lines))
    return str(path)


def dataset(split: Any = "validation", count: int = 2, **shape: Any) -> WrittenQuestions:
    written = [Written(f"f:{i + 1}", line["question"], line["answer"])
               for i, line in enumerate(LINES)][:count]  # fmt: skip
    return WrittenQuestions(split, written, ByteTokenizer().encode, **SHAPE | shape)


def test_a_file_is_read_line_by_line(tmp_path: Path):
    path = file_of(tmp_path, json.dumps(LINES[0]), "", json.dumps(LINES[1]))
    assert read(path) == [
        Written(f"{path}:1", "1+1=", "2"),
        Written(f"{path}:3", "7*8=", "56"),
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"questions.jsonl:2 is not JSON: Expecting"),
        ("\udcff", r"questions.jsonl:2 is not JSON: 'utf-8' codec can't decode"),
        ("[1]", r"questions.jsonl:2 has no text in field 'question' \(list\); a line is "),
        ('{"answer": "2"}', r":2 has no text in field 'question' \(fields \['answer'\]\)"),
        ('{"question": "1+1="}', r":2 has no text in field 'answer' \(fields \['question'\]\)"),
        ('{"question": "1+1=", "answer": 2}', r":2 has no text in field 'answer' "),
        ('{"question": "", "answer": "2"}', r":2 has no text in field 'question' "),
    ],
)
def test_what_is_no_question_is_named_by_its_line(tmp_path: Path, line: str, message: str):
    path = tmp_path / "questions.jsonl"
    lines = f"{json.dumps(LINES[0])}\n{line}\n"
    path.write_bytes(lines.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=message) as error:
        read(str(path))
    assert "\n" not in str(error.value)


def test_a_file_that_is_empty_or_missing_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match=r"questions.jsonl has no questions: it is empty"):
        read(file_of(tmp_path, ""))
    for name in ("none.jsonl", "."):
        with pytest.raises(FileNotFoundError, match=r"no file of questions .*, or parity"):
            read(str(tmp_path / name))


def test_the_hash_of_a_question_decides_its_split():
    parts = divide(parities(), "parity")
    assert sum(map(len, parts.values())) == sum(2**size for size in BITS)
    for split in SPLITS:
        assert {split_of(written.question.encode()) for written in parts[split]} == {split}
        for written in parts[split]:
            assert parity.verify(written.question, written.answer)
    again = divide(parities()[::-1], "parity")
    assert again["validation"] == parts["validation"][::-1]
    one = [Written("f:1", "1+1=", "2")]
    with pytest.raises(ValueError, match=r"none of the 1 questions of f falls to the .* split"):
        divide(one, "f")


def test_rows_by_hand():
    rows = dataset().rows([0, 1, 2])
    assert isinstance(rows, TieredBatch)
    assert bytes(rows.inputs[1].tolist()) == b"7*8=5\0\0\0"
    assert bytes(rows.targets[1].tolist()) == b"*8=56\0\0\0"
    assert rows.tier[0].tolist() == [-1, -1, -1, 1, -1, -1, -1, -1]
    assert rows.where.sum(axis=1).tolist() == [4, 5, 0]  # behind the end is padding
    assert (rows.tier[2] == -1).all()
    assert rows.positions[1].tolist() == [0, 1, 2, 3, 4, 0, 0, 0]
    assert rows.segments[1].tolist() == [1, 1, 1, 1, 1, 0, 0, 0]
    assert {str(field.dtype) for field in rows} == {"int32", "int8", "bool"}


def test_training_is_a_shuffled_function_of_the_index():
    written = parities()[:32]
    shape = SHAPE | {"sequence_length": 6}
    encode = ByteTokenizer().encode

    def drawn(begin: int, seed: int = 0) -> list[bytes]:
        data = WrittenQuestions("train", written, encode, **shape, seed=seed)
        return [row.tobytes() for row in data.rows(range(begin, begin + 32)).inputs]

    assert drawn(0) == drawn(0)
    assert sorted(drawn(0)) == sorted(drawn(32))
    assert drawn(0) != drawn(32)
    assert drawn(0) != drawn(0, seed=1)
    assert drawn(8)[:24] == drawn(0)[8:]


def test_fingerprints_tell_data_apart():
    sets = [
        dataset(),
        dataset("train"),
        dataset("train", seed=1),
        dataset(count=1),
        dataset(sequence_length=9),
    ]
    assert len({data.fingerprint for data in sets}) == len(sets)
    assert dataset().fingerprint == sets[0].fingerprint
    assert sets[0].num_examples == 2
    assert sets[0].bytes_per_token is None


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ({"max_question": 3}, "f:1 has a question of 4 tokens, which must be 2 to 3; leave it out"),
        ({"max_answer": 1}, "f:2 has an answer of 2 tokens, which must be 1 to .*max_answer=1"),
        ({"vocab_size": 56}, r"f:1 has a token 61, .* at least --model.vocab_size=62"),
    ],
)
def test_questions_that_do_not_fit_are_named(shape: dict[str, int], message: str):
    with pytest.raises(ValueError, match=message):
        dataset(**shape)


def test_a_question_of_one_token_is_refused():
    with pytest.raises(ValueError, match="x:1 has a question of 1 tokens, which must be 2 to 7"):
        WrittenQuestions("train", [Written("x:1", "a", "b")], ByteTokenizer().encode, **SHAPE)


def test_rows_are_of_the_indices_asked_for():
    data = dataset()
    np.testing.assert_array_equal(data.rows(np.array([1])).inputs, data.rows([0, 1]).inputs[1:])
