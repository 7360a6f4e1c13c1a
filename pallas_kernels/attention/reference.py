"""Attention with its scores in one array, the specification: plain JAX, any derivative."""

# Dimension key: B batch, L queries, M keys, H query heads, K key heads, G = H / K, C head size.

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxlib_methods.pallas_kernels.attention.tiles import MASKED_SCORE, sees


def visible(
    query_positions: jax.Array,
    key_positions: jax.Array,
    query_segments: jax.Array,
    key_segments: jax.Array,
    *,
    window: int | None = None,
) -> jax.Array:
    """Which keys a query may read: same document (or a shared key), not later, not padding.

    query_positions, query_segments: `[B, L]`; key_positions, key_segments: `[B, M]`; int32.
    Returns bool `[B, L, M]`.
    """
    queries = (x[:, :, None] for x in (query_positions, query_segments))
    keys = (x[:, None, :] for x in (key_positions, key_segments))
    (positions, segments), (key_positions, key_segments) = queries, keys
    return sees(positions, key_positions, segments, key_segments, window)


def attention_reference(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    where: jax.Array,
    own: tuple[jax.Array, jax.Array] | None = None,
) -> jax.Array:
    """Grouped-query softmax attention, scores and softmax in float32 or better.

        o_i = sum_j softmax_j(<q_i, k_j> / sqrt(C)) v_j     over the j with where[i, j]

    query: `[B, L, H, C]`; key, value: `[B, M, K, C]` with H a multiple of K; where: bool
    `[B, L, M]`. own: a key and a value for each query, `[B, L, K, C]`, which it sees beside the
    others, as the candidates of an energy-based transformer do (EBT, footnote 12). Returns
    `[B, L, H, C]` in query's dtype. A row without a visible key averages all values: finite, and
    for padding only.
    """
    B, L, H, C = query.shape
    K = key.shape[2]
    wide = jnp.promote_types(query.dtype, jnp.float32)
    # Heads in front of positions: XLA's matmuls on a CPU, and more so their gradients, are several
    # times slower where batch dimensions stand between others, or where one has size 1.
    g = "" if K == H else "g"
    shape = (B, L, K, C) if K == H else (B, L, K, H // K, C)
    q_BKGLC = jnp.moveaxis(query.reshape(shape), 1, -2)
    if own is None:
        q_BKGLC *= jnp.asarray(C**-0.5, query.dtype)
    k_BKMC, v_BKMC = jnp.swapaxes(key, 1, 2), jnp.swapaxes(value, 1, 2)
    s_BKGLM = jnp.einsum(f"bk{g}lc,bkmc->bk{g}lm", q_BKGLC, k_BKMC, preferred_element_type=wide)
    if own is not None:  # an energy is what scores add up to: scaled queries would be rounded
        s_BKGLM *= C**-0.5
    seen = where[:, None] if K == H else where[:, None, None]
    s_BKGLM = jnp.where(seen, s_BKGLM, jnp.asarray(MASKED_SCORE, wide))
    if own is None:
        p_BKGLM = jax.nn.softmax(s_BKGLM, axis=-1).astype(value.dtype)
        mixed = jnp.einsum(f"bk{g}lm,bkmc->bk{g}lc", p_BKGLM, v_BKMC)
    else:
        # The softmax over both without joining them, divided after the products with the values.
        k_BKGLC, v_BKGLC = (
            jnp.expand_dims(jnp.swapaxes(x, 1, 2), [2] * len(g)).astype(wide) for x in own
        )
        s_BKGL1 = C**-0.5 * jnp.sum(q_BKGLC.astype(wide) * k_BKGLC, axis=-1, keepdims=True)
        top = jnp.maximum(s_BKGLM.max(axis=-1, keepdims=True), s_BKGL1)
        top = jax.lax.stop_gradient(top)
        e_BKGLM, e_BKGL1 = jnp.exp(s_BKGLM - top), jnp.exp(s_BKGL1 - top)
        mixed = jnp.einsum(
            f"bk{g}lm,bkmc->bk{g}lc",
            e_BKGLM.astype(value.dtype),
            v_BKMC,
            preferred_element_type=wide,
        )
        mixed = (mixed + e_BKGL1 * v_BKGLC) / (e_BKGLM.sum(axis=-1, keepdims=True) + e_BKGL1)
    return jnp.moveaxis(mixed, -2, 1).reshape(B, L, H, C).astype(query.dtype)


class Keys(NamedTuple):
    """What queries attend to. key, value: `[B, M, K, C]`; positions, segments: int32 `[B, M]`."""

    key: jax.Array
    value: jax.Array
    positions: jax.Array
    segments: jax.Array
