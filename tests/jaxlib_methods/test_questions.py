"""Datasets of questions: splits, buckets, repeated and endless sets, for every task."""

import collections
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from jaxlib_methods.tasks.boolean_logic import BooleanLogic
from jaxlib_methods.tasks.kinship import Kinship
from jaxlib_methods.tasks.questions import Draws, QuestionDataset, split_of
from jaxlib_methods.tasks.reachability import Reachability

GOLDEN_SPLIT = [14, 15, 20, 25, 30, 31, 32, 39]  # another list would mix earlier splits
SMALL = Reachability(max_nodes=12, train_nodes=(8, 12), test_nodes=(8, 12))
# Task, difficulties of training, difficulties of validation.
TASKS: dict[str, tuple[Any, tuple[int, ...], tuple[int, ...]]] = {
    "reachability": (Reachability(), (1, 2, 3, 4, 5), (1, 2, 3, 4, 6, 8, 10, 12)),
    "small": (SMALL, (1, 2, 3), (1, 2, 3, 4, 5)),
    "matched": (Reachability(variant="matched"), (1, 2, 3), (1, 4, 8)),
    "logic": (BooleanLogic(), (1, 2, 3, 4, 5, 6, 7, 8), (2, 4, 6, 8, 10, 12, 14)),
    "balanced": (BooleanLogic(balanced=True), (1, 2, 3), (2, 4, 8)),
    "kinship": (Kinship(), (2, 3, 4, 5), (2, 3, 4, 5, 6, 7, 8, 9)),
}
EVERY = pytest.mark.parametrize("name", TASKS)


def train(name: str, **fields: Any) -> QuestionDataset:
    task, difficulties, _ = TASKS[name]
    defaults: dict[str, Any] = {"difficulties": difficulties}
    return QuestionDataset("train", task, **defaults | fields)


def validation(name: str, **fields: Any) -> QuestionDataset:
    task, _, difficulties = TASKS[name]
    defaults: dict[str, Any] = {"difficulties": difficulties, "per_bucket": 12}
    return QuestionDataset("validation", task, **defaults | fields)


def said(rows: Any) -> list[bytes]:
    """What each row says, its answer and its difficulty aside."""
    asks = [field for name, field in rows._asdict().items() if name in ("tokens", "edges")]
    asks += [rows.endpoints] if hasattr(rows, "endpoints") else []
    return [b"".join(field[i].tobytes() for field in asks) for i in range(len(rows.where))]


def same(first: Any, second: Any) -> None:
    for name, values in first._asdict().items():
        np.testing.assert_array_equal(values, getattr(second, name), err_msg=name)


def test_draws_are_even() -> None:
    draws = Draws(np.random.default_rng(0))
    below = collections.Counter(draws.below(5) for _ in range(5000))
    between = collections.Counter(draws.between(2, 4) for _ in range(3000))
    assert set(below) == {0, 1, 2, 3, 4}
    assert set(between) == {2, 3, 4}
    assert min(*below.values(), *between.values()) > 900
    orders = collections.Counter("".join(draws.sample("abc")) for _ in range(6000))
    assert len(orders) == 6
    assert min(orders.values()) > 900
    pairs = collections.Counter("".join(draws.sample("abc", 2)) for _ in range(6000))
    assert len(pairs) == 6
    assert min(pairs.values()) > 900


def test_splits_are_stable_and_one_in_eight_is_for_validation() -> None:
    assert [i for i in range(40) if split_of(b"%d" % i) == "validation"] == GOLDEN_SPLIT
    share = np.mean([split_of(b"%d" % i) == "validation" for i in range(8000)])
    assert share == pytest.approx(1 / 8, abs=0.015)


@EVERY
def test_no_question_is_in_both_splits(name) -> None:
    task, *both = TASKS[name]
    for difficulty in sorted({*both[0], *both[1]} & set(range(1, 15))):
        fields = {"difficulties": (difficulty,)}
        held = said(validation(name, **fields).rows(range(12)))
        assert len(set(held)) == 12
        examples = train(name, **fields, seed=1), validation(name, **fields, seed=2)
        for dataset, split in zip(examples, ("train", "validation"), strict=True):
            contents = [task.content(dataset.example(i)) for i in range(12)]
            assert {split_of(content) for content in contents} == {split}
        assert not set(held) & set(said(train(name, **fields).rows(range(40))))


def test_the_few_shallow_expressions_are_all_used_before_one_is_used_again() -> None:
    dataset = validation("logic", difficulties=(1,), per_bucket=150)
    texts = [dataset.example(i).text for i in range(150)]
    new = len(set(texts))
    assert 40 < new < 120
    assert len(set(texts[:new])) == new
    other = validation("logic", difficulties=(1,), per_bucket=150, seed=1)
    assert {other.example(i).text for i in range(150)} == set(texts)
    seen = set(said(train("logic", difficulties=(1,)).rows(range(2000))))
    assert not seen & set(said(dataset.rows(range(150))))


@EVERY
@pytest.mark.parametrize("num_train", [0, 30])
def test_a_training_row_is_a_function_of_its_index_alone(name, num_train) -> None:
    numbers = [17, 3, 29, 3, 4]
    first = train(name, num_train=num_train)
    whole = first.rows(numbers)
    again = train(name, num_train=num_train)
    same(again.rows(numbers[1:2]), type(whole)(*(field[1:2] for field in whole)))
    same(again.rows(np.array(numbers)), whole)
    assert whole.where.all()
    other = said(train(name, num_train=num_train, seed=1).rows(numbers))
    assert not set(other) & set(said(whole))


@EVERY
def test_a_validation_row_is_a_function_of_its_index_alone(name) -> None:
    first, again = validation(name), validation(name, per_bucket=12)
    total = first.num_examples
    backwards = np.arange(total)[::-1]
    whole = first.rows(range(total))
    same(type(whole)(*(field[::-1] for field in again.rows(backwards))), whole)
    few = validation(name, per_bucket=6)
    assert said(few.rows(range(6, 12))) == said(whole)[12:18]  # buckets only grow


@EVERY
def test_fixed_sets_repeat_and_endless_ones_do_not(name) -> None:
    fixed, endless = train(name, num_train=20), train(name)
    assert fixed.num_examples == 20
    assert endless.num_examples == 2**31
    epochs = [said(fixed.rows(range(20 * k, 20 * k + 20))) for k in range(3)]
    assert epochs[0] != epochs[1] != epochs[2]  # each in an order of its own
    for epoch in epochs:
        assert sorted(epoch) == sorted(said(endless.rows(range(20))))
    assert set(said(endless.rows(range(1000, 1020)))) != set(said(endless.rows(range(20))))
    assert fixed.rows([10**12 + 7]).where.all()
    assert fixed.example(47) == fixed.example(7) == endless.example(7) != endless.example(47)


@EVERY
def test_difficulties_and_labels_are_counted_out(name) -> None:
    task, difficulties, harder = TASKS[name]
    rows = train(name).rows(range(4 * len(difficulties)))
    assert collections.Counter(rows.difficulty.tolist()) == dict.fromkeys(difficulties, 4)
    held = validation(name).rows(range(12 * len(harder)))
    assert held.difficulty.tolist() == [k for k in harder for _ in range(12)]
    for part in (rows, held):
        if task.balanced:
            assert part.label.tolist() == [1, 0] * (len(part.label) // 2)
            for k in set(part.difficulty.tolist()):
                assert part.label[part.difficulty == k].mean() == 0.5
        else:
            assert part.label.tolist() != [1, 0] * (len(part.label) // 2)


@EVERY
def test_behind_the_validation_split_rows_count_nothing(name) -> None:
    dataset = validation(name)
    total = dataset.num_examples
    rows = dataset.rows([total - 1, total, total + 100])
    assert rows.where.tolist() == [True, False, False]
    same(type(rows)(*(field[:0] for field in rows)), dataset.rows([]))
    assert dataset.rows([total]).tokens.any(), "attention has something to attend to"


@EVERY
def test_rows_have_the_shapes_of_the_dataset(name) -> None:
    dataset = train(name, num_train=8)
    rows: Any = dataset.rows(range(6))
    length = dataset.sequence_length
    assert dataset.bytes_per_token is None
    assert rows.tokens.shape == (6, length)
    assert {field.dtype for field in (rows.tokens, rows.label, rows.difficulty)} == {np.dtype("i4")}
    assert rows.where.dtype == bool
    if hasattr(rows, "edges"):
        assert rows.edges.shape == (6, length, length)
        assert rows.edges[:, np.arange(length), np.arange(length)].all()
        padding = rows.tokens == 0
        between = rows.edges & ~np.eye(length, dtype=bool)
        assert padding.any()
        assert not (between & (padding[:, :, None] | padding[:, None, :])).any()
    else:
        assert (rows.tokens[:, 0] == 1).all()


def test_threads_get_the_same_rows_as_one() -> None:
    for dataset, again in (
        (validation("kinship"), validation("kinship")),
        (train("logic", num_train=96), train("logic", num_train=96)),
    ):
        parts = [np.arange(96)[i::4] for i in range(4)]
        with ThreadPoolExecutor(4) as threads:
            found = list(threads.map(dataset.rows, parts))
        for part, rows in zip(parts, found, strict=True):
            same(rows, again.rows(part))


def test_fingerprints_tell_datasets_apart() -> None:
    sets = [
        train("small"),
        train("small", seed=1),
        train("small", num_train=4),
        train("small", difficulties=(1, 2)),
        train("reachability", difficulties=(1, 2, 3)),
        train("logic", difficulties=(1, 2, 3)),
        train("balanced", difficulties=(1, 2, 3)),
        validation("small"),
        validation("small", per_bucket=3),
    ]
    assert len({dataset.fingerprint for dataset in sets}) == len(sets)
    assert train("small").fingerprint == train("small").fingerprint


def test_what_no_index_could_give_is_refused_at_once() -> None:
    with pytest.raises(ValueError, match="12 hops needs 13 nodes, test_nodes goes to 12"):
        validation("small", difficulties=(3, 12))
    with pytest.raises(ValueError, match="12 hops needs 13 nodes, train_nodes goes to 12"):
        train("small", difficulties=(3, 12))
    with pytest.raises(ValueError, match="depth 40 do not fit"):
        validation("logic", difficulties=(2, 40))
    with pytest.raises(ValueError, match="chain of 13 facts"):
        train("kinship", difficulties=(2, 13))
    with pytest.raises(ValueError, match="no question of difficulty 0 belongs to the validation"):
        validation("logic", difficulties=(0,))
    with pytest.raises(ValueError, match="difficulties is empty"):
        train("small", difficulties=())
    with pytest.raises(ValueError, match="per_bucket 0 must be at least 1"):
        validation("small", per_bucket=0)
