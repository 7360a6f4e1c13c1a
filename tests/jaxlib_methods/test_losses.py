"""The losses: by hand, their slopes, what a mask deletes, who gets no gradient."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from jaxlib_methods import losses

B, L, V, D, E = 2, 3, 7, 5, 11
RNG = np.random.default_rng(0)
LOGITS = RNG.normal(size=(B, L, V)).astype(np.float32)
TEACHER_LOGITS = RNG.normal(size=(B, L, V)).astype(np.float32)
LABELS = np.array([[0, 6, 3], [2, 2, 5]])
STATE = RNG.normal(size=(B, L, D)).astype(np.float32)
TEACHER = RNG.normal(size=(B, L, D)).astype(np.float32)
WIDE_TEACHER = RNG.normal(size=(B, L, E)).astype(np.float32)
WHERE = np.array([[True, False, True], [False, True, False]])

token_nll = jax.jit(losses.token_nll)
soft_cross_entropy = jax.jit(losses.soft_cross_entropy, static_argnames="temperature")
cosine_similarity = jax.jit(losses.cosine_similarity)
alignment = jax.jit(losses.alignment)
nll_of_labels = functools.partial(token_nll, labels=jnp.asarray(LABELS))


def log_of(*shares: float) -> jax.Array:
    """Logits `[1, 1, V]` of a distribution; its softmax is the shares over their sum."""
    return jnp.log(jnp.array(shares))[None, None]


# By hand.


def test_token_nll_by_hand():
    # Logits (0, log 3) give p = (1/4, 3/4).
    logits = jnp.broadcast_to(log_of(1.0, 3.0), (1, 2, 2))
    got = token_nll(logits, jnp.array([[0, 1]]))
    np.testing.assert_allclose(got, [[math.log(4.0), math.log(4.0 / 3.0)]], rtol=1e-6)


@pytest.mark.parametrize("label", [-100, -1, V, 200])
@pytest.mark.parametrize("dtype", [np.int32, np.int16])
def test_a_label_that_is_no_token_is_nan_unless_it_is_deleted(label, dtype):
    labels = jnp.array([[0, label, 3], [2, 2, V - 1]], dtype)
    got = token_nll(LOGITS, labels)
    assert np.isnan(got).tolist() == (labels == label).tolist()

    def total(logits):
        nll = losses.token_nll(logits, labels, where=labels != label)
        return nll.sum(), nll

    (_, kept), slope = jax.value_and_grad(total, has_aux=True)(jnp.asarray(LOGITS))
    np.testing.assert_array_equal(kept, jnp.where(labels == label, 0.0, got))
    assert slope.any(axis=-1).tolist() == (labels != label).tolist()
    assert not jnp.isnan(slope).any()


def test_bytes_are_labels_and_numbers_with_a_point_are_none():
    logits, labels = jnp.zeros((1, 1, 256)), jnp.full((1, 1), 255, jnp.uint8)
    np.testing.assert_allclose(token_nll(logits, labels), [[math.log(256.0)]], rtol=1e-6)
    with pytest.raises(ValueError, match="labels must be integers, got float32"):
        losses.token_nll(logits, labels.astype(jnp.float32))


def test_soft_cross_entropy_by_hand():
    # Teacher (1/4, 3/4), student (1/2, 1/2): log 2. Student (1/5, 4/5): 1/4 log 5 + 3/4 log 5/4.
    got = soft_cross_entropy(log_of(1.0, 1.0), log_of(1.0, 3.0))
    np.testing.assert_allclose(got, [[math.log(2.0)]], rtol=1e-6)
    got = soft_cross_entropy(log_of(1.0, 4.0), log_of(1.0, 3.0))
    want = 0.25 * math.log(5.0) + 0.75 * math.log(1.25)
    np.testing.assert_allclose(got, [[want]], rtol=1e-6)


def test_temperature_divides_the_logits_of_the_teacher_only():
    # At 1/2 the teacher's (1, 3) become (1, 9): shares 1/10 and 9/10.
    got = soft_cross_entropy(log_of(1.0, 4.0), log_of(1.0, 3.0), temperature=0.5)
    want = 0.1 * math.log(5.0) + 0.9 * math.log(1.25)
    np.testing.assert_allclose(got, [[want]], rtol=1e-6)


def test_token_entropy_by_hand():
    # (1/4, 3/4), uniform, and all on one token.
    got = losses.token_entropy(log_of(1.0, 3.0))
    np.testing.assert_allclose(got, [[0.25 * math.log(4.0) + 0.75 * math.log(4 / 3)]], rtol=1e-6)
    np.testing.assert_allclose(losses.token_entropy(jnp.ones((1, 1, V))), [[math.log(V)]])
    assert losses.token_entropy(100 * jnp.eye(V)[None, :1]).tolist() == [[0.0]]
    # Of the two likeliest tokens: (1/4, 3/4) again. More than all are all.
    two = losses.token_entropy(log_of(1.0, 0.5, 3.0), top_k=2)
    np.testing.assert_allclose(two, got, rtol=1e-6)
    all_of_them = losses.token_entropy(log_of(1.0, 0.5, 3.0), top_k=16)
    np.testing.assert_allclose(all_of_them, losses.token_entropy(log_of(1.0, 0.5, 3.0)))


@pytest.mark.parametrize("score", [-1e30, -jnp.inf])
@pytest.mark.parametrize("top_k", [None, 5, 9])
def test_the_entropy_of_a_padded_vocabulary_is_that_of_the_real_one(score, top_k):
    entropy = functools.partial(losses.token_entropy, top_k=top_k)
    padded = jnp.pad(LOGITS, ((0, 0), (0, 0), (0, 4)), constant_values=score)
    values, slope = jax.vjp(entropy, padded)
    want, want_slope = jax.vjp(entropy, jnp.asarray(LOGITS))
    np.testing.assert_allclose(values, want, rtol=1e-6)
    (got,), (exact,) = slope(jnp.ones_like(values)), want_slope(jnp.ones_like(values))
    np.testing.assert_allclose(got[..., :V], exact, rtol=1e-5, atol=1e-7)
    assert not got[..., V:].any()
    # The opposite: a token that counts.
    assert not np.isclose(entropy(padded.at[..., -1].set(1.0)), want).any()


def test_cosine_similarity_by_hand():
    # (3, 4) and (0, 2): 8 / (5 * 2); and (3, 4) and (-4, 2): -4 / (5 sqrt 20).
    a, b = jnp.array([[[3.0, 4.0]] * 2]), jnp.array([[[0.0, 2.0], [-4.0, 2.0]]])
    want = [[0.8, -4 / (5 * math.sqrt(20.0))]]
    np.testing.assert_allclose(cosine_similarity(a, b), want, rtol=1e-6)


def test_alignment_by_hand():
    # The teacher's (0, 1, 2) becomes (0.25, 1.75); with (3, 4): 7.75 / (5 sqrt(3.125)).
    got = alignment(jnp.array([[[3.0, 4.0]]]), jnp.array([[[0.0, 1.0, 2.0]]]))
    np.testing.assert_allclose(got, [[-7.75 / (5 * math.sqrt(3.125))]], rtol=1e-6)


def test_mean_by_hand():
    assert float(losses.mean(jnp.float32(6.0), jnp.float32(4.0))) == 1.5
    assert float(losses.mean(jnp.float32(0.0), jnp.float32(0.0))) == 0.0


def test_masked_sum_by_hand():
    where = jnp.array([[True, False], [True, True]])
    total, count = losses.masked_sum(jnp.array([[1.0, jnp.nan], [2.0, 4.0]]), where=where)
    assert (float(total), float(count)) == (7.0, 3.0)


@pytest.mark.parametrize(
    ("where", "got"),
    [
        (jnp.ones((2, 3)), r"float32 of \(2, 3\)"),
        (jnp.ones((2, 3), jnp.int32), r"int32 of \(2, 3\)"),
        (jnp.ones((3,), bool), r"bool of \(3,\)"),
        (jnp.ones((2, 1), bool), r"bool of \(2, 1\)"),
    ],
)
def test_masked_sum_refuses_anything_but_a_bool_of_the_same_shape(where, got):
    with pytest.raises(ValueError, match=rf"where must be bool of shape \(2, 3\), got {got}"):
        losses.masked_sum(jnp.zeros((2, 3)), where=where)


@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_weights_are_no_where(dtype):
    x, weights = jnp.asarray(LOGITS), jnp.asarray(WHERE, dtype)
    message = rf"where must be bool of shape \(2, 3\), got {dtype.__name__}"
    for loss, first, second, _ in LOSSES.values():
        with pytest.raises(ValueError, match=message):
            loss(first, second, where=weights)
    for loss in (losses.smooth_l1, losses.binary_nll):
        with pytest.raises(ValueError, match=message):
            loss(x[..., 0], x[..., 1], where=weights)


# Interpolation of features.


@pytest.mark.parametrize(
    ("x", "want"),
    [
        ([0, 1, 2, 3], [0, 0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3]),
        ([0, 1, 2], [0.25, 1.75]),
        (range(8), [0.5, 2.5, 4.5, 6.5]),
        ([2, 7, 1], [2, 7, 1]),
    ],
)
def test_resize_features_by_hand(x, want):
    assert losses.resize_features(jnp.array(x, jnp.float32), len(want)).tolist() == want


@pytest.mark.parametrize(("width", "size"), [(64, 192), (768, 2048), (192, 64), (7, 13), (13, 5)])
def test_resize_features_is_the_resize_of_jax_without_antialiasing(width, size):
    x = jnp.asarray(np.random.default_rng(1).normal(size=(3, width)), jnp.float32)
    want = jax.image.resize(x, (3, size), "linear", antialias=False)
    np.testing.assert_allclose(losses.resize_features(x, size), want, atol=1e-5)


def test_resize_features_is_linear_and_keeps_constants_and_leading_axes():
    x, y = jnp.asarray(WIDE_TEACHER), jnp.asarray(WIDE_TEACHER[::-1])
    resize = functools.partial(losses.resize_features, size=D)
    np.testing.assert_allclose(resize(2 * x - 3 * y), 2 * resize(x) - 3 * resize(y), atol=1e-5)
    np.testing.assert_allclose(resize(jnp.full((4, E), 1.7)), jnp.full((4, D), 1.7), rtol=1e-6)
    assert jnp.array_equal(resize(x)[1, 2], resize(x[1, 2]))
    assert resize(x.astype(jnp.bfloat16)).dtype == jnp.float32


# Invariances.


@pytest.mark.parametrize("shift", [-1000.0, 1000.0])  # exp(1000) overflows
def test_a_common_shift_of_the_logits_changes_nothing(shift):
    with jax.enable_x64(True):
        logits, teacher = LOGITS.astype(np.float64), TEACHER_LOGITS.astype(np.float64)
        np.testing.assert_allclose(nll_of_labels(logits + shift), nll_of_labels(logits), rtol=1e-9)
        want = soft_cross_entropy(logits, teacher)
        np.testing.assert_allclose(
            soft_cross_entropy(logits + shift, teacher - shift), want, rtol=1e-9
        )
        # The opposite: one logit alone.
        moved = logits + np.eye(V)[4]
        assert not np.any(np.isclose(nll_of_labels(moved), nll_of_labels(logits)))
        assert not np.any(np.isclose(soft_cross_entropy(moved, teacher), want))


def test_cosine_depends_on_direction_only():
    a, b = jnp.asarray(STATE), jnp.asarray(TEACHER)
    cosine = cosine_similarity
    np.testing.assert_allclose(cosine(7 * a, 0.01 * b), cosine(a, b), rtol=1e-5)
    np.testing.assert_allclose(cosine(a, -b), -cosine(a, b), rtol=1e-6)
    np.testing.assert_allclose(cosine(a, 3 * a), jnp.ones((B, L)), rtol=1e-6)
    orthogonal = jnp.stack([-a[..., 1], a[..., 0], *(0 * a[..., 2:]).transpose(2, 0, 1)], axis=-1)
    np.testing.assert_allclose(cosine(a, orthogonal), jnp.zeros((B, L)), atol=1e-6)
    assert jnp.all(jnp.abs(cosine(a, b)) < 1)


def test_alignment_is_minus_the_cosine_to_the_resized_teacher():
    s, t = jnp.asarray(STATE), jnp.asarray(WIDE_TEACHER)
    np.testing.assert_allclose(alignment(losses.resize_features(t, D), 2 * t), -1, rtol=1e-6)
    np.testing.assert_allclose(alignment(-losses.resize_features(t, D), t), 1, rtol=1e-6)
    # Per token: another teacher token, another loss.
    moved = alignment(s, t[:, ::-1])
    assert not jnp.any(jnp.isclose(moved, alignment(s, t), atol=1e-3)[:, ::2])


def test_zero_vectors_have_cosine_zero_and_finite_gradients():
    zero = jnp.zeros((1, 2, D))
    for a, b in [(zero, zero), (zero, jnp.asarray(STATE[:1, :2]))]:
        value, grads = jax.value_and_grad(
            lambda a, b: cosine_similarity(a, b).sum(), argnums=(0, 1)
        )(a, b)
        assert float(value) == 0.0
        assert all(bool(jnp.isfinite(grad).all()) for grad in grads)


def test_short_vectors_are_floored():
    # |a| = 5e-7 counts as 1e-6: half the cosine of 1.
    a = jnp.array([[[3e-7, 4e-7]]])
    np.testing.assert_allclose(cosine_similarity(a, 1e7 * a), [[0.5]], rtol=1e-5)


@pytest.mark.parametrize("weight", [0.1, 3.0])
@pytest.mark.parametrize("stop", [2, 94, 1500])
def test_linear_fade_is_a_line_to_exactly_zero(weight, stop):
    steps = jnp.array([0, stop // 2, stop, stop + 1, 10 * stop])
    fade = functools.partial(losses.linear_fade, weight=weight, stop_step=stop)
    for got in (fade(steps), jax.jit(fade)(steps)):
        assert got.dtype == jnp.float32
        np.testing.assert_allclose(got[:2], [weight, weight / 2], rtol=3e-7)
        assert got[2:].tolist() == [0.0, 0.0, 0.0]


def test_linear_fade_without_a_stop_step_is_zero():
    assert losses.linear_fade(jnp.arange(3), weight=0.8, stop_step=0).tolist() == [0.0] * 3


# Precision.


def test_losses_of_bfloat16_are_computed_in_float32():
    # bfloat16 has three digits: log 2 would be 0.6914 or 0.6953, and 0.8 would be 0.8008.
    logits = jnp.zeros((1, 1, 2), jnp.bfloat16)
    vector, other = (jnp.array([[x]], jnp.bfloat16) for x in ([3.0, 4.0], [0.0, 2.0]))
    for got, want in [
        (token_nll(logits, jnp.array([[1]])), math.log(2.0)),
        (losses.token_entropy(logits), math.log(2.0)),
        (soft_cross_entropy(logits, logits), math.log(2.0)),
        (cosine_similarity(vector, other), 0.8),
        (alignment(vector, other), -0.8),
    ]:
        assert got.dtype == jnp.float32
        np.testing.assert_allclose(got, [[want]], rtol=1e-6)


# Slopes and masks. Each loss as a function of two arrays and a mask, and whether the second is a
# teacher, which gets no gradient.


def _nll(logits: Any, labels: Any, where: Any = None) -> jax.Array:
    return losses.token_nll(logits, labels, where=where)


def _soft(logits: Any, teacher: Any, where: Any = None) -> jax.Array:
    return losses.soft_cross_entropy(logits, teacher, temperature=0.7, where=where)


def _cosine(a: Any, b: Any, where: Any = None) -> jax.Array:
    return losses.cosine_similarity(a, b, where=where)


def _alignment(student: Any, teacher: Any, where: Any = None) -> jax.Array:
    return losses.alignment(student, teacher, where=where)


def _entropy(logits: Any, labels: Any, where: Any = None) -> jax.Array:
    del labels  # has none
    return losses.token_entropy(logits, where=where)


def _top_entropy(logits: Any, labels: Any, where: Any = None) -> jax.Array:
    del labels
    return losses.token_entropy(logits, top_k=3, where=where)


LOSSES = {
    "token_nll": (_nll, LOGITS, LABELS, False),
    "token_entropy": (_entropy, LOGITS, LABELS, False),
    "token_entropy of 3": (_top_entropy, LOGITS, LABELS, False),
    "soft_cross_entropy": (_soft, LOGITS, TEACHER_LOGITS, True),
    "cosine_similarity": (_cosine, STATE, TEACHER, False),
    "alignment": (_alignment, STATE, WIDE_TEACHER, True),
}


@pytest.mark.parametrize("name", LOSSES)
def test_gradient_is_the_slope(name):
    loss, first, second, _ = LOSSES[name]
    with jax.enable_x64(True):
        x, other = jnp.asarray(first, jnp.float64), jnp.asarray(second)
        other = other.astype(jnp.float64) if other.dtype == jnp.float32 else other
        arrays: Any = (x, other) if name == "cosine_similarity" else (x,)

        @jax.jit
        def total(*arrays):
            return loss(*(*arrays, other)[:2], where=WHERE)

        check_grads(total, arrays, order=2, modes=("rev",), rtol=1e-5, atol=1e-6)


@functools.cache
def masked_value_and_gradients(name: str) -> Any:
    loss, _, second, is_teacher = LOSSES[name]

    def total(x, y, where):
        values = loss(x, y, where)
        return losses.masked_sum(values, where=where)[0], values

    has_target = is_teacher or second.dtype.kind == "i"
    arguments = (0,) if has_target else (0, 1)
    return jax.jit(jax.value_and_grad(total, argnums=arguments, has_aux=True))


@pytest.mark.parametrize("junk", [jnp.nan, jnp.inf, 1e30])
@pytest.mark.parametrize("name", LOSSES)
def test_masked_tokens_do_not_exist(name, junk):
    _, first, second, _ = LOSSES[name]
    run = masked_value_and_gradients(name)
    x, y = (
        np.where(WHERE if a.ndim == 2 else WHERE[..., None], a, -1 if a.ndim == 2 else junk)
        for a in (first, second)
    )
    (value, values), grads = run(x, y.astype(second.dtype), WHERE)
    (want, _), want_grads = run(first[WHERE][None], second[WHERE][None], np.ones((1, 3), bool))
    np.testing.assert_allclose(value, want, rtol=1e-6)
    assert not values[~WHERE].any()
    for grad, want_grad in zip(grads, want_grads, strict=True):
        np.testing.assert_allclose(grad[WHERE], want_grad[0], rtol=1e-5, atol=1e-7)
        assert not grad[~WHERE].any()
        assert bool(want_grad.any())


@pytest.mark.parametrize("name", ["soft_cross_entropy", "alignment"])
def test_the_teacher_gets_no_gradient(name):
    loss, first, second, _ = LOSSES[name]
    total = jax.jit(lambda x, y: loss(x, y).sum())
    to_student, to_teacher = jax.grad(total, argnums=(0, 1))(first, second)
    assert bool(to_student.any())
    assert not to_teacher.any()
