"""Softmax-embedding: by hand, against float64 to second order, the update, shards, memory."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from jaxlib_methods.pallas_kernels import dispatch
from jaxlib_methods.pallas_kernels import softmax_embed as module
from jaxlib_methods.pallas_kernels import softmax_embed_tpu as tpu
from jaxlib_methods.pallas_kernels.softmax_embed import (
    softmax_embed,
    softmax_embed_reference,
    softmax_embed_update,
)

# No block divides a size; the vocabulary is padded.
N, D, V, CLASSES = 13, 24, 300, 277
RNG = np.random.default_rng(0)


def normal(*shape: int) -> np.ndarray:
    """Numbers that bfloat16 holds exactly, so that one reference serves every dtype."""
    return np.asarray(jnp.asarray(RNG.normal(size=shape), jnp.bfloat16), np.float64)


LOGITS, TABLE = 2 * normal(N, V), normal(V, D)
DIRECTION = normal(N, V), normal(V, D)
SLOPE, WEIGHT = normal(N, D), normal(N, V)
STEP_SIZE = np.linspace(1, 4, N).round(1)
LOGITS[:, CLASSES:], TABLE[CLASSES:] = 50.0, 7.0  # padding may hold anything

Op = Callable[..., Any]
PALLAS_AND_XLA = pytest.mark.parametrize("implementation", ["xla", "pallas"])
# float32: sums of 24 and 277 terms, each rounded by 6e-8. bfloat16: the sums are as wide; rounded
# by 2^-9 are probabilities, their slopes, the results, and their derivatives once more.
DTYPES = pytest.mark.parametrize(
    ("dtype", "first", "second"), [(jnp.float32, 1e-5, 1e-5), (jnp.bfloat16, 2**-7, 2**-6)]
)


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch):
    monkeypatch.setattr(module, "TILE", 128)
    monkeypatch.setattr(tpu, "BLOCKS", {8192: 8})


def total(op: Op, *arrays: jax.Array) -> jax.Array:
    """A scalar that is not linear in the results."""
    e, lse = op(*arrays, num_classes=CLASSES)
    e = e.astype(lse.dtype)
    scales = jnp.asarray(SLOPE, lse.dtype)
    return ((scales + jnp.sin(e)) * e).sum() + (jnp.sin(lse) * lse).sum()


def derivatives(op: Op, dtype: Any) -> dict[str, Any]:
    """Outputs and derivatives to second order, in one program."""
    arrays, direction = (
        tuple(jnp.asarray(x, dtype) for x in pair) for pair in ((LOGITS, TABLE), DIRECTION)
    )

    def program(*arrays: jax.Array) -> dict[str, Any]:
        slope = jax.grad(functools.partial(total, op), argnums=(0, 1))

        def along(*x: jax.Array) -> jax.Array:
            wide = jnp.promote_types(dtype, jnp.float32)
            dot = functools.partial(jnp.vdot, preferred_element_type=wide)
            of_logits, of_table = map(dot, slope(*x), direction)
            return of_logits + of_table

        return {
            "output": tuple(op(*arrays, num_classes=CLASSES)),
            "jvp": jax.jvp(lambda *x: op(*x, num_classes=CLASSES), arrays, direction)[1],
            "vjp": slope(*arrays),
            "jvp of vjp": jax.jvp(slope, arrays, direction)[1],
            "vjp of vjp": jax.grad(along, argnums=(0, 1))(*arrays),
        }

    return run(program, *arrays)


def run(program: Callable[..., Any], *arrays: jax.Array) -> Any:
    with jax.default_matmul_precision("highest"), dispatch.interpreted():
        return jax.jit(program)(*arrays)


def exact(program: Callable[..., Any], *arguments: Any) -> Any:
    with jax.enable_x64(True):
        return jax.tree.map(np.asarray, program(*arguments, jnp.float64))


@pytest.fixture(scope="module")
def want() -> dict[str, Any]:
    return exact(derivatives, softmax_embed_reference)


def distance(got: Any, want: np.ndarray) -> float:
    return float(np.linalg.norm(np.asarray(got, np.float64) - want) / np.linalg.norm(want))


@DTYPES
@PALLAS_AND_XLA
def test_agrees_with_the_reference_to_second_order(implementation, dtype, first, second, want):
    got = derivatives(functools.partial(softmax_embed, implementation=implementation), dtype)
    assert [x.dtype for x in got["output"]] == [dtype, jnp.float32]
    for order, arrays in got.items():
        for x, y in zip(arrays, want[order], strict=True):
            assert distance(x, y) < (second if "of" in order else first), order
        if "vjp" in order:
            of_logits, of_table = arrays
            assert not of_logits[:, CLASSES:].any()
            assert not of_table[CLASSES:].any()


def reference_update(
    logits: jax.Array,
    table: jax.Array,
    embedded: Any,
    slope: jax.Array,
    step_size: jax.Array,
    *,
    num_classes: int,
) -> jax.Array:
    """The specification of the update: a step against the gradient of <g, e>."""
    del embedded
    embed = functools.partial(softmax_embed_reference, table=table, num_classes=num_classes)
    (dy,) = jax.vjp(lambda y: embed(y)[0], logits)[1](slope)
    return logits - step_size[:, None] * dy


def update_derivatives(update: Op, embed: Op, dtype: Any) -> dict[str, Any]:
    """The update of the logits and its derivatives, with all that it comes from."""
    arrays = tuple(jnp.asarray(x, dtype) for x in (LOGITS, TABLE, SLOPE, STEP_SIZE))
    weight = jnp.asarray(WEIGHT, dtype)

    def step(y: jax.Array, w: jax.Array, g: jax.Array, alpha: jax.Array) -> jax.Array:
        embedded = embed(y, w, num_classes=CLASSES)
        return update(y, w, embedded, g, alpha, num_classes=CLASSES)

    def loss(*x: jax.Array) -> jax.Array:
        moved = step(*x)[:, :CLASSES].astype(jnp.promote_types(dtype, jnp.float32))
        return (jnp.sin(moved) * weight[:, :CLASSES]).sum()

    def program(*x: jax.Array) -> dict[str, Any]:
        direction = tuple(y * jnp.asarray(0.5, dtype) for y in x)
        return {
            "output": (step(*x)[:, :CLASSES],),
            "jvp": (jax.jvp(step, x, direction)[1][:, :CLASSES],),
            "vjp": jax.grad(loss, argnums=(0, 1, 2, 3))(*x),
        }

    return run(program, *arrays)


@DTYPES
@PALLAS_AND_XLA
def test_the_update_is_a_step_against_the_gradient(implementation, dtype, first, second):
    update, embed = (
        functools.partial(op, implementation=implementation)
        for op in (softmax_embed_update, softmax_embed)
    )
    got = update_derivatives(update, embed, dtype)
    expected = exact(update_derivatives, reference_update, softmax_embed_reference)
    del first  # the update holds a first derivative, and e rounded to the table's dtype
    for order, arrays in got.items():
        for x, y in zip(arrays, expected[order], strict=True):
            assert x.dtype == dtype
            assert distance(x, y) < second, order


def test_by_hand():
    # p = (1/4, 3/4): e = 1/4 * 0 + 3/4 * 4 = 3, L = log 4. With g = 2 the slope of the logits is
    # p (2 w - 6) = (-3/2, 3/2).
    logits, table = jnp.array([[0.0, math.log(3.0)]]), jnp.array([[0.0], [4.0]])
    for op in (softmax_embed, softmax_embed_reference):
        e, lse = op(logits, table)
        np.testing.assert_allclose(e, [[3.0]], rtol=1e-5)
        np.testing.assert_allclose(lse, [math.log(4.0)], rtol=1e-5)
    moved = softmax_embed_update(logits, table, (e, lse), jnp.array([[2.0]]), 0.1)
    np.testing.assert_allclose(moved, logits - jnp.array([[-0.15, 0.15]]), rtol=1e-5)


def test_a_large_common_offset_of_the_logits_is_harmless():
    # Logits near 300 are rounded by 300 * 2^-24 = 2e-5, and probabilities with them.
    expected = softmax_embed_reference(
        jnp.asarray(LOGITS, "float32"), jnp.asarray(TABLE, "float32")
    )
    offset = jnp.asarray(LOGITS + 300, "float32")
    e, lse = softmax_embed(offset, jnp.asarray(TABLE, "float32"))
    assert distance(e, np.asarray(expected[0])) < 1e-4
    assert distance(lse - 300, np.asarray(expected[1])) < 1e-4


def test_a_vocabulary_cut_over_devices():
    # 4 shards of 75 rows: one is full, one has 25 classes, two have none.
    mesh = jax.make_mesh((2, 4), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    arrays = tuple(jnp.asarray(x, "float32") for x in (LOGITS[:4], TABLE, SLOPE[:4]))

    def step(y: jax.Array, w: jax.Array, bend: jax.Array, **axis: Any) -> jax.Array:
        options: Any = {"num_classes": 100, **axis}
        e, lse = softmax_embed(y, w, **options)
        return softmax_embed_update(y, w, (e, lse), jnp.sin(e) + bend, 0.5, **options)

    cut = jax.shard_map(
        functools.partial(step, axis_name="tensor"),
        mesh=mesh,
        in_specs=(P("data", "tensor"), P("tensor"), P("data")),
        out_specs=P("data", "tensor"),
        check_vma=False,
    )

    def program(f: Op, *x: jax.Array) -> Any:
        def loss(*x: jax.Array) -> tuple[jax.Array, jax.Array]:
            moved = f(*x)[:, :100]
            return jnp.sin(moved).sum(), moved

        return jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(*x)

    got, expected = (
        jax.tree.leaves(jax.jit(functools.partial(program, f))(*arrays)) for f in (cut, step)
    )
    for x, y in zip(got, expected, strict=True):
        assert distance(x, np.asarray(y, np.float64)) < 1e-5


def test_under_vmap_and_a_rematerialised_scan():
    logits, table = (jnp.asarray(x, "float32") for x in (LOGITS[:12], TABLE))
    rows, tables = logits.reshape(3, 4, V), jnp.stack([table, 2 * table, -table])

    def together(op: Op, rows: jax.Array, tables: jax.Array) -> jax.Array:
        def slope(y: jax.Array, w: jax.Array) -> jax.Array:
            return jax.grad(lambda y: jnp.sin(op(y, w, num_classes=CLASSES)[0]).sum())(y)

        def body(c: jax.Array, x: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
            return c + (slope(*x) ** 2).sum(), None

        by_scan, _ = jax.lax.scan(jax.checkpoint(body), jnp.zeros(()), (rows, tables))
        return by_scan + jnp.sin(100 * jax.vmap(slope)(rows, tables)).sum()

    got, expected = (
        jax.jit(jax.grad(functools.partial(together, op), argnums=(0, 1)))(rows, tables)
        for op in (softmax_embed, softmax_embed_reference)
    )
    for x, y in zip(got, expected, strict=True):
        assert distance(x, np.asarray(y, np.float64)) < 1e-4


def test_no_second_array_of_the_vocabulary(monkeypatch):
    monkeypatch.setattr(module, "TILE", 1024)  # which does not divide the vocabulary
    logits, table = jnp.zeros((512, 16500)), jnp.zeros((16500, 32))
    slope = jnp.zeros((512, 32))

    def temporary(program: Callable[..., Any], *arrays: jax.Array) -> int:
        found: Any = jax.jit(program).lower(*arrays).compile().memory_analysis()
        return found.temp_size_in_bytes

    def step(y: jax.Array, w: jax.Array, g: jax.Array) -> jax.Array:
        return softmax_embed_update(y, w, softmax_embed(y, w), g, 0.5)

    def plain(y: jax.Array, w: jax.Array, g: jax.Array) -> jax.Array:
        return reference_update(y, w, None, g, jnp.full(512, 0.5), num_classes=16500)

    def pull(y: jax.Array, w: jax.Array, g: jax.Array) -> jax.Array:
        return jax.vjp(lambda *x: softmax_embed(*x)[0], y, w)[1](g)

    one = logits.nbytes
    assert temporary(plain, logits, table, slope) > one
    assert temporary(step, logits, table, slope) < one / 4
    assert temporary(pull, logits, table, slope) < one / 4


def test_an_impossible_argument_says_why():
    logits, table = jnp.zeros((3, 5)), jnp.zeros((5, 2))
    with pytest.raises(ValueError, match=r"table must be \[5, D\] .* got \(2, 5\)"):
        softmax_embed(logits, table.T)
    with pytest.raises(ValueError, match="logits must be floating point, got int32"):
        softmax_embed(logits.astype(int), table)
    embedded = softmax_embed(logits, table)
    with pytest.raises(ValueError, match=r"slope must be float32\(3, 2\) .* got float32\(2, 3\)"):
        softmax_embed_update(logits, table, embedded, jnp.zeros((2, 3)), 1.0)
    pallas: Any = {"implementation": "pallas"}
    with pytest.raises(ValueError, match="no kernel is written for cpu, only for tpu"):
        softmax_embed(logits, table, **pallas)
    with dispatch.interpreted(), pytest.raises(ValueError, match="table is float16"):
        softmax_embed(logits, table.astype("float16"), **pallas)
    with dispatch.interpreted(), pytest.raises(ValueError, match="8192 wide and the kernel takes"):
        softmax_embed(logits, jnp.zeros((5, 8192)), **pallas)


def step_and_derivatives(logits: jax.Array, table: jax.Array) -> Any:
    """A descent step by the kernels, its gradient, and the forward derivative of a gradient."""
    pallas: Any = {"implementation": "pallas", "num_classes": logits.shape[1] - 27}

    def step(y: jax.Array, w: jax.Array) -> jax.Array:
        e, lse = softmax_embed(y, w, **pallas)
        return softmax_embed_update(y, w, (e, lse), jnp.sin(e), 0.5, **pallas).sum()

    def energy(y: jax.Array, w: jax.Array) -> jax.Array:
        return jnp.sin(softmax_embed(y, w, **pallas)[0]).sum()

    slope = jax.grad(energy, argnums=(0, 1))
    twice = jax.grad(lambda *x: (slope(*x)[0] ** 2).sum(), argnums=(0, 1))
    arrays = logits, table
    return (
        jax.grad(step, argnums=(0, 1))(*arrays),
        jax.jvp(slope, arrays, arrays)[1],
        twice(*arrays),
    )


def abstract(tokens: int, width: int, vocabulary: int, dtype: str, sharding: Any = None) -> Any:
    """Abstract logits and table."""
    return [
        jax.ShapeDtypeStruct((tokens, vocabulary), "float32", sharding=sharding),
        jax.ShapeDtypeStruct((vocabulary, width), dtype, sharding=sharding),
    ]


def test_kernels_lower_for_a_tpu(monkeypatch):
    monkeypatch.undo()
    with dispatch.lowering_for("tpu"):
        traced = jax.jit(step_and_derivatives).trace(*abstract(1000, 384, 50304, "bfloat16"))
    text = traced.lower(lowering_platforms=("tpu",)).as_text()
    for formula in ("forward", "tangent", "backward", "backward_tangent", "double_backward"):
        assert f"softmax_embed_{formula}_rows" in text
    assert "softmax_embed_update_backward_columns" in text


@pytest.mark.usefixtures("optimised")
@pytest.mark.libtpu
@pytest.mark.parametrize("chip", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"])
def test_kernels_compile_for_a_tpu(chip, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    topology = topologies.get_topology_desc(platform="tpu", topology_name=chip)
    sharding = jax.sharding.SingleDeviceSharding(topology.devices[0])
    # The widest tables of each block size: too large a block does not fit VMEM.
    for width, dtype in (
        (384, "bfloat16"),
        (1024, "float32"),
        (2048, "float32"),
        (8192, "bfloat16"),
    ):
        with dispatch.lowering_for("tpu"):
            lowered = jax.jit(step_and_derivatives).lower(
                *abstract(1000, width, 5000, dtype, sharding)
            )
        program: Any = lowered.compile().as_text()
        assert program.count("tpu_custom_call") >= 8
