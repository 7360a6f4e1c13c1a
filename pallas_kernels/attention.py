"""Softmax attention over packed documents.

`attention_reference` is the specification and what every platform runs.
"""

# Dimension key: B batch, L queries, M keys, H query heads, K key heads, G = H / K, C head size.

import jax
import jax.numpy as jnp

MASKED_SCORE = -1e30  # finite, so that a row that sees nothing stays finite


def visible(
    query_positions: jax.Array,
    key_positions: jax.Array,
    query_segments: jax.Array,
    key_segments: jax.Array,
) -> jax.Array:
    """Which keys a query may read: same document, not later, not padding.

    query_positions, query_segments: `[B, L]`; key_positions, key_segments: `[B, M]`; int32.
    Returns bool `[B, L, M]`.
    """
    same = query_segments[:, :, None] == key_segments[:, None, :]
    past = query_positions[:, :, None] >= key_positions[:, None, :]
    return same & past & (key_segments != 0)[:, None, :]


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
    q_BLKGC = query.reshape(B, L, K, H // K, C) * jnp.asarray(C**-0.5, query.dtype)
    s_BKGLM = jnp.einsum("blkgc,bmkc->bkglm", q_BLKGC, key, preferred_element_type=wide)
    s_BKGLM = jnp.where(where[:, None, None], s_BKGLM, jnp.asarray(MASKED_SCORE, wide))
    p_BKGLM = jax.nn.softmax(s_BKGLM, axis=-1).astype(value.dtype)
    return jnp.einsum("bkglm,bmkc->blkgc", p_BKGLM, value).reshape(B, L, H, C)
