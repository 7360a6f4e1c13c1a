"""Linear interpolation along the channels as a linear map that knows its transpose.

Both are gathers. Left to JAX, the transpose of a gather is a scatter, which moves the array many
times over.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

_Taps = tuple[np.ndarray, np.ndarray]  # places int `[K, outputs]`, shares float of the same shape


def interpolate(x: jax.Array, size: int) -> jax.Array:
    """Linear interpolation to `size` channels, half a channel off at both ends.

        s_j = clip((j + 1/2) D/size - 1/2, 0, D - 1),  i = floor(s_j),  a = s_j - i
        y_j = (1 - a) x_i + a x_(i + 1)

    x: float `[..., D]`. Returns `[..., size]` of x's dtype, with derivatives of every order and
    mode.

    >>> import jax.numpy as jnp
    >>> interpolate(jnp.array([0.0, 1.0, 2.0]), 2).tolist()
    [0.25, 1.75]
    """
    return _map.bind(x, sizes=(x.shape[-1], size), transposed=False)


@functools.cache
def _taps(width: int, size: int) -> _Taps:
    """The two channels that each output reads, and how much of each."""
    place = np.clip((np.arange(size) + 0.5) * width / size - 0.5, 0, width - 1)
    left = np.floor(place).astype(np.int32)
    share = place - left
    return np.stack([left, np.minimum(left + 1, width - 1)]), np.stack([1 - share, share])


@functools.cache
def _transposed_taps(width: int, size: int) -> _Taps:
    """The outputs that read each channel: two at most where `size` is the smaller, else more."""
    places, shares = _taps(width, size)
    readers = [np.nonzero((places == i) & (shares > 0)) for i in range(width)]
    most = max(len(output) for _, output in readers)
    back, share = np.zeros((most, width), np.int32), np.zeros((most, width))
    for i, (tap, output) in enumerate(readers):
        back[: len(output), i], share[: len(output), i] = output, shares[tap, output]
    return back, share


def _gather(x: jax.Array, *, sizes: tuple[int, int], transposed: bool) -> jax.Array:
    places, shares = (_transposed_taps if transposed else _taps)(*sizes)
    axes = range(x.ndim - 1)
    first, *others = (
        jnp.expand_dims(jnp.asarray(share, x.dtype), axes) * x[..., place]
        for place, share in zip(places, shares, strict=True)
    )
    return sum(others, start=first)


def _abstract(x: Any, *, sizes: tuple[int, int], transposed: bool) -> Any:
    return x.update(shape=(*x.shape[:-1], sizes[0 if transposed else 1]))


def _transpose(slope: Any, _: Any, *, sizes: tuple[int, int], transposed: bool) -> list[Any]:
    return [_map.bind(slope, sizes=sizes, transposed=not transposed)]


def _batch(arrays: Any, axes: Any, **options: Any) -> tuple[jax.Array, int]:
    return _map.bind(jnp.moveaxis(arrays[0], axes[0], 0), **options), 0


_map = Primitive("interpolate")
_map.def_impl(_gather)
_map.def_abstract_eval(_abstract)
ad.deflinear2(_map, _transpose)
batching.primitive_batchers[_map] = _batch
mlir.register_lowering(_map, mlir.lower_fun(_gather, multiple_results=False))
