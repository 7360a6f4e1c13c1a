"""Attention: a loop in NumPy, the mask's rule, its gradient, extreme scores."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from jaxlib_methods.pallas_kernels.attention import attention_reference, visible

B, L, M, K, G, C = 2, 3, 5, 2, 3, 7
H = K * G
RNG = np.random.default_rng(0)
QUERY = RNG.normal(size=(B, L, H, C))
KEY = RNG.normal(size=(B, M, K, C))
VALUE = RNG.normal(size=(B, M, K, C))
# Each row sees something; no two rows see the same.
WHERE = np.array(
    [
        [[1, 0, 0, 0, 0], [1, 1, 0, 1, 0], [0, 0, 1, 1, 1]],
        [[0, 1, 0, 0, 1], [1, 1, 1, 1, 1], [0, 0, 0, 1, 0]],
    ],
    bool,
)


def loop(query: np.ndarray, key: np.ndarray, value: np.ndarray, where: np.ndarray) -> np.ndarray:
    """One head, one query, one sum at a time."""
    out = np.zeros(query.shape)
    for b, i, h in np.ndindex(*query.shape[:3]):
        k = h // (query.shape[2] // key.shape[2])
        seen = np.flatnonzero(where[b, i])
        scores = [sum(query[b, i, h] * key[b, j, k]) / math.sqrt(query.shape[3]) for j in seen]
        powers = [math.exp(score - max(scores)) for score in scores]
        for power, j in zip(powers, seen, strict=True):
            out[b, i, h] += power / sum(powers) * value[b, j, k]
    return out


attention = jax.jit(attention_reference)


def attend(query=QUERY, key=KEY, value=VALUE, where=WHERE, dtype=None) -> jax.Array:
    arrays = (jnp.asarray(x, dtype) for x in (query, key, value))
    return attention(*arrays, where=jnp.asarray(where))


def test_equals_a_loop():
    with jax.enable_x64(True):
        np.testing.assert_allclose(attend(), loop(QUERY, KEY, VALUE, WHERE), rtol=1e-12)


def test_by_hand():
    # Scores (log 3, 0) give shares 3/4 and 1/4 of the values 1 and 5: 2. C = 4 halves the product.
    query = jnp.array([2.0 * math.log(3.0), 0.0, 0.0, 0.0]).reshape(1, 1, 1, 4)
    key = jnp.array([[1.0, 0.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0]]).reshape(1, 2, 1, 4)
    value = jnp.array([[1.0] * 4, [5.0] * 4]).reshape(1, 2, 1, 4)
    got = attention_reference(query, key, value, where=jnp.ones((1, 1, 2), bool))
    np.testing.assert_allclose(got.reshape(-1), [2.0] * 4, rtol=1e-5)


def test_visible_is_the_same_document_not_later_and_not_padding():
    # Documents 1 and 2 of three and two tokens, two tokens of padding.
    segments = jnp.array([[1, 1, 1, 2, 2, 0, 0]])
    positions = jnp.array([[0, 1, 2, 0, 1, 0, 1]])
    want = [
        [1, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0],
        [0, 0, 0, 1, 0, 0, 0],
        [0, 0, 0, 1, 1, 0, 0],
        [0, 0, 0, 0, 0, 0, 0],
        [0, 0, 0, 0, 0, 0, 0],
    ]
    got = visible(positions, positions, segments, segments)
    assert got.dtype == jnp.bool_
    assert jnp.array_equal(got[0], jnp.array(want, bool))


def test_visible_with_other_keys_than_queries():
    # Two queries at positions 4 and 2 of document 1; three cached keys, the last slot empty.
    got = visible(
        jnp.array([[4, 2]]), jnp.array([[2, 3, 0]]), jnp.array([[1, 1]]), jnp.array([[1, 1, 0]])
    )
    assert jnp.array_equal(got, jnp.array([[[1, 1, 0], [1, 0, 0]]], bool))


@pytest.mark.parametrize("j", range(M))
def test_a_row_reads_exactly_the_keys_it_may_see(j):
    value, key = VALUE.copy(), KEY.copy()
    value[:, j] -= 2.0
    key[:, j, :, 0] += 3.0
    base, by_value, by_key = attend(), attend(value=value), attend(key=key)
    sees = WHERE[..., j]
    assert jnp.array_equal(base[~sees], by_value[~sees])
    assert jnp.array_equal(base[~sees], by_key[~sees])
    assert not jnp.any(jnp.all(base == by_value, axis=-1)[sees])
    chooses = sees & (WHERE.sum(axis=-1) > 1)  # the score of an only key does not matter
    assert not jnp.any(jnp.all(base == by_key, axis=-1)[chooses])


def test_rows_that_see_nothing_average_and_stay_finite():
    where = WHERE.copy()
    where[:, 1] = False
    got = attend(where=where)
    arrays = [jnp.asarray(x) for x in (QUERY, KEY, VALUE)]
    gradient = jax.grad(lambda *x: (attention(*x, where=where) ** 2).sum(), argnums=(0, 1, 2))
    assert all(bool(jnp.isfinite(slope).all()) for slope in jax.jit(gradient)(*arrays))
    mean = np.repeat(VALUE.mean(axis=1), G, axis=1)
    np.testing.assert_allclose(got[:, 1], mean, rtol=1e-4, atol=1e-6)
    assert jnp.array_equal(got[:, 0], attend()[:, 0])


def test_gradient_is_the_slope():
    with jax.enable_x64(True):
        arrays = tuple(jnp.asarray(x) for x in (QUERY, KEY, VALUE))
        where = jnp.asarray(WHERE)
        check_grads(
            jax.jit(lambda *arrays: attention(*arrays, where=where)),
            arrays,
            order=1,
            modes=("rev",),
            rtol=1e-7,
            atol=1e-7,
        )


@pytest.mark.parametrize("offset", [-3000.0, 3000.0])
def test_a_large_common_offset_of_the_scores_changes_nothing(offset):
    # A feature that is 1 in every key adds the same to all scores of a query. exp(1000) overflows.
    key = KEY.copy()
    key[..., 0] = 1.0
    query = QUERY.copy()
    query[..., 0] += offset
    with jax.enable_x64(True):
        got = attend(query, key)
        assert bool(jnp.isfinite(got).all())
        np.testing.assert_allclose(got, loop(QUERY, key, VALUE, WHERE), rtol=1e-9)


def test_bfloat16_keeps_its_dtype_and_scores_in_float32():
    # Scores 100.25 and 100 give the first value the share 1 / (1 + e^-0.25) = 0.5622. Between 64
    # and 128 bfloat16 counts in halves: scores kept in it would be equal.
    query = np.array([20.0, 1.0, 0.0, 0.0]).reshape(1, 1, 1, 4)
    key = np.array([[10.0, 0.5, 0.0, 0.0], [10.0, 0.0, 0.0, 0.0]]).reshape(1, 2, 1, 4)
    value = np.array([[1.0] * 4, [0.0] * 4]).reshape(1, 2, 1, 4)
    got = attend(query, key, value, np.ones((1, 1, 2), bool), dtype=jnp.bfloat16)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(got.astype(jnp.float32).reshape(-1), [0.5622] * 4, rtol=2**-8)
