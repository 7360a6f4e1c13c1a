"""Linear cross-entropy's kernels for Hopper: cut vocabularies, refusals, compiled for an H200.

Their numbers are compared in `test_linear_cross_entropy`, with those of the other implementations.
"""

import logging
import math
import re
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from jaxlib_methods.pallas_kernels import dispatch
from jaxlib_methods.pallas_kernels import linear_cross_entropy_gpu as gpu
from jaxlib_methods.pallas_kernels.linear_cross_entropy import (
    TokenStatistics,
    linear_cross_entropy,
    linear_cross_entropy_reference,
)

KERNELS = ("linear_cross_entropy_statistics", "linear_cross_entropy_slopes")


def gradient(*arrays: jax.Array) -> Any:
    """Of all statistics, by the kernels."""

    def mean(*x: jax.Array) -> jax.Array:
        return jnp.stack(linear_cross_entropy(*x, scale=0.5, implementation="pallas")).mean()

    return jax.grad(mean, argnums=(0, 1))(*arrays)


def shapes(tokens: int, width: int, vocabulary: int, dtype: str = "bfloat16") -> Any:
    hidden, weight = ((n, width) for n in (tokens, vocabulary))
    arrays = (jax.ShapeDtypeStruct(x, dtype) for x in (hidden, weight))
    return *arrays, jax.ShapeDtypeStruct((tokens,), jnp.int32)


@pytest.mark.skipif(
    dispatch.gpu_interpreter() is None, reason="JAX interprets kernels for GPUs from 0.11 on"
)
def test_a_vocabulary_in_parts_is_joined_as_any_other(monkeypatch):
    # Of 2 x 150 rows 277 are classes. Parts are of 128 and 130, the first of the latter of 20.
    monkeypatch.setattr(gpu, "WALK", 1)
    monkeypatch.setattr(gpu, "CLASSES", 130)
    rng = np.random.default_rng(0)
    hidden, weight = (jnp.asarray(rng.normal(size=(n, 24)), jnp.bfloat16) / 2 for n in (4, 300))
    labels = jnp.asarray([0, 149, 150, 276])

    def by_device(hidden: jax.Array, weight: jax.Array) -> TokenStatistics:
        options: dict[str, Any] = {"num_classes": 277, "axis_name": "tensor", "scale": 1.5}
        return linear_cross_entropy(hidden, weight, labels, **options, implementation="pallas")

    # As many devices as one interpreter serves: an axis of vmap is a mesh axis to the op.
    def cut(hidden: jax.Array, weight: jax.Array) -> jax.Array:
        rows = weight.reshape(2, 150, 24)
        found = jax.vmap(by_device, in_axes=(None, 0), axis_name="tensor")(hidden, rows)
        return jnp.stack(found)[:, 0]

    def whole(hidden: jax.Array, weight: jax.Array) -> jax.Array:
        options: dict[str, Any] = {"num_classes": 277, "scale": 1.5}
        return jnp.stack(linear_cross_entropy_reference(hidden, weight, labels, **options))

    def program(op: Any) -> Any:
        slopes = jax.grad(lambda *x: jnp.sin(op(*x)).sum(), argnums=(0, 1))
        return jax.jit(lambda *x: (op(*x), *slopes(*x)))(hidden, weight)

    with dispatch.interpreted(), dispatch.lowering_for("gpu"):
        got = program(cut)
    # Sums of float32; bfloat16 rounds the slopes of the logits and the results by 2^-9.
    for x, y, limit in zip(got, program(whole), (1e-5, 2**-7, 2**-7), strict=True):
        x, y = np.asarray(x, "f8"), np.asarray(y, "f8")
        assert np.linalg.norm(x - y) < limit * np.linalg.norm(y)


def test_devices_exchange_what_they_do_without_kernels(lower_for_h200):
    mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)

    def exchanges(implementation: Any) -> list[str]:
        def by_device(*arrays: jax.Array) -> TokenStatistics:
            options: dict[str, Any] = {"axis_name": "tensor", "implementation": implementation}
            return linear_cross_entropy(*arrays, **options)

        in_specs = (P("data"), P("tensor"), P("data"))
        cut = jax.shard_map(by_device, mesh=mesh, in_specs=in_specs, out_specs=P("data"))
        slopes = jax.grad(lambda *x: jnp.sin(jnp.stack(cut(*x))).sum(), argnums=(0, 1))
        text = lower_for_h200(slopes, *shapes(64, 32, 600)).as_text()
        assert all((name in text) is (implementation == "pallas") for name in KERNELS)
        return re.findall(r"stablehlo\.all_reduce\".* replica_groups = (.*), use_global", text)

    found = exchanges("pallas")
    assert len(found) == 6  # of statistics, the largest and three sums; of each gradient, one
    assert found == exchanges("xla")


def test_no_array_of_tokens_times_vocabulary(lower_for_h200):
    tokens, vocabulary = 8192, 50257
    text = lower_for_h200(gradient, *shapes(tokens, 64, vocabulary)).as_text()
    found = re.findall(r"tensor<((?:\d+x)+)", text)
    sizes = [math.prod(map(int, shape[:-1].split("x"))) for shape in found]
    assert max(sizes) == tokens * gpu.CLASSES


def test_what_the_kernels_cannot_do_says_why(monkeypatch, caplog):
    hidden, weight, labels = jnp.zeros((3, 2)), jnp.zeros((5, 2)), jnp.zeros(3, jnp.int32)
    half = hidden.astype(jnp.bfloat16)
    with dispatch.lowering_for("gpu"):
        message = "hidden is float32 and the kernel takes bfloat16 or float16; choose auto or xla"
        with pytest.raises(ValueError, match=message):
            linear_cross_entropy(hidden, weight, labels, implementation="pallas")
        dispatch.log_once.cache_clear()
        with caplog.at_level(logging.INFO):
            for x in (hidden, half):
                assert linear_cross_entropy(x, weight, labels).nll.shape == (3,)
    assert caplog.messages == [
        "linear_cross_entropy runs as xla: no kernel is known to be faster on gpu"
    ]
    device = types.SimpleNamespace(device_kind="NVIDIA A100", compute_capability="8.0")
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "local_devices", lambda: [device])
    with pytest.raises(ValueError, match=r"9\.0 \(Hopper\) and NVIDIA A100 has 8\.0"):
        linear_cross_entropy(half, weight, labels, implementation="pallas")


def test_kernels_lower_for_hopper(lower_for_h200):
    text = lower_for_h200(gradient, *shapes(1000, 192, 50257)).as_text()
    assert all(name in text for name in KERNELS)


@pytest.mark.parametrize(
    ("width", "dtype"), [(64, "bfloat16"), (192, "bfloat16"), (4096, "bfloat16"), (1024, "float16")]
)
def test_kernels_compile_for_hopper_without_spills(width, dtype, spills_on_h200):
    spills = spills_on_h200(gradient, *shapes(1000, width, 50257, dtype))
    assert set(spills) == set(KERNELS)
    assert not any(spilled for _, spilled in spills.values()), spills
