"""Softmax attention over packed documents, twice differentiable with memory linear in the length.

`attention` returns the output and the log-sum-exp of the scores; models run it on whole sequences.
`attention_reference` is the specification, `attend_parts` what decodes with a cache.
"""

# Dimension key: B batch, L queries, M keys, H query heads, K key heads, G = H / K, C head size,
# E the values' head size.

import jax
import jax.numpy as jnp

from jaxlib_methods.pallas_kernels.attention.derivatives import attend
from jaxlib_methods.pallas_kernels.attention.parts import Part, attend_parts
from jaxlib_methods.pallas_kernels.attention.reference import (
    Keys,
    attention_reference,
    visible,
)
from jaxlib_methods.pallas_kernels.attention.tiles import (
    MASKED_SCORE,
    SHARED_SEGMENT,
    Places,
    Plan,
)
from jaxlib_methods.pallas_kernels.dispatch import (
    Implementation,
    choose,
    gpu_why_not,
    interpret,
    platform,
)

__all__ = [
    "MASKED_SCORE",
    "SHARED_SEGMENT",
    "Keys",
    "Part",
    "Places",
    "attend_parts",
    "attention",
    "attention_reference",
    "visible",
]

# (queries, keys) of a tile, at most, and what a tile's sides are multiples of.
TILES = {"xla": (256, 512), "tpu": (256, 256), "gpu": (64, 64)}
CPU_TILE = (128, 128)  # of plain JAX there: measured, the scores stay in the cache
ALIGNMENT = {"xla": 1, "tpu": 128, "gpu": 64}
MAX_HEAD_SIZE = {"tpu": 256, "gpu": 128}  # a tile fits a core's memory, or a warpgroup's registers


def attention(
    query: jax.Array,
    context: Keys,
    *,
    positions: jax.Array,
    segments: jax.Array,
    own: tuple[jax.Array, jax.Array] | None = None,
    window: int | None = None,
    implementation: Implementation = "auto",
    tile: tuple[int, int] | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Grouped-query attention to the visible keys, and the log-sum-exp of its scores.

        L_i = log sum_j exp(<q_i, k_j> / sqrt(C))    o_i = sum_j exp(<q_i, k_j> / sqrt(C) - L_i) v_j

    query: `[B, L, H, C]`; context: keys `[B, M, K, C]` and values `[B, M, K, E]`, H a multiple of
    K; positions, segments: int32 `[B, L]`, of the queries, see `visible`. own: a key and a value
    for each query, `[B, L, K, C]` and `[B, L, K, E]`, which it sees beside the context.
    Returns `[B, L, H, E]` in query's dtype and `[B, L, H]` in float32 or better; 0 and
    `MASKED_SCORE` where a query sees nothing. Both are differentiable, forward, in reverse, forward
    over reverse and in reverse twice, with memory linear in L and M. Padding (segment 0) may hold
    anything. Inside `jax.shard_map`, over the batch, heads or queries, set `check_vma=False`.
    tile: queries and keys whose scores exist at once. `pallas` has kernels for TPUs and, of
    bfloat16, for Hopper GPUs; both compile and neither was run on its device, so `auto` is `xla`.
    """
    _check(query, context, own)
    B, L, H, _ = query.shape
    K = context.key.shape[2]
    kernel = "gpu" if platform() == "gpu" else "tpu"
    chosen = choose(
        "attention",
        implementation,
        unsupported=_unsupported(kernel, query, context),
        kernels=("gpu", "tpu"),
    )
    loop = kernel if chosen == "pallas" else chosen
    of_cpu = loop == "xla" and platform() == "cpu"
    sides = tile or (CPU_TILE if of_cpu else TILES[loop])
    rows, columns = (
        _side(n, side, ALIGNMENT[loop])
        for n, side in zip((L, context.key.shape[1]), sides, strict=True)
    )
    plan = Plan(loop, query.shape[3] ** -0.5, window, rows, columns, interpret())
    place = [_padded(x, rows) for x in (positions, segments)]
    key_place = [_padded(x, columns) for x in (context.positions, context.segments)]
    # Heads in front; those of a group one behind another, as if they were further queries.
    q = jnp.moveaxis(_padded(_existing(query, segments), rows), 1, 2)
    q = q.reshape(B, K, -1, q.shape[-1])
    place = [jnp.tile(x, (1, H // K)) for x in place]
    key, value = (
        jnp.moveaxis(_padded(_existing(x, context.segments), columns), 1, 2)
        for x in (context.key, context.value)
    )
    mixed, lse = (
        jnp.moveaxis(x.reshape(B, H, -1, x.shape[-1]), 1, 2)[:, :L]
        for x in attend(plan, Places(*place, *key_place), q, key, value)
    )
    if own is not None:
        mixed, lse = _with_own(*(_existing(x, segments) for x in (query, *own)), mixed, lse)
    return mixed.astype(query.dtype), lse[..., 0]


def _with_own(
    query: jax.Array, key: jax.Array, value: jax.Array, mixed: jax.Array, lse: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Joins a further key to attention that has been computed, through its log-sum-exp."""
    dtype, group = lse.dtype, query.shape[2] // key.shape[2]
    key, value = (jnp.repeat(x.astype(dtype), group, axis=2) for x in (key, value))
    score = query.shape[3] ** -0.5 * jnp.sum(query.astype(dtype) * key, axis=-1, keepdims=True)
    total = jnp.logaddexp(lse, score)
    return jnp.exp(lse - total) * mixed.astype(dtype) + jnp.exp(score - total) * value, total


def _existing(x: jax.Array, segments: jax.Array) -> jax.Array:
    return jnp.where((segments != 0)[:, :, None, None], x, jnp.zeros((), x.dtype))


def _padded(x: jax.Array, side: int) -> jax.Array:
    """Padding behind axis 1, up to a multiple of `side`."""
    return jnp.pad(x, [(0, 0), (0, -x.shape[1] % side)] + [(0, 0)] * (x.ndim - 2))


def _side(length: int, most: int, alignment: int) -> int:
    """The side of equal tiles, as few as `most` allows."""
    count = -(-length // most)
    return -(-length // (count * alignment)) * alignment


def _check(query: jax.Array, context: Keys, own: tuple[jax.Array, jax.Array] | None) -> None:
    B, L, H, C = query.shape
    M, K = context.key.shape[1:3]
    E = context.value.shape[3]
    wanted = {"key": (B, M, K, C), "value": (B, M, K, E)}
    given = {"key": context.key, "value": context.value}
    if own is not None:
        wanted |= {"own key": (B, L, K, C), "own value": (B, L, K, E)}
        given |= dict(zip(("own key", "own value"), own, strict=True))
    if H % K:
        raise ValueError(f"{H} query heads are no multiple of {K} key heads")
    for name, x in given.items():
        if x.shape != wanted[name] or x.dtype != query.dtype:
            raise ValueError(
                f"{name} is {x.dtype}{x.shape}, must be {query.dtype}{wanted[name]} "
                f"with queries {query.shape}"
            )


def _unsupported(kernel: str, query: jax.Array, context: Keys) -> str | None:
    """Why a platform's kernels do not take these arguments."""
    dtypes = ("bfloat16",) if kernel == "gpu" else ("float32", "bfloat16")
    if query.dtype.name not in dtypes:
        return f"kernels for a {kernel} take {' or '.join(dtypes)}, not {query.dtype}"
    widest, most = max(query.shape[3], context.value.shape[3]), MAX_HEAD_SIZE[kernel]
    if widest > most:
        return f"kernels for a {kernel} take heads of at most {most} features, not {widest}"
    return gpu_why_not() if kernel == "gpu" else None
