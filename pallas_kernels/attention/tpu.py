"""Sums over the tiles of attention as TPU kernels (Pallas, Mosaic): one for rows, one for columns.

The inner axis of the grid walks over the tiles that are summed, in the core's memory. Tiles in
which no query sees a key are not computed, and those before the first and behind the last in sight
are not loaded.
"""

# Dimension key: B batch, K key heads, R rows, M columns, X features of a row's or column's array,
# S statistics of a row. Statistics are lines of one array: a column each would fill its registers.

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxlib_methods.pallas_kernels.attention import tiles
from jaxlib_methods.pallas_kernels.attention.tiles import Arrays, Formula, Places, Plan, Side

SUBLANES = 8

Index = Callable[..., jax.Array]


class Call(NamedTuple):
    """What a kernel sums. matrices: of the row arrays, which are not statistics."""

    plan: Plan
    formula: Formula
    side: Side
    matrices: tuple[bool, ...]


def sweep(
    plan: Plan, formula: Formula, places: Places, rows: Arrays, columns: Arrays
) -> tuple[Arrays, Arrays]:
    """A formula's row results and column results over all tiles in which a query sees a key.

    rows: each `[B, K, R, X]`; columns: each `[B, K, M, X]`. The results likewise, float32.
    """
    hits = tiles.tiles_in_sight(plan, places)
    matrices = tuple(x.shape[-1] > 1 for x in rows)
    statistics = [x for x, is_matrix in zip(rows, matrices, strict=True) if not is_matrix]
    arrays = [x for x, is_matrix in zip(rows, matrices, strict=True) if is_matrix]
    operands = (
        _lines(jnp.stack(places[:2], axis=1)),
        _lines(jnp.stack(places[2:], axis=1)),
        _lines(_packed(statistics, rows[0])),
        *arrays,
        *columns,
    )

    def run(side: Side, hits: jax.Array) -> Arrays:
        call = Call(plan, formula, side, matrices)
        tile, arguments = tiles.one_tile(plan, formula, side, rows, columns)
        shapes = [x.shape for x in jax.eval_shape(tile, *arguments)]
        if not shapes:
            return ()
        cost = _cost(pl.estimate_cost(tile, *arguments), hits.size * rows[0].shape[1])
        kernel = _pallas_call(call, shapes, cost, operands)
        found = kernel(tiles.span(hits).reshape(-1), *operands)
        lines = iter(found[-1][:, :, s, :, None] for s in range(SUBLANES))
        wide = iter(found)
        return tuple(next(wide if shape[1] > 1 else lines) for shape in shapes)

    return run("rows", hits), run("columns", jnp.swapaxes(hits, 1, 2))


def _pallas_call(
    call: Call, sums: list[tuple[int, ...]], cost: pl.CostEstimate, operands: Arrays
) -> Callable[..., Any]:
    """A kernel that takes the ends of what is in sight, then `operands`. sums: a tile's shapes."""
    queries, keys, statistics, *arrays = operands
    B, K = statistics.shape[:2]
    plan, side = call.plan, call.side
    outer, inner = queries.shape[2] // plan.rows, keys.shape[2] // plan.columns
    if side == "columns":
        outer, inner = inner, outer

    def tile_of(axis: Side) -> Index:
        """Along an axis: the outer tile, or the inner one while in sight."""

        def index(b: Any, i: Any, j: Any, ends: Any) -> Any:
            first, behind = ends[2 * (b * outer + i)], ends[2 * (b * outer + i) + 1]
            return i if axis == side else jnp.clip(j, first, jnp.maximum(behind - 1, first))

        return index

    def spec(axis: Side, x: Any, *, lines: bool = False) -> pl.BlockSpec:
        at, size = tile_of(axis), plan.rows if axis == "rows" else plan.columns
        if x.ndim == 3:
            block = (None, x.shape[1], size)
            return pl.BlockSpec(block, lambda b, h, i, j, ends: (b, 0, at(b, i, j, ends)))
        if lines:
            block = (None, None, x.shape[2], size)
            return pl.BlockSpec(block, lambda b, h, i, j, ends: (b, h, 0, at(b, i, j, ends)))
        block = (None, None, size, x.shape[3])
        return pl.BlockSpec(block, lambda b, h, i, j, ends: (b, h, at(b, i, j, ends), 0))

    num_matrices = sum(call.matrices)
    shapes = [(B, K, outer * n, x) for n, x in sums if x > 1]
    num_wide = len(shapes)
    if num_wide < len(sums):
        shapes.append((B, K, SUBLANES, outer * sums[0][0]))
    results = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    grid = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=1,
        grid=(B, K, outer, inner),
        in_specs=[
            spec("rows", queries),
            spec("columns", keys),
            spec("rows", statistics, lines=True),
            *(spec("rows" if n < num_matrices else "columns", x) for n, x in enumerate(arrays)),
        ],
        out_specs=[spec(side, x, lines=n == num_wide) for n, x in enumerate(results)],
        scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in sums],
    )
    return pl.pallas_call(
        functools.partial(_kernel, call, len(arrays), len(sums)),
        out_shape=results,
        grid_spec=grid,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel", "arbitrary")
        ),
        cost_estimate=cost,
        interpret=plan.interpret,
        name=f"attention_{call.formula.tile.__name__}_{side}",
    )


def _cost(tile: pl.CostEstimate, num_tiles: int) -> pl.CostEstimate:
    """Of a whole grid with half of the tiles in sight, as causal attention has them."""
    return pl.CostEstimate(
        flops=tile.flops * num_tiles // 2,
        transcendentals=tile.transcendentals * num_tiles // 2,
        bytes_accessed=tile.bytes_accessed * num_tiles // 2,
    )


def _kernel(
    call: Call,
    num_arrays: int,
    num_sums: int,
    ends: Any,
    queries: Any,
    keys: Any,
    statistics: Any,
    *refs: Any,
) -> None:
    """Adds one tile to the sums of a side."""
    arrays, results, sums = refs[:num_arrays], refs[num_arrays:-num_sums], refs[-num_sums:]
    initial, merge = call.formula.initial, call.formula.merge
    if call.side == "columns":
        initial, merge = (0.0,) * len(sums), tiles.add
    j = pl.program_id(3)
    place = 2 * (pl.program_id(0) * pl.num_programs(2) + pl.program_id(2))

    @pl.when(j == 0)
    def _begin() -> None:
        for x, value in zip(sums, initial, strict=False):
            x[...] = jnp.full(x.shape, value, x.dtype)

    @pl.when((ends[place] <= j) & (j < ends[place + 1]))
    def _add() -> None:
        query, key = queries[...].T, keys[...]
        where = tiles.sees(query[:, :1], key[:1], query[:, 1:2], key[1:2], call.plan.window)
        by_row = statistics[...].T
        stats = iter(by_row[:, s : s + 1] for s in range(SUBLANES))
        values = iter(x[...] for x in arrays)
        rows = tuple(next(values if is_matrix else stats) for is_matrix in call.matrices)
        on = tiles.Tile(where, call.plan.scale)
        tile = call.formula.tile(on, rows, tuple(values))
        found = merge(tuple(x[...] for x in sums), getattr(tile, call.side)())
        for x, value in zip(sums, found, strict=True):
            x[...] = value

    @pl.when(j == pl.num_programs(3) - 1)
    def _end() -> None:
        wide = [x for x in sums if x.shape[1] > 1]
        for result, x in zip(results, wide, strict=False):
            result[...] = x[...]
        if len(wide) < len(sums):
            results[-1][...] = _side_by_side([x[...] for x in sums if x.shape[1] == 1]).T


def _side_by_side(columns: list[jax.Array]) -> jax.Array:
    """`[R, 1]` each -> `[R, SUBLANES]`."""
    shape = (columns[0].shape[0], SUBLANES)
    lane = jax.lax.broadcasted_iota(jnp.int32, shape, 1)
    joined = jnp.zeros(shape, columns[0].dtype)
    for index, x in enumerate(columns):
        joined = jnp.where(lane == index, x, joined)
    return joined


def _packed(statistics: list[jax.Array], like: jax.Array) -> jax.Array:
    """`[B, K, R, 1]` each -> `[B, K, S, R]`; zeros where there are none."""
    if not statistics:
        return jnp.zeros((*like.shape[:2], 1, like.shape[2]), jnp.float32)
    return jnp.stack([x[..., 0] for x in statistics], axis=2)


def _lines(x: jax.Array) -> jax.Array:
    """Zeros behind the last axis but one, up to whole registers."""
    return jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, SUBLANES - x.shape[-2]), (0, 0)])
