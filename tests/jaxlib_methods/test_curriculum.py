"""The curriculum: tiers are a partition, shares move on time, draws are what they promise."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlib_methods import curriculum, losses

THRESHOLDS = (0.5, 1.0, 1.5)
FIRST, LAST = (0.6, 0.3, 0.1), (0.1, 0.3, 0.6)
BATCH, LENGTH, DRAWS = 4096, 11, 10

shares = functools.partial(curriculum.tier_probabilities, first=FIRST, last=LAST)
draw: Any = jax.jit(functools.partial(curriculum.draw_positions, num_per_row=DRAWS))
KEYS = jax.random.split(jax.random.key(0), BATCH)


def rows(*kinds):
    """These rows in turn `[BATCH, LENGTH]`, without candidates behind them."""
    tiers = np.full((BATCH, LENGTH), -1, np.int8)
    for number, row in enumerate(kinds):
        tiers[number :: len(kinds), : len(row)] = row
    return jnp.asarray(tiers)


def close(count, share):
    """Within four standard deviations of what `BATCH` draws give."""
    return abs(count - BATCH * share) <= 4 * np.sqrt(BATCH * share * (1 - share))


# Tiers.


@pytest.mark.parametrize("kind", [np.asarray, jnp.asarray])
def test_tiers_by_hand(kind):
    entropy = kind(
        np.array([0.0, 0.49, 0.5, 0.99, 1.0, 1.49, 1.5, 9.0, np.nan, np.inf], np.float32)
    )
    got = curriculum.assign_tiers(entropy, THRESHOLDS)
    assert isinstance(got, type(entropy))
    assert got.dtype == np.int8
    assert got.tolist() == [-1, -1, 0, 0, 1, 1, 2, 2, -1, 2]


def test_the_entropy_of_the_first_token_is_unknown_and_of_the_next_one_a_place_earlier():
    # Token 1 is certain from token 0, token 2 is one of four equally likely ones.
    logits = jnp.array([[[50.0, 0.0, 0.0, 0.0], [0.0] * 4, [1.0, 2.0, 3.0, 4.0]]])
    entropy = losses.token_entropy(logits)
    of_token = jnp.pad(entropy[:, :-1], ((0, 0), (1, 0)), constant_values=jnp.nan)
    assert curriculum.assign_tiers(of_token, THRESHOLDS).tolist() == [[-1, -1, 1]]


def test_quantiles_cut_known_shares():
    entropies = np.random.default_rng(0).exponential(size=(40, 25))
    entropies[:, 0] = np.nan
    tiers = curriculum.assign_tiers(entropies, curriculum.quantile_thresholds(entropies))
    counts = [(tiers[:, 1:] == tier).sum() for tier in (-1, 0, 1, 2)]
    np.testing.assert_allclose(np.array(counts) / 960, [0.5, 0.2, 0.15, 0.15], atol=2e-3)
    assert (tiers[:, 0] == -1).all()
    got = curriculum.quantile_thresholds(np.arange(11.0), (0.0, 0.1, 1.0))
    assert got == (0.0, 1.0, 10.0)


@pytest.mark.parametrize("wrong", [(0.5, 0.4, 0.9), (0.5, 0.7), (-0.1, 0.5, 0.7), (0.1, 0.5, 1.1)])
def test_quantiles_out_of_order_are_refused(wrong):
    with pytest.raises(ValueError, match=r"quantiles \(.*\) must be 3 ascending numbers"):
        curriculum.quantile_thresholds(np.arange(5.0), wrong)


def test_entropies_without_a_number_and_thresholds_out_of_order_are_refused():
    with pytest.raises(ValueError, match=r"entropies of shape \(2,\) hold no number"):
        curriculum.quantile_thresholds(np.full(2, np.nan))
    for wrong in ((1.0, 0.5, 1.5), (0.5, 1.0), (0.5, np.nan, 1.5)):
        with pytest.raises(ValueError, match="must be 3 ascending numbers"):
            curriculum.assign_tiers(np.zeros(1), wrong)


# Shares.


@pytest.mark.parametrize("num_steps", [10, 100, 317, 1000])
def test_shares_move_on_a_line_between_the_switches(num_steps):
    steps = np.arange(num_steps + 5)
    got = jax.vmap(functools.partial(shares, num_steps=num_steps))(steps)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got.sum(axis=-1), 1.0, rtol=1e-6)
    before, after = 10 * steps <= 3 * num_steps, 10 * steps >= 7 * num_steps
    np.testing.assert_array_equal(
        got[before], np.tile(np.array(FIRST, np.float32), (before.sum(), 1))
    )
    np.testing.assert_array_equal(got[after], np.tile(np.array(LAST, np.float32), (after.sum(), 1)))
    way = np.clip((steps / num_steps - 0.3) / 0.4, 0, 1)[:, None]
    np.testing.assert_allclose(got, (1 - way) * FIRST + way * LAST, atol=1e-6)
    # No jumps: a step moves a share by 0.5 / (0.4 T) at most.
    assert np.abs(np.diff(got, axis=0)).max() <= 0.5 / (0.4 * num_steps) + 1e-6


def test_shares_by_hand():
    np.testing.assert_allclose(shares(50, num_steps=100), [0.35, 0.3, 0.35], rtol=1e-6)
    np.testing.assert_allclose(shares(40, num_steps=100), [0.475, 0.3, 0.225], rtol=1e-6)
    got = shares(jnp.int32(75), num_steps=100, begin=0.5, end=1.0)
    np.testing.assert_allclose(got, [0.35, 0.3, 0.35], rtol=1e-6)
    # In float64 100 * 0.29 is 28.999999999999996 and 100 * 0.55 is 55.00000000000001.
    for run in (shares, jax.jit(shares, static_argnames=("num_steps", "begin", "end"))):
        got = [run(step, num_steps=100, begin=0.29, end=0.55) for step in (29, 55)]
        np.testing.assert_array_equal(got, np.array([FIRST, LAST], np.float32))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"first": (0.5, 0.5)}, r"first \(0.5, 0.5\) must be 3 shares of easy, medium, hard"),
        ({"last": (0.5, 0.6, 0.2)}, r"last \(0.5, 0.6, 0.2\) .* sum to 1"),
        ({"last": (1.5, -0.5, 0.0)}, r"last \(1.5, -0.5, 0.0\)"),
        ({"begin": 0.7, "end": 0.3}, r"begin 0.7 must lie before end 0.3"),
        ({"end": 1.2}, r"end 1.2, both from 0 to 1"),
    ],
)
def test_shares_that_are_none_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        curriculum.tier_probabilities(0, **{"num_steps": 10, "first": FIRST, "last": LAST, **wrong})


# Draws.

ROW = [-1, 0, 2, -1, 0, 1, 2, 2, -1, 0, 0]


def test_draws_are_as_frequent_as_promised():
    tiers, p = rows(ROW), jnp.array([0.2, 0.5, 0.3])
    positions, drawn, where = draw(tiers, p, keys=KEYS)
    assert (positions.dtype, drawn.dtype, where.dtype) == (jnp.int32, jnp.int8, jnp.bool_)
    assert positions.shape == drawn.shape == where.shape == (BATCH, DRAWS)
    of_drawn = jnp.take_along_axis(tiers, positions, axis=1)
    np.testing.assert_array_equal(drawn, jnp.where(where, of_drawn, -1))
    counts = np.bincount(positions[:, 0], minlength=LENGTH)
    size = {tier: ROW.count(tier) for tier in (0, 1, 2)}
    for position, tier in enumerate(ROW):
        share = float(p[tier]) / size[tier] if tier >= 0 else 0.0
        assert close(counts[position], share), (position, tier)


def test_a_row_is_emptied_without_repetition():
    positions, drawn, where = draw(rows(ROW), jnp.array(FIRST), keys=KEYS)
    np.testing.assert_array_equal(where, np.tile(np.arange(DRAWS) < 8, (BATCH, 1)))
    candidates = [position for position, tier in enumerate(ROW) if tier >= 0]
    np.testing.assert_array_equal(
        np.sort(positions[:, :8], axis=1), np.tile(candidates, (BATCH, 1))
    )
    assert not positions[:, 8:].any()
    assert (drawn[:, 8:] == -1).all()
    # All orders are drawn, not one: the second draw is every candidate.
    assert set(np.unique(positions[:, 1])) == set(candidates)


def test_empty_tiers_give_their_share_to_the_others():
    _, drawn, _ = draw(rows([0, -1, 2, 0]), jnp.array([0.2, 0.5, 0.3]), keys=KEYS)
    first = drawn[:, 0]
    assert set(np.unique(first)) == {0, 2}
    assert close(int((first == 2).sum()), 0.6)


def test_later_draws_leave_out_exhausted_tiers():
    # One easy candidate among hard ones: it is drawn at once or later, and only once.
    _, drawn, where = draw(rows([2, 2, 0, 2]), jnp.array([0.9, 0.0, 0.1]), keys=KEYS)
    assert where[:, :4].all()
    easy = drawn == 0
    np.testing.assert_array_equal(easy.sum(axis=1), np.ones(BATCH))
    assert close(int(easy[:, 0].sum()), 0.9)
    assert close(int(easy[:, :3].sum()), 1 - 0.1**3)


def test_what_cannot_be_drawn_is_not():
    only_easy = jnp.array([1.0, 0.0, 0.0])
    got = draw(rows([], [2, 2], [-1, 0]), only_easy, keys=KEYS)
    positions, drawn, where = (np.asarray(x[:3, :2]) for x in got)
    assert where.tolist() == [[False, False], [False, False], [True, False]]
    assert positions.tolist() == [[0, 0], [0, 0], [1, 0]]
    assert drawn.tolist() == [[-1, -1], [-1, -1], [0, -1]]


def test_a_draw_depends_on_its_own_row_and_key_alone():
    tiers = np.random.default_rng(1).integers(-1, 3, (BATCH, LENGTH)).astype(np.int8)
    p, even = jnp.array(LAST), np.arange(BATCH) % 2 == 0
    other_keys = jax.random.split(jax.random.key(5), BATCH)
    want = draw(tiers, p, keys=KEYS)
    got = draw(
        np.where(even[:, None], tiers, -tiers % 3).astype(np.int8),
        p,
        keys=jnp.where(even, KEYS, other_keys),
    )
    for a, b in zip(got, want, strict=True):
        np.testing.assert_array_equal(a[even], b[even])
    # Nor on the padding of the row, or on how many rows there are.
    padded = np.pad(tiers[3:4], ((0, 0), (0, 4)), constant_values=-1)
    for a, b in zip(draw(padded, p, keys=KEYS[3:4]), want, strict=True):
        np.testing.assert_array_equal(a[0], b[3])
    # The opposite: another key, another draw.
    assert (draw(tiers, p, keys=other_keys)[0] != want[0]).any(axis=1).mean() > 0.9


def test_a_mesh_draws_the_same_and_new_shares_do_not_compile_again():
    tiers, p = rows(ROW), shares(60, num_steps=100)
    want = draw(tiers, p, keys=KEYS)
    compiled = draw._cache_size()
    draw(tiers, shares(61, num_steps=100), keys=KEYS)
    assert draw._cache_size() == compiled
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    cut = jax.NamedSharding(mesh, jax.P("data"))
    got = draw(jax.device_put(tiers, cut), p, keys=jax.device_put(KEYS, cut))
    for a, b in zip(got, want, strict=True):
        np.testing.assert_array_equal(a, b)
