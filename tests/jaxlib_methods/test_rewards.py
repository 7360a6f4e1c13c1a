"""Rewards: budgets against exact arithmetic, both papers' tables, bytes of tokens."""

import decimal
import functools
import itertools
from decimal import Decimal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlib_methods import rewards

budget = rewards.token_budget


def exact_budgets(num_steps: int, first: int, decay: str, least: int) -> list[int]:
    """The budgets of all steps, in 40 decimal digits."""
    with decimal.localcontext(prec=40):
        powers = (Decimal(decay) ** (Decimal(t) / num_steps) for t in range(num_steps + 1))
        # A power that is a whole number comes out next to it.
        return [max(least, int(first * power + Decimal("1e-30"))) for power in powers]


# The budget.


@pytest.mark.parametrize("num_steps", [20, 100, 1000])
def test_budgets_are_those_of_the_paper(num_steps):
    steps = (jnp.array([0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0]) * num_steps).round().astype(int)
    got = budget(steps, num_steps=num_steps)
    assert got.tolist() == [800, 681, 534, 357, 239, 187, 160]
    assert got.dtype == jnp.int32


@pytest.mark.parametrize(
    ("first", "decay", "least"),
    [
        (800, "0.2", 1),
        (4, "0.01", 1),
        (16, "0.5", 1),
        (100, "0.29", 1),  # 28.999999999999996 in float64
        (1000, "0.3", 350),
        (64, "0.0625", 1),  # passes 32, 16 and 8 exactly
        (7, "1", 1),
    ],
)
def test_budgets_of_a_run_are_exact(first, decay, least):
    num_steps = 2000
    want = exact_budgets(num_steps, first, decay, least)
    run = functools.partial(
        budget, num_steps=num_steps, first=first, decay=float(decay), least=least
    )
    steps = jnp.arange(num_steps + 1)
    for got in (run(steps), jax.jit(run)(steps)):
        np.testing.assert_array_equal(got, want)
    with jax.enable_x64(True):
        got = run(jnp.arange(num_steps + 1))
        np.testing.assert_array_equal(got, want)
        assert got.dtype == jnp.int32
    assert all(a >= b >= least for a, b in itertools.pairwise(want))
    # Resumed past the end, or before the start.
    assert run(jnp.array([num_steps + 5, 10**9, -3])).tolist() == [want[-1], want[-1], want[0]]


def test_a_budget_is_of_the_shape_of_its_step():
    run = jax.jit(functools.partial(budget, num_steps=10))
    assert run(jnp.int32(5)).shape == ()
    assert run(jnp.array([[0, 5], [10, 20]])).tolist() == [[800, 357], [160, 160]]
    assert int(budget(0, num_steps=1, first=3, least=5)) == 5


@pytest.mark.parametrize("wrong", [{"num_steps": 0}, {"least": 0}, {"decay": 0.0}, {"decay": 1.5}])
def test_a_budget_refuses_what_has_no_schedule(wrong):
    name, value = next(iter(wrong.items()))
    with pytest.raises(ValueError, match=f"{name} {value}"):
        budget(0, **{"num_steps": 10, **wrong})


# The reward of a length.


def test_length_reward_by_hand():
    length = jnp.array([0, 5, 10, 15, 20, 21, 100])
    assert rewards.length_reward(length, 10).tolist() == [0.0, 0.5, 1.0, 0.5, 0.0, 0.0, 0.0]
    assert rewards.length_reward(length, 10, peak=3.0).tolist() == [0, 1.5, 3, 1.5, 0, 0, 0]
    assert rewards.length_reward(jnp.arange(4), 1).tolist() == [0.0, 1.0, 0.0, 0.0]
    per_prompt = rewards.length_reward(jnp.array([[2, 4], [4, 8]]), jnp.array([[2], [8]]))
    assert per_prompt.tolist() == [[1.0, 0.0], [0.5, 1.0]]
    assert per_prompt.dtype == jnp.float32


@pytest.mark.parametrize("size", [1, 3, 187, 800])
def test_length_reward_is_a_symmetric_triangle(size):
    offset = jnp.arange(size + 1)
    below, above = (rewards.length_reward(size + s * offset, size) for s in (-1, 1))
    np.testing.assert_array_equal(below, above)
    np.testing.assert_allclose(below, 1 - np.arange(size + 1) / size, atol=1e-6)
    assert float(below[0]) == 1.0
    assert float(rewards.length_reward(jnp.array(3 * size), size)) == 0.0


# The reward of an answer.


def test_match_reward_by_hand():
    answers = jnp.array([[[3, 1], [1, 3], [3, 3]], [[4, 0], [4, 0], [0, 4]]])
    lengths = jnp.array([[1, 2, 2], [1, 0, 0]])
    got = rewards.match_reward(answers, lengths, jnp.array([[3], [4]]))
    assert got.tolist() == [[1.0, 0.0, 1.0], [1.0, 0.0, 0.0]]
    assert got.dtype == jnp.float32
    # Padding is 0, and so may a target be.
    assert rewards.match_reward(answers[1], lengths[1], jnp.array([0, 0, 0])).tolist() == [0, 0, 0]


def test_match_reward_depends_on_equality_alone_and_follows_its_rollouts():
    random = np.random.default_rng(0)
    shapes = ((4, 5, 2), (4, 1), (4, 5))
    answers, target, lengths = (jnp.asarray(random.integers(0, 3, shape)) for shape in shapes)
    names = jnp.array([17, 0, 90])
    got = rewards.match_reward(answers, lengths, target)
    np.testing.assert_array_equal(rewards.match_reward(names[answers], lengths, names[target]), got)
    order = random.permutation(5)
    moved = rewards.match_reward(answers[:, order], lengths[:, order], target)
    np.testing.assert_array_equal(moved, got[:, order])
    assert 0 < float(got.mean()) < 1


def test_an_array_per_prompt_must_say_so():
    # With as many rollouts as prompts it would be read as one per rollout.
    answers, lengths = jnp.zeros((3, 3, 1), int), jnp.ones((3, 3), int)
    with pytest.raises(ValueError, match=r"target of shape \(3,\) .* \(3, 3\); add one of size 1"):
        rewards.match_reward(answers, lengths, jnp.zeros(3, int))
    with pytest.raises(ValueError, match=r"baseline_log_prob of shape \(3,\)"):
        rewards.information_gain(jnp.zeros((3, 3)), jnp.zeros(3))
    with pytest.raises(ValueError, match=r"truth_bytes of shape \(3, 1\)"):
        rewards.prefix_match_reward(answers, lengths, jnp.zeros((3, 1)), answers)
    with pytest.raises(ValueError, match=r"boundaries of shape \(3, 1\)"):
        rewards.prefix_match_reward(answers, lengths, answers, jnp.zeros((3, 1)))


def as_bytes(texts, size=6):
    return jnp.array([list(text.ljust(size, b"\0")) for text in texts], jnp.uint8)


def test_prefix_match_reward_is_that_of_rpt():
    answers = [b"ab", b"abc", b"a", b"abx", b"", b"abcd", b"b", b"xb"]
    # The truth goes on behind the last boundary: "ab", "c", then "de".
    got = rewards.prefix_match_reward(
        as_bytes(answers),
        jnp.array([len(text) for text in answers]),
        as_bytes([b"abcde"]),
        jnp.array([[2, 3, 0, 0]]),
    )
    assert got.tolist() == [1, 1, 0, 0, 0, 0, 0, 0]
    assert got.dtype == jnp.float32


def test_an_answer_that_was_cut_is_wrong_and_bytes_behind_it_do_not_count():
    def run(*arrays):
        return float(rewards.prefix_match_reward(*map(jnp.asarray, arrays)))

    truth = as_bytes([b"abcdef"])[0]
    assert run(truth, 6, truth, [6, 8]) == 1.0
    assert run(truth, 8, truth, [6, 8]) == 0.0
    assert run(as_bytes([b"abzz"])[0], 2, truth, [2]) == 1.0
    assert run(as_bytes([b"abzz"])[0], 3, truth, [3]) == 0.0


def test_tokens_are_spelled_as_python_joins_them():
    words = [b"a", b"bc", b"", b"xyz", b"\xff\0", b"q"]
    table = as_bytes(words, 3)
    table_lengths = jnp.array([len(word) for word in words])
    random = np.random.default_rng(0)
    tokens, lengths = random.integers(0, len(words), (5, 7, 4)), random.integers(0, 5, (5, 7))
    spell = jax.jit(rewards.spell, static_argnames="size")
    for size in (7, 12):
        text, total = spell(tokens, lengths, table, table_lengths, size=size)
        assert text.shape == (5, 7, size)
        assert (text.dtype, total.dtype) == (jnp.uint8, jnp.int32)
        for place in np.ndindex(5, 7):
            want = b"".join(words[token] for token in tokens[place][: lengths[place]])
            assert int(total[place]) == len(want)
            assert bytes(np.asarray(text[place])) == want.ljust(size, b"\0")[:size]


def test_form_is_left_out_of_a_vocabulary():
    words = [b" The", b"A\tb\n", b"  ", b"", b"\xc3\x84Z", b"1,0"]
    table, sizes = rewards.without_form(
        np.asarray(as_bytes(words, 4)), np.array([len(word) for word in words], np.int32)
    )
    found = [bytes(row[:size]) for row, size in zip(table, sizes, strict=True)]
    assert found == [b"the", b"ab", b"", b"", b"\xc3\x84z", b"1,0"]
    assert not table[2].any()


def test_equal_texts_are_right_and_empty_ones_are_not():
    answers, truths = as_bytes([b"42", b"42", b"4", b"421", b""], 3), as_bytes([b"42"], 3)
    lengths = jnp.array([2, 5, 1, 3, 0])  # the second was cut
    got = rewards.same_text_reward(answers, lengths, truths, jnp.array([2]))
    assert got.tolist() == [1, 0, 0, 0, 0]
    nothing = (answers[4:], lengths[4:])
    assert rewards.same_text_reward(*nothing, *nothing).tolist() == [0]
    with pytest.raises(ValueError, match="must have the axes of answer_bytes"):
        rewards.same_text_reward(answers, lengths, truths[0], jnp.array(2))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (rb"so \boxed{42}.", b"42"),
        (rb"\boxed{3}, no: \boxed{\frac{1}{2}}", rb"\frac{1}{2}"),
        (rb"\boxed{\text{a {b}}}}", rb"\text{a {b}}"),
        (rb"\boxed{3} \boxed{4", b""),
        (rb"\boxed{}", b""),
        (rb"boxed{4}", b""),
        (rb"", b""),
    ],
)
def test_the_last_box_is_opened(text: bytes, expected: bytes):
    inside, size = jax.jit(rewards.boxed)(as_bytes([text], 40)[0], jnp.int32(len(text)))
    assert bytes(np.asarray(inside)) == expected.ljust(40, b"\0")
    assert int(size) == len(expected)
    # What was cut at the array's end is not closed; rows of a batch do not meet.
    both = as_bytes([text, rb"\boxed{x}"], 40)[None]
    _, sizes = rewards.boxed(both, jnp.array([[len(text), 9]]))
    assert sizes.tolist() == [[len(expected), 1]]


# Sums and differences.


def test_total_reward_by_hand():
    # Right and as long as asked; right and far too long; wrong and as long as asked; wrong, empty.
    match, length = jnp.array([1.0, 1.0, 0.0, 0.0]), jnp.array([10, 21, 10, 0])
    got = rewards.total_reward(match, rewards.length_reward(length, 10), weight=0.3)
    np.testing.assert_allclose(got, [1.0, 0.7, 0.3, 0.0], rtol=1e-6)
    plain = rewards.total_reward(match, rewards.length_reward(length, 10), weight=0.0)
    assert plain.tolist() == match.tolist()


def test_information_gain_by_hand_and_without_a_gradient():
    thought, prefix = jnp.array([[-0.5, -2.0], [-1.0, -1.0]]), jnp.array([[-1.0], [-1.0]])
    assert rewards.information_gain(thought, prefix).tolist() == [[0.5, -1.0], [0.0, 0.0]]
    slopes = jax.grad(
        lambda *arrays: jnp.square(rewards.information_gain(*arrays)).sum(), argnums=(0, 1)
    )(thought, prefix)
    assert not any(slope.any() for slope in slopes)
