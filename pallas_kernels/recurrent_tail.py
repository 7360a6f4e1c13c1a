"""The elementwise end of a recurrent block: LayerScale, gate, norm of the next step's input.

`recurrent_tail_reference` is the specification. The op's derivative keeps the arguments and two
numbers per token, and computes the rest again.
"""

# Dimension key: D width, ... the axes of tokens. Vectors are lines of one array: scale, depth,
# norm's scale and bias.

import functools
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp

from jaxlib_methods.pallas_kernels import recurrent_tail_tpu as tpu
from jaxlib_methods.pallas_kernels.dispatch import Implementation, choose, with_tangents_of
from jaxlib_methods.pallas_kernels.recurrent_tail_tpu import Norm, backward, forward

NormKind = Literal["layer_norm", "rms_norm"]


class Tail(NamedTuple):
    """state: h'; normed: what the next step's first sub-layer reads."""

    state: jax.Array
    normed: jax.Array


def recurrent_tail_reference(
    residual: jax.Array,
    update: jax.Array,
    state: jax.Array,
    gate: jax.Array,
    *,
    scale: jax.Array,
    depth: jax.Array,
    norm_scale: jax.Array,
    norm_bias: jax.Array | None = None,
    norm: NormKind = "layer_norm",
    eps: float = 1e-5,
) -> Tail:
    """What `recurrent_tail` computes, line by line."""
    lead = range(residual.ndim - 1)
    wide = jnp.promote_types(state.dtype, jnp.float32)
    a, f, h, q = (x.astype(wide) for x in (residual, update, state, gate))
    candidate = a + jnp.expand_dims(scale, lead) * f
    z = jax.nn.sigmoid(q)
    new = z * candidate + (1 - z) * h
    y = new + jnp.expand_dims(depth, lead)
    if norm == "layer_norm":
        y = y - jnp.mean(y, axis=-1, keepdims=True)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)
    y = y * jnp.expand_dims(norm_scale, lead)
    if norm_bias is not None:
        y = y + jnp.expand_dims(norm_bias, lead)
    return Tail(new.astype(state.dtype), y.astype(update.dtype))


def recurrent_tail(
    residual: jax.Array,
    update: jax.Array,
    state: jax.Array,
    gate: jax.Array,
    *,
    scale: jax.Array,
    depth: jax.Array,
    norm_scale: jax.Array,
    norm_bias: jax.Array | None = None,
    norm: NormKind = "layer_norm",
    eps: float = 1e-5,
    implementation: Implementation = "auto",
) -> Tail:
    """LayerScale, identity-biased gate and the next step's norm (Chen 2026, arXiv 2603.21676).

        n = a + s f    z = sigmoid(q)    h' = z n + (1 - z) h    y = norm(h' + d)

    residual, update, state, gate: a, f, h and q (with its bias) `[..., D]`; scale, depth: s of
    this step and d of the next, `[D]`, like norm_scale and norm_bias. Returns h' in state's and y
    in update's dtype, computed in float32 or better; differentiable in reverse, and forwards or in
    reverse over that. See `dispatch` for the implementations.

    >>> import jax.numpy as jnp
    >>> x, one, zero = jnp.array([[1.0, 3.0]]), jnp.ones(2), jnp.zeros(2)
    >>> out = recurrent_tail(x, x, -x, 0 * x, scale=one, depth=zero, norm_scale=one)
    >>> out.state.tolist()
    [[0.5, 1.5]]
    """
    _check(residual, update=update, state=state, gate=gate)
    D = residual.shape[-1]
    wide = jnp.promote_types(state.dtype, jnp.float32)
    bias = jnp.zeros(D, wide) if norm_bias is None else norm_bias
    vectors = {"scale": scale, "depth": depth, "norm_scale": norm_scale, "norm_bias": bias}
    for name, x in vectors.items():
        if x.shape != (D,):
            raise ValueError(f"{name} must be [{D}] for a state of {state.shape}, got {x.shape}")
    if norm not in get_args(NormKind):
        raise ValueError(f"norm {norm!r} is unknown; choose one of {', '.join(get_args(NormKind))}")
    arrays = residual, update, state, gate
    chosen = choose("recurrent_tail", implementation, unsupported=tpu.why_not(*arrays))
    lines = jnp.stack([x.astype(wide) for x in vectors.values()])
    found: Any = _tail(*arrays, lines, Norm(norm == "layer_norm", eps), chosen)
    return Tail(*found)


def _check(residual: jax.Array, **others: jax.Array) -> None:
    for name, x in {"residual": residual, **others}.items():
        if x.shape != residual.shape or not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(
                f"{name} must be floating point of residual's shape {residual.shape}, got "
                f"{x.dtype} of {x.shape}"
            )


def _spread(arrays: tuple[jax.Array, ...], lines: jax.Array) -> tuple[Any, ...]:
    """The arrays in the lines' dtype, and each line of the rank of the arrays."""
    lead = range(arrays[0].ndim - 1)
    return tuple(x.astype(lines.dtype) for x in arrays), tuple(
        jnp.expand_dims(line, lead) for line in lines
    )


def _xla_forward(norm: Norm, *arguments: jax.Array) -> tuple[jax.Array, ...]:
    *arrays, lines = arguments
    new, y, *statistics = forward(norm, *_spread(tuple(arrays), lines))
    return new.astype(arrays[2].dtype), y.astype(arrays[1].dtype), *statistics


def _xla_backward(norm: Norm, *arguments: jax.Array) -> tuple[jax.Array, ...]:
    *arrays, lines, mean, deviation, of_state, of_normed = arguments
    wide, vectors = _spread((*arrays, of_state, of_normed), lines)
    found, terms = backward(norm, wide[:4], vectors, (mean, deviation), wide[4:])
    tokens = tuple(range(mean.ndim - 1))
    of_lines = jnp.stack([x.sum(axis=tokens) for x in terms])
    return *(x.astype(y.dtype) for x, y in zip(found, arrays, strict=True)), of_lines


def _forward_by(name: str, norm: Norm) -> Any:
    plain = functools.partial(_xla_forward, norm)
    return plain if name == "xla" else with_tangents_of(plain, functools.partial(tpu.run, norm))


def _backward_by(name: str, norm: Norm) -> Any:
    plain = functools.partial(_xla_backward, norm)
    return plain if name == "xla" else with_tangents_of(plain, functools.partial(tpu.pull, norm))


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _tail(
    residual: jax.Array,
    update: jax.Array,
    state: jax.Array,
    gate: jax.Array,
    lines: jax.Array,
    norm: Norm,
    implementation: str,
) -> tuple[jax.Array, jax.Array]:
    return _forward_by(implementation, norm)(residual, update, state, gate, lines)[:2]


def _tail_forward(*arguments: Any) -> tuple[Any, Any]:
    *arrays, norm, implementation = arguments
    new, y, *statistics = _forward_by(implementation, norm)(*arrays)
    return (new, y), (*arrays, *statistics)


def _tail_backward(norm: Norm, implementation: str, saved: Any, slopes: Any) -> Any:
    return _backward_by(implementation, norm)(*saved, *slopes)


_tail.defvjp(_tail_forward, _tail_backward)
