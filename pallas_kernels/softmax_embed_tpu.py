"""Sums over the tiles of `softmax_embed` as TPU kernels (Pallas, Mosaic).

One kernel walks over the classes of a block of tokens, another over the tokens of a block of
classes; what is summed stays in VMEM. What lies beyond an array in its last block may be anything:
it is masked when it is loaded.
"""

# Dimension key: N tokens, V vocabulary, D width; n and v are blocks of the former two.

import functools
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxlib_methods.pallas_kernels import softmax_embed_tiles as tiles
from jaxlib_methods.pallas_kernels.softmax_embed_tiles import Arrays, Formula

# Largest bytes of a row of the table -> tokens and classes of a block: of the widest formula, two
# tables and rows, their sums and three parts of the logits fit the 64 MiB of TPU v7x's VMEM.
BLOCKS = {4096: 512, 8192: 256, 16384: 128}
VMEM_BYTES = 56 * 2**20

_Ref = Any  # of a block in VMEM
_Walk = Literal["rows", "columns"]


class _Plan(NamedTuple):
    """A walk of one kernel. N, V: tokens and classes; n, v: of a block. matrices: which of the row
    arrays are no numbers per token; sums: how many of the results are summed over the walk."""

    formula: Formula
    walk: _Walk
    N: int
    V: int
    n: int
    v: int
    matrices: tuple[bool, ...]
    sums: int


def why_not(logits: jax.Array, table: jax.Array) -> str | None:
    """Why the kernels cannot take these arguments, as a clause; None where they can."""
    for name, x in (("logits are", logits), ("table is", table)):
        if x.dtype not in (jnp.float32, jnp.bfloat16):
            return f"{name} {x.dtype} and the kernel takes float32 or bfloat16"
    widest = max(BLOCKS) // table.dtype.itemsize
    if table.shape[1] > widest:
        return f"table is {table.shape[1]} wide and the kernel takes {widest} at most"
    return None


def sweep(
    formula: Formula,
    limit: jax.Array,
    parts: Arrays,
    rows: Arrays,
    columns: Arrays,
    *,
    interpret: bool,
) -> tuple[Arrays, ...]:
    """Row results, parts and column results of a formula over all tiles, see `softmax_embed`."""
    V, D = columns[0].shape
    tokens = parts[0].shape[:-1]
    parts, rows = (tuple(x.reshape(-1, x.shape[-1]) for x in xs) for xs in (parts, rows))
    N = parts[0].shape[0]
    most = next(size for limit, size in BLOCKS.items() if D * columns[0].dtype.itemsize <= limit)
    n, v = (min(most, -(-size // 128) * 128) for size in (N, V))
    matrices = tuple(x.shape[1] > 1 for x in rows)
    like = jax.eval_shape(functools.partial(_tile, formula), *_blocks(n, v, parts, rows, columns))

    def run(walk: _Walk, results: list[Any], sums: int) -> Arrays:
        if not results:
            return ()
        plan = _Plan(formula, walk, N, V, n, v, matrices, sums)
        return tuple(_call(plan, limit, parts, rows, columns, results, interpret))

    of_rows = [jax.ShapeDtypeStruct((N, x.shape[1]), x.dtype) for x in like[0]]
    of_parts = [jax.ShapeDtypeStruct((N, V), parts[0].dtype) for _ in like[1]]
    of_columns = [jax.ShapeDtypeStruct((V, D), columns[0].dtype) for _ in like[2]]
    found = run("rows", of_rows + of_parts, len(of_rows))
    found = tuple(x.reshape(*tokens, x.shape[1]) for x in found)
    found_columns = run("columns", of_columns, len(of_columns))
    return found[: len(of_rows)], found[len(of_rows) :], found_columns


def _tile(formula: Formula, parts: Arrays, rows: Arrays, columns: Arrays) -> tuple[Arrays, ...]:
    found = formula.tile(parts, rows, columns)
    return found.rows(), found.parts(), found.columns()


def _blocks(n: int, v: int, parts: Arrays, rows: Arrays, columns: Arrays) -> Any:
    """Shapes of a tile's arguments."""
    shape = jax.ShapeDtypeStruct
    return (
        tuple(shape((n, v), tiles.wide(x)) for x in parts),
        tuple(shape((n, x.shape[1]), x.dtype) for x in rows),
        tuple(shape((v, x.shape[1]), x.dtype) for x in columns),
    )


def _call(
    plan: _Plan,
    limit: jax.Array,
    parts: Arrays,
    rows: Arrays,
    columns: Arrays,
    results: list[Any],
    interpret: bool,
) -> Any:
    n, v = plan.n, plan.v
    grid = (pl.cdiv(plan.N, n), pl.cdiv(plan.V, v))
    token, vocab = 0, 1
    if plan.walk == "columns":
        grid, token, vocab = grid[::-1], 1, 0
    numbers = [x for x, is_matrix in zip(rows, plan.matrices, strict=True) if not is_matrix]
    matrices = [x for x, is_matrix in zip(rows, plan.matrices, strict=True) if is_matrix]
    packed = jnp.concatenate(numbers, axis=1) if numbers else jnp.zeros((plan.N, 1), jnp.float32)

    def of_tokens(x: Any) -> pl.BlockSpec:
        return pl.BlockSpec((n, x.shape[1]), lambda *at: (at[token], 0))

    def of_classes(x: Any) -> pl.BlockSpec:
        return pl.BlockSpec((v, x.shape[1]), lambda *at: (at[vocab], 0))

    of_parts = pl.BlockSpec((n, v), lambda *at: (at[token], at[vocab]))
    of_sums = of_tokens if plan.walk == "rows" else of_classes
    summed = results[: plan.sums]
    arguments = (packed, *parts, *matrices, *columns)
    cost = pl.estimate_cost(
        lambda *blocks: _tile(plan.formula, *blocks)[2 if plan.walk == "columns" else slice(2)],
        *_blocks(n, v, parts, rows, columns),
    )
    again = columns if plan.walk == "rows" else matrices
    return pl.pallas_call(
        functools.partial(_kernel, plan, (len(parts), len(matrices), len(columns))),
        grid=grid,
        in_specs=[
            pl.BlockSpec(memory_space=pltpu.SMEM),
            of_tokens(packed),
            *(of_parts for _ in parts),
            *map(of_tokens, matrices),
            *map(of_classes, columns),
        ],
        out_specs=[*map(of_sums, summed), *(of_parts for _ in results[plan.sums :])],
        out_shape=results,
        scratch_shapes=[
            pltpu.VMEM((n if plan.walk == "rows" else v, x.shape[1]), jnp.float32) for x in summed
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=VMEM_BYTES
        ),
        cost_estimate=pl.CostEstimate(
            flops=cost.flops * grid[0] * grid[1],
            transcendentals=plan.N * plan.V,
            bytes_accessed=sum(x.nbytes for x in arguments)
            + sum(x.size * x.dtype.itemsize for x in results)
            + (grid[0] - 1) * sum(x.nbytes for x in again),
        ),
        interpret=interpret,
        name=f"softmax_embed_{plan.formula.tile.__name__}_{plan.walk}",
    )(limit.reshape(1, 1), *arguments)


def _kernel(
    plan: _Plan, counts: tuple[int, int, int], limit: _Ref, packed: _Ref, *refs: _Ref
) -> None:
    """Adds one tile to the sums of a walk, and writes its parts. counts: of the arguments."""
    num_inputs = sum(counts)
    inputs, outputs = refs[:num_inputs], refs[num_inputs : len(refs) - plan.sums]
    sums = refs[len(refs) - plan.sums :]
    initial, merge = plan.formula.initial, plan.formula.merge
    if plan.walk == "columns":
        initial, merge = (0.0,) * plan.sums, tiles.add

    @pl.when(pl.program_id(1) == 0)
    def _begin() -> None:
        for x, value in zip(sums, initial, strict=False):
            x[...] = jnp.full(x.shape, value, x.dtype)

    found = _tile_of(plan, counts, jnp.minimum(limit[0, 0], plan.V), packed, inputs)
    of_sums = found.columns() if plan.walk == "columns" else found.rows()
    if sums:
        total = merge(tuple(x[...] for x in sums), of_sums)
        for x, value in zip(sums, total, strict=True):
            x[...] = value
    if plan.walk == "rows":
        for output, part in zip(outputs[plan.sums :], found.parts(), strict=True):
            output[...] = part.astype(output.dtype)

    @pl.when(pl.program_id(1) == pl.num_programs(1) - 1)
    def _end() -> None:
        for output, x in zip(outputs, sums, strict=False):
            output[...] = x[...].astype(output.dtype)


def _tile_of(
    plan: _Plan, counts: tuple[int, int, int], limit: Any, packed: _Ref, inputs: Sequence[_Ref]
) -> tiles.Sums:
    """The formula on the loaded blocks, with what lies beyond the arrays masked."""
    i, j = pl.program_id(0), pl.program_id(1)
    if plan.walk == "columns":
        i, j = j, i

    def within(shape: tuple[int, ...], axis: int, start: Any, size: Any) -> jax.Array:
        return start + jax.lax.broadcasted_iota(jnp.int32, shape, axis) < size

    def token(x: jax.Array, fill: float = 0.0) -> jax.Array:
        if plan.walk == "rows":  # what a token beyond the last gives is not written
            return x
        return jnp.where(within(x.shape, 0, i * plan.n, plan.N), x, jnp.asarray(fill, x.dtype))

    def part(x: jax.Array, fill: float) -> jax.Array:
        x = x.astype(jnp.float32)
        return token(jnp.where(within(x.shape, 1, j * plan.v, limit), x, fill), fill)

    def class_(x: jax.Array) -> jax.Array:
        zero = jnp.zeros((), x.dtype)
        return jnp.where(within(x.shape, 0, j * plan.v, limit), x, zero)

    num_parts, num_matrices, _ = counts
    loaded = [x[...] for x in inputs]
    fills = (tiles.MASKED_SCORE, 0.0)
    parts = tuple(part(x, fill) for x, fill in zip(loaded[:num_parts], fills, strict=False))
    wide = iter(token(x) for x in loaded[num_parts : num_parts + num_matrices])
    by_token = token(packed[...])
    numbers = iter(by_token[:, k : k + 1] for k in range(by_token.shape[1]))
    rows = tuple(next(wide if is_matrix else numbers) for is_matrix in plan.matrices)
    return plan.formula.tile(parts, rows, tuple(map(class_, loaded[num_parts + num_matrices :])))
