"""Attention's mathematics on one tile: some queries (rows) and some keys (columns).

    S = s Q K^T    P = exp(S - L)    O = P V    L = logsumexp(S)          s = 1 / sqrt(C)

Every derivative up to the second is a sum of such tiles over keys (of what belongs to a query) or
over queries (of what belongs to a key). A formula returns both as functions, for the loop around it
to call what it sums. Loops: `xla`, `tpu` and `gpu`; order of the formulas: `derivatives`.
"""

# Dimension key: R rows, M columns, C head size, E value's head size.

import dataclasses
import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

MASKED_SCORE = -1e30  # finite, so that a row that sees nothing stays finite
SHARED_SEGMENT = -1  # of a key that every document sees

Arrays = tuple[jax.Array, ...]
Side = Literal["rows", "columns"]


def sees(
    query_positions: jax.Array,
    key_positions: jax.Array,
    query_segments: jax.Array,
    key_segments: jax.Array,
    window: int | None = None,
) -> jax.Array:
    """Which keys a query may read; int32 arguments that broadcast to the result's shape.

    Same document (or a shared key), not later, not padding; with a window, fewer than `window`
    positions back unless shared.
    """
    shared = key_segments == SHARED_SEGMENT
    same = query_segments == key_segments
    if window is not None:
        same &= query_positions - key_positions < window
    return (same | shared) & (query_positions >= key_positions) & (key_segments != 0)


def wide(dtype: jax.typing.DTypeLike) -> jnp.dtype:
    """What products of `dtype` are summed in: float32 or better."""
    return jnp.promote_types(dtype, jnp.float32)


def _dot(axes: tuple[int, int], a: jax.Array, b: jax.Array) -> jax.Array:
    """Sum of products over one axis of each; `a` is rounded to `b`'s dtype."""
    dims = (((axes[0],), (axes[1],)), ((), ()))
    return jax.lax.dot_general(a.astype(b.dtype), b, dims, preferred_element_type=wide(b.dtype))


def _dots(axes: tuple[int, int], pairs: tuple[Arrays, ...]) -> jax.Array:
    return functools.reduce(operator.add, (_dot(axes, *pair) for pair in pairs))


@dataclasses.dataclass(frozen=True)
class Tile:
    """A tile and the products over it, each of one or more pairs, summed.

    where: bool `[R, M]`, which keys a query sees; scale: of the scores. A loop whose matrices are
    no arrays brings a tile of its own.
    """

    where: jax.Array
    scale: float

    def scores(self, *pairs: Any) -> jax.Array:
        """Of `[R, C], [M, C] -> [R, M]`."""
        return _dots((1, 1), pairs)

    def mix(self, *pairs: Any) -> Any:
        """Of `[R, M], [M, C] -> [R, C]`: a sum over keys."""
        return _dots((1, 0), pairs)

    def collect(self, *pairs: Any) -> Any:
        """Of `[R, M], [R, C] -> [M, C]`: a sum over queries."""
        return _dots((0, 0), pairs)

    def total(self, x: jax.Array) -> jax.Array:
        """`[R, M] -> [R, 1]`."""
        return jnp.sum(x, axis=1, keepdims=True)


class Sums(NamedTuple):
    """What a tile adds to its rows and to its columns."""

    rows: Callable[[], Arrays]
    columns: Callable[[], Arrays]


def _probabilities(on: Tile, q: jax.Array, k: jax.Array, lse: jax.Array) -> jax.Array:
    return jnp.where(on.where, jnp.exp(on.scale * on.scores((q, k)) - lse), 0)


def forward(on: Tile, rows: Arrays, columns: Arrays) -> Sums:
    """Rows q, columns k, v. Row results: the mixed values, their weights' sum and exponent."""
    (q,), (k, v) = rows, columns
    s = jnp.where(on.where, on.scale * on.scores((q, k)), MASKED_SCORE)
    top = jnp.max(s, axis=1, keepdims=True)
    p = jnp.where(on.where, jnp.exp(s - top), 0)
    return Sums(lambda: (on.mix((p, v)), on.total(p), top), lambda: ())


def merge(a: Arrays, b: Arrays) -> Arrays:
    """Two parts of `forward`'s row results as one."""
    top = jnp.maximum(a[2], b[2])
    left, right = jnp.exp(a[2] - top), jnp.exp(b[2] - top)
    return left * a[0] + right * b[0], left * a[1] + right * b[1], top


def add(a: Arrays, b: Arrays) -> Arrays:
    """Two parts of any other formula's results as one."""
    return tuple(x + y for x, y in zip(a, b, strict=True))


def tangent(on: Tile, rows: Arrays, columns: Arrays) -> Sums:
    """Rows q, q', L, centre c; columns k, k', v, v'. With W = S' - c, row results

    (P W) V + P V',  rowsum(P W)
    """
    (q, dq, lse, centre), (k, dk, v, dv) = rows, columns
    p = _probabilities(on, q, k, lse)
    pw = p * (on.scale * on.scores((dq, k), (q, dk)) - centre)
    return Sums(lambda: (on.mix((pw, v), (p, dv)), on.total(pw)), lambda: ())


def backward(on: Tile, rows: Arrays, columns: Arrays) -> Sums:
    """Rows q, G, L, mu; columns k, v. With dS = P (G V^T - mu)

    dQ = s dS K;  dK = s dS^T Q,  dV = P^T G
    """
    (q, g, lse, mu), (k, v) = rows, columns
    p = _probabilities(on, q, k, lse)
    ds = on.scale * p * (on.scores((g, v)) - mu)
    return Sums(lambda: (on.mix((ds, k)),), lambda: (on.collect((ds, q)), on.collect((p, g))))


def backward_tangent(on: Tile, rows: Arrays, columns: Arrays) -> Sums:
    """Rows q, q', G, G', L, L', mu, mu'; columns k, k', v, v'. The derivative of `backward`,

    P' = P (S' - L')    dS' = P' (G V^T - mu) + P (G' V^T + G V'^T - mu')
    dQ' = s (dS' K + dS K');  dK' = s (dS'^T Q + dS^T Q'),  dV' = P'^T G + P^T G'
    """
    (q, dq, g, dg, lse, dlse, mu, dmu), (k, dk, v, dv) = rows, columns
    p = _probabilities(on, q, k, lse)
    dp = p * (on.scale * on.scores((dq, k), (q, dk)) - dlse)
    d = on.scores((g, v)) - mu
    ds = on.scale * p * d
    dds = on.scale * (dp * d + p * (on.scores((dg, v), (g, dv)) - dmu))
    return Sums(
        lambda: (on.mix((dds, k), (ds, dk)),),
        lambda: (on.collect((dds, q), (ds, dq)), on.collect((dp, g), (p, dg))),
    )


def double_backward_rows(on: Tile, rows: Arrays, columns: Arrays) -> Sums:
    """Rows q, A, G, L, delta, centre c; columns k, B, v, C, where A, B, C are the cotangents of
    dQ, dK, dV. With W = s (A K^T + Q B^T) - c and D = G V^T, row results

        rowsum(P W),  rowsum(P ((D - delta) W + G C^T))
    """
    (q, a, g, lse, delta, centre), (k, b, v, c) = rows, columns
    p = _probabilities(on, q, k, lse)
    w = on.scale * on.scores((a, k), (q, b)) - centre
    z = (on.scores((g, v)) - delta) * w + on.scores((g, c))
    return Sums(lambda: (on.total(p * w), on.total(p * z)), lambda: ())


def double_backward(on: Tile, rows: Arrays, columns: Arrays) -> Sums:
    """Rows q, A, G, L, mu, w, z; columns k, B, v, C: the transpose of `backward_tangent`, whole.

    T = P (W - w)    R = P ((D - mu) (W - w) + G C^T - z)    W = s (A K^T + Q B^T)
    Q^ = s (R K + dS B),  G^ = T V + P C;  K^ = s (R^T Q + dS^T A),  V^ = T^T G
    """
    (q, a, g, lse, mu, w_mean, z_mean), (k, b, v, c) = rows, columns
    p = _probabilities(on, q, k, lse)
    w = on.scale * on.scores((a, k), (q, b)) - w_mean
    d = on.scores((g, v)) - mu
    t, ds = p * w, on.scale * p * d
    r = on.scale * p * (d * w + on.scores((g, c)) - z_mean)
    return Sums(
        lambda: (on.mix((r, k), (ds, b)), on.mix((t, v), (p, c))),
        lambda: (on.collect((r, q), (ds, a)), on.collect((t, g))),
    )


class Places(NamedTuple):
    """int32 `[B, R]` of the queries, `[B, M]` of the keys."""

    query_positions: jax.Array
    query_segments: jax.Array
    key_positions: jax.Array
    key_segments: jax.Array


class Plan(NamedTuple):
    """How tiles are walked over. rows, columns: of a tile; both divide the arrays' lengths."""

    loop: str
    scale: float
    window: int | None
    rows: int
    columns: int
    interpret: bool = False


class Formula(NamedTuple):
    """A tile's results and how they are joined; initial: of each row result."""

    tile: Callable[[Tile, Arrays, Arrays], Sums]
    merge: Callable[[Arrays, Arrays], Arrays] = add
    initial: Sequence[float] = (0.0, 0.0)


def one_tile(
    plan: Plan, formula: Formula, side: Side, rows: Arrays, columns: Arrays
) -> tuple[Callable[..., Arrays], Any]:
    """What one tile adds to a side, and the shapes of its arguments; rows: `[B, K, R, X]`."""

    def tile(rows: Arrays, columns: Arrays) -> Arrays:
        on = Tile(jnp.ones((plan.rows, plan.columns), bool), plan.scale)
        return getattr(formula.tile(on, rows, columns), side)()

    def cut(arrays: Arrays, length: int) -> Any:
        return tuple(jax.ShapeDtypeStruct((length, x.shape[3]), x.dtype) for x in arrays)

    return tile, (cut(rows, plan.rows), cut(columns, plan.columns))


FORWARD = Formula(forward, merge, (0.0, 0.0, MASKED_SCORE))


def tiles_in_sight(plan: Plan, places: Places) -> jax.Array:
    """bool `[B, R / rows, M / columns]`: tiles in which some query sees some key."""
    if plan.loop == "tpu":
        # Its compiler (libtpu 0.0.42.1) may fuse the cut of two joined axes with the comparison,
        # and then ends with "Reshape should have supported layout before reaching the emitter".
        places = jax.lax.optimization_barrier(places)
    B, R = places.query_positions.shape
    M = places.key_positions.shape[1]

    def row(queries: Arrays) -> jax.Array:
        positions, segments = (x[:, :, None] for x in queries)
        keys = (places.key_positions[:, None], places.key_segments[:, None])
        seen = sees(positions, keys[0], segments, keys[1], plan.window)
        return seen.reshape(B, plan.rows, M // plan.columns, plan.columns).any(axis=(1, 3))

    queries = (places.query_positions, places.query_segments)
    cut = tuple(jnp.moveaxis(x.reshape(B, R // plan.rows, plan.rows), 1, 0) for x in queries)
    if plan.loop != "xla":  # GPUs and TPUs fuse it; a loop would be steps, one after another
        return jax.vmap(row, out_axes=1)(cut)
    return jnp.moveaxis(jax.lax.map(row, cut), 0, 1)


def span(hits: jax.Array) -> jax.Array:
    """bool `[..., N] -> [..., 2]`: index of the first hit and that behind the last; 0, 0: none."""
    count = hits.shape[-1]
    first = jnp.argmax(hits, axis=-1)
    behind = count - jnp.argmax(hits[..., ::-1], axis=-1)
    ends = jnp.stack([first, behind], axis=-1).astype(jnp.int32)
    return jnp.where(hits.any(axis=-1, keepdims=True), ends, 0)
