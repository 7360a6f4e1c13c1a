"""Policy gradients: the papers' numbers, exact expectations over a toy policy, who gets a slope."""

import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from jaxlib_methods import policy_gradient as pg

N, G, R = 2, 3, 5
RNG = np.random.default_rng(0)
REWARDS = RNG.normal(size=(N, G)).astype(np.float32)
LOG_PROBS = -RNG.uniform(0.1, 3.0, size=(N, G, R)).astype(np.float32)
OLD = (LOG_PROBS + 0.4 * RNG.normal(size=(N, G, R))).astype(np.float32)
ADVANTAGES = np.array([[1.3, -0.4, -0.9], [0.6, -1.1, 0.5]], np.float32)
WHERE = np.arange(R) < np.array([[5, 3, 1], [2, 4, 3]])[..., None]

group = jax.jit(pg.group_advantages, static_argnames="epsilon")
leave_one_out = jax.jit(pg.leave_one_out_advantages)
surrogate = jax.jit(pg.clipped_surrogate, static_argnames=("clip_low", "clip_high"))
clipped = jax.jit(pg.clipped, static_argnames=("clip_low", "clip_high"))


# Advantages.


@pytest.mark.parametrize(
    ("rewards", "want"),
    [
        ([-0.80, -0.60, -0.50, -0.30], [-0.3333, -0.0667, 0.0667, 0.3333]),
        ([-0.80, -0.60, -0.35, -0.10], [-0.45, -0.1833, 0.15, 0.4833]),
    ],
)
def test_leave_one_out_advantages_are_those_of_the_paper(rewards, want):
    # RLP's own example: all rewards are negative, and the least bad thoughts are reinforced.
    np.testing.assert_allclose(leave_one_out(jnp.array(rewards)), want, atol=5e-5)


def test_leave_one_out_advantages_compare_with_the_other_ones():
    others = [np.delete(REWARDS, i, axis=-1).mean(axis=-1) for i in range(G)]
    got = leave_one_out(REWARDS)
    np.testing.assert_allclose(got, REWARDS - np.stack(others, axis=-1), rtol=1e-5)
    np.testing.assert_allclose(got.sum(axis=-1), 0.0, atol=1e-6)


def test_group_advantages_by_hand():
    # Mean 2, population std sqrt(2): with epsilon sqrt(2) all are halved.
    got = group(jnp.array([[0.0, 2.0, 2.0, 4.0]]), epsilon=math.sqrt(2.0))
    np.testing.assert_allclose(got, [[-1 / math.sqrt(2), 0, 0, 1 / math.sqrt(2)]], rtol=1e-6)
    got = group(REWARDS)
    np.testing.assert_allclose(got.mean(axis=-1), 0.0, atol=1e-6)
    np.testing.assert_allclose(got.std(axis=-1), 1.0, rtol=1e-5)


def test_advantages_ignore_what_is_common_to_a_group():
    moved = np.float32(2.5) * REWARDS + np.array([[3.0], [-7.0]], np.float32)
    np.testing.assert_allclose(group(moved), group(REWARDS), rtol=1e-4)
    # Another baseline for a prompt changes nothing in RLP's gradient; its scale does.
    shifted = REWARDS + np.array([[3.0], [-7.0]], np.float32)
    np.testing.assert_allclose(leave_one_out(shifted), leave_one_out(REWARDS), atol=1e-5)
    np.testing.assert_allclose(leave_one_out(2 * REWARDS), 2 * leave_one_out(REWARDS), rtol=1e-5)


@pytest.mark.parametrize("advantages", [group, leave_one_out])
def test_advantages_follow_their_rollouts_and_stay_in_their_group(advantages):
    order = np.array([2, 0, 1])
    got = advantages(REWARDS)
    np.testing.assert_allclose(advantages(REWARDS[:, order]), got[:, order], atol=1e-6)
    np.testing.assert_allclose(advantages(REWARDS[::-1]), got[::-1], atol=1e-6)
    other = advantages(np.concatenate([REWARDS[:1], 9 + REWARDS[1:] ** 2]))
    np.testing.assert_array_equal(other[0], got[0])


@pytest.mark.parametrize("advantages", [pg.group_advantages, pg.leave_one_out_advantages])
@pytest.mark.parametrize("size", [2, 3, 7, 8])
def test_equal_rewards_give_exactly_zero(advantages, size):
    values = np.array([0.0, 0.1, 0.3, 0.7, -1 / 3, 0.9700001, 1e6 + 0.7], np.float32)
    rewards = np.repeat(values[:, None], size, axis=1)
    if size in (3, 7):  # the trap: a mean that is rounded is another number
        assert (rewards - jnp.mean(rewards, axis=-1, keepdims=True)).any()
    for run in (advantages, jax.jit(advantages)):
        assert not run(rewards).any()


@pytest.mark.parametrize("advantages", [pg.group_advantages, pg.leave_one_out_advantages])
def test_one_rollout_is_refused(advantages):
    with pytest.raises(ValueError, match=r"shape \(4, 1\) have 1 rollout .* at least 2"):
        advantages(jnp.zeros((4, 1)))


@pytest.mark.parametrize("advantages", [group, leave_one_out])
def test_rewards_get_no_gradient(advantages):
    assert not jax.grad(lambda r: jnp.square(advantages(r)).sum())(REWARDS).any()
    assert advantages(REWARDS.astype(jnp.bfloat16)).dtype == jnp.float32


# The surrogate.


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "active"),
    [
        (1.5, 2.0, -2.4, True),  # 1.2 A: no more than the clip
        (1.5, -2.0, 3.0, False),  # min takes the lower: 1.5 A
        (0.5, 2.0, -1.0, False),
        (0.5, -2.0, 1.6, True),  # 0.8 A
        (1.1, 2.0, -2.2, False),
        (0.9, -2.0, 1.8, False),
        (1.5, 0.0, 0.0, False),
        (0.5, 0.0, 0.0, False),
        (1.0, 2.0, -2.0, False),
    ],
)
def test_surrogate_by_hand(ratio, advantage, loss, active):
    log_probs, old = jnp.log(jnp.array([0.4 * ratio])), jnp.log(jnp.array([0.4]))
    value, slope = jax.value_and_grad(lambda lp: surrogate(lp, old, jnp.array(advantage))[0])(
        log_probs
    )
    np.testing.assert_allclose(value, loss, rtol=1e-6, atol=1e-12)
    # d loss / d log pi is the loss itself, or nothing where it is clipped.
    np.testing.assert_allclose(slope, [0.0 if active else loss], rtol=1e-6, atol=1e-12)
    assert clipped(log_probs, old, jnp.array(advantage)).tolist() == [active]


def test_surrogate_is_the_equation():
    ratio, advantage = np.exp(LOG_PROBS - OLD), ADVANTAGES[..., None]
    want = -np.minimum(ratio * advantage, np.clip(ratio, 0.9, 1.3) * advantage)
    got = surrogate(LOG_PROBS, OLD, ADVANTAGES, clip_low=0.1, clip_high=0.3)
    np.testing.assert_allclose(got, want, rtol=1e-5)
    active = clipped(LOG_PROBS, OLD, ADVANTAGES, clip_low=0.1, clip_high=0.3)
    np.testing.assert_array_equal(active, -ratio * advantage < got - 1e-6)
    assert 0 < int(active.sum()) < active.size


def test_the_first_update_after_sampling_is_the_policy_gradient():
    where = jnp.asarray(WHERE)

    def total(log_probs):
        loss = surrogate(log_probs, LOG_PROBS, leave_one_out(REWARDS), where=where)
        return pg.per_response(loss, where=where).mean()

    value, slope = jax.value_and_grad(total)(LOG_PROBS)
    np.testing.assert_allclose(value, 0.0, atol=1e-6)
    want = -leave_one_out(REWARDS)[..., None] / WHERE.sum(axis=-1, keepdims=True) / (N * G)
    np.testing.assert_allclose(slope, np.where(WHERE, want, 0.0), rtol=1e-6)
    # At a ratio of exactly 1 even a clip of nothing leaves the whole gradient.
    tight = jax.grad(
        lambda lp: surrogate(lp, LOG_PROBS, ADVANTAGES, clip_low=0.0, clip_high=0.0).sum()
    )(LOG_PROBS)
    np.testing.assert_allclose(tight, np.broadcast_to(-ADVANTAGES[..., None], tight.shape))
    assert not clipped(LOG_PROBS, LOG_PROBS, ADVANTAGES, clip_low=0.0, clip_high=0.0).any()


def test_only_the_policy_gets_a_gradient():
    to_policy, to_old, to_advantages = jax.grad(
        lambda *arrays: surrogate(*arrays).sum(), argnums=(0, 1, 2)
    )(LOG_PROBS, OLD, ADVANTAGES)
    assert to_policy.any()
    assert not to_old.any()
    assert not to_advantages.any()


def test_a_clipped_ratio_may_overflow():
    value, slope = jax.value_and_grad(lambda lp: surrogate(lp, jnp.zeros(1), jnp.array(1.0))[0])(
        jnp.array([200.0])
    )
    np.testing.assert_allclose(value, -1.2, rtol=1e-6)
    assert slope.tolist() == [0.0]


# The penalty and the reduction.


def test_k3_by_hand():
    # A reference half or twice as likely: 1/2 + log 2 - 1, and 2 - log 2 - 1.
    got = pg.k3_kl(jnp.zeros(3), jnp.log(jnp.array([0.5, 2.0, 1.0])))
    np.testing.assert_allclose(got, [math.log(2) - 0.5, 1 - math.log(2), 0.0], rtol=1e-6)
    # d^2 / 2 near zero, where 1 + d has lost most digits of d.
    np.testing.assert_allclose(pg.k3_kl(jnp.zeros(1), jnp.array([1e-3])), [5e-7], rtol=1e-3)


def test_the_mean_of_k3_is_the_divergence():
    p, q = np.array([0.2, 0.5, 0.3]), np.array([0.4, 0.1, 0.5])
    got = (p * pg.k3_kl(jnp.log(p), jnp.log(q))).sum()
    np.testing.assert_allclose(got, (p * np.log(p / q)).sum(), rtol=1e-5)
    to_policy, to_reference = jax.grad(lambda *x: pg.k3_kl(*x).sum(), argnums=(0, 1))(
        LOG_PROBS, OLD
    )
    np.testing.assert_allclose(to_policy, 1 - np.exp(OLD - LOG_PROBS), rtol=1e-4, atol=1e-6)
    assert not to_reference.any()


def test_per_response_by_hand():
    values = jnp.array([[1.0, 2.0, 6.0], [4.0, jnp.nan, jnp.inf], [jnp.nan] * 3])
    where = jnp.array([[True] * 3, [True, False, False], [False] * 3])
    assert pg.per_response(values, where=where).tolist() == [3.0, 4.0, 0.0]
    assert pg.per_response(values, where=where, divisor=4).tolist() == [2.25, 1.0, 0.0]


@pytest.mark.parametrize("divisor", [None, 7])
def test_repeated_tokens_change_a_sum_and_not_a_mean(divisor):
    values, where = jnp.asarray(LOG_PROBS), jnp.asarray(WHERE)
    once = pg.per_response(values, where=where, divisor=divisor)
    twice = pg.per_response(
        jnp.repeat(values, 2, axis=-1), where=jnp.repeat(where, 2, axis=-1), divisor=divisor
    )
    np.testing.assert_allclose(twice, (2 if divisor else 1) * once, rtol=1e-6)


def test_per_response_refuses_what_it_cannot_reduce():
    with pytest.raises(ValueError, match=r"bool of shape \(2, 3\), got float32 of \(2, 3\)"):
        pg.per_response(jnp.zeros((2, 3)), where=jnp.ones((2, 3)))
    with pytest.raises(ValueError, match=r"bool of shape \(2, 3\), got bool of \(2, 1\)"):
        pg.per_response(jnp.zeros((2, 3)), where=jnp.ones((2, 1), bool))
    with pytest.raises(ValueError, match="divisor 0 must be at least 1"):
        pg.per_response(jnp.zeros((2, 3)), where=jnp.ones((2, 3), bool), divisor=0)


# Slopes and masks.


def _loss(log_probs: Any, old: Any, where: Any, divisor: int | None = None) -> jax.Array:
    loss = pg.clipped_surrogate(log_probs, old, jnp.asarray(ADVANTAGES), where=where)
    loss += 0.3 * pg.k3_kl(log_probs, old, where=where)
    return pg.per_response(loss, where=where, divisor=divisor).sum()


@pytest.mark.parametrize("divisor", [None, 7])
def test_gradient_is_the_slope(divisor):
    with jax.enable_x64(True):
        x, old = jnp.asarray(LOG_PROBS, jnp.float64), jnp.asarray(OLD, jnp.float64)
        run = jax.jit(lambda x: _loss(x, old, jnp.asarray(WHERE), divisor))
        check_grads(run, (x,), order=2, modes=("rev",), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("junk", [jnp.nan, jnp.inf, -1e30])
def test_masked_tokens_do_not_exist(junk):
    run = jax.jit(jax.value_and_grad(_loss))
    where = jnp.asarray(WHERE)
    value, slope = run(np.where(WHERE, LOG_PROBS, junk), np.where(WHERE, OLD, -junk), where)
    want, want_slope = run(LOG_PROBS, OLD, where)
    np.testing.assert_array_equal(value, want)
    np.testing.assert_array_equal(slope, want_slope)
    assert not slope[~WHERE].any()
    assert slope[WHERE].all()
    each = surrogate(LOG_PROBS, OLD, ADVANTAGES, where=where)
    np.testing.assert_array_equal(each == 0, ~WHERE)
    penalty = pg.k3_kl(jnp.asarray(LOG_PROBS), jnp.asarray(OLD), where=where)
    np.testing.assert_array_equal(penalty == 0, ~WHERE)
    # A response without tokens: nothing, and not nothing over nothing.
    nobody = jnp.zeros_like(where)
    value, slope = run(jnp.full_like(LOG_PROBS, junk), OLD, nobody)
    assert float(value) == 0.0
    assert not slope.any()
    assert not clipped(jnp.full_like(LOG_PROBS, junk), OLD, ADVANTAGES, where=nobody).any()


# A toy policy: every group of responses is enumerated, so that expectations are exact.


def expected_gradient(theta, rewards, advantages, *, num_rollouts, divisor):
    """Mean of the loss's gradient over all groups `[groups, G]` of responses, by their odds.

    theta: `[R, 2]`, logits of two tokens at every place; rewards: `[2] * R`.
    """
    num_tokens = len(theta)
    responses = np.array(list(itertools.product((0, 1), repeat=num_tokens)))
    groups = np.array(list(itertools.product(range(len(responses)), repeat=num_rollouts)))
    tokens = responses[groups]  # [groups, G, R]
    reward = np.asarray(rewards)[tuple(np.moveaxis(tokens, -1, 0))]

    def log_probs_of(theta):
        return jax.nn.log_softmax(theta)[np.arange(num_tokens), tokens]

    old = log_probs_of(theta)
    odds = jnp.exp(old.sum(axis=(-1, -2)))

    @jax.jit
    def loss(theta):
        tokens_loss = pg.clipped_surrogate(
            log_probs_of(theta), old, advantages(jnp.asarray(reward, jnp.float32))
        )
        each = pg.per_response(tokens_loss, where=jnp.ones(tokens.shape, bool), divisor=divisor)
        return (odds * each.mean(axis=-1)).sum()

    return jax.grad(loss)(theta)


@pytest.mark.parametrize("num_rollouts", [2, 3])
def test_the_gradient_of_two_tokens_is_that_of_their_expected_reward(num_rollouts):
    # J = p_0 r_0 + p_1 r_1, and dJ / d theta_0 = p_0 p_1 (r_0 - r_1) = -dJ / d theta_1.
    theta, (first, second) = jnp.array([[0.3, -0.5]]), (0.9, -0.4)
    p = 1 / (1 + math.exp(-0.8))
    want = p * (1 - p) * (first - second)
    got = expected_gradient(
        theta,
        [first, second],
        pg.leave_one_out_advantages,
        num_rollouts=num_rollouts,
        divisor=None,
    )
    np.testing.assert_allclose(got, [[-want, want]], rtol=1e-5)


def test_the_gradient_of_longer_responses_is_that_of_their_expected_reward():
    theta, rewards = jnp.array([[0.3, -0.5], [-0.2, 0.7]]), jnp.array([[1.0, -0.3], [0.2, 0.6]])

    def expected_reward(theta):
        p = jax.nn.softmax(theta)
        return (p[0][:, None] * p[1][None] * rewards).sum()

    want = jax.grad(expected_reward)(theta)
    got = expected_gradient(theta, rewards, pg.leave_one_out_advantages, num_rollouts=2, divisor=1)
    np.testing.assert_allclose(got, -want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "advantages", [pg.group_advantages, pg.leave_one_out_advantages], ids=["group", "one_out"]
)
def test_the_better_token_becomes_likelier_and_equal_rewards_change_nothing(advantages):
    theta = jnp.array([[0.3, -0.5]])
    run = {"num_rollouts": 2, "divisor": None}
    worse, better = expected_gradient(theta, [0.0, 1.0], advantages, **run)[0]
    assert worse > 0 > better
    assert not expected_gradient(theta, [0.7, 0.7], advantages, **run).any()
