"""Loss, entropy and log-sum-exp of next-token predictions without their logits.

`linear_cross_entropy_reference` is the specification: the logits, then the losses. The op itself
walks over tiles of the vocabulary and computes their logits again for the derivative: no array of
tokens times vocabulary exists, under derivatives of first and second order.
"""

# Dimension key: T tiles of the vocabulary, V vocabulary, D width, ... the axes of tokens.

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp

from jaxlib_methods.pallas_kernels import linear_cross_entropy_gpu as gpu
from jaxlib_methods.pallas_kernels import linear_cross_entropy_tpu as tpu
from jaxlib_methods.pallas_kernels.dispatch import (
    Implementation,
    choose,
    platform,
    with_tangents_of,
)
from jaxlib_methods.pallas_kernels.linear_cross_entropy_tpu import MASKED_SCORE, NO_CLASS

TILE = 1024  # classes whose logits exist at once


class TokenStatistics(NamedTuple):
    """Of each prediction, in nats. nll: of the label; logsumexp: of the logits."""

    nll: jax.Array
    entropy: jax.Array
    logsumexp: jax.Array


class Part(NamedTuple):
    """Of each prediction over a part of the vocabulary, with logsumexp = top + spread.

    score: the label's logit, 0 where it is elsewhere; top: the largest logit, without a gradient:
    spread has that of both, and is kept apart because a large top would round it.
    """

    score: jax.Array
    entropy: jax.Array
    top: jax.Array
    spread: jax.Array


def linear_cross_entropy_reference(
    hidden: jax.Array,
    weight: jax.Array,
    labels: jax.Array,
    *,
    where: jax.Array | None = None,
    num_classes: int | None = None,
    scale: jax.Array | float = 1.0,
) -> TokenStatistics:
    """What `linear_cross_entropy` computes, by way of the logits `[..., V]`."""
    if where is not None:
        hidden = jnp.where(where[..., None], hidden, jnp.zeros((), hidden.dtype))
    num_classes = num_classes or weight.shape[0]
    columns = jnp.arange(weight.shape[0])
    columns = jnp.where(columns < num_classes, columns, NO_CLASS)
    part = _tile_statistics(hidden, weight, columns, labels, _wide(scale, hidden))
    return _finish(part, labels, num_classes, where)


def linear_cross_entropy(
    hidden: jax.Array,
    weight: jax.Array,
    labels: jax.Array,
    *,
    where: jax.Array | None = None,
    num_classes: int | None = None,
    scale: jax.Array | float = 1.0,
    axis_name: str | None = None,
    implementation: Implementation = "auto",
) -> TokenStatistics:
    """Cross-entropy of a linear head in tiles of the vocabulary (cut cross-entropy, 2411.09009).

        z_t = scale W h_t,   L_t = logsumexp_v z_tv
        nll_t = L_t - z_t[y_t],   H_t = L_t - sum_v p_tv z_tv,   p_t = softmax(z_t)

    hidden: `[..., D]`; weight: `[V, D]`, a table of embeddings or a head's transposed kernel, used
    in hidden's dtype; labels: int `[...]`; where: bool `[...]`, False gives 0 and no gradient.
    Returns three arrays `[...]`, float32 or better, all differentiable: in reverse, and forwards
    or in reverse over that. nll is NaN for a label that is no class: delete its token by `where`.
    Raises ValueError for arrays of other shapes or types.

    num_classes: how many rows of weight are classes; the others pad the vocabulary. scale: a
    scalar without a gradient, such as 1 / temperature. axis_name: inside `jax.shard_map`, the mesh
    axis along which the rows of weight are cut; statistics of the tokens are all that crosses it.
    `pallas` has kernels for TPUs and, of hidden in bfloat16 or float16, for Hopper GPUs; both
    compile and neither was run on its device, so `auto` is `xla`. See `dispatch`.

    >>> import jax.numpy as jnp
    >>> out = linear_cross_entropy(jnp.ones((2, 3)), jnp.zeros((4, 3)), jnp.array([0, 3]))
    >>> bool(jnp.allclose(out.nll, jnp.log(4.0))), bool(jnp.allclose(out.entropy, jnp.log(4.0)))
    (True, True)
    """
    _check(hidden, weight, labels, where)
    kernel = "gpu" if platform() == "gpu" else "tpu"
    chosen = choose(
        "linear_cross_entropy",
        implementation,
        unsupported=gpu.why_not(hidden) if kernel == "gpu" else tpu.why_not(hidden, weight),
        kernels=("gpu", "tpu"),
    )
    loop = kernel if chosen == "pallas" else chosen
    if where is not None:
        hidden = jnp.where(where[..., None], hidden, jnp.zeros((), hidden.dtype))
    first, num_columns = 0, weight.shape[0]
    if axis_name is not None:
        first = jax.lax.axis_index(axis_name) * num_columns
        num_columns *= jax.lax.axis_size(axis_name)
    num_classes = num_classes or num_columns
    columns = first + jnp.arange(weight.shape[0], dtype=jnp.int32)
    columns = jnp.where(columns < num_classes, columns, NO_CLASS)
    # Made here, with their padding: where a function with a custom derivative makes an array of
    # nothing, JAX 0.10 to 0.12 may mistake it for what another one, around it, saved in a scan.
    if loop == "xla":
        weight, columns = _tiles(weight, columns)
    else:
        columns = tpu.whole_blocks(columns)
    arrays = _vary_alike(hidden, weight, columns, labels, _wide(scale, hidden))
    part = cast(Part, _statistics(*arrays, loop))
    if axis_name is not None:
        part = _merge(
            part,
            functools.partial(jax.lax.pmax, axis_name=axis_name),
            functools.partial(jax.lax.psum, axis_name=axis_name),
        )
    return _finish(part, labels, num_classes, where)


def _check(
    hidden: jax.Array, weight: jax.Array, labels: jax.Array, where: jax.Array | None
) -> None:
    if weight.ndim != 2 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"weight must be [V, {hidden.shape[-1]}] for hidden of {hidden.shape}, got "
            f"{weight.shape}; transpose a head's kernel"
        )
    if labels.shape != hidden.shape[:-1] or not jnp.issubdtype(labels.dtype, jnp.integer):
        raise ValueError(
            f"labels must be integers of shape {hidden.shape[:-1]}, got {labels.dtype} of "
            f"{labels.shape}"
        )
    if where is not None and (where.shape != labels.shape or where.dtype != jnp.bool_):
        raise ValueError(
            f"where must be bool of shape {labels.shape}, got {where.dtype} of {where.shape}"
        )


def _wide(scale: jax.Array | float, hidden: jax.Array) -> jax.Array:
    """The scale in the dtype of the logits: hidden times it would be rounded to hidden's."""
    wide = jnp.promote_types(hidden.dtype, jnp.float32)
    return jax.lax.stop_gradient(jnp.asarray(scale, wide))


def _finish(
    part: Part, labels: jax.Array, num_classes: int, where: jax.Array | None
) -> TokenStatistics:
    top = jax.lax.stop_gradient(part.top)
    # The score of no class is 0, and the loss would have no lower bound.
    known = (labels >= 0) & (labels < jnp.int32(num_classes))
    nll = jnp.where(known, (top - part.score) + part.spread, jnp.nan)
    found = TokenStatistics(nll, part.entropy, top + part.spread)
    if where is None:
        return found
    return TokenStatistics(*(jnp.where(where, x, 0.0) for x in found))


def _merge(
    part: Part, largest: Callable[[jax.Array], jax.Array], total: Callable[[Any], Any]
) -> Part:
    """Joins parts of the vocabulary: the chain rule of entropy, H = sum_s w_s (H_s - log w_s)."""
    tops = jax.lax.stop_gradient(part.top)
    top = largest(tops)
    log_weight = (tops - top) + part.spread
    weight = jnp.exp(log_weight)
    score, mixed, norm = total((part.score, weight * (part.entropy - log_weight), weight))
    return Part(score, mixed / norm + jnp.log(norm), top, jnp.log(norm))


def _vary_alike(*arrays: jax.Array) -> tuple[jax.Array, ...]:
    """Inside shard_map: as varying over the union of their axes, so that derivatives add up."""
    varying = [jax.typeof(x).manual_axis_type.varying for x in arrays]
    union = frozenset().union(*varying)
    return tuple(
        jax.lax.pcast(x, tuple(sorted(union - axes)), to="varying")
        for x, axes in zip(arrays, varying, strict=True)
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _statistics(
    hidden: jax.Array,
    weight: jax.Array,
    columns: jax.Array,
    labels: jax.Array,
    scale: jax.Array,
    loop: str,
) -> Part:
    return _FORWARD[loop](hidden, weight, columns, labels, scale)


def _statistics_forward(
    hidden: jax.Array,
    weight: jax.Array,
    columns: jax.Array,
    labels: jax.Array,
    scale: jax.Array,
    loop: str,
) -> tuple[Part, tuple[Any, ...]]:
    part = _FORWARD[loop](hidden, weight, columns, labels, scale)
    return part, (hidden, weight, columns, labels, scale, part)


def _statistics_backward(
    loop: str, saved: tuple[Any, ...], slopes: Part
) -> tuple[jax.Array | None, ...]:
    return (*_BACKWARD[loop](*saved, slopes), None, None, None)


_statistics.defvjp(_statistics_forward, _statistics_backward)


# The tiles in plain JAX.


def _tiles(weight: jax.Array, columns: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Weight `[T, V / T, D]` and columns `[T, V / T]`, padded where V is no multiple."""
    V = weight.shape[0]
    even = -(-V // (128 * -(-V // TILE))) * 128
    # One that divides V spares copies of weight and its gradient.
    tile = V if V <= TILE else next((t for t in range(TILE, TILE // 4, -128) if V % t == 0), even)
    num_tiles = -(-V // tile)
    short = num_tiles * tile - V
    weight = jnp.pad(weight, [(0, short), (0, 0)])
    columns = jnp.pad(columns, [(0, short)], constant_values=NO_CLASS)
    return weight.reshape(num_tiles, tile, -1), columns.reshape(num_tiles, tile)


def _tile_logits(
    hidden: jax.Array,
    weight: jax.Array,
    columns: jax.Array,
    labels: jax.Array,
    scale: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Scaled logits `[..., V]`, which of them are of a class, and which of the label."""
    weight = weight.astype(hidden.dtype)
    logits = jnp.einsum("...d,vd->...v", hidden, weight, preferred_element_type=scale.dtype)
    logits = logits * scale
    columns = jnp.expand_dims(columns, range(labels.ndim))
    real = columns != NO_CLASS
    return logits, real, real & (columns == labels[..., None])


def _tile_statistics(
    hidden: jax.Array,
    weight: jax.Array,
    columns: jax.Array,
    labels: jax.Array,
    scale: jax.Array,
) -> Part:
    logits, real, hit = _tile_logits(hidden, weight, columns, labels, scale)
    logits = jnp.where(real, logits, MASKED_SCORE)
    top = jax.lax.stop_gradient(logits.max(axis=-1))
    excess = logits - top[..., None]
    power = jnp.exp(excess)
    norm = power.sum(axis=-1)
    entropy = jnp.log(norm) - (power * excess).sum(axis=-1) / norm
    return Part(jnp.where(hit, logits, 0.0).sum(axis=-1), entropy, top, jnp.log(norm))


def _tile_gradients(
    hidden: jax.Array,
    weight: jax.Array,
    columns: jax.Array,
    labels: jax.Array,
    scale: jax.Array,
    part: Part,
    slopes: Part,
) -> tuple[jax.Array, jax.Array]:
    """The share of a tile in hidden's gradient, wide, and the gradient of its rows of weight.

    dz_v = p_v (dL - dH (log p_v + H)) + ds [v = y],   of the scaled logits
    """
    logits, real, hit = _tile_logits(hidden, weight, columns, labels, scale)
    _, entropy, top, spread = (x[..., None] for x in part)
    dscore, dentropy, _, dspread = (x[..., None] for x in slopes)
    log_probs = jnp.where(real, (logits - top) - spread, 0.0)
    probs = jnp.where(real, jnp.exp(log_probs), 0.0)
    dlogits = probs * (dspread - dentropy * (log_probs + entropy))
    dlogits = (scale * (dlogits + jnp.where(hit, dscore, 0.0))).astype(hidden.dtype)
    wide = functools.partial(jnp.tensordot, preferred_element_type=logits.dtype)
    tokens = tuple(range(labels.ndim))
    dweight = wide(dlogits, hidden, axes=(tokens, tokens)).astype(weight.dtype)
    return wide(dlogits, weight.astype(hidden.dtype), axes=1), dweight


def _xla_statistics(
    hidden: jax.Array,
    weight: jax.Array,
    columns: jax.Array,
    labels: jax.Array,
    scale: jax.Array,
) -> Part:
    """Of weight `[T, V / T, D]` and columns `[T, V / T]`, like all that follows."""
    body = jax.checkpoint(_tile_statistics, prevent_cse=False)
    return _join(jax.lax.map(lambda tile: body(hidden, *tile, labels, scale), (weight, columns)))


def _join(parts: Part) -> Part:
    """Parts of the vocabulary, along the first axis, as one."""
    total = functools.partial(jnp.sum, axis=0, keepdims=True)
    part = _merge(
        parts,
        functools.partial(jnp.max, axis=0, keepdims=True),
        functools.partial(jax.tree.map, total),
    )
    return jax.tree.map(lambda x: x[0], part)


def _xla_gradients(
    hidden: jax.Array,
    weight: jax.Array,
    columns: jax.Array,
    labels: jax.Array,
    scale: jax.Array,
    part: Part,
    slopes: Part,
) -> tuple[jax.Array, jax.Array]:
    tile_gradients = jax.checkpoint(_tile_gradients, prevent_cse=False)

    def body(dhidden: jax.Array, tile: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        # The sum outside the checkpoint: it is linear, so its derivative keeps no partial sum.
        share, dweight = tile_gradients(hidden, *tile, labels, scale, part, slopes)
        return dhidden + share, dweight

    start, _ = _vary_alike(jnp.zeros(hidden.shape, part.spread.dtype), hidden)
    dhidden, dweight = jax.lax.scan(body, start, (weight, columns))
    return dhidden.astype(hidden.dtype), dweight


# The kernels. Their own derivatives, which only a second order takes, are those of the tiles.


def _plain_statistics(
    hidden: jax.Array, weight: jax.Array, columns: jax.Array, *rest: jax.Array
) -> Part:
    return _xla_statistics(hidden, *_tiles(weight, columns[: weight.shape[0]]), *rest)


def _plain_gradients(
    hidden: jax.Array, weight: jax.Array, columns: jax.Array, *rest: Any
) -> tuple[jax.Array, jax.Array]:
    V, D = weight.shape
    dhidden, dweight = _xla_gradients(hidden, *_tiles(weight, columns[:V]), *rest)
    return dhidden, dweight.reshape(-1, D)[:V]


_FORWARD = {
    "xla": _xla_statistics,
    "tpu": with_tangents_of(_plain_statistics, lambda *x: Part(*tpu.statistics(*x))),
    "gpu": with_tangents_of(_plain_statistics, lambda *x: _join(Part(*gpu.statistics(*x)))),
}
_BACKWARD = {
    "xla": _xla_gradients,
    "tpu": with_tangents_of(_plain_gradients, tpu.gradients),
    "gpu": with_tangents_of(_plain_gradients, gpu.gradients),
}
