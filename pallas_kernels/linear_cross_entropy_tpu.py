"""TPU kernels of `linear_cross_entropy`: statistics of the tokens, gradients of both factors.

Each walks over blocks of tokens and of the vocabulary, and sums over the inner walk in VMEM. What
lies beyond an array in its last block may be anything: it is masked before it is used.
"""

# Dimension key: N tokens, V vocabulary, D width; n and v are blocks of the former two.

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxlib_methods.pallas_kernels.dispatch import interpret

MASKED_SCORE = -1e30  # finite, so that a part of the vocabulary without a class stays finite
NO_CLASS = -1  # number of a column that pads the vocabulary

# Largest bytes of a row -> tokens and classes of a block: two factors, their slopes and sums fit
# the 64 MiB of the smallest VMEM, that of TPU v7x.
BLOCKS = {8192: 512, 16384: 256, 32768: 128}
VMEM_BYTES = 56 * 2**20

_Ref = Any  # of a block in VMEM
_Walk = Literal["tokens", "classes"]


def why_not(hidden: jax.Array, weight: jax.Array) -> str | None:
    """Why the kernels cannot take these arguments, as a clause; None where they can."""
    if hidden.dtype not in (jnp.float32, jnp.bfloat16):
        return f"hidden is {hidden.dtype} and the kernel takes float32 or bfloat16"
    if _row_bytes(hidden, weight) > max(BLOCKS):
        return f"hidden is {hidden.shape[-1]} wide and the kernel takes {max(BLOCKS) // 4} at most"
    return None


def whole_blocks(columns: jax.Array) -> jax.Array:
    """Pads the classes of the rows, int32 `[V]`, so that they fill the last block of any size."""
    short = -columns.size % max(BLOCKS.values())
    return jnp.pad(columns, [(0, short)], constant_values=NO_CLASS)


def _row_bytes(hidden: jax.Array, weight: jax.Array) -> int:
    return hidden.shape[-1] * max(hidden.dtype.itemsize, weight.dtype.itemsize)


def statistics(
    hidden: jax.Array,
    weight: jax.Array,
    columns: jax.Array,
    labels: jax.Array,
    scale: jax.Array,
) -> tuple[jax.Array, ...]:
    """Of each token: the logit of its label, the entropy, the largest logit (top), and what the
    log-sum-exp has above it (spread).

    hidden: `[..., D]`; weight: `[V, D]`; columns: the class of each row, -1 of padding, in
    `whole_blocks`; labels: int `[...]`; scale: of the logits, a float32 scalar. Returns four
    float32 `[...]`.
    """
    arrays = _factors(hidden, weight, columns, labels, scale)
    rows = ((labels.size, 1), jnp.float32)
    found = _walk("tokens", _statistics_kernel, arrays, outputs=[rows] * 4, sums=1, scratch=2)
    return tuple(x.reshape(labels.shape) for x in found)


def gradients(
    hidden: jax.Array,
    weight: jax.Array,
    columns: jax.Array,
    labels: jax.Array,
    scale: jax.Array,
    part: Sequence[jax.Array],
    slopes: Sequence[jax.Array],
) -> tuple[jax.Array, jax.Array]:
    """Gradients of hidden and weight, in their dtypes, from those of the statistics `part`."""
    _, entropy, top, spread = part
    dscore, dentropy, _, dspread = slopes
    rows = jnp.stack([entropy, top, spread, dscore, dentropy, dspread], axis=-1)
    rows = rows.reshape(labels.size, -1)
    arrays = (*_factors(hidden, weight, columns, labels, scale), rows)
    V, D = weight.shape
    kernel = functools.partial(_hidden_kernel, num_classes=V)
    (dhidden,) = _walk("tokens", kernel, arrays, outputs=[((labels.size, D), hidden.dtype)], sums=D)
    kernel = functools.partial(_weight_kernel, num_tokens=labels.size)
    (dweight,) = _walk("classes", kernel, arrays, outputs=[(weight.shape, weight.dtype)], sums=D)
    return dhidden.reshape(hidden.shape), dweight


def _factors(
    hidden: jax.Array,
    weight: jax.Array,
    columns: jax.Array,
    labels: jax.Array,
    scale: jax.Array,
) -> tuple[jax.Array, ...]:
    rows = hidden.reshape(-1, hidden.shape[-1])
    return rows, weight, columns[None], scale.reshape(1, 1), labels.reshape(-1, 1)


def _walk(
    outer: _Walk,
    kernel: Callable[..., None],
    arrays: Sequence[jax.Array],
    *,
    outputs: Sequence[tuple[tuple[int, ...], Any]],
    sums: int,
    scratch: int = 1,
) -> Sequence[jax.Array]:
    """Runs a kernel over all pairs of blocks, those of `outer` one after the other.

    arrays: hidden `[N, D]`, weight `[V, D]`, columns `[1, V or more]`, scale `[1, 1]`, labels
    `[N, 1]`, further ones of tokens. outputs: shapes and dtypes, in blocks of `outer`. scratch:
    how many float32 arrays, of `sums` columns and a row per row of the block, the kernel sums in.
    """
    hidden, weight = arrays[:2]
    (N, D), V = hidden.shape, weight.shape[0]
    block = next(size for limit, size in BLOCKS.items() if _row_bytes(hidden, weight) <= limit)
    n, v = (min(block, -(-size // 128) * 128) for size in (N, V))
    grid = (pl.cdiv(N, n), pl.cdiv(V, v))
    token, vocab = 0, 1
    if outer == "classes":
        grid, token, vocab = grid[::-1], 1, 0

    def rows(size: int, axis: int, width: int) -> pl.BlockSpec:
        return pl.BlockSpec((size, width), lambda *at: (at[axis], 0))

    of_tokens = functools.partial(rows, n, token)
    of_classes = functools.partial(rows, v, vocab)
    of_outer = of_tokens if outer == "tokens" else of_classes
    axes = jax.typeof(hidden).manual_axis_type  # of a shard_map around
    matmuls = 2 if sums == D else 1
    call = pl.pallas_call(
        kernel,
        grid=grid,
        in_specs=[
            of_tokens(D),
            of_classes(D),
            pl.BlockSpec((1, v), lambda *at: (0, at[vocab])),
            pl.BlockSpec(memory_space=pltpu.SMEM),
            *(of_tokens(x.shape[1]) for x in arrays[4:]),
        ],
        out_specs=[of_outer(shape[1]) for shape, _ in outputs],
        out_shape=[
            jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=axes) for shape, dtype in outputs
        ],
        scratch_shapes=[pltpu.VMEM((n if outer == "tokens" else v, sums), jnp.float32)] * scratch,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=VMEM_BYTES
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * matmuls * N * V * D,
            transcendentals=N * V,
            bytes_accessed=sum(x.nbytes for x in arrays)
            + sum(math.prod(shape) * jnp.dtype(dtype).itemsize for shape, dtype in outputs)
            + (grid[0] - 1) * (weight if outer == "tokens" else hidden).nbytes,
        ),
        interpret=interpret(),
    )
    return call(*arrays)


def _block_logits(
    hidden: jax.Array, weight: jax.Array, columns: _Ref, scale: _Ref, labels: _Ref
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Scaled logits `[n, v]`, which of them are of a class, and which of the label."""
    logits = _dot(hidden, weight.astype(hidden.dtype), contract=(1, 1)) * scale[0, 0]
    real = jnp.broadcast_to(columns[...] != NO_CLASS, logits.shape)
    return logits, real, real & (columns[...] == labels[...])


def _dot(a: jax.Array, b: jax.Array, *, contract: tuple[int, int]) -> jax.Array:
    dims = (((contract[0],), (contract[1],)), ((), ()))
    return jax.lax.dot_general(a, b, dims, preferred_element_type=jnp.float32)


def _within(x: jax.Array, start: jax.Array, size: int) -> jax.Array:
    """`x` with rows from `size` on, counted from `start`, replaced by 0."""
    index = start + jax.lax.broadcasted_iota(jnp.int32, x.shape, 0)
    return jnp.where(index < size, x, jnp.zeros((), x.dtype))


def _statistics_kernel(
    hidden: _Ref,
    weight: _Ref,
    columns: _Ref,
    scale: _Ref,
    labels: _Ref,
    score: _Ref,
    entropy: _Ref,
    top: _Ref,
    spread: _Ref,
    norm: _Ref,
    mixed: _Ref,
) -> None:
    """Online: norm = sum_v e^(z_v - top), mixed = sum_v e^(z_v - top) (z_v - top)."""

    @pl.when(pl.program_id(1) == 0)
    def _() -> None:
        top[...] = jnp.full(top.shape, MASKED_SCORE, top.dtype)
        for total in (score, norm, mixed):
            total[...] = jnp.zeros(total.shape, total.dtype)

    logits, real, hit = _block_logits(hidden[...], weight[...], columns, scale, labels)
    logits = jnp.where(real, logits, MASKED_SCORE)
    score[...] += jnp.sum(jnp.where(hit, logits, 0.0), axis=1, keepdims=True)
    new_top = jnp.maximum(top[...], jnp.max(logits, axis=1, keepdims=True))
    lower = top[...] - new_top
    excess = logits - new_top
    power = jnp.exp(excess)
    mixed[...] = jnp.exp(lower) * (mixed[...] + norm[...] * lower)
    mixed[...] += jnp.sum(power * excess, axis=1, keepdims=True)
    norm[...] = jnp.exp(lower) * norm[...] + jnp.sum(power, axis=1, keepdims=True)
    top[...] = new_top

    @pl.when(pl.program_id(1) == pl.num_programs(1) - 1)
    def _() -> None:
        spread[...] = jnp.log(norm[...])
        entropy[...] = spread[...] - mixed[...] / norm[...]


def _block_slopes(
    hidden: jax.Array, weight: jax.Array, columns: _Ref, scale: _Ref, labels: _Ref, rows: _Ref
) -> jax.Array:
    """Gradient of the logits `[n, v]` before scaling: see `_tile_gradients`."""
    logits, real, hit = _block_logits(hidden, weight, columns, scale, labels)
    entropy, top, spread, dscore, dentropy, dspread = (rows[:, k : k + 1] for k in range(6))
    log_probs = jnp.where(real, (logits - top) - spread, 0.0)
    probs = jnp.where(real, jnp.exp(log_probs), 0.0)
    slopes = probs * (dspread - dentropy * (log_probs + entropy))
    slopes = scale[0, 0] * (slopes + jnp.where(hit, dscore, 0.0))
    return slopes.astype(hidden.dtype)


def _hidden_kernel(
    hidden: _Ref,
    weight: _Ref,
    columns: _Ref,
    scale: _Ref,
    labels: _Ref,
    rows: _Ref,
    dhidden: _Ref,
    total: _Ref,
    *,
    num_classes: int,
) -> None:
    @pl.when(pl.program_id(1) == 0)
    def _() -> None:
        total[...] = jnp.zeros(total.shape, total.dtype)

    w = _within(weight[...], pl.program_id(1) * weight.shape[0], num_classes)
    slopes = _block_slopes(hidden[...], w, columns, scale, labels, rows)
    total[...] += _dot(slopes, w.astype(slopes.dtype), contract=(1, 0))

    @pl.when(pl.program_id(1) == pl.num_programs(1) - 1)
    def _() -> None:
        dhidden[...] = total[...].astype(dhidden.dtype)


def _weight_kernel(
    hidden: _Ref,
    weight: _Ref,
    columns: _Ref,
    scale: _Ref,
    labels: _Ref,
    rows: _Ref,
    dweight: _Ref,
    total: _Ref,
    *,
    num_tokens: int,
) -> None:
    @pl.when(pl.program_id(1) == 0)
    def _() -> None:
        total[...] = jnp.zeros(total.shape, total.dtype)

    start = pl.program_id(1) * hidden.shape[0]
    h = _within(hidden[...], start, num_tokens)
    slopes = _block_slopes(h, weight[...], columns, scale, labels, rows)
    total[...] += _dot(_within(slopes, start, num_tokens), h, contract=(0, 0))

    @pl.when(pl.program_id(1) == pl.num_programs(1) - 1)
    def _() -> None:
        dweight[...] = total[...].astype(dweight.dtype)
