"""Attention's kernels for Hopper: interpreted against the loops, lowered, compiled for an H200."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlib_methods.pallas_kernels.attention import SHARED_SEGMENT, Keys, attention, tiles, xla
from jaxlib_methods.pallas_kernels.attention.tiles import Formula, Places, Plan
from jaxlib_methods.pallas_kernels.dispatch import gpu_interpreter, interpreted, lowering_for

interpretable = pytest.mark.skipif(
    gpu_interpreter() is None, reason="JAX interprets kernels for GPUs from 0.11 on"
)

# Features of the row arrays (1: a statistic) and of the column arrays. Of wide sums the kernels of
# second order make 64 features at a time.
C, E, WIDE = 40, 24, 72
FORMULAS = {
    "forward": (tiles.FORWARD, (C,), (C, E)),
    "tangent": (Formula(tiles.tangent), (C, C, 1, 1), (C, C, E, E)),
    "backward": (Formula(tiles.backward), (C, E, 1, 1), (C, E)),
    "backward_tangent": (
        Formula(tiles.backward_tangent),
        (C, C, WIDE, WIDE, 1, 1, 1, 1),
        (C, C, WIDE, WIDE),
    ),
    "double_backward_rows": (
        Formula(tiles.double_backward_rows),
        (C, C, E, 1, 1, 1),
        (C, C, E, E),
    ),
    "double_backward": (Formula(tiles.double_backward), (C, C, E, 1, 1, 1, 1), (C, C, E, E)),
}
ROWS, COLUMNS = 128, 128


def places() -> Places:
    """The last keys are ahead of every query, the first is everybody's, some are nobody's."""
    rows, columns = np.arange(ROWS) + 30, np.arange(COLUMNS)
    segments = [1 + x // 70 for x in (rows, columns)]
    segments[0][100:] = 0
    segments[1][50:55] = 0
    segments[1][0] = SHARED_SEGMENT
    found = (rows, segments[0], columns, segments[1])
    return Places(*(jnp.asarray(x[None], jnp.int32) for x in found))


@interpretable
@pytest.mark.parametrize("name", FORMULAS)
def test_sums_are_those_of_plain_loops(name):
    from jaxlib_methods.pallas_kernels.attention import gpu

    formula, of_rows, of_columns = FORMULAS[name]
    rng = np.random.default_rng(0)
    rows, columns = (
        tuple(
            jnp.asarray(rng.normal(size=(1, 1, n, x)), "bfloat16" if x > 1 else "float32")
            for x in sizes
        )
        for n, sizes in ((ROWS, of_rows), (COLUMNS, of_columns))
    )
    plan = Plan("gpu", C**-0.5, 60, 64, 64, interpret=True)
    got = gpu.sweep(plan, formula, places(), rows, columns)
    want = xla.sweep(plan._replace(rows=ROWS, columns=COLUMNS), formula, places(), rows, columns)
    assert len(jax.tree.leaves(got)) == len(jax.tree.leaves(want))
    for sums, expected in zip(got, want, strict=True):
        for x, y in zip(sums, expected, strict=True):
            # bfloat16 rounds the weights, of `forward` relative to another exponent.
            limit = 2**-8 if name == "forward" else 1e-3
            assert jnp.abs(x - y).max() <= limit * jnp.abs(y).max()


@interpretable
def test_attention_runs_them_by_name():
    # Grouped heads of sizes that no tile has, padding that holds NaN.
    rng = np.random.default_rng(0)
    shapes = (1, 9, 6, 7), (1, 11, 2, 7), (1, 11, 2, 5)
    arrays = tuple(jnp.asarray(rng.normal(size=shape), jnp.bfloat16) for shape in shapes)
    segments = jnp.asarray([[1] * 8 + [0]]), jnp.asarray([[1] * 9 + [0] * 2])
    arrays = tuple(
        jnp.where((at != 0)[..., None, None], x, jnp.nan)
        for x, at in zip(arrays, (segments[0], segments[1], segments[1]), strict=True)
    )

    def attend(implementation: Any) -> tuple[jax.Array, jax.Array]:
        query, key, value = arrays
        keys = Keys(key, value, jnp.arange(11)[None], segments[1])
        at: Any = {"positions": jnp.arange(9)[None], "segments": segments[0]}
        mixed, lse = attention(query, keys, **at, implementation=implementation)
        return mixed[:, :8], lse[:, :8]

    with interpreted(), lowering_for("gpu"):
        got = attend("pallas")
    for x, y in zip(got, attend("xla"), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_allclose(np.asarray(x, "f4"), np.asarray(y, "f4"), rtol=0, atol=2**-6)


def second_order(*, reverse: bool) -> Callable[..., Any]:
    """The Hessian's product with the arguments, of some loss of both results."""

    def total(arrays: Any, place: jax.Array) -> jax.Array:
        query, key, value = arrays
        at: Any = {"positions": place, "segments": place * 0 + 1}
        context = Keys(key, value, place, place * 0 + 1)
        mixed, lse = attention(query, context, **at, window=100, implementation="pallas")
        return jnp.sum(jnp.sin(mixed.astype(lse.dtype))) + jnp.sum(jnp.sin(lse))

    def product(query: jax.Array, key: jax.Array, value: jax.Array, place: jax.Array) -> Any:
        arrays = (query, key, value)
        if not reverse:
            return jax.jvp(lambda x: jax.grad(total)(x, place), (arrays,), (arrays,))

        def along(x: Any) -> jax.Array:
            pairs = zip(jax.grad(total)(x, place), x, strict=True)
            return sum((jnp.sum((a * b).astype("float32")) for a, b in pairs), jnp.zeros(()))

        return jax.grad(along)(arrays)

    return product


def shapes(length: int, size: int) -> tuple[Any, ...]:
    arrays = (jax.ShapeDtypeStruct((2, length, h, size), "bfloat16") for h in (4, 2, 2))
    return *arrays, jax.ShapeDtypeStruct((2, length), jnp.int32)


@pytest.mark.parametrize("reverse", [False, True])
def test_kernels_lower_for_hopper(reverse, lower_for_h200):
    text = lower_for_h200(second_order(reverse=reverse), *shapes(300, 80)).as_text()
    second = "double_backward" if reverse else "backward_tangent"
    for name in ("forward_rows", "backward_rows", "backward_columns", f"{second}_columns"):
        assert f"attention_{name}" in text


@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize("reverse", [False, True])
def test_kernels_compile_for_hopper_without_spills(reverse, size, spills_on_h200):
    spills = spills_on_h200(second_order(reverse=reverse), *shapes(512, size))
    assert len(spills) == 6
    assert not any(spilled for _, spilled in spills.values()), spills
