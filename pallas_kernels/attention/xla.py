"""Sums over the tiles of attention as loops of plain JAX: any platform, memory linear in length."""

# Dimension key: B batch, K key heads, R rows, M columns, X features of a row's or column's array.

from typing import Any

import jax
import jax.numpy as jnp

from jaxlib_methods.pallas_kernels.attention import tiles
from jaxlib_methods.pallas_kernels.attention.tiles import Arrays, Formula, Places, Plan


def sweep(
    plan: Plan, formula: Formula, places: Places, rows: Arrays, columns: Arrays
) -> tuple[Arrays, Arrays]:
    """A formula's row results and column results over all tiles in which a query sees a key.

    rows: each `[B, K, R, X]`; columns: each `[B, K, M, X]`. The results likewise, float32 or
    better.
    """

    def tile(places: Arrays, rows: Arrays, columns: Arrays) -> tuple[Arrays, Arrays]:
        query_positions, query_segments, key_positions, key_segments = places
        where = tiles.sees(
            query_positions[:, None],
            key_positions[None],
            query_segments[:, None],
            key_segments[None],
            plan.window,
        )
        sums = formula.tile(tiles.Tile(where, plan.scale), rows, columns)
        return sums.rows(), sums.columns()

    both = jax.vmap(jax.vmap(tile, in_axes=(None, 0, 0)))
    cut_rows = _cut((rows, places[:2]), plan.rows)
    cut_columns = _cut((columns, places[2:]), plan.columns)
    of_row, of_column = (jax.tree.map(lambda x: x[0], x) for x in (cut_rows, cut_columns))
    row_shapes, column_shapes = jax.eval_shape(
        lambda r, c: both((*r[1], *c[1]), r[0], c[0]), of_row, of_column
    )
    num_rows, num_columns = (jax.tree.leaves(x)[0].shape[0] for x in (cut_rows, cut_columns))
    if num_rows == num_columns == 1:
        return both(tuple(places), rows, columns)
    ends = tiles.span(tiles.tiles_in_sight(plan, places).any(axis=0))
    initial = tuple(
        jnp.full(x.shape, value, x.dtype)
        for x, value in zip(row_shapes, formula.initial, strict=False)
    )

    def row(column_sums: Arrays, part: Any) -> tuple[Arrays, Arrays]:
        (rows, row_places), ends = part

        def column(j: jax.Array, sums: tuple[Arrays, Arrays]) -> tuple[Arrays, Arrays]:
            columns, column_places = jax.tree.map(lambda x: x[j], cut_columns)
            by_row, by_column = both((*row_places, *column_places), rows, columns)
            column_sums = tuple(x.at[j].add(y) for x, y in zip(sums[1], by_column, strict=True))
            return formula.merge(sums[0], by_row), column_sums

        row_sums, column_sums = jax.lax.fori_loop(ends[0], ends[1], column, (initial, column_sums))
        return column_sums, row_sums

    zeros = tuple(jnp.zeros((num_columns, *x.shape), x.dtype) for x in column_shapes)
    column_sums, row_sums = jax.lax.scan(row, zeros, (cut_rows, ends))
    return _joined(row_sums), _joined(column_sums)


def _cut(arrays: Any, size: int) -> Any:
    """`[B, K, N, X]` and `[B, N]` -> tiles first, `[N / size, B, K, size, X]`."""

    def cut(x: jax.Array) -> jax.Array:
        axis = 2 if x.ndim == 4 else 1
        count = x.shape[axis] // size
        x = x.reshape(*x.shape[:axis], count, size, *x.shape[axis + 1 :])
        return jnp.moveaxis(x, axis, 0)

    return jax.tree.map(cut, arrays)


def _joined(arrays: Arrays) -> Arrays:
    """`_cut` undone."""

    def join(x: jax.Array) -> jax.Array:
        x = jnp.moveaxis(x, 0, 2)
        return x.reshape(*x.shape[:2], -1, x.shape[-1])

    return tuple(join(x) for x in arrays)
