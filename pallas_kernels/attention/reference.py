"""Attention with its scores in one array, and in tiles of queries: plain JAX, any derivative.

`attention_reference` is the specification. `tiled_attention` is the same, and the pattern of
energy-based transformers, with memory linear in the length.
"""

# Dimension key: B batch, L queries, M keys, H query heads, K key heads, G = H / K, C head size.

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxlib_methods.pallas_kernels.attention.tiles import MASKED_SCORE, sees

TILE = 256  # queries whose scores exist at once


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
    query: jax.Array, key: jax.Array, value: jax.Array, *, where: jax.Array
) -> jax.Array:
    """Grouped-query softmax attention, scores and softmax in float32 or better.

        o_i = sum_j softmax_j(<q_i, k_j> / sqrt(C)) v_j     over the j with where[i, j]

    query: `[B, L, H, C]`; key, value: `[B, M, K, C]` with H a multiple of K; where: bool
    `[B, L, M]`. Returns `[B, L, H, C]` in query's dtype. A row without a visible key averages
    all values: finite, and for padding only.
    """
    B, L, H, C = query.shape
    K = key.shape[2]
    wide = jnp.promote_types(query.dtype, jnp.float32)
    # Heads in front of positions: XLA's matmuls on a CPU, and more so their gradients, are several
    # times slower where batch dimensions stand between others, or where one has size 1.
    g = "" if K == H else "g"
    shape = (B, L, K, C) if K == H else (B, L, K, H // K, C)
    q_BKGLC = jnp.moveaxis(query.reshape(shape), 1, -2) * jnp.asarray(C**-0.5, query.dtype)
    k_BKMC, v_BKMC = jnp.swapaxes(key, 1, 2), jnp.swapaxes(value, 1, 2)
    s_BKGLM = jnp.einsum(f"bk{g}lc,bkmc->bk{g}lm", q_BKGLC, k_BKMC, preferred_element_type=wide)
    seen = where[:, None] if K == H else where[:, None, None]
    s_BKGLM = jnp.where(seen, s_BKGLM, jnp.asarray(MASKED_SCORE, wide))
    p_BKGLM = jax.nn.softmax(s_BKGLM, axis=-1).astype(value.dtype)
    mixed = jnp.einsum(f"bk{g}lm,bkmc->bk{g}lc", p_BKGLM, v_BKMC)
    return jnp.moveaxis(mixed, -2, 1).reshape(B, L, H, C)


class Keys(NamedTuple):
    """What queries attend to. key, value: `[B, M, K, C]`; positions, segments: int32 `[B, M]`."""

    key: jax.Array
    value: jax.Array
    positions: jax.Array
    segments: jax.Array


def tiled_attention(
    query: jax.Array,
    context: Keys,
    *,
    positions: jax.Array,
    segments: jax.Array,
    own: tuple[jax.Array, jax.Array] | None = None,
    tile: int = TILE,
) -> jax.Array:
    """Attention to the visible keys of a context and, where `own` is given, to oneself.

        o_i = softmax_j([<q_i, K_j> / sqrt(C)] for visible j, [<q_i, k_i> / sqrt(C)]) [V_j, v_i]

    query: `[B, L, H, C]`; positions, segments: int32 `[B, L]`, of the queries, see `visible`.
    own: the queries' own key and value, each `[B, L, K, C]`: the candidates of an energy-based
    transformer see the context and themselves, not each other (EBT, footnote 12).
    Returns `[B, L, H, C]`. More than `tile` queries go tile by tile, each computed again for its
    derivative: no `[L, M]` array exists, and derivatives of any order are plain JAX. Without
    `own`, a query that sees nothing averages all values.
    """
    B, L = positions.shape
    rows = (query, positions, segments, own)
    if tile >= L:
        return _attend(*rows, context)
    padded = -(-L // tile) * tile

    def cut(x: jax.Array) -> jax.Array:
        x = jnp.pad(x, [(0, 0), (0, padded - L)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(B, padded // tile, tile, *x.shape[2:]), 1, 0)

    def attend(part: Any) -> jax.Array:
        query, positions, segments, own = part
        return _attend(query, positions, segments, own, context)

    mixed = jax.lax.map(jax.checkpoint(attend, prevent_cse=False), jax.tree.map(cut, rows))
    return jnp.moveaxis(mixed, 0, 1).reshape(B, padded, *query.shape[2:])[:, :L]


def _attend(
    query: jax.Array,
    positions: jax.Array,
    segments: jax.Array,
    own: tuple[jax.Array, jax.Array] | None,
    context: Keys,
) -> jax.Array:
    where = visible(positions, context.positions, segments, context.segments)
    if own is None:
        return attention_reference(query, context.key, context.value, where=where)
    B, L, H, C = query.shape
    K = context.key.shape[2]
    wide = jnp.promote_types(query.dtype, jnp.float32)
    own_key, own_value = (x[:, :, :, None] for x in own)  # [B, L, K, 1, C]
    scale = jnp.asarray(C**-0.5, wide)  # of the scores: the queries would be rounded by it
    q_BLKGC = query.reshape(B, L, K, H // K, C)
    s_BKGLM = scale * jnp.einsum(
        "blkgc,bmkc->bkglm", q_BLKGC, context.key, preferred_element_type=wide
    )
    s_BKGLM = jnp.where(where[:, None, None], s_BKGLM, jnp.asarray(MASKED_SCORE, wide))
    s_BKGL1 = jnp.moveaxis(
        jnp.sum(scale * q_BLKGC.astype(wide) * own_key.astype(wide), axis=-1), 1, 3
    )[..., None]
    # The softmax over both parts without joining them, divided after the products with the values.
    top = jax.lax.stop_gradient(jnp.maximum(s_BKGLM.max(axis=-1, keepdims=True), s_BKGL1))
    e_BKGLM, e_BKGL1 = jnp.exp(s_BKGLM - top), jnp.exp(s_BKGL1 - top)
    total = e_BKGLM.sum(axis=-1, keepdims=True) + e_BKGL1
    dtype = own_value.dtype
    mixed = jnp.einsum(
        "bkglm,bmkc->blkgc", e_BKGLM.astype(dtype), context.value, preferred_element_type=wide
    )
    e_BLKG1, total = jnp.moveaxis(e_BKGL1, 3, 1), jnp.moveaxis(total, 3, 1)
    mixed = (mixed + e_BLKG1 * own_value.astype(wide)) / total
    return mixed.reshape(B, L, H, C).astype(query.dtype)
