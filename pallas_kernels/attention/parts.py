"""Attention to keys that lie in several arrays, heads first, for decoding: plain JAX."""

# Dimension key: B batch, L queries, H query heads, K key heads, G = H / K, C head size; of a part:
# N rows, R = B L / N queries of a row, M keys.

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxlib_methods.pallas_kernels.attention.tiles import MASKED_SCORE


class Part(NamedTuple):
    """Keys that B / N rows of queries, one behind another, have in common; N = B is their own.

    key, value: `[N, K, M, C]`; where: bool `[N, R, M]`, which of them a query sees.
    """

    key: jax.Array
    value: jax.Array
    where: jax.Array


def attend_parts(query: jax.Array, parts: Sequence[Part]) -> jax.Array:
    """Grouped-query softmax attention to the keys of all parts; see `attention_reference`.

        o = sum_p exp(t_p - t) n_p / sum_p exp(t_p - t) z_p,   t = max_p t_p

    with t_p the largest score of a part, z_p = sum_j exp(s_j - t_p) and n_p the same sum of
    exp(s_j - t_p) v_j. query: `[B, L, H, C]`; at least one part. Returns `[B, L, H, C]` in query's
    dtype. A query that sees nothing averages all values.
    """
    tops, totals, mixed = zip(*(_attend(query, part) for part in parts), strict=True)
    top = functools.reduce(jnp.maximum, tops)
    weights = [jnp.exp(each - top) for each in tops]
    total, joined = (
        functools.reduce(jnp.add, map(jnp.multiply, weights, sums)) for sums in (totals, mixed)
    )
    return (joined / total).reshape(query.shape).astype(query.dtype)


def _attend(query: jax.Array, part: Part) -> tuple[jax.Array, jax.Array, jax.Array]:
    """t_p and z_p, `[B, L, K, G, 1]`, and n_p, `[B, L, K, G, C]`, in float32 or better."""
    B, L, H, C = query.shape
    N, K, M, _ = part.key.shape
    rows, group = B * L // N, H // K
    wide = jnp.promote_types(query.dtype, jnp.float32)
    # All queries of a head behind one another: a matrix, even where each row has a single one.
    q_NKRGC = jnp.moveaxis((query * C**-0.5).reshape(N, rows, K, group, C), 2, 1)
    q_NKQC = q_NKRGC.reshape(N, K, rows * group, C)
    s_NKQM = jnp.einsum("nkqc,nkmc->nkqm", q_NKQC, part.key, preferred_element_type=wide)
    seen = part.where[:, None, :, None]
    s_NKRGM = jnp.where(seen, s_NKQM.reshape(N, K, rows, group, M), jnp.asarray(MASKED_SCORE, wide))
    top = s_NKRGM.max(axis=-1, keepdims=True)
    e_NKRGM = jnp.exp(s_NKRGM - top)
    e_NKQM = e_NKRGM.reshape(N, K, rows * group, M).astype(part.value.dtype)
    mixed = jnp.einsum("nkqm,nkmc->nkqc", e_NKQM, part.value, preferred_element_type=wide)
    found = (top, e_NKRGM.sum(axis=-1, keepdims=True), mixed.reshape(N, K, rows, group, C))
    top, total, mixed = (jnp.moveaxis(x, 1, 2).reshape(B, L, K, group, x.shape[-1]) for x in found)
    return top, total, mixed
