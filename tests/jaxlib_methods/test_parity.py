"""Parity of bits: values, splits, rows and what a warm-up row teaches."""

import itertools
from typing import Any

import numpy as np
import pytest

from jaxlib_methods import curriculum
from jaxlib_methods.method import Batch, TieredBatch
from jaxlib_methods.tasks import parity
from jaxlib_methods.tasks.questions import SPLITS, Split, split_of

THINK, CLOSE, FILLER = 256, 257, 258


def warm_up(split: Split = "train", bits: int = 8, **fields: Any) -> parity.WarmUpDataset:
    tags: Any = {"think": THINK, "close": CLOSE, "filler": FILLER, "max_thought": 16}
    return parity.WarmUpDataset(split, bits, **(tags | fields))


def text_of(batch, row):
    """All tokens of a row: its inputs and the last target."""
    size = int(batch.segments[row].sum())
    return [*batch.inputs[row, :size].tolist(), int(batch.targets[row, size - 1])]


@pytest.mark.parametrize(
    ("bits", "answer", "thought"),
    [("0", 0, "0"), ("1", 1, "1"), ("0111", 1, "0101"), ("01101001", 0, "01001110")],
)
def test_parity_by_hand(bits, answer, thought):
    assert parity.answer(bits) == answer
    assert parity.thought(bits) == thought
    assert parity.verify(bits, str(answer))
    for wrong in (str(1 - answer), "", f"{answer} ", f"{answer}{answer}", "x"):
        assert not parity.verify(bits, wrong)


def test_answers_and_thoughts_of_all_strings():
    for bits in map("".join, itertools.product("01", repeat=6)):
        running = np.bitwise_xor.accumulate([int(bit) for bit in bits])
        assert parity.thought(bits) == "".join(map(str, running))
        assert parity.answer(bits) == running[-1]


@pytest.mark.parametrize("text", ["", "012", "01=", " 01"])
def test_what_is_no_bits_is_refused(text):
    with pytest.raises(ValueError, match="are no bits"):
        parity.answer(text)
    with pytest.raises(ValueError, match="are no bits"):
        parity.verify(text, "0")


@pytest.mark.parametrize("bits", [5, 8, 9, 40])
def test_a_string_is_in_one_split(bits):
    drawn = {}
    for split in SPLITS:
        texts = [parity.question(index, split=split, bits=bits) for index in range(300)]
        assert all(len(text) == bits and set(text) <= set("01") for text in texts)
        assert all(split_of(text.encode()) == split for text in texts)
        drawn[split] = set(texts)
    assert not drawn["train"] & drawn["validation"]
    if bits == 8:  # a function of the hash alone: about one in eight of 256
        held = [f"{n:08b}" for n in range(256) if split_of(f"{n:08b}".encode()) == "validation"]
        assert 16 < len(held) < 48
        assert drawn["validation"] <= set(held)


def test_a_question_is_a_function_of_its_index_and_seed():
    def draw(**fields):
        return [parity.question(i, split="train", bits=30, **fields) for i in range(50)]

    assert draw() == draw() == draw(seed=0)
    assert len(set(draw())) == 50
    assert not set(draw()) & set(draw(seed=1))
    # A recorded drawing: change `parity.VERSION` where it changes.
    assert [parity.question(i, split="train") for i in range(3)] == RECORDED
    ones = [text.count("1") for text in draw(seed=2)]
    assert abs(np.mean(ones) - 15) < 4 * np.sqrt(30 / 4 / 50)


RECORDED = ["01011111", "01010000", "00000000"]


def test_rows_by_hand():
    data = parity.ParityDataset("train", 8, seed=3)
    batch = data.rows([5, 6])
    assert isinstance(batch, TieredBatch)
    assert data.sequence_length == 9
    for row, index in enumerate((5, 6)):
        bits = parity.question(index, split="train", bits=8, seed=3)
        assert bytes(batch.inputs[row].tolist()) == f"{bits}=".encode()
        assert bytes(batch.targets[row].tolist()) == f"{bits[1:]}={parity.answer(bits)}".encode()
        assert batch.tier[row].tolist() == [-1] * 8 + [1]
        assert batch.positions[row].tolist() == list(range(9))
    assert batch.where.all()
    assert (batch.segments == 1).all()
    kinds = {name: field.dtype for name, field in batch._asdict().items()}
    assert kinds.pop("where") is np.dtype(bool)
    assert kinds.pop("tier") == np.int8
    assert set(kinds.values()) == {np.dtype(np.int32)}
    assert curriculum.TIERS[batch.tier.max()] == "medium"
    assert data.rows(np.array([5])).inputs.tolist() == batch.inputs[:1].tolist()


@pytest.mark.parametrize(
    "make",
    [
        lambda **f: parity.ParityDataset("validation", 8, **f),
        lambda **f: warm_up("validation", **f),
    ],
)
def test_behind_the_end_of_validation_rows_are_padding(make):
    data = make(num_examples=3)
    assert data.num_examples == 3
    batch = data.rows([2, 3, 4])
    assert batch.where.any(axis=1).tolist() == [True, False, False]
    for name, field in batch._asdict().items():
        assert (field[1:] == (-1 if name == "tier" else 0)).all(), name


def test_training_is_endless_and_fingerprints_tell_data_apart():
    datasets = [
        parity.ParityDataset("train", 8),
        parity.ParityDataset("train", 9),
        parity.ParityDataset("train", 8, seed=1),
        parity.ParityDataset("validation", 8),
        parity.ParityDataset("validation", 8, num_examples=7),
        warm_up(),
        warm_up(max_thought=17),
        warm_up(seed=1),
    ]
    assert len({data.fingerprint for data in datasets}) == len(datasets)
    assert parity.ParityDataset("train", 8).fingerprint == datasets[0].fingerprint
    assert datasets[0].num_examples == 2**31
    assert datasets[0].rows([2**31 + 5]).where.all()
    assert all(data.bytes_per_token is None for data in datasets)


def test_warm_up_rows_are_right_and_half_of_them_think():
    data, count = warm_up(), 400
    assert data.sequence_length == 8 + 1 + 1 + 16 + 2 - 1
    batch = data.rows(range(count))
    assert isinstance(batch, Batch)
    trailing, empty = [], []
    for row in range(count):
        text = text_of(batch, row)
        bits = bytes(text[:8]).decode()
        assert bits == parity.question(row, split="train")
        assert text[8:10] == [ord("="), THINK]
        assert text[-2:] == [CLOSE, ord(str(parity.answer(bits)))]
        thought = text[10:-2]
        useful = bytes(token for token in thought if token != FILLER).decode()
        assert useful == (parity.thought(bits) if row % 2 == 0 else "")
        assert thought == [*useful.encode(), *[FILLER] * (len(thought) - len(useful))]
        (empty if row % 2 else trailing).append(len(thought) - len(useful))
    assert set(trailing) == set(range(9))
    assert set(empty) == set(range(17))


def test_warm_up_counts_the_response_and_nothing_else():
    batch = warm_up().rows(range(50))
    for row in range(50):
        text = text_of(batch, row)
        response = text[10:]
        assert batch.targets[row][batch.where[row]].tolist() == response
        counted = [9 <= t < len(text) - 1 for t in range(27)]
        assert batch.where[row].tolist() == counted
        assert batch.positions[row, : len(text) - 1].tolist() == list(range(len(text) - 1))
        for field in (batch.inputs, batch.targets, batch.positions, batch.segments):
            assert field.dtype == np.int32
            assert not field[row, len(text) - 1 :].any()
    assert batch.where.dtype == np.bool_


def test_short_thoughts_hold_as_many_fillers_as_fit():
    data = warm_up(bits=8, max_thought=10)
    batch = data.rows(range(200))
    sizes = [len(text_of(batch, row)) for row in range(0, 200, 2)]
    assert set(sizes) == {20, 21, 22}
    assert data.sequence_length == 21
    with pytest.raises(ValueError, match="max_thought 7 does not hold the 8 parities"):
        warm_up(bits=8, max_thought=7)


def test_impossible_data_is_refused_at_once():
    with pytest.raises(ValueError, match="bits 0 and num_examples 512 must be at least 1"):
        parity.ParityDataset("train", 0)
    # By their hashes both strings of one bit belong to the training split.
    with pytest.raises(ValueError, match="no question of 1 bits belongs to the validation split"):
        parity.ParityDataset("validation", 1)
