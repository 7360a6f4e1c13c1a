"""Norms, rotary positions, projections and blocks: by hand, and against NumPy."""

import dataclasses
import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from jaxlib_methods.models import layers, partitioning
from jaxlib_methods.models.config import TransformerConfig

BASE = TransformerConfig(
    vocab_size=61,
    num_layers=3,
    embed_dim=10,
    num_heads=6,
    num_kv_heads=2,
    head_dim=4,
    mlp_dim=7,
    max_length=32,
    compute_dtype="float32",
)
NORMAL = np.random.default_rng(0).normal(size=(32, 32)).astype(np.float32)


def apply(module: nn.Module, params: Any, *arrays: Any) -> Any:
    return module.apply({"params": params}, *arrays)


# Norms. Inputs of 1e-3 with an epsilon of their square: dropping it changes the first digit.


def test_rms_norm_by_hand():
    # mean(x^2) = (9 + 16) / 2 * 1e-6 = 12.5e-6; with epsilon 25e-6, the square of 5e-3.
    got = layers.rms_norm(jnp.array([[3e-3, 4e-3]]), jnp.array([2.0, 10.0]), eps=12.5e-6)
    np.testing.assert_allclose(got, [[1.2, 8.0]], rtol=1e-6)


def test_layer_norm_by_hand():
    # mean 4e-3, deviations -3e-3 and 3e-3, variance 9e-6; with epsilon 25e-6.
    x, scale, bias = jnp.array([[1e-3, 7e-3]]), jnp.array([2.0, 10.0]), jnp.array([1.0, -1.0])
    got = layers.layer_norm(x, scale, bias, eps=16e-6)
    np.testing.assert_allclose(got, [[1.0 - 1.2, 6.0 - 1.0]], rtol=1e-5)


def test_norms_of_half_precision_do_not_overflow():
    # 300^2 and 400^2 exceed float16's 65504. mean(x^2) = 125000, its root 353.55.
    x, one, zero = jnp.array([300.0, 400.0], jnp.float16), jnp.ones(2), jnp.zeros(2)
    got = layers.rms_norm(x, one, eps=1e-5)
    assert got.dtype == jnp.float16
    np.testing.assert_allclose(got, [0.8485, 1.1314], rtol=1e-3)
    got = layers.layer_norm(jnp.array([-300.0, 300.0], jnp.float16), one, zero, eps=1e-5)
    np.testing.assert_allclose(got, [-1.0, 1.0], rtol=1e-3)


@pytest.mark.parametrize("kind", ["rms_norm", "layer_norm"])
def test_norm_gradient_is_the_slope(kind):
    with jax.enable_x64(True):
        x, scale, bias = (
            jnp.asarray(np.random.default_rng(i).normal(size=size))
            for i, size in enumerate([(3, 5), (5,), (5,)])
        )

        @jax.jit
        def norm(x, scale, bias):
            if kind == "rms_norm":
                return layers.rms_norm(x, scale, eps=0.1)
            return layers.layer_norm(x, scale, bias, eps=0.1)

        check_grads(norm, (x, scale, bias), order=2, modes=("rev",), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", ["rms_norm", "layer_norm"])
def test_norm_module_takes_kind_and_epsilon_from_the_configuration(kind):
    cfg = dataclasses.replace(BASE, norm=kind, norm_eps=12.5e-6)
    module, x = layers.Norm(cfg, 2), jnp.array([3e-3, 4e-3])
    params = {"scale": jnp.array([2.0, 10.0]), "bias": jnp.array([1.0, -1.0])}
    names = {"rms_norm": {"scale"}, "layer_norm": {"scale", "bias"}}[kind]
    assert set(module.init(jax.random.key(0), x)["params"]) == names
    got = apply(module, {name: params[name] for name in names}, x)
    want = {
        "rms_norm": [1.2, 8.0],
        # Deviations of 0.5e-3, variance 0.25e-6: 0.5e-3 / sqrt(12.75e-6) = 0.140028.
        "layer_norm": [1.0 - 2 * 0.140028, 10 * 0.140028 - 1.0],
    }[kind]
    np.testing.assert_allclose(got, want, rtol=1e-5)


# Rotary positions.

rotation = jax.jit(layers.rotation, static_argnums=1)
rotate = jax.jit(layers.rotate)


def rotary(**changes: Any) -> TransformerConfig:
    return dataclasses.replace(BASE, **changes)


def test_rotation_by_hand():
    # theta 16 and 4 features: 1 and 16^(-1/2) = 1/4 radians per token; at position 2, 2 and 1/2.
    # The pairs are (0, 2) and (1, 3): (1, 0) turns to (cos, sin), (0, 1) to (-sin, cos).
    angles = rotation(jnp.array([[2]]), rotary(rope_theta=16.0))
    got = rotate(jnp.array([1.0, 0.0, 0.0, 1.0]).reshape(1, 1, 1, 4), angles)
    want = [math.cos(2.0), -math.sin(0.5), math.sin(2.0), math.cos(0.5)]
    np.testing.assert_allclose(got[0, 0, 0], want, rtol=1e-6)


def test_scores_depend_on_the_difference_of_positions_only():
    query, key = (jnp.asarray(NORMAL[:3, i : i + 4])[None, None] for i in range(2))

    def scores(at, key_at):
        one, other = (rotation(jnp.array([[p]]), BASE) for p in (at, key_at))
        return (rotate(query, one) * rotate(key, other)).sum(-1)

    np.testing.assert_allclose(scores(9, 4), scores(105, 100), atol=1e-4)
    np.testing.assert_allclose(scores(5, 5), (query * key).sum(-1), atol=1e-5)
    assert jnp.all(jnp.abs(scores(9, 4) - scores(10, 4)) > 1e-2)


def test_partial_rotation_leaves_the_rest():
    x = jnp.asarray(NORMAL[:30, :8].reshape(2, 3, 5, 8))
    positions = jnp.broadcast_to(jnp.arange(1, 4), (2, 3))
    half = rotary(head_dim=8, rotary_fraction=0.5)
    got = rotate(x, rotation(positions, half))
    assert jnp.array_equal(got[..., 4:], x[..., 4:])
    assert not jnp.any(got[..., :4] == x[..., :4])
    # The four rotated features turn as a head of four would, not as the first half of eight.
    np.testing.assert_allclose(
        got[..., :4], rotate(x[..., :4], rotation(positions, BASE)), rtol=1e-6
    )


def test_rotation_keeps_bfloat16_and_the_angles_float32():
    # Position 257 does not exist in bfloat16 (256 and 258 do).
    angles = rotation(jnp.array([[257]]), BASE)
    assert angles[0].dtype == jnp.float32
    np.testing.assert_allclose(angles[0][0, 0, 0], math.cos(257.0), rtol=1e-4)
    assert rotate(jnp.ones((1, 1, 1, 4), jnp.bfloat16), angles).dtype == jnp.bfloat16


# theta 64 and 6 features: 1, 64^(-1/3) = 1/4 and 1/16 radians per token. A context of 60 tokens
# holds 60 w / (2 pi) = 9.549, 2.387 and 0.597 of their turns.
SCALED = rotary(head_dim=6, rope_theta=64.0, rope_scaling_factor=8.0, rope_original_length=60)


def test_frequencies_without_scaling():
    np.testing.assert_allclose(layers.rotary_frequencies(SCALED), [1.0, 1 / 4, 1 / 16], rtol=1e-6)


def test_linear_scaling_divides_all_frequencies():
    cfg = dataclasses.replace(SCALED, rope_scaling="linear")
    np.testing.assert_allclose(layers.rotary_frequencies(cfg), [1 / 8, 1 / 32, 1 / 128], rtol=1e-6)


@pytest.mark.parametrize(
    ("low", "high", "blended"),
    [
        # keep = (2.387324 - 1) / 3 = 0.462441; 0.25 (0.462441 + 0.537559 / 8)
        (1.0, 4.0, 0.1324090),
        # keep = (2.387324 - 2) / 3 = 0.129108; 0.25 (0.129108 + 0.870892 / 8)
        (2.0, 5.0, 0.0594924),
    ],
)
def test_llama3_scaling_keeps_short_waves_and_divides_long_ones(low, high, blended):
    cfg = dataclasses.replace(
        SCALED,
        rope_scaling="llama3",
        rope_low_frequency_factor=low,
        rope_high_frequency_factor=high,
    )
    np.testing.assert_allclose(layers.rotary_frequencies(cfg), [1.0, blended, 1 / 128], rtol=1e-5)


# Projections.


@pytest.mark.parametrize(
    ("in_shape", "out_shape", "equation"),
    [((5,), (3, 7), "blx,xhc->blhc"), ((3, 7), (5,), "blhc,hcx->blx")],
)
def test_projection_contracts_the_last_axes(in_shape, out_shape, equation):
    names = {1: ("embed",), 2: ("heads", "head_dim")}
    module = layers.Projection(
        in_shape=in_shape,
        out_shape=out_shape,
        in_names=names[len(in_shape)],
        out_names=names[len(out_shape)],
        use_bias=True,
        cfg=BASE,
    )
    x = jnp.asarray(NORMAL[:22, : math.prod(in_shape)].reshape(2, 11, *in_shape))
    boxed: Any = module.init(jax.random.key(1), x)["params"]
    assert boxed["kernel"].names == (*names[len(in_shape)], *names[len(out_shape)])
    params = partitioning.unbox(boxed)
    assert params["kernel"].shape == (*in_shape, *out_shape)
    assert params["bias"].shape == out_shape
    assert not params["bias"].any()
    params["bias"] = jnp.asarray(NORMAL[0, : math.prod(out_shape)].reshape(out_shape))
    want = np.einsum(equation, x, params["kernel"]) + np.asarray(params["bias"])
    np.testing.assert_allclose(apply(module, params, x), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_projection_starts_with_a_deviation_of_one_over_the_root_of_its_inputs(scale):
    module = layers.Projection(
        in_shape=(16, 4),
        out_shape=(500,),
        in_names=("heads", "head_dim"),
        out_names=("embed",),
        use_bias=False,
        cfg=BASE,
        init_scale=scale,
    )
    params = partitioning.unbox(module.init(jax.random.key(0), jnp.zeros((1, 16, 4))))["params"]
    assert set(params) == {"kernel"}
    np.testing.assert_allclose(params["kernel"].std(), scale / 8, rtol=0.02)


# Feed-forward and blocks.


@pytest.mark.parametrize(
    ("mlp", "hidden"),
    [
        ("swiglu", 3 * 0.7310586),  # up 3, gate 1: 3 silu(1)
        ("relu", 0.0),
        ("gelu", -0.0040496),  # -3 Phi(-3)
        ("gelu_tanh", -0.0036374),
    ],
)
def test_feed_forward_by_hand(mlp, hidden):
    cfg = dataclasses.replace(BASE, embed_dim=2, mlp_dim=1, mlp=mlp)
    sign = 1.0 if mlp == "swiglu" else -1.0
    params = {"up": {"kernel": [[sign], [0.0]]}, "down": {"kernel": [[2.0, 5.0]]}}
    if mlp == "swiglu":
        params["gate"] = {"kernel": [[0.0], [1.0]]}
    params = jax.tree.map(jnp.array, params, is_leaf=lambda x: isinstance(x, list))
    got = apply(layers.FeedForward(cfg), params, jnp.array([[[3.0, 1.0]]]))
    np.testing.assert_allclose(got, [[[2 * hidden, 5 * hidden]]], rtol=1e-4)


BLOCKS = {
    "llama": {},
    "qwen": {"qkv_bias": True, "qk_norm": True, "num_kv_heads": 3},
    "neox": {
        "norm": "layer_norm",
        "mlp": "gelu",
        "rotary_fraction": 0.5,
        "parallel_residual": True,
        "qkv_bias": True,
        "output_bias": True,
        "mlp_bias": True,
    },
    "opt": {"norm": "layer_norm", "mlp": "relu", "positions": "learned", "mlp_bias": True},
}


def block_in_numpy(p: Any, x: np.ndarray, where: np.ndarray, at: np.ndarray, cfg) -> np.ndarray:
    """One block on one sequence `[L, D]`, written again from the definition."""

    def norm(p, x, kind):
        if kind == "rms_norm":
            return x / np.sqrt((x**2).mean(-1, keepdims=True) + cfg.norm_eps) * p["scale"]
        x = x - x.mean(-1, keepdims=True)
        return norm(p, x, "rms_norm") + p["bias"]

    def linear(p, x):
        return np.tensordot(x, p["kernel"], x.ndim) + p.get("bias", 0.0)

    def turn(x):
        out, half = x.copy(), cfg.rotary_dim // 2
        for t, i in np.ndindex(len(x), half if cfg.positions == "rotary" else 0):
            angle = at[t] * cfg.rope_theta ** (-2 * i / cfg.rotary_dim)
            a, b = x[t, :, i], x[t, :, i + half]
            out[t, :, i] = a * math.cos(angle) - b * math.sin(angle)
            out[t, :, i + half] = b * math.cos(angle) + a * math.sin(angle)
        return out

    def attention(p, x):
        q, k, v = (np.stack([linear(p[n], row) for row in x]) for n in ("query", "key", "value"))
        if cfg.qk_norm:
            q, k = norm(p["query_norm"], q, "rms_norm"), norm(p["key_norm"], k, "rms_norm")
        q, k, mixed = turn(q), turn(k), np.zeros((len(x), cfg.num_heads, cfg.head_size))
        for t, h in np.ndindex(*mixed.shape[:2]):
            g = h * cfg.kv_heads // cfg.num_heads
            share = np.where(where[t], np.exp(k[:, g] @ q[t, h] / math.sqrt(cfg.head_size)), 0.0)
            mixed[t, h] = share @ v[:, g] / share.sum()
        return np.stack([linear(p["output"], row) for row in mixed])

    def mlp(p, x):
        up = linear(p["up"], x)
        if cfg.mlp == "swiglu":
            gate = linear(p["gate"], x)
            return linear(p["down"], gate / (1 + np.exp(-gate)) * up)
        erf = np.vectorize(math.erf)
        hidden = np.maximum(up, 0) if cfg.mlp == "relu" else up * (1 + erf(up / 2**0.5)) / 2
        return linear(p["down"], hidden)

    mixed = attention(p["attention"], norm(p["attention_norm"], x, cfg.norm))
    if cfg.parallel_residual:
        return x + mixed + rows(mlp, p["mlp"], norm(p["mlp_norm"], x, cfg.norm))
    x = x + mixed
    return x + rows(mlp, p["mlp"], norm(p["mlp_norm"], x, cfg.norm))


def rows(function, p, x):
    return np.stack([function(p, row) for row in x])


@pytest.mark.parametrize("name", BLOCKS)
def test_block_equals_numpy(name):
    cfg = dataclasses.replace(BASE, compute_dtype="float64", norm_eps=0.1, **BLOCKS[name])
    rng = np.random.default_rng(0)
    x, at = rng.normal(size=(5, 10)), np.array([0, 1, 0, 1, 2])
    where = np.array(
        [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 1, 1, 0], [0, 0, 1, 1, 1]], bool
    )
    with jax.enable_x64(True):
        angles = rotation(jnp.asarray(at)[None], cfg) if cfg.positions == "rotary" else None
        block, inputs = layers.Block(cfg), (jnp.asarray(x)[None], jnp.asarray(where)[None])
        boxed = jax.eval_shape(block.init, jax.random.key(0), *inputs, angles, None)["params"]
        params = jax.tree.map(
            lambda leaf: rng.normal(size=leaf.shape) / 2, partitioning.unbox(boxed)
        )
        got, cache = jax.jit(functools.partial(apply, block))(params, *inputs, angles, None)
        assert cache is None
        # The angles are float32.
        np.testing.assert_allclose(
            got[0], block_in_numpy(params, x, where, at, cfg), rtol=1e-6, atol=1e-6
        )


@pytest.mark.parametrize("at", [2, [[4, 0, 5], [1, 7, 3]]])  # 5 and more write nothing
def test_heads_are_written_like_slots(at: Any):
    rng = np.random.default_rng(0)
    slots, new = (jnp.asarray(rng.normal(size=(2, size, 7, 3))) for size in (5, 3))
    got = layers.write_heads(jnp.swapaxes(slots, 1, 2), new, jnp.asarray(at))
    want = layers.write_slots(slots, new, jnp.asarray(at))
    np.testing.assert_array_equal(jnp.swapaxes(got, 1, 2), want)
    assert not np.array_equal(want, slots)
