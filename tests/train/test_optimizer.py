"""Schedules by hand, what decays, what Muon takes, and clipping."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax.contrib import MuonDimensionNumbers

from jaxlib_methods import energy
from jaxlib_methods.energy_config import EnergyConfig
from jaxlib_methods.models import depth_recurrent, partitioning, recurrent_depth
from jaxlib_methods.models.config import TransformerConfig
from jaxlib_methods.models.depth_recurrent_config import DepthRecurrentConfig
from jaxlib_methods.models.transformer import init_params
from jaxlib_methods.train.config import OptimizerConfig
from jaxlib_methods.train.optimizer import (
    MUON_BETA,
    decay_mask,
    global_norm,
    make_optimizer,
    make_schedule,
    muon_dimensions,
)

MODEL = TransformerConfig(
    vocab_size=11,
    num_layers=3,
    embed_dim=12,
    num_heads=2,
    head_dim=10,
    mlp_dim=14,
    norm="layer_norm",
    qkv_bias=True,
    output_bias=True,
    mlp_bias=True,
    qk_norm=True,
)


def make_params():
    return partitioning.unbox(jax.jit(lambda key: init_params(MODEL, key))(jax.random.key(0)))


def by_path(tree, is_leaf=None):
    flat = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in flat}


SCHEDULES = [
    # 4 steps up to the peak of 2, then 16 steps of half a cosine: 2 * (0.1 + 0.9 * 0.5) half way.
    ("cosine", {}, {0: 0.5, 1: 1.0, 3: 2.0, 4: 2.0, 12: 1.1, 20: 0.2}),
    # The line takes the last 5 of 20 steps: 1.8 / 5 down in each.
    ("wsd", {"decay_fraction": 0.25}, {0: 0.5, 3: 2.0, 4: 2.0, 15: 2.0, 16: 1.64, 20: 0.2}),
    ("constant", {}, {0: 0.5, 3: 2.0, 19: 2.0}),
    ("cosine", {"warmup_fraction": 0.0}, {0: 2.0, 10: 1.1, 20: 0.2}),
    ("constant", {"warmup_fraction": 0.05}, {0: 2.0, 1: 2.0}),  # one step: at the peak at once
    # Warm-up and decay that overlap: the decay takes what the warm-up leaves.
    ("wsd", {"warmup_fraction": 0.8, "decay_fraction": 0.5}, {15: 2.0, 16: 2.0, 18: 1.1, 20: 0.2}),
]


@pytest.mark.parametrize(("schedule", "fields", "expected"), SCHEDULES)
def test_schedule_by_hand(schedule, fields, expected):
    fields = {"warmup_fraction": 0.2, "final_fraction": 0.1, **fields}
    cfg = OptimizerConfig(learning_rate=2.0, schedule=schedule, **fields)
    rate = make_schedule(cfg, 20)
    got = {step: np.asarray(rate(jnp.int32(step))).item() for step in expected}
    assert got == pytest.approx(expected, rel=1e-6)


def test_the_schedule_is_that_of_the_steps():
    # With a constant gradient of either sign and no decay, Adam moves by the learning rate.
    cfg = OptimizerConfig(learning_rate=2.0, weight_decay=0.0, warmup_fraction=0.2, clip_norm=0.0)
    optimizer, rate = make_optimizer(cfg, 20), make_schedule(cfg, 20)
    params: Any = {"kernel": jnp.zeros(2)}
    updates: Any
    state = optimizer.init(params)
    for step in range(6):
        updates, state = optimizer.update({"kernel": jnp.array([3.0, -0.5])}, state, params)
        np.testing.assert_allclose(updates["kernel"], rate(step) * jnp.array([-1, 1]), rtol=1e-5)


@functools.cache
def compiled(name):
    """`update(grads, params)` from a fresh state: rate 0.5, decay 0.2, no warm-up, no clipping."""
    cfg = OptimizerConfig(
        name=name,
        learning_rate=0.5,
        weight_decay=0.2,
        schedule="constant",
        warmup_fraction=0.0,
        clip_norm=0.0,
    )
    optimizer = make_optimizer(cfg, 10)
    return jax.jit(lambda grads, p: optimizer.update(grads, optimizer.init(p), p)[0])


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_only_matrices_decay(name):
    params = jax.tree.map(lambda x: jnp.full_like(x, 3.0), make_params())
    updates = compiled(name)(jax.tree.map(jnp.zeros_like, params), params)
    got = {path: float(leaf.max()) for path, leaf in by_path(updates).items()}
    decays = {path for path, value in got.items() if value}
    assert decays == {
        "embedding/table",
        "head/kernel",
        *(f"blocks/attention/{n}/kernel" for n in ("query", "key", "value", "output")),
        *(f"blocks/mlp/{n}/kernel" for n in ("gate", "up", "down")),
    }
    assert [got[path] for path in decays] == pytest.approx([-0.5 * 0.2 * 3.0] * len(decays))
    assert {path for path, yes in by_path(decay_mask(params)).items() if yes} == decays


def test_muon_takes_the_blocks_kernels():
    def is_leaf(x):
        return x is None or isinstance(x, MuonDimensionNumbers)

    found = by_path(muon_dimensions(make_params()), is_leaf)
    taken = {path: tuple(value) for path, value in found.items() if value is not None}
    assert taken == {
        **{f"blocks/attention/{n}/kernel": ((1,), (2, 3)) for n in ("query", "key", "value")},
        "blocks/attention/output/kernel": ((1, 2), (3,)),
        **{f"blocks/mlp/{n}/kernel": ((1,), (2,)) for n in ("gate", "up", "down")},
    }


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_rates_by_name_on_the_parameters_of_an_energy_model(name):
    model = TransformerConfig(
        vocab_size=11, num_layers=2, embed_dim=12, num_heads=2, mlp_dim=14, max_length=8
    )
    init = functools.partial(energy.init_params, model, EnergyConfig(step_size=5.0))
    shapes = partitioning.unbox(jax.eval_shape(init, jax.random.key(0)))
    rng = np.random.default_rng(0)
    params, grads = (
        jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), shapes)
        for _ in range(2)
    )
    cfg = OptimizerConfig(
        name=name, learning_rate=0.5, weight_decay=0.2, schedule="constant", warmup_fraction=0.0
    )
    plain = make_optimizer(cfg, 10)
    factors = {"step_size": 3.0, "step_unit": 0.0, "energy_head": 0.5}
    scaled = make_optimizer(cfg, 10, rate_factors=factors)

    @jax.jit
    def update(grads, params):
        both = (one.update(grads, one.init(params), params)[0] for one in (plain, scaled))
        return tuple(both)

    before, after = update(grads, params)
    for top in before:
        factor = factors.get(top, 1.0)
        for x, y in zip(jax.tree.leaves(before[top]), jax.tree.leaves(after[top]), strict=True):
            assert x.any()
            np.testing.assert_allclose(y, factor * x, rtol=1e-6, err_msg=top)
    # A scalar takes Adam's first step, the rate times the sign, and does not decay. Muon's Adam has
    # Nesterov's momentum: 0.9 * 0.1 / 0.19 + 1 = 28 / 19.
    first = 0.5 * (28 / 19 if name == "muon" else 1)
    sign = np.sign(grads["step_size"]["value"])
    np.testing.assert_allclose(after["step_size"]["value"], -3 * first * sign, rtol=1e-3)
    taken = by_path(
        muon_dimensions(params), lambda x: x is None or isinstance(x, MuonDimensionNumbers)
    )
    taken = {path for path, value in taken.items() if value is not None}
    assert taken == {path for path in taken if path.startswith("blocks/")}
    assert len(taken) == 7


MATRICES = {
    "attention/query/kernel": (12, 20),
    "attention/output/kernel": (20, 12),
    "mlp/down/kernel": (14, 12),
}


def test_muon_of_stacked_layers_is_muon_of_each():
    params = make_params()
    keys = jax.random.split(jax.random.key(1), len(jax.tree.leaves(params)))
    keys = jax.tree.unflatten(jax.tree.structure(params), list(keys))
    grads = jax.tree.map(lambda x, key: jax.random.normal(key, x.shape), params, keys)
    updates = compiled("muon")(grads, params)
    one: Any = optax.contrib.muon(0.5, beta=MUON_BETA, weight_decay=0.2, consistent_rms=0.2)
    update = jax.jit(lambda g, p: one.update({"w": g}, one.init({"w": p}), {"w": p})[0]["w"])
    for path, shape in MATRICES.items():
        for layer in range(MODEL.num_layers):
            p, g, got = (
                by_path(tree)[f"blocks/{path}"][layer].reshape(shape)
                for tree in (params, grads, updates)
            )
            np.testing.assert_allclose(got, update(g, p), rtol=1e-4, atol=1e-6, err_msg=path)
            # Orthogonal: singular values near one, times 0.2 sqrt(longer side) and the rate.
            values = np.linalg.svd(got + 0.5 * 0.2 * p, compute_uv=False)
            assert values.min() > 0.5 * 0.5 * 0.2 * max(shape) ** 0.5


def test_clipping_is_by_the_global_norm():
    # Norms 10 and 0.5: only the first is cut, to 1. Adam forgets a common scale, not this one.
    first = {"a": jnp.array([6.0]), "b": jnp.array([8.0])}
    second = {"a": jnp.array([0.3]), "b": jnp.array([0.4])}
    params = {"a": jnp.zeros(1), "b": jnp.zeros(1)}

    def last_update(clip_norm, *grads):
        cfg = OptimizerConfig(clip_norm=clip_norm, weight_decay=0.0)
        optimizer = make_optimizer(cfg, 10)
        updates: Any = params
        state = optimizer.init(params)
        for g in grads:
            updates, state = optimizer.update(g, state, params)
        return np.array([updates["a"][0], updates["b"][0]])

    tenth = jax.tree.map(lambda x: x / 10, first)
    clipped = last_update(1.0, first, second)
    np.testing.assert_allclose(clipped, last_update(0.0, tenth, second), rtol=1e-5)
    assert not np.allclose(clipped, last_update(0.0, first, second), rtol=1e-2)


def test_global_norm_by_hand():
    # 3-4-5; the squares of 301 ones are 300 in bfloat16.
    assert float(global_norm({"a": jnp.array([3.0]), "b": jnp.array([[4.0]])})) == 5.0
    assert float(global_norm([jnp.ones(301, jnp.bfloat16)])) == pytest.approx(301**0.5)
    assert float(global_norm({})) == 0.0


@pytest.mark.parametrize("kind", ["language", "tied", "untied"])
def test_muon_takes_the_kernels_of_models_that_are_recurrent_in_depth(kind: str):
    if kind == "language":
        model = TransformerConfig(num_layers=3, embed_dim=8, num_heads=2, mlp_dim=16, recurrence=2)
        init: Any = functools.partial(recurrent_depth.init_params, model)
    else:
        trunk = TransformerConfig(embed_dim=8, num_heads=2, mlp_dim=16)
        fields: dict[str, Any] = {"activation": "relu", "vocab_size": 5, "weights": kind}
        cfg = DepthRecurrentConfig.of(trunk, max_steps=3, gate=kind == "tied", **fields)
        init = functools.partial(depth_recurrent.init_params, cfg)
    params = partitioning.unbox(jax.eval_shape(init, jax.random.key(0)))
    is_leaf = lambda x: x is None or isinstance(x, MuonDimensionNumbers)  # noqa: E731
    found = jax.tree.leaves_with_path(muon_dimensions(params), is_leaf=is_leaf)
    shapes = {jax.tree_util.keystr(path): leaf.shape for path, leaf in
              jax.tree.leaves_with_path(params)}  # fmt: skip
    matrices = {}
    for path, numbers in found:
        if numbers is not None:
            shape = shapes[jax.tree_util.keystr(path)]
            names = [entry.key for entry in path]
            matrices[names[-2]] = tuple(
                math.prod(shape[axis] for axis in axes)
                for axes in (numbers.reduction_axis, numbers.output_axis)
            )
    square = dict.fromkeys(("query", "key", "value", "output"), (8, 8))
    expected: dict[str, Any] = {**square, "up": (8, 16), "down": (16, 8)}
    expected |= {"gate": (8, 16), "adapter": (16, 8)} if kind == "language" else {}
    expected |= {"gate": (16, 8)} if kind == "tied" else {}
    assert matrices == expected
