"""The gradient of LET's interpolation of channels: gathers both ways against a scatter.

    python tests/benchmarks/interpolation.py

Measured: the gradient of the cosine to a target after `interpolate`, which reads with gathers
forwards and backwards. Against: the same with two gathers left to JAX, whose transpose is a
scatter. Goal: no slower.
"""

import functools
from collections.abc import Callable

import harness
import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from jaxlib_methods import losses
from jaxlib_methods.pallas_kernels.interpolation import interpolate

_TOKENS = flags.DEFINE_integer("tokens", 2048, "Tokens of a call.", lower_bound=1)
SIZES = ((1024, 384), (384, 1024))  # channels of the student, of the target


def plain(x: jax.Array, size: int) -> jax.Array:
    """The same numbers, with JAX's own derivative."""
    width = x.shape[-1]
    place = np.clip((np.arange(size) + 0.5) * width / size - 0.5, 0, width - 1)
    left = np.floor(place).astype(np.int32)
    share = jnp.expand_dims(jnp.asarray(place - left, x.dtype), range(x.ndim - 1))
    return (1 - share) * x[..., left] + share * x[..., np.minimum(left + 1, width - 1)]


def gradient(
    op: Callable[[jax.Array, int], jax.Array], x: jax.Array, target: jax.Array
) -> jax.Array:
    """Of the summed cosine, to `x`."""

    def cosine(x: jax.Array) -> jax.Array:
        return losses.cosine_similarity(op(x, target.shape[-1]), target).sum()

    return jax.grad(cosine)(x)


def main(_: list[str]) -> None:
    """Times both directions of resizing."""
    for width, size in SIZES:
        keys = jax.random.split(jax.random.key(0))
        shape = (1, _TOKENS.value)
        x = jax.random.normal(keys[0], (*shape, width))
        target = jax.random.normal(keys[1], (*shape, size))
        step = jax.jit(gradient, static_argnums=0)
        ops = {"scatter": plain, "gathers": interpolate}
        times = harness.measure(
            {name: functools.partial(step, op, x, target) for name, op in ops.items()}
        )
        title = f"Gradient of an interpolation from {width} to {size} channels"
        ratio = harness.report(title, times, reference="scatter", tokens_per_call=_TOKENS.value)
        harness.check_goal("gathers / scatter", ratio["gathers"], limit=1.0)


if __name__ == "__main__":
    app.run(main)
