"""Parity of bits: values, splits and rows."""

import itertools

import numpy as np
import pytest

from jaxlib_methods import curriculum
from jaxlib_methods.method import TieredBatch
from jaxlib_methods.tasks import parity
from jaxlib_methods.tasks.questions import SPLITS, split_of


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


def test_behind_the_end_of_validation_rows_are_padding():
    data = parity.ParityDataset("validation", 8, num_examples=3)
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
    ]
    assert len({data.fingerprint for data in datasets}) == len(datasets)
    assert parity.ParityDataset("train", 8).fingerprint == datasets[0].fingerprint
    assert datasets[0].num_examples == 2**31
    assert datasets[0].rows([2**31 + 5]).where.all()
    assert all(data.bytes_per_token is None for data in datasets)


def test_impossible_data_is_refused_at_once():
    with pytest.raises(ValueError, match="bits 0 and num_examples 512 must be at least 1"):
        parity.ParityDataset("train", 0)
    # By their hashes both strings of one bit belong to the training split.
    with pytest.raises(ValueError, match="no question of 1 bits belongs to the validation split"):
        parity.ParityDataset("validation", 1)
