"""Linear cross-entropy: by hand, against float64 to second order, deletion, shards, memory."""

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from jaxlib_methods import losses
from jaxlib_methods.pallas_kernels import dispatch
from jaxlib_methods.pallas_kernels import linear_cross_entropy as module
from jaxlib_methods.pallas_kernels import linear_cross_entropy_gpu as gpu
from jaxlib_methods.pallas_kernels import linear_cross_entropy_tpu as tpu
from jaxlib_methods.pallas_kernels.linear_cross_entropy import (
    TokenStatistics,
    linear_cross_entropy,
    linear_cross_entropy_reference,
)

# No block divides a size; the vocabulary is padded; one token is deleted.
N, D, V, CLASSES = 13, 24, 300, 277
RNG = np.random.default_rng(0)


def normal(*shape: int) -> np.ndarray:
    """Numbers that bfloat16 holds exactly, so that one reference serves every dtype."""
    return np.asarray(jnp.asarray(RNG.normal(size=shape), jnp.bfloat16), np.float64)


HIDDEN, WEIGHT = normal(N, D), normal(V, D) / 4
DIRECTION = normal(N, D), normal(V, D)
LABELS = RNG.integers(0, CLASSES, N)
WHERE = np.arange(N) != 5
HIDDEN[~WHERE], LABELS[~WHERE] = np.nan, -1
SCALE = 1.375  # of the logits
SCALES = RNG.normal(size=(3, N))  # makes every token and statistic matter on its own

OPTIONS: dict[str, Any] = {"where": jnp.asarray(WHERE), "num_classes": CLASSES}
Op = Callable[..., TokenStatistics]

interpretable = pytest.mark.skipif(
    dispatch.gpu_interpreter() is None, reason="JAX interprets kernels for GPUs from 0.11 on"
)
LOOPS = ["xla", "tpu", pytest.param("gpu", marks=interpretable)]
# float32: sums of 24 and 277 terms, each rounded by 6e-8. bfloat16: the sums are as wide; rounded
# by 2^-9, of float16 by 2^-11, are the slopes of the logits, the results, and their derivatives
# once more.
BOUNDS = {"float32": (1e-5, 1e-5), "bfloat16": (2**-7, 2**-6), "float16": (2**-9, 2**-8)}


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch):
    monkeypatch.setattr(module, "TILE", 128)
    monkeypatch.setattr(gpu, "WALK", 2)
    monkeypatch.setattr(gpu, "CLASSES", 128)


@contextlib.contextmanager
def running(loop: str) -> Iterator[Op]:
    """The op in plain JAX or by the kernels of a platform, interpreted."""
    xla = loop == "xla"
    with dispatch.interpreted(), dispatch.lowering_for("cpu" if xla else loop):
        yield functools.partial(linear_cross_entropy, implementation="xla" if xla else "pallas")


def total(found: TokenStatistics) -> jax.Array:
    """A scalar that is not linear in the statistics."""
    x = jnp.stack(found)
    return ((jnp.asarray(SCALES, x.dtype) + jnp.sin(x)) * x).sum()


def derivatives(op: Op, dtype: Any) -> dict[str, Any]:
    """Outputs and derivatives to second order, in one program."""
    hidden, weight = jnp.asarray(HIDDEN, dtype), jnp.asarray(WEIGHT, dtype)
    direction = tuple(jnp.asarray(x, dtype) for x in DIRECTION)
    labels = jnp.asarray(LABELS)

    def program(hidden: jax.Array, weight: jax.Array, scale: jax.Array) -> dict[str, Any]:
        options = OPTIONS | {"scale": scale}
        slope = jax.grad(lambda *x: total(op(*x, labels, **options)), argnums=(0, 1))

        def along(*x: jax.Array) -> jax.Array:
            wide = jnp.promote_types(dtype, jnp.float32)
            dot = functools.partial(jnp.vdot, preferred_element_type=wide)
            dhidden, dweight = map(dot, slope(*x), direction)
            return dhidden + dweight

        return {
            "output": tuple(op(hidden, weight, labels, **options)),
            "vjp": slope(hidden, weight),
            "jvp of vjp": jax.jvp(slope, (hidden, weight), direction)[1],
            "vjp of vjp": jax.grad(along, argnums=(0, 1))(hidden, weight),
        }

    with jax.default_matmul_precision("highest"):
        return jax.jit(program)(hidden, weight, SCALE)


@pytest.fixture(scope="module")
def want() -> dict[str, Any]:
    with jax.enable_x64(True):
        return jax.tree.map(np.asarray, derivatives(linear_cross_entropy_reference, jnp.float64))


def distance(got: Any, want: np.ndarray) -> float:
    return float(np.linalg.norm(np.asarray(got, np.float64) - want) / np.linalg.norm(want))


@pytest.mark.parametrize(
    ("loop", "dtype"),
    [
        *(("xla", dtype) for dtype in ("float32", "bfloat16")),
        *(("tpu", dtype) for dtype in ("float32", "bfloat16")),
        *(pytest.param("gpu", dtype, marks=interpretable) for dtype in ("bfloat16", "float16")),
    ],
)
def test_agrees_with_the_reference_to_second_order(loop, dtype, want, monkeypatch):
    monkeypatch.setattr(tpu, "BLOCKS", {8192: 8})  # several of tokens and of the vocabulary
    first, second = BOUNDS[dtype]
    with running(loop) as op:
        got = derivatives(op, dtype)
    for x, y in zip(got.pop("output"), want["output"], strict=True):
        assert x.dtype == jnp.float32
        assert distance(x, y) < 1e-5
    for order, arrays in got.items():
        for x, y in zip(arrays, want[order], strict=True):
            assert x.dtype == dtype
            assert distance(x, y) < (first if order == "vjp" else second), order
        dhidden, dweight = arrays
        assert not dhidden[~WHERE].any()
        assert not dweight[CLASSES:].any()


def test_by_hand():
    # Logits (0, log 3) give p = (1/4, 3/4): L = log 4, and H = log 4 - 3/4 log 3.
    hidden, weight = jnp.ones((2, 1)), jnp.array([[0.0], [math.log(3.0)]])
    for op in (linear_cross_entropy, linear_cross_entropy_reference):
        found = op(hidden, weight, jnp.array([0, 1]))
        np.testing.assert_allclose(found.nll, [math.log(4.0), math.log(4 / 3)], rtol=1e-5)
        entropy = math.log(4.0) - 0.75 * math.log(3.0)
        np.testing.assert_allclose(found.entropy, [entropy] * 2, rtol=1e-5)
        np.testing.assert_allclose(found.logsumexp, [math.log(4.0)] * 2, rtol=1e-5)
        # At temperature 1/2 the odds are squared: p = (1/10, 9/10).
        found = op(hidden, weight, jnp.array([0, 1]), scale=2.0)
        np.testing.assert_allclose(found.nll, [math.log(10.0), math.log(10 / 9)], rtol=1e-5)
        entropy = math.log(10.0) - 0.9 * math.log(9.0)
        np.testing.assert_allclose(found.entropy, [entropy] * 2, rtol=1e-5)
        np.testing.assert_allclose(found.logsumexp, [math.log(10.0)] * 2, rtol=1e-5)


@pytest.mark.parametrize("loop", LOOPS)
def test_at_any_temperature_only_classes_are_likely(loop):
    dtype = "bfloat16" if loop == "gpu" else "float32"
    hidden, weight = jnp.asarray(HIDDEN, dtype), jnp.asarray(WEIGHT, dtype)
    with running(loop) as op:

        def entropy(scale: jax.Array) -> jax.Array:
            return op(hidden, weight, jnp.asarray(LABELS), scale=scale, **OPTIONS).entropy

        found = jax.jit(entropy)(1e-30)
        slope = jax.jacrev(entropy)(1.0)
    np.testing.assert_allclose(found[WHERE], math.log(CLASSES), rtol=1e-5)
    assert not slope.any()


@pytest.mark.parametrize("loop", LOOPS)
def test_a_label_that_is_no_class_is_nan_unless_it_is_deleted(loop):
    # Of the padding, too, and of no row at all.
    labels = np.where(WHERE, LABELS, 0)
    labels[[1, 4, 7]] = -100, CLASSES, V
    known = np.isin(np.arange(N), [1, 4, 7], invert=True)
    dtype = "bfloat16" if loop == "gpu" else "float32"
    hidden, weight = jnp.asarray(np.nan_to_num(HIDDEN), dtype), jnp.asarray(WEIGHT, dtype)
    with running(loop) as op:

        def deleting(hidden: jax.Array) -> Any:
            nll = op(hidden, weight, labels, where=known, num_classes=CLASSES).nll
            return nll.sum(), nll

        got = op(hidden, weight, jnp.asarray(labels), num_classes=CLASSES)
        (_, kept), slope = jax.value_and_grad(deleting, has_aux=True)(hidden)
    np.testing.assert_array_equal(np.isnan(got.nll), ~known)
    assert not jnp.isnan(got.entropy).any()
    np.testing.assert_array_equal(kept, jnp.where(known, got.nll, 0.0))
    np.testing.assert_array_equal(slope.any(axis=-1), known)


def test_says_what_the_losses_say():
    hidden = jnp.asarray(HIDDEN, jnp.float32).reshape(1, N, D)
    labels, where = jnp.asarray(LABELS)[None], jnp.asarray(WHERE)[None]
    weight = jnp.asarray(WEIGHT, jnp.float32)
    op = jax.jit(functools.partial(linear_cross_entropy, num_classes=CLASSES))
    found = op(hidden, weight, labels, where=where)
    logits = hidden @ weight[:CLASSES].T
    nll = losses.token_nll(logits, labels, where=where)
    entropy = losses.token_entropy(logits, where=where)
    np.testing.assert_allclose(found.nll, nll, rtol=1e-5)
    np.testing.assert_allclose(found.entropy, entropy, rtol=1e-5)
    assert not found.logsumexp[~where].any()


@pytest.mark.parametrize("loop", ["xla", "tpu"])
def test_a_large_common_offset_of_the_logits_is_harmless(loop):
    # A part common to the rows of all classes: logits near 300, rounded by 300 * 2^-24 = 2e-5.
    # Probabilities whose sum is off by as much would be multiplied by the common part.
    hidden, weight, labels = HIDDEN[WHERE], WEIGHT + 10.0, jnp.asarray(LABELS[WHERE])
    hidden = hidden + (30.0 - hidden.sum(axis=1, keepdims=True)) / D

    def slopes(op: Op, dtype: Any) -> Any:
        def mean(*x: jax.Array) -> jax.Array:
            found = op(*x, labels, num_classes=CLASSES)
            return found.nll.mean() + found.entropy.mean() / 2

        with jax.default_matmul_precision("highest"):
            x = jnp.asarray(hidden, dtype), jnp.asarray(weight, dtype)
            return jax.jit(jax.grad(mean, argnums=(0, 1)))(*x)

    with running(loop) as op:
        got = slopes(op, jnp.float32)
    with jax.enable_x64(True):
        exact = slopes(linear_cross_entropy_reference, jnp.float64)
    for x, y in zip(got, exact, strict=True):
        assert distance(x, np.asarray(y)) < 1e-4


def test_a_vocabulary_cut_over_devices():
    # 4 shards of 75 rows, each in one tile; of the last shard only 52 rows are classes, and with
    # 150 classes two shards have none.
    mesh = jax.make_mesh((2, 4), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    hidden, weight = jnp.asarray(HIDDEN[:4], jnp.float32), jnp.asarray(WEIGHT, jnp.float32)
    labels = jnp.asarray(LABELS[:4] % 150)

    def program(op: Op) -> Any:
        def along(*x: jax.Array) -> jax.Array:
            return jnp.sin(jnp.stack(op(*x, labels, SCALE))).sum()

        slope = jax.grad(along, argnums=(0, 1))
        tangents = hidden, weight
        found = op(hidden, weight, labels, SCALE)
        return found, slope(*tangents), jax.jvp(slope, tangents, tangents)[1]

    for num_classes in (CLASSES, 150):

        def on_each(*arrays: jax.Array, num_classes: int = num_classes) -> TokenStatistics:
            *factors, scale = arrays
            options: dict[str, Any] = {"num_classes": num_classes, "axis_name": "tensor"}
            return linear_cross_entropy(*factors, scale=scale, **options)

        def whole(*arrays: jax.Array, num_classes: int = num_classes) -> TokenStatistics:
            *factors, scale = arrays
            return linear_cross_entropy_reference(*factors, scale=scale, num_classes=num_classes)

        in_specs = (P("data"), P("tensor"), P("data"), P())
        cut = jax.shard_map(on_each, mesh=mesh, in_specs=in_specs, out_specs=P("data"))
        got, expected = (
            jax.tree.leaves(jax.jit(program, static_argnums=0)(f)) for f in (cut, whole)
        )
        for x, y in zip(got, expected, strict=True):
            assert distance(x, np.asarray(y, np.float64)) < 1e-5
        # A label is unknown where no shard knows it.
        nll = jax.jit(cut)(hidden, weight, labels.at[1].set(num_classes), SCALE).nll
        assert jnp.isnan(nll).tolist() == [False, True, False, False]


def test_derivatives_inside_another_custom_derivative_in_a_scan():
    # JAX 0.10 to 0.12 shift what the inner forward rule saves, if its function makes an array that
    # depends on no argument. Twice differentiated the result is then silently wrong.
    rows = jnp.asarray(HIDDEN[:4], jnp.float32).reshape(2, 2, D)
    weight, labels = jnp.asarray(WEIGHT, jnp.float32), jnp.asarray(LABELS[:4]).reshape(2, 2)

    def twice(op: Op, *, custom: bool) -> jax.Array:
        def plain(hidden: jax.Array, labels: jax.Array) -> jax.Array:
            found = op(hidden, weight, labels, num_classes=CLASSES)
            return jnp.sin(jnp.stack(found)).sum()

        energy = jax.custom_vjp(plain)
        energy.defvjp(
            lambda *x: (plain(*x), jax.grad(plain)(*x)), lambda slope, u: (u * slope, None)
        )

        def scanned(rows: jax.Array) -> jax.Array:
            f = jax.checkpoint(energy if custom else plain)
            total, _ = jax.lax.scan(
                lambda c, x: (c + jnp.sin(f(*x)), None), jnp.zeros(()), (rows, labels)
            )
            return total

        return jax.jit(jax.grad(lambda x: (jax.grad(scanned)(x) ** 2).sum()))(rows)

    expected = twice(linear_cross_entropy_reference, custom=False)
    for loop in ("xla", "tpu"):  # JAX differentiates no checkpoint of kernels that it interprets
        with running(loop) as op:
            got = twice(op, custom=True)
        assert distance(got, np.asarray(expected, np.float64)) < 1e-4


def test_no_array_of_tokens_times_vocabulary(monkeypatch):
    monkeypatch.setattr(module, "TILE", 1024)
    tokens, vocabulary = 512, 16384
    arrays = (jnp.zeros((tokens, 32)), jnp.zeros((vocabulary, 32)))
    labels = jnp.zeros(tokens, jnp.int32)

    def temporary(op: Op, derivative: Callable[..., Any]) -> int:
        slope = jax.grad(lambda *x: jnp.sin(jnp.stack(op(*x, labels))).sum(), argnums=(0, 1))
        program = jax.jit(functools.partial(derivative, slope))
        found: Any = program.lower(*arrays).compile().memory_analysis()
        return found.temp_size_in_bytes

    def first(slope: Callable[..., Any], *x: jax.Array) -> Any:
        return slope(*x)

    def forward_over_reverse(slope: Callable[..., Any], *x: jax.Array) -> Any:
        return jax.jvp(slope, x, x)[1]

    def reverse_over_reverse(slope: Callable[..., Any], *x: jax.Array) -> Any:
        return jax.grad(lambda *x: sum((y**2).sum() for y in slope(*x)), argnums=(0, 1))(*x)

    limit = tokens * vocabulary * 4
    assert temporary(linear_cross_entropy_reference, first) > limit
    assert temporary(linear_cross_entropy, first) < limit / 4
    assert temporary(linear_cross_entropy, forward_over_reverse) < limit
    assert temporary(linear_cross_entropy, reverse_over_reverse) < limit


def test_an_impossible_argument_says_why():
    hidden, weight, labels = jnp.zeros((3, 2)), jnp.zeros((5, 2)), jnp.zeros(3, jnp.int32)
    with pytest.raises(ValueError, match=r"weight must be \[V, 2\] .* got \(2, 5\); transpose"):
        linear_cross_entropy(hidden, weight.T, labels)
    with pytest.raises(ValueError, match=r"integers of shape \(3,\), got float32"):
        linear_cross_entropy(hidden, weight, jnp.zeros(3))
    with pytest.raises(ValueError, match=r"integers of shape \(3,\), got int32 of \(2,\)"):
        linear_cross_entropy(hidden, weight, labels[:2])
    with pytest.raises(ValueError, match=r"where must be bool of shape \(3,\), got float32"):
        linear_cross_entropy(hidden, weight, labels, where=jnp.ones(3))
    with pytest.raises(ValueError, match="no kernel is written for"):
        linear_cross_entropy(hidden, weight, labels, implementation="pallas")
    with dispatch.interpreted(), pytest.raises(ValueError, match="hidden is float16"):
        linear_cross_entropy(hidden.astype("float16"), weight, labels, implementation="pallas")
    wide = jnp.zeros((3, 16384)), jnp.zeros((5, 16384))
    with dispatch.interpreted(), pytest.raises(ValueError, match="16384 wide and the kernel takes"):
        linear_cross_entropy(*wide, labels, implementation="pallas")


def gradient(*arrays: jax.Array) -> Any:
    """Of all statistics, by the kernels."""

    def mean(*x: jax.Array) -> jax.Array:
        return jnp.stack(linear_cross_entropy(*x, implementation="pallas")).mean()

    return jax.grad(mean, argnums=(0, 1))(*arrays)


def arrays(tokens: int, width: int, vocabulary: int, dtypes: str, sharding: Any = None) -> Any:
    """Abstract arguments of `gradient`; the dtypes of hidden and weight."""
    shapes = (tokens, width), (vocabulary, width), (tokens,)
    return [
        jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
        for shape, dtype in zip(shapes, (*dtypes.split(), "int32"), strict=True)
    ]


def test_kernels_lower_for_a_tpu():
    with dispatch.lowering_for("tpu"):
        traced = jax.jit(gradient).trace(*arrays(1000, 192, 50257, "bfloat16 float32"))
    assert traced.lower(lowering_platforms=("tpu",)).as_text().count("tpu_custom_call") == 3


@pytest.mark.usefixtures("optimised")
@pytest.mark.libtpu
@pytest.mark.parametrize("chip", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"])
def test_kernels_compile_for_a_tpu(chip, monkeypatch):
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    topology = topologies.get_topology_desc(platform="tpu", topology_name=chip)
    sharding = jax.sharding.SingleDeviceSharding(topology.devices[0])
    # The widest rows of each block size: too large a block does not fit VMEM.
    for width, dtypes in (
        (64, "bfloat16 bfloat16"),
        (4096, "bfloat16 bfloat16"),
        (2048, "float32 float32"),
        (4096, "float32 float32"),
        (8192, "float32 float32"),
    ):
        with dispatch.lowering_for("tpu"):
            lowered = jax.jit(gradient).lower(*arrays(1000, width, 5000, dtypes, sharding))
        program: Any = lowered.compile().as_text()
        assert program.count("tpu_custom_call") == 3
