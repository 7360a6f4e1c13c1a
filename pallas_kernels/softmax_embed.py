"""Expected embedding of a softmax and the descent step on its logits, in tiles of the vocabulary.

`softmax_embed_reference` is the specification. The op itself walks over tiles of the vocabulary:
beside the logits, their derivatives and the table, no array has the vocabulary's size, under
derivatives of first and second order. It is primitives, each the derivative or the transpose of
another, for the reasons that `attention.derivatives` gives:

    embed  --jvp-->  tangent  --transpose-->  backward
    backward  --jvp-->  backward_tangent  --transpose-->  double_backward
    update  --jvp-->  update_tangent  --transpose-->  update_backward

With e, L the expected embedding and the log-sum-exp, g, l their cotangents: delta = <g, e>,
mu = delta - l. The rules of `backward` treat e and L as functions of logits and table: forward,
their tangents are used as they come; in reverse the total derivative goes to logits and table.
Derivatives of third order, and of second order of the update (itself a derivative), raise an error.
"""

# Dimension key: V vocabulary, D width, ... the axes of tokens.

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from jaxlib_methods.pallas_kernels import softmax_embed_tiles as tiles
from jaxlib_methods.pallas_kernels import softmax_embed_tpu as tpu
from jaxlib_methods.pallas_kernels.dispatch import Implementation, choose, interpret
from jaxlib_methods.pallas_kernels.softmax_embed_tiles import Arrays, Formula

TILE = 2048  # classes that exist at once beside the logits


def softmax_embed_reference(
    logits: jax.Array, table: jax.Array, *, num_classes: int | None = None
) -> tuple[jax.Array, jax.Array]:
    """What `softmax_embed` computes, by way of the probabilities `[..., V]`."""
    real = jnp.arange(logits.shape[-1]) < (num_classes or logits.shape[-1])
    real = jnp.expand_dims(real, range(logits.ndim - 1))
    y = jnp.where(real, logits.astype(tiles.wide(logits, table)), tiles.MASKED_SCORE)
    table = jnp.where(real.reshape(-1, 1), table, 0)
    mixed = tiles.mix(jax.nn.softmax(y, axis=-1), table)
    return mixed.astype(table.dtype), jax.nn.logsumexp(y, axis=-1)


def softmax_embed(
    logits: jax.Array,
    table: jax.Array,
    *,
    num_classes: int | None = None,
    axis_name: str | None = None,
    implementation: Implementation = "auto",
) -> tuple[jax.Array, jax.Array]:
    """Expected embedding of a softmax, and its log-sum-exp (EBT, arXiv 2507.02092, section 3).

        L = logsumexp(y)    e = softmax(y) W

    logits: float `[..., V]`; table: `[V, D]`. Returns `[..., D]` in table's dtype and `[...]` in
    float32 or better, differentiable: forward, in reverse, forward over reverse and in reverse
    twice. num_classes: how many of the V are classes; the others pad, and may hold anything.
    axis_name: inside `jax.shard_map(check_vma=False)`, the mesh axis along which logits and table
    are cut; a maximum and one sum of tokens cross it. See `dispatch` for the implementations.

    >>> import jax.numpy as jnp
    >>> softmax_embed(jnp.zeros((1, 2)), jnp.array([[1.0], [3.0]]))[0].tolist()
    [[2.0]]
    """
    _check(logits, table)
    loop = choose("softmax_embed", implementation, unsupported=tpu.why_not(logits, table))
    limit = _limit(logits.shape[-1], num_classes, axis_name)
    mixed, lse = embed_p.bind(limit, logits, table, loop=_Loop(loop, interpret()))
    if axis_name is not None:
        top = jax.lax.pmax(jax.lax.stop_gradient(lse), axis_name)
        weight = jnp.exp(lse - top)
        both = jnp.concatenate([weight * mixed.astype(weight.dtype), weight], axis=-1)
        total = jax.lax.psum(both, axis_name)
        mixed, norm = total[..., :-1] / total[..., -1:], total[..., -1:]
        mixed, lse = mixed.astype(table.dtype), top + jnp.log(norm)
    return mixed, lse[..., 0]


def softmax_embed_update(
    logits: jax.Array,
    table: jax.Array,
    embedded: tuple[jax.Array, jax.Array],
    slope: jax.Array,
    step_size: jax.Array | float,
    *,
    num_classes: int | None = None,
    axis_name: str | None = None,
    implementation: Implementation = "auto",
) -> jax.Array:
    """A descent step on the logits of `softmax_embed`, without an array of their slopes.

        y' = y - alpha p (W g - <g, e>),   p = exp(y - L)

    embedded: (e, L), what `softmax_embed` gave; slope: g `[..., D]`, dE/de, in table's dtype;
    step_size: alpha, a scalar or `[...]`. Returns `[..., V]` in logits' dtype, differentiable once
    in every argument, forward or in reverse. The rest as in `softmax_embed`.
    """
    _check(logits, table)
    mixed, lse = embedded
    if slope.shape != mixed.shape or slope.dtype != table.dtype:
        raise ValueError(
            f"slope must be {table.dtype}{mixed.shape} like the embedding, got "
            f"{slope.dtype}{slope.shape}"
        )
    name = "softmax_embed_update"
    loop = choose(name, implementation, unsupported=tpu.why_not(logits, table))
    alpha = jnp.broadcast_to(jnp.asarray(step_size, lse.dtype), lse.shape)[..., None]
    limit = _limit(logits.shape[-1], num_classes, axis_name)
    mu = _rowsum(slope, mixed).astype(lse.dtype)
    arrays = logits, table, lse[..., None], slope, mu, alpha
    return update_p.bind(limit, *arrays, loop=_Loop(loop, interpret()))[0]


def _check(logits: jax.Array, table: jax.Array) -> None:
    if table.ndim != 2 or table.shape[0] != logits.shape[-1]:
        raise ValueError(
            f"table must be [{logits.shape[-1]}, D] for logits of {logits.shape}, got {table.shape}"
        )
    for name, x in (("logits", logits), ("table", table)):
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(f"{name} must be floating point, got {x.dtype}")


def _limit(size: int, num_classes: int | None, axis_name: str | None) -> jax.Array:
    """How many of the classes here are real."""
    if axis_name is None:
        return jnp.int32(num_classes or size)
    first = jax.lax.axis_index(axis_name) * size
    return jnp.clip((num_classes or size * jax.lax.axis_size(axis_name)) - first, 0, size)


class _Loop(NamedTuple):
    """Which loop walks over the tiles."""

    name: str
    interpret: bool


def _sweep(loop: _Loop, formula: Formula, limit: jax.Array, *arrays: Arrays) -> tuple[Arrays, ...]:
    """Row results, parts and column results of a formula over all tiles.

    arrays: parts `[..., V]`, rows `[..., X]`, columns `[V, D]`; limit: classes that are real.
    """
    if loop.name == "pallas":
        return tpu.sweep(formula, limit, *arrays, interpret=loop.interpret)
    return _xla_sweep(formula, limit, *arrays)


def _xla_sweep(
    formula: Formula, limit: jax.Array, parts: Arrays, rows: Arrays, columns: Arrays
) -> tuple[Arrays, ...]:
    V = parts[0].shape[-1]
    tile = min(V, TILE)

    def at(start: jax.Array | int, size: int) -> tuple[Arrays, ...]:
        real = start + jnp.arange(size, dtype=jnp.int32) < limit
        fills = (tiles.MASKED_SCORE, *[0.0] * len(parts))
        cut = jax.lax.dynamic_slice_in_dim
        row = jnp.expand_dims(real, range(parts[0].ndim - 1))
        found = formula.tile(
            tuple(
                jnp.where(row, cut(x, start, size, -1), fill).astype(tiles.wide(x))
                for x, fill in zip(parts, fills, strict=False)
            ),
            rows,
            tuple(jnp.where(real[:, None], cut(x, start, size, 0), 0) for x in columns),
        )
        return found.rows(), found.parts(), found.columns()

    def add(start: jax.Array | int, size: int, found: tuple[Arrays, ...]) -> tuple[Arrays, ...]:
        of_rows, of_parts, of_columns = at(start, size)
        put = jax.lax.dynamic_update_slice_in_dim
        pairs = functools.partial(zip, strict=True)
        return (
            formula.merge(found[0], of_rows) if of_rows else (),
            tuple(put(x, y.astype(x.dtype), start, -1) for x, y in pairs(found[1], of_parts)),
            tuple(put(x, y.astype(x.dtype), start, 0) for x, y in pairs(found[2], of_columns)),
        )

    like = jax.eval_shape(functools.partial(at, 0, tile))
    tokens, width = parts[0].shape[:-1], columns[0].shape[1]
    initial = (
        tuple(
            jnp.full(x.shape, v, x.dtype) for x, v in zip(like[0], formula.initial, strict=False)
        ),
        tuple(jnp.zeros((*tokens, V), parts[0].dtype) for _ in like[1]),
        tuple(jnp.zeros((V, width), columns[0].dtype) for _ in like[2]),
    )
    # The last tile has a size of its own: padding would copy the logits in each sweep.
    count, rest = divmod(V, tile)
    found = jax.lax.fori_loop(0, count, lambda i, found: add(i * tile, tile, found), initial)
    return add(V - rest, rest, found) if rest else found


def _rowsum(a: jax.Array, b: jax.Array) -> jax.Array:
    dtype = tiles.wide(a, b)
    return jnp.sum(a.astype(dtype) * b.astype(dtype), axis=-1, keepdims=True)


def _embed(sweep: Callable[..., Any], y: jax.Array, w: jax.Array) -> Arrays:
    (mixed, total, top), _, _ = sweep(tiles.FORWARD, (y,), (), (w,))
    seen = total > 0
    total = jnp.where(seen, total, 1)
    lse = jnp.where(seen, top + jnp.log(total), tiles.MASKED_SCORE)
    return mixed / total, lse


def _tangent(sweep: Callable[..., Any], *arrays: jax.Array) -> Arrays:
    y, w, e, lse, dy, dw = arrays
    (mixed, total), _, _ = sweep(Formula(tiles.tangent), (y, dy), (lse,), (w, dw))
    return mixed - total * e.astype(mixed.dtype), total


def _backward(sweep: Callable[..., Any], *arrays: jax.Array) -> Arrays:
    y, w, e, lse, g, g_lse = arrays
    rows = (g, lse, _rowsum(g, e) - g_lse)
    _, (dy,), (dw,) = sweep(Formula(tiles.backward), (y,), rows, (w,))
    return dy, dw


def _backward_tangent(sweep: Callable[..., Any], *arrays: jax.Array) -> Arrays:
    y, w, e, lse, g, g_lse, dy, dw, de, dlse, dg, dg_lse = arrays
    mu = _rowsum(g, e) - g_lse
    dmu = _rowsum(dg, e) + _rowsum(g, de) - dg_lse
    rows = (g, dg, lse, dlse, mu, dmu)
    _, (ddy,), (ddw,) = sweep(Formula(tiles.backward_tangent), (y, dy), rows, (w, dw))
    return ddy, ddw


def _double_backward(sweep: Callable[..., Any], *arrays: jax.Array) -> Arrays:
    y, w, e, lse, g, g_lse, a, c = arrays
    delta = _rowsum(g, e)
    formula = Formula(tiles.double_backward_rows)
    (mean_a, z), _, _ = sweep(formula, (y, a), (g, lse, delta), (w, c))
    rows = (g, lse, delta - g_lse, mean_a, z)
    formula = Formula(tiles.double_backward)
    (dg,), (dy,), (dw,) = sweep(formula, (y, a), rows, (w, c))
    return dy, dw, dg, mean_a


def _update(sweep: Callable[..., Any], *arrays: jax.Array) -> Arrays:
    y, w, lse, g, mu, alpha = arrays
    return sweep(Formula(tiles.update), (y,), (g, lse, mu, alpha), (w,))[1]


def _update_tangent(sweep: Callable[..., Any], *arrays: jax.Array) -> Arrays:
    y, w, lse, g, mu, alpha, dy, dw, dlse, dg, dmu, dalpha = arrays
    rows = (g, dg, lse, dlse, mu, dmu, alpha, dalpha)
    return sweep(Formula(tiles.update_tangent), (y, dy), rows, (w, dw))[1]


def _update_backward(sweep: Callable[..., Any], *arrays: jax.Array) -> Arrays:
    y, w, lse, g, mu, alpha, u = arrays
    rows = (g, lse, mu, alpha)
    (dg, dlse, dmu, dalpha), (dy,), (dw,) = sweep(
        Formula(tiles.update_backward), (y, u), rows, (w,)
    )
    return dy, dw, dlse, dg, dmu, dalpha


def _primitive(name: str, compute: Callable[..., Arrays], like: tuple[int, ...]) -> Primitive:
    """A primitive of (limit, logits, table, ...); like: arguments whose types the results have.

    -1: an embedding per token, -2: a number per token.
    """

    def types(limit: Any, *arguments: Any, loop: _Loop) -> list[Any]:
        del limit, loop
        y, w = arguments[:2]
        options = {"weak_type": False}
        row = y.update(shape=(*y.shape[:-1], 1), dtype=tiles.wide(y, w), **options)
        mixed = y.update(shape=(*y.shape[:-1], w.shape[1]), dtype=w.dtype, **options)
        special = {-1: mixed, -2: row}
        return [special[i] if i < 0 else arguments[i].update(**options) for i in like]

    def run(limit: jax.Array, *arguments: jax.Array, loop: _Loop) -> Arrays:
        def sweep(formula: Formula, *arrays: Arrays) -> tuple[Arrays, ...]:
            return _sweep(loop, formula, limit, *arrays)

        wanted = types(limit, *map(jax.typeof, arguments), loop=loop)
        found = compute(sweep, *arguments)
        return tuple(x.astype(t.dtype) for x, t in zip(found, wanted, strict=True))

    def batched(arguments: Any, axes: Any, *, loop: _Loop) -> tuple[Any, list[int]]:
        """One after the other: the tables may differ."""
        mapped = [i for i, axis in enumerate(axes) if axis is not None]

        def one(slices: Any) -> Any:
            whole = list(arguments)
            for i, x in zip(mapped, slices, strict=True):
                whole[i] = x
            return primitive.bind(*whole, loop=loop)

        found = jax.lax.map(one, [jnp.moveaxis(arguments[i], axes[i], 0) for i in mapped])
        return found, [0] * len(found)

    primitive = Primitive(name)
    primitive.multiple_results = True
    primitive.def_impl(jax.jit(run, static_argnames="loop"))
    primitive.def_abstract_eval(types)
    mlir.register_lowering(primitive, mlir.lower_fun(run, multiple_results=True))
    batching.primitive_batchers[primitive] = batched
    return primitive


_Y, _W, _MIXED, _ROW = 0, 1, -1, -2
embed_p = _primitive("softmax_embed", _embed, (_MIXED, _ROW))
tangent_p = _primitive("softmax_embed_tangent", _tangent, (_MIXED, _ROW))
backward_p = _primitive("softmax_embed_backward", _backward, (_Y, _W))
backward_tangent_p = _primitive("softmax_embed_backward_tangent", _backward_tangent, (_Y, _W))
double_backward_p = _primitive(
    "softmax_embed_double_backward", _double_backward, (_Y, _W, _MIXED, _ROW)
)
update_p = _primitive("softmax_embed_update", _update, (_Y,))
update_tangent_p = _primitive("softmax_embed_update_tangent", _update_tangent, (_Y,))
update_backward_p = _primitive(
    "softmax_embed_update_backward", _update_backward, (_Y, _W, _ROW, _MIXED, _ROW, _ROW)
)


def _filled(tangents: Any) -> list[jax.Array]:
    """Tangents of all arguments but the limit, zeros as arrays."""
    return [ad.instantiate_zeros(x) for x in tangents]


def _jvp(
    primitive: Primitive, derivative: Primitive, *, results: bool
) -> Callable[..., tuple[Any, Any]]:
    """results: whether the derivative takes them too."""

    def rule(primals: Any, tangents: Any, *, loop: _Loop) -> tuple[Any, Any]:
        found = primitive.bind(*primals, loop=loop)
        saved = (*primals, *found) if results else primals
        return found, derivative.bind(*saved, *_filled(tangents[1:]), loop=loop)

    return rule


def _transpose(primitive: Primitive, *, linear: int, unused: int = 0) -> Callable[..., list[Any]]:
    """By a primitive that takes what is not linear, then the cotangents.

    linear: how many of the arguments are, at the end; unused: see `backward` in the module.
    """

    def rule(cotangents: Any, *arguments: Any, loop: _Loop) -> list[Any]:
        saved, moving = arguments[:-linear], arguments[-linear:]
        found = primitive.bind(*saved, *_filled(cotangents), loop=loop)
        found = [*found[:2], *[None] * unused, *found[2:]]
        asked = zip(moving, found, strict=True)
        return [None] * len(saved) + [y if ad.is_undefined_primal(x) else None for x, y in asked]

    return rule


ad.primitive_jvps[embed_p] = _jvp(embed_p, tangent_p, results=True)
ad.primitive_transposes[tangent_p] = _transpose(backward_p, linear=2)
ad.primitive_jvps[backward_p] = _jvp(backward_p, backward_tangent_p, results=False)
ad.primitive_transposes[backward_tangent_p] = _transpose(double_backward_p, linear=6, unused=2)
ad.primitive_jvps[update_p] = _jvp(update_p, update_tangent_p, results=False)
ad.primitive_transposes[update_tangent_p] = _transpose(update_backward_p, linear=6)
