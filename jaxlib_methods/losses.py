"""Every paper's mathematics as pure functions of arrays. Importing this costs only jax.

A loss takes arrays first, returns one number per token in nats, and never reduces. `where`
(bool) deletes a token before anything nonlinear happens to it, so it may hold NaN; weights, or
another shape, are a ValueError. Reduce with `masked_sum` to (sum, count) and divide once, after
micro-batches and hosts have been added.
"""

# Dimension key: B batch, L sequence, D student width, E teacher width, V vocabulary.

import jax
import jax.numpy as jnp

from jaxlib_methods.pallas_kernels.interpolation import interpolate

NORM_FLOOR = 1e-6


def _wide(x: jax.Array) -> jax.Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _check_where(where: jax.Array, shape: tuple[int, ...]) -> None:
    if where.dtype != jnp.bool_ or where.shape != shape:
        raise ValueError(f"where must be bool of shape {shape}, got {where.dtype} of {where.shape}")


def _keep(x: jax.Array, where: jax.Array | None) -> jax.Array:
    if where is None:
        return x
    _check_where(where, x.shape[:-1])
    return jnp.where(where[..., None], x, jnp.zeros((), x.dtype))


def token_nll(logits: jax.Array, labels: jax.Array, *, where: jax.Array | None = None) -> jax.Array:
    """Negative log-likelihood of each label.

        l_t = logsumexp_v z_tv - z_t[y_t]

    logits: `[B, L, V]`; labels: int `[B, L]`; where: bool `[B, L]`, False gives 0 and no gradient.
    Returns `[B, L]` nats, float32 or better; NaN for a label that is none of the V, such as -100:
    delete its token by `where`. Raises ValueError for labels that are not integers.

    >>> import jax.numpy as jnp
    >>> bool(jnp.allclose(token_nll(jnp.zeros((1, 1, 4)), jnp.array([[2]])), jnp.log(4.0)))
    True
    """
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise ValueError(f"labels must be integers, got {labels.dtype}")
    logits = _wide(_keep(logits, where))
    # Compare and sum instead of a gather: a gather along a sharded vocabulary moves all of it.
    vocabulary = jnp.expand_dims(jnp.arange(logits.shape[-1]), range(labels.ndim))
    picked = vocabulary == labels[..., None]
    nll = jax.nn.logsumexp(logits, axis=-1) - jnp.where(picked, logits, 0.0).sum(axis=-1)
    # No score would be picked of it, and the loss would have no lower bound.
    nll = jnp.where((labels >= 0) & (labels < jnp.int32(logits.shape[-1])), nll, jnp.nan)
    return nll if where is None else jnp.where(where, nll, 0.0)


def token_entropy(
    logits: jax.Array, *, top_k: int | None = None, where: jax.Array | None = None
) -> jax.Array:
    """Entropy of each prediction, by which RPT (arXiv 2506.08007) and RMT choose tokens.

        H_t = -sum_v p_tv log p_tv,   p_t = softmax(z_t)

    With `top_k` over the k likeliest tokens alone, renormalised (RPT: 16). The logits at t predict
    token t + 1. logits: `[B, L, V]`, a masked vocabulary padding counts nothing; where: bool
    `[B, L]`, False gives 0 and no gradient. Returns `[B, L]` nats, float32 or better.

    >>> import jax.numpy as jnp
    >>> bool(jnp.allclose(token_entropy(jnp.zeros((1, 1, 8))), jnp.log(8.0)))
    True
    """
    logits = _wide(_keep(logits, where))
    if top_k is not None:
        logits = jax.lax.top_k(logits, min(top_k, logits.shape[-1]))[0]
    log_probs = jax.nn.log_softmax(logits, axis=-1)
    probs = jnp.exp(log_probs)
    # A masked score may be minus infinity, and 0 times it is not 0.
    entropy = -jnp.sum(probs * jnp.where(probs > 0, log_probs, 0.0), axis=-1)
    return entropy if where is None else jnp.where(where, entropy, 0.0)


def masked_sum(values: jax.Array, *, where: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Reduces per-token values to (sum, count), the pair that averages correctly.

    values: float `[...]`; where: bool of the same shape. Returns two scalars of values' dtype.
    Raises ValueError where `where` is not bool or of another shape.

    >>> import jax.numpy as jnp
    >>> s, n = masked_sum(jnp.array([1.0, 2.0, jnp.nan]), where=jnp.array([True, True, False]))
    >>> float(s), float(n)
    (3.0, 2.0)
    """
    _check_where(where, values.shape)
    return jnp.where(where, values, 0).sum(), where.sum(dtype=values.dtype)


def mean(total: jax.Array, count: jax.Array) -> jax.Array:
    """Divides a (sum, count) pair of scalars; 0 where nothing was counted.

    >>> float(mean(jnp.float32(6.0), jnp.float32(4.0)))
    1.5
    """
    return total / jnp.maximum(count, 1)


def resize_features(x: jax.Array, size: int) -> jax.Array:
    """Linear interpolation along the feature axis, the map P of LET (arXiv 2602.05393, method).

        s_j = clip((j + 1/2) D/size - 1/2, 0, D - 1),  i = floor(s_j),  a = s_j - i
        y_j = (1 - a) x_i + a x_(i + 1)

    The half-pixel convention of `align_corners=False`. Exact on constants, the identity where
    `size` is D. x: `[..., D]`. Returns `[..., size]`, float32 or better.

    >>> import jax.numpy as jnp
    >>> resize_features(jnp.array([0.0, 1.0, 2.0]), 2).tolist()
    [0.25, 1.75]
    """
    x = _wide(x)
    return x if size == x.shape[-1] else interpolate(x, size)


def cosine_similarity(a: jax.Array, b: jax.Array, *, where: jax.Array | None = None) -> jax.Array:
    """Cosine of the angle between two vectors per token.

        c_t = <a_t, b_t> / (max(|a_t|, 1e-6) max(|b_t|, 1e-6))

    a, b: `[B, L, D]`; where: bool `[B, L]`, False gives 0 and no gradient.
    Returns `[B, L]` between -1 and 1, float32 or better.

    >>> import jax.numpy as jnp
    >>> a, b = jnp.array([[[3.0, 4.0]]]), jnp.array([[[0.0, 2.0]]])
    >>> round(float(cosine_similarity(a, b)[0, 0]), 6)
    0.8
    """

    def unit(x: jax.Array) -> jax.Array:
        x = _wide(_keep(x, where))
        # The floor under the root, not after it: the root's slope at 0 is infinite.
        return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(x * x, axis=-1, keepdims=True), NORM_FLOOR**2))

    return jnp.sum(unit(a) * unit(b), axis=-1)


def alignment(
    student: jax.Array, teacher: jax.Array, *, where: jax.Array | None = None
) -> jax.Array:
    """LET's projection loss (arXiv 2602.05393, objective): minus the cosine to a late state.

        l_t = -<s_t, P sg(h_t)> / (|s_t| |P sg(h_t)|)

    P is `resize_features` to the student's width (the identity where the widths agree). The
    teacher's gradient is stopped.
    student: `[B, L, D]`; teacher: `[B, L, E]`; where: bool `[B, L]`, False gives 0.
    Returns `[B, L]` between -1 and 1.

    >>> import jax.numpy as jnp
    >>> h = jnp.array([[[1.0, 2.0]]])
    >>> round(float(alignment(3.0 * h, h)[0, 0]), 6)
    -1.0
    """
    target = resize_features(jax.lax.stop_gradient(teacher), student.shape[-1])
    return -cosine_similarity(student, target, where=where)


def linear_fade(step: jax.Array, *, weight: float, stop_step: int) -> jax.Array:
    """LET's weight schedule (arXiv 2602.05393): a straight line to exactly zero.

        lambda(s) = weight * max(0, (stop_step - s) / stop_step),   0 where stop_step is 0

    step: int or float, scalar or array. Returns float32 of step's shape.

    >>> import jax.numpy as jnp
    >>> linear_fade(jnp.array([0, 50, 100, 150]), weight=0.5, stop_step=100).tolist()
    [0.5, 0.25, 0.0, 0.0]
    """
    left = jnp.maximum(stop_step - jnp.asarray(step, jnp.float32), 0.0)
    share = left / max(stop_step, 1)
    # A compiler may multiply by 1 / stop_step: the first step's weight is exact all the same.
    return jnp.float32(weight) * jnp.where(left == max(stop_step, 1), 1.0, share)


def soft_cross_entropy(
    logits: jax.Array,
    teacher_logits: jax.Array,
    *,
    temperature: float = 1.0,
    where: jax.Array | None = None,
) -> jax.Array:
    """Cross-entropy against a teacher's distribution, the loss of SALT (arXiv 2410.18779).

        l_t = -sum_v softmax(z^T_t / temperature)_v log softmax(z_t)_v

    The teacher's gradient is stopped. logits, teacher_logits: `[B, L, V]`; where: bool `[B, L]`.
    Returns `[B, L]` nats.

    >>> import jax.numpy as jnp
    >>> z = jnp.zeros((1, 1, 8))
    >>> bool(jnp.allclose(soft_cross_entropy(z, z), jnp.log(8.0)))
    True
    """
    teacher = _wide(_keep(jax.lax.stop_gradient(teacher_logits), where)) / temperature
    log_probs = jax.nn.log_softmax(_wide(_keep(logits, where)), axis=-1)
    loss = -jnp.sum(jax.nn.softmax(teacher, axis=-1) * log_probs, axis=-1)
    return loss if where is None else jnp.where(where, loss, 0.0)


def smooth_l1(
    prediction: jax.Array,
    target: jax.Array,
    *,
    beta: float = 1.0,
    where: jax.Array | None = None,
) -> jax.Array:
    """Huber's loss scaled by 1 / beta: a parabola near zero, a straight line beyond beta.

        l = d^2 / (2 beta) where |d| < beta,   |d| - beta / 2 elsewhere,   d = prediction - target

    prediction, target: `[...]`; where: bool `[...]`, False gives 0 and no gradient. One number per
    element, `[...]`, float32 or better.

    >>> import jax.numpy as jnp
    >>> smooth_l1(jnp.array([0.5, 3.0]), jnp.zeros(2)).tolist()
    [0.125, 2.5]
    """
    distance = _wide(prediction) - _wide(target)
    if where is not None:
        _check_where(where, distance.shape)
        distance = jnp.where(where, distance, 0.0)
    size = jnp.abs(distance)
    return jnp.where(size < beta, 0.5 * distance**2 / beta, size - 0.5 * beta)


def binary_nll(
    logits: jax.Array, targets: jax.Array, *, where: jax.Array | None = None
) -> jax.Array:
    """Binary cross-entropy with logits.

        l = -y log sigmoid(z) - (1 - y) log sigmoid(-z)

    logits, targets (between 0 and 1), where (bool, False gives 0): `[...]`. One number per
    element in nats, `[...]`, float32 or better.

    >>> import jax.numpy as jnp
    >>> [round(float(l), 4) for l in binary_nll(jnp.zeros(2), jnp.array([1.0, 0.5]))]
    [0.6931, 0.6931]
    """
    z, y = _wide(logits), _wide(targets)
    if where is not None:
        _check_where(where, z.shape)
        z = jnp.where(where, z, 0.0)
    loss = jax.nn.softplus(z) - y * z
    return loss if where is None else jnp.where(where, loss, 0.0)
