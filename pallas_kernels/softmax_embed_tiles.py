"""Softmax-embedding on one tile: all tokens (rows) and some classes of the vocabulary (columns).

    P = exp(Y - L)    e = P W    L = logsumexp(Y)

Every derivative up to the second is made of such tiles: sums over classes of what belongs to a
token, sums over tokens of what belongs to a class, and parts of arrays like Y. A formula returns
the three as functions, for the loop around it to call what it keeps. The order of the formulas:
`softmax_embed`.
"""

# Dimension key: V classes of the tile, D width, ... the axes of tokens.

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

MASKED_SCORE = -1e30  # finite, so that a part of the vocabulary without a class stays finite

Arrays = tuple[jax.Array, ...]


def wide(*arrays: jax.Array) -> jnp.dtype:
    """What products are summed in: float32 or better."""
    return jnp.result_type(jnp.float32, *(x.dtype for x in arrays))


def _dot(a: jax.Array, b: jax.Array, axes: tuple[Sequence[int], Sequence[int]]) -> jax.Array:
    """Sum of products over axes of each; `a` is rounded to `b`'s dtype."""
    dims = (axes, ((), ()))
    return jax.lax.dot_general(a.astype(b.dtype), b, dims, preferred_element_type=wide(b))


def scores(g: jax.Array, w: jax.Array) -> jax.Array:
    """`[..., D], [V, D] -> [..., V]`."""
    return _dot(g, w, ((g.ndim - 1,), (1,)))


def mix(p: jax.Array, w: jax.Array) -> jax.Array:
    """`[..., V], [V, D] -> [..., D]`: a sum over classes."""
    return _dot(p, w, ((p.ndim - 1,), (0,)))


def collect(p: jax.Array, g: jax.Array) -> jax.Array:
    """`[..., V], [..., D] -> [V, D]`: a sum over tokens."""
    tokens = tuple(range(p.ndim - 1))
    return _dot(p, g, (tokens, tokens))


class Sums(NamedTuple):
    """What a tile adds to its tokens, its parts of arrays like Y, what it adds to its classes."""

    rows: Callable[[], Arrays] = tuple
    parts: Callable[[], Arrays] = tuple
    columns: Callable[[], Arrays] = tuple


def _total(x: jax.Array) -> jax.Array:
    return jnp.sum(x, axis=-1, keepdims=True)


def _probabilities(y: jax.Array, lse: jax.Array) -> jax.Array:
    return jnp.where(y > MASKED_SCORE / 2, jnp.exp(y - lse), 0)


def forward(parts: Arrays, rows: Arrays, columns: Arrays) -> Sums:
    """Parts y; columns w. Row results: the mixed rows of w, their weights' sum and exponent."""
    (y,), (w,) = parts, columns
    top = jnp.max(y, axis=-1, keepdims=True)
    p = _probabilities(y, top)
    return Sums(rows=lambda: (mix(p, w), _total(p), top))


def merge(a: Arrays, b: Arrays) -> Arrays:
    """Two parts of `forward`'s row results as one."""
    top = jnp.maximum(a[2], b[2])
    left, right = jnp.exp(a[2] - top), jnp.exp(b[2] - top)
    return left * a[0] + right * b[0], left * a[1] + right * b[1], top


def add(a: Arrays, b: Arrays) -> Arrays:
    """Two parts of any other formula's results as one."""
    return tuple(x + y for x, y in zip(a, b, strict=True))


def tangent(parts: Arrays, rows: Arrays, columns: Arrays) -> Sums:
    """Parts y, y'; rows L; columns w, w'. Row results (P y') W + P W', rowsum(P y')."""
    (y, dy), (lse,), (w, dw) = parts, rows, columns
    p = _probabilities(y, lse)
    return Sums(rows=lambda: (mix(p * dy, w) + mix(p, dw), _total(p * dy)))


def backward(parts: Arrays, rows: Arrays, columns: Arrays) -> Sums:
    """Parts y; rows g, L, mu; columns w: dY = P (g W^T - mu), dW = P^T g."""
    (y,), (g, lse, mu), (w,) = parts, rows, columns
    p = _probabilities(y, lse)
    return Sums(parts=lambda: (p * (scores(g, w) - mu),), columns=lambda: (collect(p, g),))


def backward_tangent(parts: Arrays, rows: Arrays, columns: Arrays) -> Sums:
    """Parts y, y'; rows g, g', L, L', mu, mu'; columns w, w'. The derivative of `backward`,

    P' = P (Y' - L')    dY' = P' (g W^T - mu) + P (g' W^T + g W'^T - mu')    dW' = P'^T g + P^T g'
    """
    (y, dy), (g, dg, lse, dlse, mu, dmu), (w, dw) = parts, rows, columns
    p = _probabilities(y, lse)
    dp = p * (dy - dlse)

    def part() -> Arrays:
        return (dp * (scores(g, w) - mu) + p * (scores(dg, w) + scores(g, dw) - dmu),)

    return Sums(parts=part, columns=lambda: (collect(dp, g) + collect(p, dg),))


def double_backward_rows(parts: Arrays, rows: Arrays, columns: Arrays) -> Sums:
    """Parts y, A; rows g, L, delta; columns w, C, where A, C are the cotangents of dY, dW.

    Row results rowsum(P A), rowsum(P ((g W^T - delta) A + g C^T))
    """
    (y, a), (g, lse, delta), (w, c) = parts, rows, columns
    p = _probabilities(y, lse)
    z = (scores(g, w) - delta) * a + scores(g, c)
    return Sums(rows=lambda: (_total(p * a), _total(p * z)))


def double_backward(parts: Arrays, rows: Arrays, columns: Arrays) -> Sums:
    """Parts y, A; rows g, L, mu, a, z; columns w, C: the transpose of `backward_tangent`, whole.

    T = P (A - a)    Y^ = P ((g W^T - mu) (A - a) + g C^T - z)    g^ = T W + P C    W^ = T^T g
    """
    (y, a), (g, lse, mu, mean_a, mean_z), (w, c) = parts, rows, columns
    p, a = _probabilities(y, lse), a - mean_a
    t = p * a
    return Sums(
        lambda: (mix(t, w) + mix(p, c),),
        lambda: (p * ((scores(g, w) - mu) * a + scores(g, c) - mean_z),),
        lambda: (collect(t, g),),
    )


def update(parts: Arrays, rows: Arrays, columns: Arrays) -> Sums:
    """Parts y; rows g, L, mu, alpha; columns w: Y - alpha P (g W^T - mu)."""
    (y,), (g, lse, mu, alpha), (w,) = parts, rows, columns
    p = _probabilities(y, lse)
    return Sums(parts=lambda: (y - alpha * p * (scores(g, w) - mu),))


def update_tangent(parts: Arrays, rows: Arrays, columns: Arrays) -> Sums:
    """Parts y, y'; rows g, g', L, L', mu, mu', alpha, alpha'; columns w, w': of `update`, with L
    and mu as further arguments."""
    (y, dy), (g, dg, lse, dlse, mu, dmu, alpha, dalpha), (w, dw) = parts, rows, columns
    p, d = _probabilities(y, lse), scores(g, w) - mu
    step = (alpha * (dy - dlse) + dalpha) * d + alpha * (scores(dg, w) + scores(g, dw) - dmu)
    return Sums(parts=lambda: (dy - p * step,))


def update_backward(parts: Arrays, rows: Arrays, columns: Arrays) -> Sums:
    """Parts y, u; rows g, L, mu, alpha; columns w: the transpose of `update_tangent`.

    T = -alpha P u    Y^ = u + T (g W^T - mu)    g^ = T W    W^ = T^T g
    L^ = -rowsum(T (g W^T - mu))    mu^ = -rowsum(T)    alpha^ = -rowsum(P u (g W^T - mu))
    """
    (y, u), (g, lse, mu, alpha), (w,) = parts, rows, columns
    p, d = _probabilities(y, lse), scores(g, w) - mu
    t = -alpha * p * u
    return Sums(
        lambda: (mix(t, w), -_total(t * d), -_total(t), -_total(p * u * d)),
        lambda: (u + t * d,),
        lambda: (collect(t, g),),
    )


class Formula(NamedTuple):
    """A tile's results and how those of its rows are joined; initial: of each of them."""

    tile: Callable[[Arrays, Arrays, Arrays], Sums]
    merge: Callable[[Arrays, Arrays], Arrays] = add
    initial: Sequence[float] = (0.0,) * 4


FORWARD = Formula(forward, merge, (0.0, 0.0, MASKED_SCORE))
