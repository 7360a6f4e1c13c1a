"""Attention: a loop in NumPy, the mask's rule, derivatives, extreme scores, tiles, memory."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from jaxlib_methods.pallas_kernels.attention import (
    SHARED_SEGMENT,
    Keys,
    Part,
    attend_parts,
    attention,
    attention_reference,
    visible,
)

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


reference = jax.jit(attention_reference)


def attend(query=QUERY, key=KEY, value=VALUE, where=WHERE, dtype=None) -> jax.Array:
    arrays = (jnp.asarray(x, dtype) for x in (query, key, value))
    return reference(*arrays, where=jnp.asarray(where))


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
    gradient = jax.grad(lambda *x: (reference(*x, where=where) ** 2).sum(), argnums=(0, 1, 2))
    assert all(bool(jnp.isfinite(slope).all()) for slope in jax.jit(gradient)(*arrays))
    mean = np.repeat(VALUE.mean(axis=1), G, axis=1)
    np.testing.assert_allclose(got[:, 1], mean, rtol=1e-4, atol=1e-6)
    assert jnp.array_equal(got[:, 0], attend()[:, 0])


def test_gradient_is_the_slope():
    with jax.enable_x64(True):
        arrays = tuple(jnp.asarray(x) for x in (QUERY, KEY, VALUE))
        where = jnp.asarray(WHERE)
        check_grads(
            jax.jit(lambda *arrays: reference(*arrays, where=where)),
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


# A context and one's own key beside it, in tiles and not: against one dense mask over both.

LONG = 11  # queries; no tile but the whole divides them
QUERY_POSITIONS = np.array([[0, 1, 2, 3, 0, 1, 1, 2, 0, 0, 0], [3, 0, 4, 2, 2, 1, 0, 0, 1, 2, 4]])
QUERY_SEGMENTS = np.array([[1, 1, 1, 1, 2, 2, 2, 2, 3, 0, 0], [1, 1, 1, 1, 1, 2, 2, 3, 2, 2, 1]])
KEY_POSITIONS = np.array([[0, 0, 1, 2, 0, 1, 0], [0, 0, 1, 2, 3, 0, 1]])
KEY_SEGMENTS = np.array([[SHARED_SEGMENT, 1, 1, 1, 2, 2, 0], [0, 1, 1, 1, 1, 2, 2]])
# By hand: document 1 of the first row sees the shared key and its own past.
SEEN_BY_QUERY_2 = [1, 1, 1, 1, 0, 0, 0]


@functools.cache
def long_arrays() -> dict[str, np.ndarray]:
    rng, keys = np.random.default_rng(1), KEY_POSITIONS.shape[1]
    shapes = {"query": (LONG, H, C), "own_key": (LONG, K, C), "own_value": (LONG, K, C)}
    shapes |= {"key": (keys, K, C), "value": (keys, K, C)}
    return {name: rng.normal(size=(B, *shape)) for name, shape in shapes.items()}


def beside(arrays: dict[str, jax.Array], *, own: bool, tile: int | None) -> jax.Array:
    """The context and one's own key as two parts; tile: None makes all scores."""
    query, key, value = (arrays[name] for name in ("query", "key", "value"))
    places = [jnp.asarray(x) for x in (KEY_POSITIONS, KEY_SEGMENTS)]
    rows = [jnp.asarray(x) for x in (QUERY_POSITIONS, QUERY_SEGMENTS)]
    extra = (arrays["own_key"], arrays["own_value"]) if own else None
    if tile is None:
        where = visible(rows[0], places[0], rows[1], places[1])
        return attention_reference(query, key, value, where=where, own=extra)
    at: dict[str, Any] = {"positions": rows[0], "segments": rows[1]}
    return attention(query, Keys(key, value, *places), own=extra, tile=(tile, tile), **at)[0]


def dense_mask(*, own: bool) -> np.ndarray:
    """`[B, L, M]`, or `[B, L, M + L]` with each query's own key behind the context's."""
    where = np.zeros((B, LONG, KEY_POSITIONS.shape[1]), bool)
    for b, i, j in np.ndindex(*where.shape):
        document = KEY_SEGMENTS[b, j]
        same = document in (SHARED_SEGMENT, QUERY_SEGMENTS[b, i])
        where[b, i, j] = same and document != 0 and KEY_POSITIONS[b, j] <= QUERY_POSITIONS[b, i]
    assert where[0, 2].tolist() == SEEN_BY_QUERY_2
    themselves = np.broadcast_to(np.eye(LONG, dtype=bool), (B, LONG, LONG))
    return np.concatenate([where, themselves], axis=-1) if own else where


def densely(arrays: dict[str, jax.Array], *, own: bool) -> jax.Array:
    both = [("key", "own_key"), ("value", "own_value")]
    key, value = (
        jnp.concatenate([arrays[n] for n in names], axis=1) if own else arrays[names[0]]
        for names in both
    )
    return attention_reference(arrays["query"], key, value, where=jnp.asarray(dense_mask(own=own)))


def derivatives(attend: Any, arrays: dict[str, jax.Array], *, own: bool) -> Any:
    """The output, the gradient of something curved, and its tangent, where something is seen."""
    rng = np.random.default_rng(2)
    way = {name: jnp.asarray(rng.normal(size=x.shape)) for name, x in arrays.items()}
    seen = dense_mask(own=own).any(axis=2) & (QUERY_SEGMENTS != 0)
    seen = jnp.asarray(seen)[:, :, None, None]
    weight = jnp.asarray(rng.normal(size=(B, LONG, H, C)))

    def total(arrays: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
        mixed = jnp.where(seen, attend(arrays), 0)
        return jnp.sum(jnp.sin(mixed) * weight), mixed

    slope, slope_way, mixed = jax.jvp(
        jax.grad(total, has_aux=True), (arrays,), (way,), has_aux=True
    )
    return mixed, slope, slope_way


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("tile", [1, 4, LONG, None])
def test_two_parts_equal_one_dense_mask(own, tile):
    with jax.enable_x64(True):
        arrays = jax.tree.map(jnp.asarray, long_arrays())
        given = arrays
        if tile is not None:  # where padding may hold anything
            exists = jnp.asarray(QUERY_SEGMENTS != 0)[:, :, None, None]
            of_queries = {name: arrays[name] for name in ("query", "own_key", "own_value")}
            given = arrays | {name: jnp.where(exists, x, jnp.nan) for name, x in of_queries.items()}
        forms = functools.partial(densely, own=own), functools.partial(beside, own=own, tile=tile)
        want, got = (
            jax.jit(functools.partial(derivatives, form, own=own))(values)
            for form, values in zip(forms, (arrays, given), strict=True)
        )
        jax.tree.map(
            functools.partial(np.testing.assert_allclose, rtol=1e-11, atol=1e-12), got, want
        )
        assert all(bool(jnp.any(g != 0)) for n, g in want[2].items() if own or "own" not in n)


def test_candidates_do_not_see_each_other():
    arrays = {name: jnp.asarray(x, jnp.float32) for name, x in long_arrays().items()}
    for name in ("own_key", "own_value"):
        moved = arrays | {name: arrays[name].at[:, 5].add(1.0)}
        for tile in (4, None):
            before, after = (beside(a, own=True, tile=tile) for a in (arrays, moved))
            same = jnp.all(before == after, axis=(0, 2, 3))
            assert same.tolist() == [i != 5 for i in range(LONG)]


def test_memory_is_linear_in_the_length():
    def temporary(length: int, tile: int) -> int:
        heads = jax.ShapeDtypeStruct((1, length, 2, 4), jnp.float32)
        places = jnp.arange(length)[None]

        def total(query: jax.Array, key: jax.Array, own: jax.Array) -> jax.Array:
            context = Keys(key, key, places, places * 0 + 1)
            at: dict[str, Any] = {"positions": places, "segments": places * 0 + 1}
            mixed, _ = attention(query, context, own=(own, own), tile=(tile, tile), **at)
            return jnp.sum(mixed**2)

        def tangent(*arrays: jax.Array) -> Any:  # forward over reverse, as a descent step does it
            return jax.jvp(jax.grad(total, argnums=(0, 1, 2)), arrays, arrays)[1]

        compiled = jax.jit(tangent).lower(heads, heads, heads).compile()
        analysis = compiled.memory_analysis()
        assert analysis is not None
        return analysis.temp_size_in_bytes

    assert temporary(1024, 64) <= 2.3 * temporary(512, 64)
    assert temporary(1024, 1024) >= 3.5 * temporary(512, 512)


# Attention to keys in several arrays, heads first.


@pytest.mark.parametrize(("length", "group"), [(1, 1), (3, 2)])
def test_parts_equal_one_array_of_all_keys(length: int, group: int):
    N, times, K, C, sizes = 2, 5, 3, 4, (7, 11)
    B, rng = N * times, np.random.default_rng(0)
    query = jnp.asarray(rng.normal(size=(B, length, K * group, C)), jnp.float32)
    shared, own = (
        [jnp.asarray(rng.normal(size=(rows, K, size, C)), jnp.float32) for _ in range(2)]
        for rows, size in zip((N, B), sizes, strict=True)
    )
    seen, own_seen = (rng.random((B, length, size)) < 0.6 for size in sizes)
    seen[0] = own_seen[1] = False  # one part may be out of sight
    own_seen[0, :, 2] = seen[1, :, 3] = True
    shared_seen = jnp.asarray(seen.reshape(N, -1, sizes[0]))

    def in_parts(query: jax.Array, shared: Any, own: Any) -> jax.Array:
        parts = [
            Part(own[0], own[1], jnp.asarray(own_seen)),
            Part(shared[0], shared[1], shared_seen),
        ]
        return attend_parts(query, parts)

    def in_one(query: jax.Array, shared: Any, own: Any) -> jax.Array:
        joined = (
            jnp.concatenate([jnp.repeat(old, times, axis=0), new], axis=2).swapaxes(1, 2)
            for old, new in zip(shared, own, strict=True)
        )
        where = jnp.concatenate([seen, own_seen], axis=2)
        return attention_reference(query, *joined, where=where)

    weights = rng.normal(size=query.shape)

    def with_gradients(attend: Any) -> Any:
        def total(*arrays: Any) -> tuple[jax.Array, jax.Array]:
            mixed = attend(*arrays)
            return (weights * mixed).sum(), mixed

        total_and_gradients = jax.value_and_grad(total, (0, 1, 2), has_aux=True)
        return jax.jit(total_and_gradients)(query, shared, own)

    got, want = with_gradients(in_parts), with_gradients(in_one)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5), got, want)
