"""What a new depth-recurrent transformer is: sizes, draws, gradients through many steps."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlib_methods.models import depth_recurrent as dr
from jaxlib_methods.models import partitioning
from jaxlib_methods.models.config import TransformerConfig

MODEL = TransformerConfig(embed_dim=8, num_heads=2, mlp_dim=12, compute_dtype="float32")
SIZES: dict[str, Any] = {"vocab_size": 9, "max_steps": 4}
GRAPH = dr.DepthRecurrentConfig.of(MODEL, activation="relu", roles=True, **SIZES)


def init(cfg: dr.DepthRecurrentConfig, key: jax.Array) -> dict:
    return partitioning.unbox(dr.init_params(cfg, key))


@pytest.mark.parametrize("positions", ["none", "rotary"])
def test_parameters_are_drawn_as_published(positions: Any):
    model = dataclasses.replace(MODEL, embed_dim=32, mlp_dim=64)
    fields: dict[str, Any] = {"depth_embedding": "small", "positions": positions, **SIZES}
    fields["roles"] = True
    cfg = dr.DepthRecurrentConfig.of(model, activation="relu", **fields)
    params = jax.jit(functools.partial(init, cfg))(jax.random.key(0))
    block, fused = params["block"], positions == "none"
    attention, mlp = block["attention"], block["mlp"]
    reads = 6 / (32 + 3 * 32) if fused else 1 / 32  # squares of the largest: three in one matrix
    limits = {
        **{name: (attention[name]["kernel"], reads) for name in ("query", "key", "value")},
        "output": (attention["output"]["kernel"], 1 / 32),
        "up": (mlp["up"]["kernel"], 1 / 32),
        "down": (mlp["down"]["kernel"], 1 / 64),
        "gate": (block["gate"]["kernel"], 1 / 64),
        "hidden": (params["readout_hidden"]["kernel"], 1 / 64),
    }
    for name, (kernel, square) in limits.items():
        largest = float(jnp.abs(kernel).max())
        assert 0.98 * math.sqrt(square) < largest <= 1.001 * math.sqrt(square), name
        assert float(kernel.std()) == pytest.approx(math.sqrt(square / 3), rel=0.06), name
    assert bool((block["gate"]["bias"] == -2.0).all())
    biases = {"up": (mlp["up"]["bias"], 1 / 32), "down": (mlp["down"]["bias"], 1 / 64)}
    biases["hidden"] = (params["readout_hidden"]["bias"], 1 / 64)
    for name in ("query", "key", "value", "output"):
        biases[name] = (attention[name]["bias"], 0.0 if fused else 1 / 32)
    for name, (bias, square) in biases.items():
        largest = float(jnp.abs(bias).max())
        assert 0.8 * math.sqrt(square) <= largest <= 1.001 * math.sqrt(square), name
    for name in ("depth_embedding", "roles"):
        assert float(params[name]["table"].std()) == pytest.approx(0.02, rel=0.2), name
    assert float(params["embedding"]["table"].std()) == pytest.approx(1.0, rel=0.1)


def test_the_published_graph_model_has_205441_parameters():
    model = TransformerConfig(embed_dim=128, num_heads=4, mlp_dim=256)
    cfg = dr.DepthRecurrentConfig.of(
        model, activation="relu", vocab_size=27, max_steps=20, roles=True
    )

    def sizes(cfg: dr.DepthRecurrentConfig) -> dict[str, int]:
        shapes = jax.eval_shape(functools.partial(dr.init_params, cfg), jax.random.key(0))
        leaves = {name: jax.tree.leaves(part) for name, part in shapes.items()}
        return {name: sum(math.prod(x.shape) for x in part) for name, part in leaves.items()}

    attention, mlp = 4 * (128 * 128 + 128), (128 * 256 + 256) + (256 * 128 + 128)
    gate = 256 * 128 + 128
    assert sizes(cfg) == {
        "embedding": 27 * 128,  # A to Z and padding
        "roles": 2 * 128,
        "embedding_norm": 2 * 128,
        "depth_embedding": 20 * 128,
        "block": attention + mlp + 2 * 2 * 128 + gate,
        "readout_norm": 2 * 256,
        "readout_hidden": 256 * 128 + 128,
        "readout_logit": 128 + 1,
    }
    assert sum(sizes(cfg).values()) == 205_441
    assert sum(sizes(dataclasses.replace(cfg, gate=False)).values()) == 172_545
    longer = sizes(dataclasses.replace(cfg, max_steps=40))
    assert longer["block"] == sizes(cfg)["block"]  # tied: steps cost rows of the table alone
    untied = sizes(dataclasses.replace(cfg, weights="untied"))
    assert untied["block"] == 20 * sizes(cfg)["block"]


# The paper's claim of stability, as numbers of a new model (no training). Without its remedies the
# gradient grows 3 to 4 times; with queries, keys and values drawn as three matrices 5 to 7 times.

NODES, STEPS = 12, 24
HIGHWAY = dr.DepthRecurrentConfig.of(
    dataclasses.replace(MODEL, embed_dim=64, num_heads=4, mlp_dim=128),
    activation="relu",
    vocab_size=27,
    max_steps=STEPS,
    layer_scale=1.0,
)


@functools.cache
def new_models() -> dict:
    return jax.jit(jax.vmap(functools.partial(init, HIGHWAY)))(
        jax.random.split(jax.random.key(0), 4)
    )


@functools.cache
def highway(gate: bool, norm_placement: Any) -> Any:
    """|dL/dh_0| / |dL/dh_T| of four new models for rows of (gate bias, layer scale); mean gates."""
    cfg = dataclasses.replace(HIGHWAY, gate=gate, norm_placement=norm_placement)
    rng = np.random.default_rng(0)
    rows = 4
    tokens = jnp.asarray(rng.integers(1, 27, (rows, NODES)))
    sees = jnp.asarray((rng.random((rows, NODES, NODES)) < 2 / NODES) | np.eye(NODES, dtype=bool))
    ends = jnp.tile(jnp.array([[0, NODES - 1]]), (rows, 1))
    labels = jnp.arange(rows) % 2

    def ratio(params: Any, bias: jax.Array, scale: jax.Array) -> tuple[jax.Array, jax.Array]:
        block = dict(params["block"])
        block["gate"] = block["gate"] | {"bias": jnp.full_like(block["gate"]["bias"], bias)}
        for name in ("attention_scale", "mlp_scale"):
            block[name] = block[name] * scale
        params = params | {"block": block}

        def loss(state: jax.Array) -> jax.Array:
            logits = dr.readout(cfg, params, state, ends)
            return (jnp.logaddexp(0, logits) - labels * logits).mean()

        state = dr.embed(cfg, params, tokens)
        run = functools.partial(dr.iterate, cfg, params, sees=sees, num_steps=STEPS)
        last, back = jax.vjp(run, state)
        slope = jax.grad(loss)(last)
        z = dr.step(cfg, params, state, 0, sees)[1].mean()
        return jnp.linalg.norm(back(slope)[0]) / jnp.linalg.norm(slope), z

    over_models = jax.vmap(ratio, in_axes=(0, None, None))
    return jax.jit(jax.vmap(over_models, in_axes=(None, 0, 0)))


def geometric_means(ratios: jax.Array) -> np.ndarray:
    return np.exp(np.log(ratios).mean(axis=1))


def test_the_gate_and_the_layer_scale_make_a_gradient_highway():
    biases, scales = jnp.array([-2.0, -2.0, 0.0]), jnp.array([1e-4, 1.0, 1.0])
    ratios, gates = highway(True, "pre")(new_models(), biases, scales)
    both, gate_alone, half_open = geometric_means(ratios)
    assert 0.9 < both < 1.15
    assert 0.5 < gate_alone < 3.5
    assert half_open > 3
    assert bool(((gates[:2] > 0.10) & (gates[:2] < 0.16)).all())


def test_without_a_gate_gradients_grow_or_vanish():
    one = jnp.ones(1)
    assert geometric_means(highway(False, "pre")(new_models(), one, one)[0]) > 3
    assert geometric_means(highway(False, "post")(new_models(), one, one)[0]) < 0.05


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"vocab_size": 1}, "vocab_size 1 must be at least 2"),
        ({"max_steps": 0}, "max_steps 0 must be at least 1"),
        ({"dropout": 1.0}, "dropout 1.0 must be at least 0 and below 1"),
        (
            {"trunk": dataclasses.replace(GRAPH.trunk, parallel_residual=True)},
            "parallel_residual has no meaning",
        ),
        (
            {"trunk": dataclasses.replace(GRAPH.trunk, num_heads=8), "positions": "rotary"},
            "heads of an even size, not 1",
        ),
        ({"readout": "mean"}, "readout 'mean' is unknown"),
        ({"weights": "shared"}, "weights 'shared' is unknown"),
    ],
)
def test_impossible_models_are_refused(fields: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(GRAPH, **fields)


def test_sizes_of_a_run():
    model = TransformerConfig(embed_dim=32, num_heads=8, remat="full", vocab_size=999)
    cfg = dr.DepthRecurrentConfig.of(model, activation="gelu", **SIZES)
    trunk = cfg.trunk
    assert (trunk.embed_dim, trunk.num_heads, trunk.mlp_size, trunk.remat) == (32, 8, 128, "full")
    assert (trunk.norm, trunk.mlp, cfg.vocab_size) == ("layer_norm", "gelu", 9)
    for name, value in (("qk_norm", True), ("num_layers", 6), ("norm", "layer_norm")):
        with pytest.raises(ValueError, match=f"model.{name}={value} has no meaning"):
            dr.DepthRecurrentConfig.of(
                dataclasses.replace(model, **{name: value}), activation="gelu", **SIZES
            )
