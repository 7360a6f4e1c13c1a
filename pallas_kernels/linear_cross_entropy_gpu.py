"""GPU kernels of `linear_cross_entropy` for Hopper (Pallas, Mosaic GPU): statistics and slopes.

A warpgroup adds up the logits of a tile in registers: the copy engine brings some features at a
time, the tensor cores multiply them (`wgmma`). A gradient's rows, as wide as hidden, fit no
processor's memory; so the slopes of some classes' logits are written, and two matrix products
(XLA's) make gradients of them. Compiled for sm_90a without spills and interpreted on a CPU; never
run on a GPU, never timed: `auto` does not choose them.
"""

# Dimension key: N tokens, V vocabulary, D width, P parts of the vocabulary; n and v are the sides
# of a tile.

import functools
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxlib_methods.pallas_kernels.dispatch import gpu_interpreter, gpu_why_not, interpret
from jaxlib_methods.pallas_kernels.linear_cross_entropy_tpu import MASKED_SCORE, NO_CLASS

TILE = (128, 128)  # tokens and classes whose logits half of a warpgroup's registers hold
PIECE = 32  # classes of a tile for which the other half holds what is computed of them
FEATURES = 64  # multiplied at once: of 2 bytes, a row of the copy engine's widest swizzle
STEPS = 3  # times FEATURES that shared memory holds: room for two warpgroups on a processor
WALK = 16  # tiles of a part of the vocabulary, which a warpgroup walks over
CLASSES = 4096  # whose slopes exist at once

Ref = Any  # in global or shared memory, or an accumulator


def why_not(hidden: jax.Array) -> str | None:
    """Why the kernels cannot take hidden, as a clause; None where they can."""
    if hidden.dtype not in (jnp.bfloat16, jnp.float16):
        return f"hidden is {hidden.dtype} and the kernel takes bfloat16 or float16"
    return gpu_why_not()


def statistics(
    hidden: jax.Array,
    weight: jax.Array,
    columns: jax.Array,
    labels: jax.Array,
    scale: jax.Array,
) -> tuple[jax.Array, ...]:
    """`linear_cross_entropy_tpu.statistics` over parts of the vocabulary: four float32 `[P, ...]`.

    hidden: `[..., D]`; weight: `[V, D]`; columns: the class of each row, -1 of padding, int32 `[V]`
    or longer; labels: int `[...]`; scale: of the logits, a float32 scalar.
    """
    tokens = labels.size
    hidden, weight, columns = _whole_tiles(hidden, weight, columns, walk=WALK)
    found = _run(
        _statistics_kernel,
        [hidden, weight, columns, _padded_labels(labels), scale.reshape(1)],
        grid=(columns.shape[0] // WALK, hidden.shape[0] // TILE[0]),
        results=[((columns.shape[0] // WALK, hidden.shape[0]), jnp.float32)] * 4,
    )
    return tuple(x[:, :tokens].reshape(-1, *labels.shape) for x in found)


def gradients(
    hidden: jax.Array,
    weight: jax.Array,
    columns: jax.Array,
    labels: jax.Array,
    scale: jax.Array,
    part: Sequence[jax.Array],
    slopes: Sequence[jax.Array],
) -> tuple[jax.Array, jax.Array]:
    """Gradients of hidden and weight, in their dtypes, from those of the statistics.

    part: score, entropy, top and spread over the whole vocabulary; slopes: their gradients. The
    slopes of the logits exist for at most `CLASSES` classes at a time.
    """
    _, entropy, top, spread = part
    dscore, dentropy, _, dspread = slopes
    rows = jnp.stack([entropy, top, spread, dscore, dentropy, dspread]).reshape(6, -1)
    tokens, V = hidden.reshape(-1, hidden.shape[-1]), weight.shape[0]
    size = min(CLASSES, V)
    count = pl.cdiv(V, size)
    wide = functools.partial(jnp.tensordot, preferred_element_type=jnp.float32)

    def add(step: jax.Array, sums: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        dhidden, dweight = sums
        # The first classes may be fewer: what follows writes their last rows of dweight again.
        end = V - (count - 1 - step) * size
        start = jnp.maximum(end - size, 0)
        w, classes = (jax.lax.dynamic_slice_in_dim(x, start, size) for x in (weight, columns))
        classes = jnp.where(start + jnp.arange(size) < end, classes, NO_CLASS)
        w = w.astype(hidden.dtype)
        dlogits = _slopes(tokens, w, classes, labels, scale, rows)
        dw = wide(dlogits, tokens, axes=(0, 0)).astype(weight.dtype)
        dweight = jax.lax.dynamic_update_slice_in_dim(dweight, dw, start, axis=0)
        return dhidden + wide(dlogits, w, axes=1), dweight

    zeros = jnp.zeros_like(tokens, jnp.float32), jnp.zeros_like(weight)
    dhidden, dweight = jax.lax.fori_loop(0, count, add, zeros)
    return dhidden.reshape(hidden.shape).astype(hidden.dtype), dweight


def _slopes(
    hidden: jax.Array,
    weight: jax.Array,
    columns: jax.Array,
    labels: jax.Array,
    scale: jax.Array,
    rows: jax.Array,
) -> jax.Array:
    """Gradient of the logits before scaling, `[N, V]` in hidden's dtype; rows: `[6, N]`."""
    N, V = labels.size, weight.shape[0]
    hidden, weight, columns = _whole_tiles(hidden, weight, columns)
    lines = _padded_labels(labels), _padded(rows, 1, TILE[0])
    (found,) = _run(
        _slopes_kernel,
        [hidden, weight, columns, *lines, scale.reshape(1)],
        grid=(columns.shape[0], hidden.shape[0] // TILE[0]),
        results=[((hidden.shape[0], weight.shape[0]), hidden.dtype)],
    )
    return found[:N, :V]


def _whole_tiles(
    hidden: jax.Array, weight: jax.Array, columns: jax.Array, walk: int = 1
) -> tuple[jax.Array, ...]:
    """Hidden `[N, D]`, weight `[V, D]`, columns `[V / v, v]`, the latter in whole walks."""
    n, v = TILE
    columns = _padded(columns[: weight.shape[0]], v * walk, fill=NO_CLASS)
    weight = _padded(weight.astype(hidden.dtype), v, FEATURES)
    hidden = _padded(hidden.reshape(-1, hidden.shape[-1]), n, FEATURES)
    return hidden, weight, columns.reshape(-1, v)


def _padded_labels(labels: jax.Array) -> jax.Array:
    """int32 `[N]`, in whole tiles."""
    return _padded(labels.reshape(-1).astype(jnp.int32), TILE[0])


def _padded(x: jax.Array, *multiples: int, fill: int = 0) -> jax.Array:
    short = [(0, -size % m) for size, m in zip(x.shape, multiples, strict=True)]
    return jnp.pad(x, short, constant_values=fill)


def _run(
    kernel: Callable[..., None],
    arrays: Sequence[jax.Array],
    *,
    grid: tuple[int, int],
    results: Sequence[tuple[tuple[int, ...], Any]],
) -> Sequence[jax.Array]:
    call = plgpu.kernel(
        kernel,
        out_type=[jax.ShapeDtypeStruct(*result) for result in results],
        grid=grid,
        grid_names=("classes", "tokens"),  # neighbours share the classes, of which there are more
        compiler_params=plgpu.CompilerParams(
            approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane
        ),
        interpret=gpu_interpreter() if interpret() else None,
        kernel_name=f"linear_cross_entropy{kernel.__name__.removesuffix('_kernel')}",
    )
    # `plgpu.kernel` forgets along which axes of a shard_map around its results vary: JAX would add
    # their gradients up along these.
    axes = tuple(sorted(jax.typeof(arrays[0]).manual_axis_type.varying))
    return [jax.lax.pcast(x, axes, to="varying") for x in call(*arrays)]


def _statistics_kernel(
    hidden: Ref, weight: Ref, columns: Ref, labels: Ref, scale: Ref, *results: Ref
) -> None:
    """Online: norm = sum_v e^(z_v - top), mixed = sum_v e^(z_v - top) (z_v - top)."""
    part, block = (jax.lax.axis_index(name) for name in ("classes", "tokens"))
    first = part * WALK
    here = pl.ds(block * TILE[0], TILE[0])

    def run(classes: Ref, label: Ref, barrier: Ref) -> None:
        _fetch(barrier, (columns.at[pl.ds(first, WALK)], classes), (labels.at[here], label))
        of_label = _across(label[...], 0)

        def add(step: jax.Array, sums: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            score, top, norm, mixed = sums
            products = _products(hidden, weight, block, first + step)
            pieces, hits = [], []
            for _, z, real, hit in _pieces(products, scale[0], classes.at[step], of_label):
                pieces.append(jnp.where(real, z, MASKED_SCORE))
                hits.append(jnp.where(hit, z, 0.0))
            new_top = jnp.maximum(top, functools.reduce(jnp.maximum, pieces).max(axis=1))
            powers, mixes = [], []
            for z in pieces:
                excess = z - _across(new_top, 0)
                powers.append(jnp.exp(excess))
                mixes.append(powers[-1] * excess)
            lower = top - new_top
            kept = jnp.exp(lower)
            mixed = kept * (mixed + norm * lower) + _total(mixes)
            return score + _total(hits), new_top, kept * norm + _total(powers), mixed

        steps = jnp.minimum(WALK, weight.shape[0] // TILE[1] - first)
        start = tuple(_filled(x) for x in (0.0, MASKED_SCORE, 0.0, 0.0))
        score, top, norm, mixed = jax.lax.fori_loop(0, steps, add, start)
        spread = jnp.log(norm)
        found = score, spread - mixed / norm, top, spread
        for result, x in zip(results, found, strict=True):
            result[part, here] = x

    n, v = TILE
    memory = plgpu.SMEM((WALK, v), jnp.int32), plgpu.SMEM((n,), jnp.int32)
    pl.run_scoped(run, *memory, plgpu.Barrier(num_arrivals=len(memory)))


def _slopes_kernel(
    hidden: Ref, weight: Ref, columns: Ref, labels: Ref, rows: Ref, scale: Ref, result: Ref
) -> None:
    """See `_tile_gradients` of `linear_cross_entropy`."""
    tile, block = (jax.lax.axis_index(name) for name in ("classes", "tokens"))
    n, v = TILE
    here, there = pl.ds(block * n, n), pl.ds(tile * v, v)

    def run(classes: Ref, label: Ref, lines: Ref, barrier: Ref) -> None:
        fetched = (columns.at[tile], classes), (labels.at[here], label), (rows.at[:, here], lines)
        _fetch(barrier, *fetched)
        products = _products(hidden, weight, block, tile)

        def write(found: Ref) -> None:
            entropy, top, spread, dscore, dentropy, dspread = (
                _across(lines[k], 0) for k in range(lines.shape[0])
            )
            of_label = _across(label[...], 0)
            for at, z, real, hit in _pieces(products, scale[0], classes, of_label):
                log_probs = jnp.where(real, (z - top) - spread, 0.0)
                probs = jnp.where(real, jnp.exp(log_probs), 0.0)
                x = probs * (dspread - dentropy * (log_probs + entropy))
                found[:, at] = (scale[0] * (x + jnp.where(hit, dscore, 0.0))).astype(found.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(found, result.at[here, there])
            plgpu.wait_smem_to_gmem(0)

        pl.run_scoped(write, plgpu.SMEM(TILE, result.dtype, transforms=_swizzled(PIECE)))

    memory = (
        plgpu.SMEM((v,), jnp.int32),
        plgpu.SMEM((n,), jnp.int32),
        plgpu.SMEM((rows.shape[0], n), jnp.float32),
    )
    pl.run_scoped(run, *memory, plgpu.Barrier(num_arrivals=len(memory)))


def _fetch(barrier: Ref, *pairs: tuple[Ref, Ref]) -> None:
    for source, target in pairs:
        plgpu.copy_gmem_to_smem(source, target, barrier)
    plgpu.barrier_wait(barrier)


def _products(hidden: Ref, weight: Ref, block: jax.Array, tile: jax.Array) -> jax.Array:
    """Of a tile's tokens and classes, `[n, v]`."""
    steps = hidden.shape[1] // FEATURES
    ahead = min(1, steps - 1)  # products that may still run when the next begin

    def run(sums: Ref) -> jax.Array:
        def multiply(_: Any, tokens: Ref, classes: Ref) -> None:
            plgpu.wgmma(sums, tokens, classes.transpose((1, 0)))
            plgpu.wgmma_wait(ahead)

        blocks = [
            plgpu.BlockSpec(
                (side, FEATURES),
                lambda step, at=at: (at, step),
                transforms=_swizzled(FEATURES),
                delay_release=ahead,
            )
            for side, at in zip(TILE, (block, tile), strict=True)
        ]
        pipeline = plgpu.emit_pipeline(
            multiply, grid=(steps,), in_specs=blocks, max_concurrent_steps=STEPS
        )
        pipeline(hidden, weight)
        return sums[...]

    return pl.run_scoped(run, plgpu.ACC(TILE, jnp.float32))


def _pieces(
    products: jax.Array, scale: jax.Array, classes: Ref, of_label: jax.Array
) -> Iterator[tuple[slice, jax.Array, jax.Array, jax.Array]]:
    """Some classes of a tile after the other: which they are, their scaled logits, which of these
    are of a class, and which of the label.
    """
    for start in range(0, TILE[1], PIECE):
        at = slice(start, start + PIECE)
        of_class = _across(classes[at], 1)
        real = of_class != NO_CLASS
        yield at, scale * products[:, at], real, real & (of_class == of_label)


def _across(line: jax.Array, axis: int) -> jax.Array:
    """`[n]` or `[PIECE]`, repeated over the other axis."""
    line = plgpu.layout_cast(line, plgpu.Layout.WGMMA.reduce(1 - axis))
    return jax.lax.broadcast_in_dim(line, (TILE[0], PIECE), (axis,))


def _total(pieces: list[jax.Array]) -> jax.Array:
    return functools.reduce(operator.add, pieces).sum(axis=1)


def _filled(value: float) -> jax.Array:
    """Where the tensor cores leave a token's results: in four lanes."""
    line = jnp.full(TILE[:1], value, jnp.float32)
    return plgpu.layout_cast(line, plgpu.Layout.WGMMA.reduce(1))


def _swizzled(size: int) -> tuple[Any, ...]:
    """How the copy engine lays rows of 2-byte numbers out, as the tensor cores take them."""
    return plgpu.TilingTransform((8, size)), plgpu.SwizzleTransform(2 * size)
