"""End of a recurrent block: by hand, against float64 to second order, what its derivative keeps."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies

from jaxlib_methods.pallas_kernels import dispatch
from jaxlib_methods.pallas_kernels import recurrent_tail_tpu as tpu
from jaxlib_methods.pallas_kernels.recurrent_tail import (
    Tail,
    recurrent_tail,
    recurrent_tail_reference,
)

SHAPE = (3, 7, 24)  # 21 tokens: no block divides them
RNG = np.random.default_rng(0)
ARRAYS = ("residual", "update", "state", "gate")
VECTORS = ("scale", "depth", "norm_scale", "norm_bias")

Op = Callable[..., Tail]


def normal(*shape: int) -> np.ndarray:
    """Numbers that bfloat16 holds exactly, so that one reference serves every dtype."""
    return np.asarray(jnp.asarray(RNG.normal(size=shape), jnp.bfloat16), np.float64)


def draw() -> dict[str, np.ndarray]:
    found = {name: normal(*SHAPE) for name in ARRAYS}
    return found | {name: normal(SHAPE[2]) for name in VECTORS}


VALUES, DIRECTION = draw(), draw()
BEND = normal(2, *SHAPE)


def derivatives(op: Op, norm: str, dtype: Any) -> dict[str, Any]:
    """Outputs and derivatives to second order, in one program."""
    values, direction = (
        {name: jnp.asarray(x, dtype) for name, x in tree.items()} for tree in (VALUES, DIRECTION)
    )
    if norm == "rms_norm":
        values.pop("norm_bias")
        direction.pop("norm_bias")
    wide = jnp.promote_types(dtype, jnp.float32)

    def call(values: dict[str, jax.Array]) -> Tail:
        arrays = [values[name] for name in ARRAYS]
        vectors = {name: x for name, x in values.items() if name not in ARRAYS}
        return op(*arrays, norm=norm, eps=0.1, **vectors)

    def total(values: dict[str, jax.Array]) -> jax.Array:
        x = jnp.stack([x.astype(wide) for x in call(values)])
        return ((jnp.asarray(BEND, wide) + jnp.sin(x)) * x).sum()

    slope = jax.grad(total)

    def along(values: dict[str, jax.Array]) -> jax.Array:
        dot = functools.partial(jnp.vdot, preferred_element_type=wide)
        return sum(
            jax.tree.leaves(jax.tree.map(dot, slope(values), direction)), jnp.zeros((), wide)
        )

    def program(values: dict[str, jax.Array]) -> dict[str, Any]:
        return {
            "output": call(values),
            "vjp": slope(values),
            "jvp of vjp": jax.jvp(slope, (values,), (direction,))[1],
            "vjp of vjp": jax.grad(along)(values),
        }

    with dispatch.interpreted():
        return jax.jit(program)(values)


@functools.cache
def exact(norm: str) -> dict[str, Any]:
    with jax.enable_x64(True):
        found = derivatives(recurrent_tail_reference, norm, jnp.float64)
        return jax.tree.map(np.asarray, found)


def distance(got: Any, want: Any) -> float:
    want = np.asarray(want, np.float64)
    return float(np.linalg.norm(np.asarray(got, np.float64) - want) / np.linalg.norm(want))


# float32: sums of 24 features and 21 tokens, each rounded by 6e-8. bfloat16: computed wide from
# exact arguments; rounded by 2^-9 are the results, and what the loss bends once more.
@pytest.mark.parametrize(
    ("dtype", "limit", "norm"),
    [
        (jnp.float32, 1e-5, "layer_norm"),
        (jnp.float32, 1e-5, "rms_norm"),
        (jnp.bfloat16, 2**-6, "layer_norm"),
    ],
)
@pytest.mark.parametrize("implementation", ["xla", "pallas"])
def test_agrees_with_the_reference_to_second_order(implementation, dtype, limit, norm, monkeypatch):
    monkeypatch.setattr(tpu, "BLOCKS", {16384: 8})
    op = functools.partial(recurrent_tail, implementation=implementation)
    got, want = derivatives(op, norm, dtype), exact(norm)
    for order, tree in got.items():
        assert all(x.dtype == dtype for x in jax.tree.leaves(tree))
        errors = jax.tree.map(distance, tree, want[order])
        assert max(jax.tree.leaves(errors)) < limit, (order, errors)


def test_by_hand():
    # n = (1, 3) + 2 (1, 1) = (3, 5), z = 1/2, h = (1, 1): h' = (2, 3). With d = (0, 1) the norm
    # reads (2, 4): centred (-1, 1), so y = (-1, 1) c + b = (-3, 4).
    x, one = jnp.array([[1.0, 3.0]]), jnp.ones((1, 2))
    for op in (recurrent_tail, recurrent_tail_reference):
        found = op(
            x, one, one, 0 * one,
            scale=jnp.full(2, 2.0), depth=jnp.array([0.0, 1.0]),
            norm_scale=jnp.array([3.0, 3.0]), norm_bias=jnp.array([0.0, 1.0]), eps=0.0,
        )  # fmt: skip
        np.testing.assert_allclose(found.state, [[2.0, 3.0]], rtol=1e-5)
        np.testing.assert_allclose(found.normed, [[-3.0, 4.0]], rtol=1e-5)


def test_its_derivative_keeps_the_arguments_and_two_numbers_a_token():
    values = {name: jnp.asarray(x, "float32") for name, x in VALUES.items()}

    def kept(op: Op) -> int:
        """Bytes that the derivative keeps beside the arguments."""
        arrays, vectors = [values[n] for n in ARRAYS], {n: values[n] for n in VECTORS}
        pull = jax.vjp(lambda *x: op(*x, **vectors), *arrays)[1]
        given = {id(x) for x in arrays}
        return sum(x.nbytes for x in jax.tree.leaves(pull) if id(x) not in given)

    tokens, lines = SHAPE[0] * SHAPE[1], 4 * SHAPE[2]
    assert kept(recurrent_tail) <= 4 * (2 * tokens + lines)
    assert kept(recurrent_tail_reference) > 4 * 2 * tokens * SHAPE[2]


def test_an_impossible_argument_says_why():
    x, line = jnp.zeros((3, 2)), jnp.zeros(2)
    vectors: Any = {"scale": line, "depth": line, "norm_scale": line}
    with pytest.raises(
        ValueError, match=r"gate must be .* shape \(3, 2\), got float32 of \(2, 3\)"
    ):
        recurrent_tail(x, x, x, x.T, **vectors)
    with pytest.raises(ValueError, match=r"update must be floating point .* got int32"):
        recurrent_tail(x, x.astype(int), x, x, **vectors)
    with pytest.raises(ValueError, match=r"depth must be \[2\] .* got \(3,\)"):
        recurrent_tail(x, x, x, x, **vectors | {"depth": jnp.zeros(3)})
    unknown: Any = "batch_norm"
    with pytest.raises(ValueError, match="norm 'batch_norm' is unknown; choose one of layer_norm"):
        recurrent_tail(x, x, x, x, **vectors, norm=unknown)
    pallas: Any = {"implementation": "pallas"}
    with pytest.raises(ValueError, match="no kernel is written for cpu, only for tpu"):
        recurrent_tail(x, x, x, x, **vectors, **pallas)
    with dispatch.interpreted(), pytest.raises(ValueError, match="an argument is float16"):
        recurrent_tail(x, x.astype("float16"), x, x, **vectors, **pallas)
    wide, line = jnp.zeros((3, 8192)), jnp.zeros(8192)
    vectors = {"scale": line, "depth": line, "norm_scale": line}
    with dispatch.interpreted(), pytest.raises(ValueError, match="8192 wide and the kernel takes"):
        recurrent_tail(wide, wide, wide, wide, **vectors, **pallas)


def gradient(*values: jax.Array) -> Any:
    """Of all results, by the kernels."""

    def total(*values: jax.Array) -> jax.Array:
        vectors = dict(zip(VECTORS, values[4:], strict=True))
        found = recurrent_tail(*values[:4], implementation="pallas", **vectors)
        return sum((x.astype(jnp.float32).sum() for x in found), jnp.zeros(()))

    return jax.grad(total, argnums=tuple(range(8)))(*values)


def abstract(tokens: int, width: int, dtype: str, sharding: Any = None) -> list[Any]:
    """Abstract arguments of `gradient`; dtype: of the update."""
    shapes: list[Any] = [(tokens, width)] * 4 + [(width,)] * 4
    dtypes = ["float32", dtype, *["float32"] * 6]
    return [
        jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
        for shape, dtype in zip(shapes, dtypes, strict=True)
    ]


def test_kernels_lower_for_a_tpu():
    with dispatch.lowering_for("tpu"):
        traced = jax.jit(gradient).trace(*abstract(1000, 128, "bfloat16"))
    text = traced.lower(lowering_platforms=("tpu",)).as_text()
    assert text.count("recurrent_tail_forward") >= 1
    assert text.count("recurrent_tail_backward") >= 1


@pytest.mark.usefixtures("optimised")
@pytest.mark.libtpu
@pytest.mark.parametrize("chip", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"])
def test_kernels_compile_for_a_tpu(chip, monkeypatch):
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    topology = topologies.get_topology_desc(platform="tpu", topology_name=chip)
    sharding = jax.sharding.SingleDeviceSharding(topology.devices[0])
    # The widest states of each block size: too large a block does not fit VMEM.
    for width, dtype in ((128, "bfloat16"), (512, "float32"), (1024, "float32"), (4096, "float32")):
        with dispatch.lowering_for("tpu"):
            lowered = jax.jit(gradient).lower(*abstract(1000, width, dtype, sharding))
        program: Any = lowered.compile().as_text()
        assert program.count("tpu_custom_call") == 2
