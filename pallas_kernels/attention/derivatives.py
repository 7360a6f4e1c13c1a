"""Attention as five primitives, each the derivative or the transpose of another.

    attend  --jvp-->  tangent  --transpose-->  backward
    backward  --jvp-->  backward_tangent  --transpose-->  double_backward

With o, L the output and log-sum-exp, G, g their cotangents, A, B, C those of dQ, dK, dV:
delta = rowsum(G o), mu = delta - g. Primitives and not `jax.custom_vjp`, because the same rules
then serve reverse over reverse, forward over reverse and `jax.jvp`, and because JAX (0.10 to 0.12)
computes wrong gradients, in silence, of one `custom_vjp` called in another's forward rule under a
scan. Derivatives of third order, and of a first derivative taken forward, raise an error.

The rules of `backward` treat o and L as functions of q, k and v: forward, their tangents are used
as they come; in reverse the total derivative goes to q, k and v, and none to o and L.
"""

import functools
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from jaxlib_methods.pallas_kernels.attention import tiles, tpu, xla
from jaxlib_methods.pallas_kernels.attention.tiles import Arrays, Formula, Places, Plan

NUM_PLACES = len(Places._fields)

_RUNS: dict[Primitive, Callable[..., Arrays]] = {}


def _sweep(plan: Plan, *arguments: Any) -> tuple[Arrays, Arrays]:
    if plan.loop == "gpu":
        from jaxlib_methods.pallas_kernels.attention import gpu  # which loads a compiler

        return gpu.sweep(plan, *arguments)
    return {"xla": xla, "tpu": tpu}[plan.loop].sweep(plan, *arguments)


def _rowsum(a: jax.Array, b: jax.Array) -> jax.Array:
    dtype = tiles.wide(a.dtype)
    return jnp.sum(a.astype(dtype) * b.astype(dtype), axis=-1, keepdims=True)


def _centre(plan: Plan, places: Places, rows: Arrays, columns: Arrays) -> jax.Array:
    """What the mean key adds to every entry of a row of W = s (q' K^T + q K'^T).

    Means of W over a row are subtracted in the end. Subtracted late from sums of rounded products,
    what all keys share would swamp bfloat16; so this part is taken off before. rows: q, q', L;
    columns: K, K', 0 where padding.
    """
    q, dq, lse = rows
    dtype = tiles.wide(q.dtype)
    count = jnp.sum(places.key_segments != 0, axis=1)[:, None, None, None]
    count = jnp.maximum(count, 1).astype(dtype)
    mean_k, mean_dk = (jnp.sum(x.astype(dtype), axis=2, keepdims=True) / count for x in columns)
    centre = plan.scale * (_rowsum(dq.astype(dtype), mean_k) + _rowsum(q.astype(dtype), mean_dk))
    return jnp.where(lse > tiles.MASKED_SCORE / 2, centre, 0)


def _attend(plan: Plan, places: Places, q: jax.Array, k: jax.Array, v: jax.Array) -> Arrays:
    (mixed, total, top), _ = _sweep(plan, tiles.FORWARD, places, (q,), (k, v))
    seen = total > 0
    total = jnp.where(seen, total, 1)
    lse = jnp.where(seen, top + jnp.log(total), tiles.MASKED_SCORE)
    return (mixed / total).astype(q.dtype), lse


def _tangent(plan: Plan, places: Places, *arrays: jax.Array) -> Arrays:
    q, k, v, o, lse, dq, dk, dv = arrays
    centre = _centre(plan, places, (q, dq, lse), (k, dk))
    rows, columns = (q, dq, lse, centre), (k, dk, v, dv)
    (mixed, total), _ = _sweep(plan, Formula(tiles.tangent), places, rows, columns)
    return (mixed - total * o.astype(mixed.dtype)).astype(o.dtype), total + centre


def _backward(plan: Plan, places: Places, *arrays: jax.Array) -> Arrays:
    q, k, v, o, lse, g, g_lse = arrays
    rows = (q, g, lse, _rowsum(g, o) - g_lse)
    (dq,), (dk, dv) = _sweep(plan, Formula(tiles.backward), places, rows, (k, v))
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype)


def _backward_tangent(plan: Plan, places: Places, *arrays: jax.Array) -> Arrays:
    q, k, v, o, lse, g, g_lse, *tangents = arrays
    dq, dk, dv, do, dlse, dg, dg_lse = tangents
    mu = _rowsum(g, o) - g_lse
    dmu = _rowsum(dg, o) + _rowsum(g, do) - dg_lse
    rows, columns = (q, dq, g, dg, lse, dlse, mu, dmu), (k, dk, v, dv)
    formula = Formula(tiles.backward_tangent)
    (ddq,), (ddk, ddv) = _sweep(plan, formula, places, rows, columns)
    return ddq.astype(q.dtype), ddk.astype(k.dtype), ddv.astype(v.dtype)


def _double_backward(plan: Plan, places: Places, *arrays: jax.Array) -> Arrays:
    q, k, v, o, lse, g, g_lse, a, b, c = arrays
    delta = _rowsum(g, o)
    mu, centre = delta - g_lse, _centre(plan, places, (q, a, lse), (k, b))
    columns = (k, b, v, c)
    formula = Formula(tiles.double_backward_rows)
    (w, z), _ = _sweep(plan, formula, places, (q, a, g, lse, delta, centre), columns)
    w = w + centre
    formula, rows = Formula(tiles.double_backward), (q, a, g, lse, mu, w, z)
    (dq, dg), (dk, dv) = _sweep(plan, formula, places, rows, columns)
    like = zip((dq, dk, dv, dg), (q, k, v, g), strict=True)
    return *(x.astype(y.dtype) for x, y in like), w


def _primitive(name: str, compute: Callable[..., Arrays], like: tuple[int, ...]) -> Primitive:
    """A primitive of (q, k, v, *places, ...); like: arguments whose types the results have.

    A negative entry is a statistic of the rows: the first argument's type with one wide feature.
    """

    def run(*arguments: jax.Array, plan: Plan) -> Arrays:
        q, k, v, *rest = arguments
        places, rest = Places(*rest[:NUM_PLACES]), rest[NUM_PLACES:]
        return compute(plan, places, q, k, v, *rest)

    def types(*arguments: Any, plan: Plan) -> list[Any]:
        del plan
        q, v = arguments[0], arguments[2]
        found = {-1: q.update(shape=(*q.shape[:3], 1), dtype=tiles.wide(q.dtype), weak_type=False)}
        found[-2] = q.update(shape=(*q.shape[:3], v.shape[3]), weak_type=False)
        return [found[i] if i < 0 else arguments[i].update(weak_type=False) for i in like]

    primitive = Primitive(name)
    primitive.multiple_results = True
    _RUNS[primitive] = run
    primitive.def_impl(jax.jit(run, static_argnames="plan"))
    primitive.def_abstract_eval(types)
    mlir.register_lowering(primitive, mlir.lower_fun(run, multiple_results=True))

    def batched(arguments: Any, axes: Any, *, plan: Plan) -> tuple[Any, list[int]]:
        """A mapped axis becomes part of the batch, which all arguments have in front."""
        pairs = list(zip(arguments, axes, strict=True))
        size = next(x.shape[axis] for x, axis in pairs if axis is not None)

        def fold(x: jax.Array, axis: int | None) -> jax.Array:
            if axis is None:
                x = jnp.broadcast_to(x[None], (size, *x.shape))
            else:
                x = jnp.moveaxis(x, axis, 0)
            return x.reshape(-1, *x.shape[2:])

        results = primitive.bind(*(fold(*pair) for pair in pairs), plan=plan)
        results = [x.reshape(size, -1, *x.shape[1:]) for x in results]
        return results, [0] * len(results)

    batching.primitive_batchers[primitive] = batched
    return primitive


def in_one_tile(equation: Any) -> Any | None:
    """What an equation of a jaxpr computes, as a jaxpr without loops, if it is attention in tiles.

    Its products are those of all tiles, of what no query sees too.
    """
    if equation.primitive not in _RUNS:
        return None
    like = [jax.ShapeDtypeStruct(x.aval.shape, x.aval.dtype) for x in equation.invars]
    plan = equation.params["plan"]
    plan = plan._replace(loop="xla", rows=like[0].shape[2], columns=like[1].shape[2])
    run = functools.partial(_RUNS[equation.primitive], plan=plan)
    return jax.make_jaxpr(run)(*like).jaxpr


_Q, _K, _V, _ROW, _OUTPUT = 0, 1, 2, -1, -2
attend_p = _primitive("attention", _attend, (_OUTPUT, _ROW))
tangent_p = _primitive("attention_tangent", _tangent, (_OUTPUT, _ROW))
backward_p = _primitive("attention_backward", _backward, (_Q, _K, _V))
backward_tangent_p = _primitive("attention_backward_tangent", _backward_tangent, (_Q, _K, _V))
double_backward_p = _primitive(
    "attention_double_backward", _double_backward, (_Q, _K, _V, _OUTPUT, _ROW)
)

_ARGUMENTS = 3 + NUM_PLACES  # q, k, v and the places
_FORWARD = _ARGUMENTS + 2  # and o, L
_BACKWARD = _FORWARD + 2  # and G, g


def _filled(tangents: Any) -> list[jax.Array]:
    """Tangents of q, k, v and what comes behind the places, zeros as arrays."""
    return [ad.instantiate_zeros(x) for i, x in enumerate(tangents) if not 3 <= i < _ARGUMENTS]


def _attend_jvp(primals: Any, tangents: Any, *, plan: Plan) -> tuple[Any, Any]:
    results = attend_p.bind(*primals, plan=plan)
    return results, tangent_p.bind(*primals, *results, *_filled(tangents), plan=plan)


def _backward_jvp(primals: Any, tangents: Any, *, plan: Plan) -> tuple[Any, Any]:
    results = backward_p.bind(*primals, plan=plan)
    return results, backward_tangent_p.bind(*primals, *_filled(tangents), plan=plan)


def _dense(cotangents: Any) -> list[jax.Array]:
    return [ad.instantiate_zeros(x) for x in cotangents]


def _tangent_transpose(cotangents: Any, *arguments: Any, plan: Plan) -> list[Any]:
    found = backward_p.bind(*arguments[:_FORWARD], *_dense(cotangents), plan=plan)
    return [None] * _FORWARD + _where_asked(arguments[_FORWARD:], found)


def _backward_tangent_transpose(cotangents: Any, *arguments: Any, plan: Plan) -> list[Any]:
    saved, linear = arguments[:_BACKWARD], arguments[_BACKWARD:]
    dq, dk, dv, dg, dg_lse = double_backward_p.bind(*saved, *_dense(cotangents), plan=plan)
    through_q_k_v = [None, None]  # what reaches o and L
    found = [dq, dk, dv, *through_q_k_v, dg, dg_lse]
    return [None] * _BACKWARD + _where_asked(linear, found)


def _where_asked(linear: Any, found: Any) -> list[Any]:
    pairs = zip(linear, found, strict=True)
    return [y if ad.is_undefined_primal(x) else None for x, y in pairs]


def _refuse(primitive: Primitive) -> Callable[..., Any]:
    def jvp(*_: Any, **__: Any) -> Any:
        raise NotImplementedError(
            f"{primitive} has no derivative: attention in tiles is differentiated twice at most, "
            "first in reverse; attention_reference (--model.attention_implementation=plain) has "
            "all derivatives"
        )

    return jvp


ad.primitive_jvps[attend_p] = _attend_jvp
ad.primitive_transposes[tangent_p] = _tangent_transpose
ad.primitive_jvps[backward_p] = _backward_jvp
ad.primitive_transposes[backward_tangent_p] = _backward_tangent_transpose
for _last in (tangent_p, backward_tangent_p, double_backward_p):
    ad.primitive_jvps[_last] = _refuse(_last)


def attend(
    plan: Plan, places: Places, query: jax.Array, key: jax.Array, value: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Output `[B, K, R, E]` and log-sum-exp `[B, K, R, 1]`, differentiable to second order.

    query: `[B, K, R, C]`; key: `[B, K, M, C]`; value: `[B, K, M, E]`. Where a query sees no key,
    0 and `MASKED_SCORE`.
    """
    return cast(
        tuple[jax.Array, jax.Array], tuple(attend_p.bind(query, key, value, *places, plan=plan))
    )
