"""Sums over the tiles of attention as GPU kernels for Hopper (Pallas, Mosaic GPU).

A warpgroup keeps one tile of rows (or of columns: the outer ones) in shared memory and walks over
the tiles in sight of the others (the inner ones), which the copy engine brings. Products are the
tensor cores' (`wgmma`): with scores in registers as `[outer, inner]`, both walks are the same.
Compiled for sm_90a without spills and interpreted on a CPU; never run on a GPU, never timed: `auto`
does not choose them.
"""

# Dimension key: B batch, K key heads, R rows, M columns, X features of a row's or column's array,
# S lines: positions and segments, or statistics of a row. O outer, I inner side of a tile.

import dataclasses
from collections.abc import Callable, Sequence
from itertools import compress
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxlib_methods.pallas_kernels.attention import tiles
from jaxlib_methods.pallas_kernels.attention.tiles import Arrays, Formula, Places, Plan, Side
from jaxlib_methods.pallas_kernels.dispatch import gpu_interpreter

FEATURES = 64  # arrays of rows and columns are padded to a multiple
STEPS = 2  # inner tiles that shared memory holds

# (inner side of a tile, features that a sum has at once) of a kernel, for arrays of 64 features and
# for wider ones: as much as the registers of a warpgroup hold, by ptxas.
BLOCKS = {
    "forward_rows": ((64, 64), (64, 128)),
    "tangent_rows": ((64, 64), (64, 128)),
    "backward_rows": ((64, 64), (64, 128)),
    "backward_columns": ((64, 64), (32, 128)),
    "backward_tangent_rows": ((64, 64), (32, 64)),
    "backward_tangent_columns": ((32, 64), (16, 64)),
    "double_backward_rows_rows": ((64, 64), (64, 128)),
    "double_backward_rows": ((32, 64), (32, 64)),
    "double_backward_columns": ((32, 64), (16, 64)),
}

Ref = Any  # in global or shared memory, or an accumulator


class Call(NamedTuple):
    """What a kernel sums.

    matrices: of the row arrays, which are not statistics; tile: its outer and inner side; sums:
    features of each, 0 of a statistic; start: the first of the features.
    """

    name: str
    plan: Plan
    formula: Formula
    side: Side
    matrices: tuple[bool, ...]
    tile: tuple[int, int]
    sums: tuple[int, ...]
    start: int


class Axis(NamedTuple):
    """Arrays of the rows or of the columns. lines: `[B, S, R]` or `[B, K, S, R]`."""

    lines: tuple[Any, ...]
    matrices: tuple[Any, ...]


def sweep(
    plan: Plan, formula: Formula, places: Places, rows: Arrays, columns: Arrays
) -> tuple[Arrays, Arrays]:
    """A formula's row results and column results over all tiles in which a query sees a key.

    rows: each `[B, K, R, X]`; columns: each `[B, K, M, X]`. The results likewise, float32.
    """
    hits = tiles.tiles_in_sight(plan, places)
    matrices = tuple(x.shape[-1] > 1 for x in rows)
    pairs = list(zip(rows, matrices, strict=True))
    statistics = [x[..., 0] for x, is_matrix in pairs if not is_matrix]
    lines = (jnp.stack(places[:2], axis=1),)
    if statistics:
        lines += (jnp.stack(statistics, axis=2),)
    widest = max(x.shape[3] for x in (*rows, *columns))
    features = widest + -widest % FEATURES
    axes = (
        Axis(lines, tuple(_padded(x, features) for x, is_matrix in pairs if is_matrix)),
        Axis((jnp.stack(places[2:], axis=1),), tuple(_padded(x, features) for x in columns)),
    )

    def run(side: Side, hits: jax.Array) -> Arrays:
        tile, arguments = tiles.one_tile(plan, formula, side, rows, columns)
        sizes = [x.shape[1] for x in jax.eval_shape(tile, *arguments)]
        if not sizes:
            return ()
        ends = tiles.span(hits).reshape(-1)
        name = f"{formula.tile.__name__}_{side}"
        inner, width = BLOCKS[name][features > FEATURES]
        outer = plan.rows if side == "rows" else plan.columns
        parts = []
        sums = tuple(width if n > 1 else 0 for n in sizes)
        assert width >= features or all(sums)  # statistics are summed once
        for start in range(0, features if any(sums) else 1, width):
            call = Call(name, plan, formula, side, matrices, (outer, inner), sums, start)
            parts.append(_kernel(call, ends, axes))
        joined = (jnp.concatenate(x, axis=-1) for x in zip(*parts, strict=True))
        return tuple(
            x[..., :size] if size > 1 else x[..., None]
            for x, size in zip(joined, sizes, strict=True)
        )

    return run("rows", hits), run("columns", jnp.swapaxes(hits, 1, 2))


def _padded(x: jax.Array, features: int) -> jax.Array:
    return jnp.pad(x, [(0, 0)] * 3 + [(0, features - x.shape[3])])


def _kernel(call: Call, ends: jax.Array, axes: tuple[Axis, Axis]) -> list[jax.Array]:
    """Sums of a side: `[B, K, R, X]` each, `[B, K, R]` of statistics."""
    shape = (*axes[1].matrices[0].shape[:2], axes[call.side == "columns"].lines[0].shape[2])
    operands, structure = jax.tree.flatten((ends, *axes))

    def body(*refs: Ref) -> None:
        ends, *axes = structure.unflatten(refs[: structure.num_leaves])
        _sum(call, ends, axes, refs[structure.num_leaves :])

    kernel = plgpu.kernel(
        body,
        out_type=[
            jax.ShapeDtypeStruct((*shape, n) if n else shape, jnp.float32) for n in call.sums
        ],
        grid=(*shape[:2], shape[2] // call.tile[0]),
        grid_names=("batch", "head", "outer"),
        compiler_params=plgpu.CompilerParams(
            approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane
        ),
        interpret=gpu_interpreter() if call.plan.interpret else None,
        kernel_name=f"attention_{call.name}",
    )
    return kernel(*operands)


def _sum(call: Call, ends: Ref, axes: list[Axis], results: Sequence[Ref]) -> None:
    """Sums one outer tile over the inner tiles in sight and writes the sums."""
    b, h, i = (jax.lax.axis_index(name) for name in ("batch", "head", "outer"))
    outer, inner = (
        Axis(
            tuple(x.at[b] if len(x.shape) == 3 else x.at[b, h] for x in axis.lines),
            tuple(x.at[b, h] for x in axis.matrices),
        )
        for axis in (axes if call.side == "rows" else reversed(axes))
    )
    place = 2 * (b * jax.lax.axis_size("outer") + i)
    size, step = call.tile
    steps = (call.plan.columns if call.side == "rows" else call.plan.rows) // step  # of a tile
    here = pl.ds(i * size, size)

    def run(barrier: Ref, kept: Axis) -> None:
        for source, target in zip(outer.lines, kept.lines, strict=True):
            plgpu.copy_gmem_to_smem(source.at[:, here], target, barrier)
        for source, target in zip(outer.matrices, kept.matrices, strict=True):
            plgpu.copy_gmem_to_smem(source.at[here], target, barrier)
        plgpu.barrier_wait(barrier)
        first, behind = (steps * ends[place + n] for n in range(2))
        walk = Walk(call, kept, inner, first, behind)
        found = _online(walk) if call.formula is tiles.FORWARD else _added(walk)
        for result, x in zip(results, found, strict=True):
            result[b, h, here] = x

    lines = tuple(plgpu.SMEM((x.shape[0], size), x.dtype) for x in outer.lines)
    matrices = tuple(
        plgpu.SMEM((size, x.shape[1]), x.dtype, transforms=_swizzled(call)) for x in outer.matrices
    )
    arrivals = plgpu.Barrier(num_arrivals=len(lines) + len(matrices))
    pl.run_scoped(run, arrivals, Axis(lines, matrices))


def _swizzled(call: Call) -> tuple[Any, ...]:
    """How the copy engine lays matrices out for the tensor cores, which take whole such tiles."""
    size = call.tile[1]
    return plgpu.TilingTransform((8, size)), plgpu.SwizzleTransform(2 * size)


@dataclasses.dataclass(frozen=True)
class Tile(tiles.Tile):
    """A tile `[O, I]` whose matrices are in shared memory.

    What is summed over it is multiplied later: `mix` and `collect` give the pairs.
    """

    call: Call

    def scores(self, *pairs: Any) -> jax.Array:
        """Of rows and columns."""

        def run(found: Ref) -> jax.Array:
            for pair in pairs:
                outer, inner = pair if self.call.side == "rows" else reversed(pair)
                plgpu.wgmma(found, outer, inner.transpose((1, 0)))
            return found[...]

        return pl.run_scoped(run, plgpu.ACC(self.call.tile, jnp.float32))

    def mix(self, *pairs: Any) -> Any:
        """Of an array `[O, I]` and an inner matrix."""
        return pairs

    def collect(self, *pairs: Any) -> Any:
        """Of an array `[O, I]` and an inner matrix."""
        return pairs

    def total(self, x: jax.Array) -> jax.Array:
        """`[O, I] -> [O]`."""
        return jnp.sum(x, axis=1)


@dataclasses.dataclass(frozen=True)
class Walk:
    """From an outer tile, in shared memory, over the inner tiles `first`, ... before `behind`."""

    call: Call
    outer: Axis
    inner: Axis
    first: jax.Array
    behind: jax.Array

    def over(self, add: Callable[..., Arrays], start: Arrays) -> Arrays:
        """Calls add(tile, rows, columns, carry) for each tile, as a formula takes them."""
        size = self.call.tile[1]
        outer = [x for lines in self.outer.lines for x in self._across(lines, 0)]

        def step(_: Any, *refs: Any) -> Arrays:
            *refs, carry = refs
            lines, matrices = refs[: len(self.inner.lines)], refs[len(self.inner.lines) :]
            inner = [x for line in lines for x in self._across(line, 1)]
            axes = ((outer, self.outer.matrices), (inner, matrices))
            rows, columns = axes if self.call.side == "rows" else axes[::-1]
            carry = add(*self._arguments(rows, columns), carry)
            plgpu.wgmma_wait(0)
            plgpu.commit_smem()  # all have read what the copy engine is about to replace
            return carry

        first, inner = self.first, self.inner
        lines = [plgpu.BlockSpec((x.shape[0], size), lambda j: (0, first + j)) for x in inner.lines]
        matrices = [
            plgpu.BlockSpec(
                (size, x.shape[1]), lambda j: (first + j, 0), transforms=_swizzled(self.call)
            )
            for x in inner.matrices
        ]
        pipeline = plgpu.emit_pipeline(
            step,
            grid=(self.behind - first,),
            in_specs=[*lines, *matrices],
            max_concurrent_steps=STEPS,
            init_carry=start,
        )
        return pipeline(*inner.lines, *inner.matrices)

    def _across(self, lines: Ref, axis: int) -> list[jax.Array]:
        """Each of the lines `[S, O or I]`, repeated over the tile's other axis."""
        layout = plgpu.Layout.WGMMA.reduce(1 - axis)
        return [
            jax.lax.broadcast_in_dim(plgpu.layout_cast(lines[n], layout), self.call.tile, (axis,))
            for n in range(lines.shape[0])
        ]

    def _arguments(self, rows: Any, columns: Any) -> tuple[Tile, Arrays, Arrays]:
        """Of a formula; rows and columns: lines `[O, I]` and matrices. Statistics stay `[O, I]`."""
        (position, segment, *statistics), matrices = rows
        (key_position, key_segment), arrays = columns
        plan = self.call.plan
        where = tiles.sees(position, key_position, segment, key_segment, plan.window)
        wide, thin = iter(matrices), iter(statistics)
        rows = tuple(next(wide if is_matrix else thin) for is_matrix in self.call.matrices)
        return Tile(where, plan.scale, self.call), rows, tuple(arrays)


def _added(walk: Walk) -> list[jax.Array]:
    """Sums of what the tiles add."""
    call = walk.call
    thin = [n == 0 for n in call.sums]

    def run(*wide: Ref) -> list[jax.Array]:
        def add(on: Tile, rows: Arrays, columns: Arrays, statistics: Arrays) -> Arrays:
            found = getattr(call.formula.tile(on, rows, columns), call.side)()
            for x, pairs in zip(wide, compress(found, call.sums), strict=True):
                _multiply(call, x, pairs)
            return tuple(x + y for x, y in zip(statistics, compress(found, thin), strict=True))

        start = tuple(_filled(call.tile[:1], 0.0) for _ in compress(thin, thin))
        statistics = iter(walk.over(add, start))
        matrices = iter(wide)
        return [next(matrices)[...] if n else next(statistics) for n in call.sums]

    sums = (plgpu.ACC((call.tile[0], n), jnp.float32) for n in call.sums if n)
    return pl.run_scoped(run, *sums)


def _online(walk: Walk) -> Arrays:
    """`tiles.forward` and `merge`, with the largest exponent so far."""
    call = walk.call

    def add(on: Tile, rows: Arrays, columns: Arrays, sums: Arrays) -> Arrays:
        (q,), (k, v), (mixed, total, top) = rows, columns, sums
        s = jnp.where(on.where, on.scale * on.scores((q, k)), tiles.MASKED_SCORE)
        new_top = jnp.maximum(top, jnp.max(s, axis=1))
        p = jnp.where(on.where, jnp.exp(s - _spread(new_top, s.shape)), 0)

        def product(found: Ref) -> jax.Array:
            _multiply(call, found, on.mix((p, v)))
            return found[...]

        kept = jnp.exp(top - new_top)
        mixed *= _spread(kept, mixed.shape)
        mixed += pl.run_scoped(product, plgpu.ACC(mixed.shape, jnp.float32))
        return mixed, kept * total + on.total(p), new_top

    shapes = ((call.tile[0], call.sums[0]), call.tile[:1], call.tile[:1])
    initial = zip(shapes, call.formula.initial, strict=True)
    return walk.over(add, tuple(_filled(*pair) for pair in initial))


def _multiply(call: Call, sums: Ref, pairs: Any) -> None:
    """Adds the products of arrays `[O, I]`, rounded, and inner matrices `[I, X]`."""
    for p, matrix in pairs:
        p = p.astype(matrix.dtype)
        factor = matrix.at[:, call.start : call.start + sums.shape[1]]
        if not call.plan.interpret:
            plgpu.wgmma(sums, p, factor)
            continue

        def from_memory(copy: Ref, p: jax.Array = p, factor: Ref = factor) -> None:
            copy[...] = p
            plgpu.wgmma(sums, copy, factor)

        # JAX's interpreter takes no factor from registers.
        pl.run_scoped(from_memory, plgpu.SMEM(p.shape, p.dtype))


def _spread(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return jax.lax.broadcast_in_dim(x, shape, (0,))


def _filled(shape: tuple[int, ...], value: float) -> jax.Array:
    """Where and how the tensor cores leave results: a row's in four lanes."""
    layout = plgpu.Layout.WGMMA if len(shape) == 2 else plgpu.Layout.WGMMA.reduce(1)
    return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)
