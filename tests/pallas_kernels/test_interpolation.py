"""Interpolation along the channels: numbers, the transpose, every mode and order, no scatter."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from jax.test_util import check_grads

from jaxlib_methods.pallas_kernels.interpolation import interpolate

SIZES = [(24, 10), (10, 24), (7, 7), (5, 1), (1, 5), (12, 6)]


def matrix(width: int, size: int) -> np.ndarray:
    """`[width, size]`, from NumPy's own interpolation of unit vectors."""
    place = (np.arange(size) + 0.5) * width / size - 0.5
    return np.stack([np.interp(place, np.arange(width), unit) for unit in np.eye(width)])


@pytest.mark.parametrize(("width", "size"), SIZES)
def test_map_and_transpose_are_the_matrix(width, size):
    with jax.enable_x64(True):
        got = interpolate(jnp.eye(width), size)
        np.testing.assert_allclose(got, matrix(width, size), atol=1e-12)
        back = jax.linear_transpose(functools.partial(interpolate, size=size), jnp.zeros(width))
        columns = jax.vmap(lambda unit: back(unit)[0])(jnp.eye(size))
        np.testing.assert_allclose(columns, matrix(width, size).T, atol=1e-12)


def test_every_mode_and_order():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 7)))
    with jax.enable_x64(True):
        check_grads(lambda x: jnp.sin(interpolate(x, 4)).sum(), (x.astype(float),), order=3)


def test_vmap_over_any_axis():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 7)), jnp.float32)
    for axis in (0, 1):
        got = jax.vmap(functools.partial(interpolate, size=4), in_axes=axis, out_axes=axis)(x)
        np.testing.assert_allclose(got, interpolate(x, 4), rtol=1e-5)


def test_no_scatter_in_the_gradient():
    def slope(x: jax.Array) -> jax.Array:
        return jax.grad(lambda x: (interpolate(x, 10) ** 2).sum())(x)

    text = jax.jit(slope).lower(jnp.zeros((3, 24))).as_text()
    assert "gather" in text
    assert "scatter" not in text


def test_inside_shard_map_and_in_bfloat16():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(8, 24)), jnp.bfloat16)
    cut = jax.shard_map(
        functools.partial(interpolate, size=10), mesh=mesh, in_specs=P("data"), out_specs=P("data")
    )
    got = cut(x)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_array_equal(got, interpolate(x, 10))
