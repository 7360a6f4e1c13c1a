"""Depth-recurrent transformer (Chen 2026, arXiv 2603.21676): one block applied T times.

An encoder with one logit per example. T is chosen when the model is called: more steps for harder
examples. The switches of `DepthRecurrentConfig` give the paper's three models and their ablations.
"""

# Dimension key: B examples, L tokens or nodes, D width, S most steps, T steps, R readout vectors.

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxlib_methods.models.config import TransformerConfig
from jaxlib_methods.models.depth_recurrent_config import DepthRecurrentConfig
from jaxlib_methods.models.layers import (
    Attention,
    FeedForward,
    Norm,
    Rotation,
    Table,
    parameter,
    rotation,
)
from jaxlib_methods.models.partitioning import constrain, look_up
from jaxlib_methods.models.transformer import REMAT_POLICIES

DEPTH_DEVIATIONS = {"normal": 1.0, "small": 0.02}  # of a new depth embedding
ROLE_DEVIATION = 0.02

Params = Mapping[str, Any]
Depth = int | jax.Array


def sees_all(tokens: jax.Array) -> jax.Array:
    """Every token sees every token that is not padding: `[B, L]` to bool `[B, L, L]`."""
    B, L = tokens.shape
    return jnp.broadcast_to((tokens > 0)[:, None, :], (B, L, L))


def _dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    if key is None or rate == 0.0:
        return x
    return jnp.where(jax.random.bernoulli(key, 1.0 - rate, x.shape), x / (1.0 - rate), 0)


def _keys(key: jax.Array | None, num: int) -> list[jax.Array | None]:
    return [None] * num if key is None else list(jax.random.split(key, num))


def _fold(key: jax.Array | None, number: Depth) -> jax.Array | None:
    return None if key is None else jax.random.fold_in(key, number)


class _Linear(nn.Module):
    """A linear map drawn like PyTorch's, uniform within 1 / sqrt(fan_in), with wide sums.

    bias_init: what a new bias is instead.
    """

    cfg: TransformerConfig
    sizes: tuple[int, int]
    names: tuple[str, str]
    bias_init: float | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        cfg, dtype = self.cfg, jnp.dtype(self.cfg.compute_dtype)
        limit, constant = self.sizes[0] ** -0.5, self.bias_init

        def draw(key: jax.Array, shape: Any, dtype: Any) -> jax.Array:
            return jax.random.uniform(key, shape, dtype, -limit, limit)

        kernel = parameter(self, "kernel", draw, self.sizes, self.names, cfg)
        draw_bias = draw if constant is None else nn.initializers.constant(constant)
        bias = parameter(self, "bias", draw_bias, self.sizes[1:], self.names[1:], cfg)
        wide = jnp.promote_types(dtype, jnp.float32)
        y = jnp.dot(x.astype(dtype), kernel.astype(dtype), preferred_element_type=wide)
        return y + jnp.expand_dims(bias.astype(wide), range(y.ndim - 1))


class RecurrentBlock(nn.Module):
    """One step. With the state h, the depth embedding d of this step and u = h + d:

        a = u + s1 * attention(norm1(u))        n = a + s2 * feed_forward(norm2(a))
        z = sigmoid([n; h] W + b)               h' = z * n + (1 - z) * h

    Norms behind: a = norm1(u + s1 * attention(u)), and so on. Without a gate h' = n.
    state: `[B, L, D]`; depth: `[D]` or None; sees: bool `[B, L, L]`. Returns h' and z `[B, L, D]`.
    """

    cfg: DepthRecurrentConfig

    @nn.compact
    def __call__(
        self,
        state: jax.Array,
        depth: jax.Array | None,
        sees: jax.Array,
        angles: Rotation | None,
        key: jax.Array | None,
    ) -> tuple[jax.Array, jax.Array]:
        cfg, trunk = self.cfg, self.cfg.trunk
        width = trunk.embed_dim
        key_attention, key_mlp = _keys(key, 2)
        attention, mlp = Attention(trunk, name="attention"), FeedForward(trunk, name="mlp")
        x = state if depth is None else state + depth.astype(state.dtype)[None, None]
        x = self._sub_layer(
            "attention", x, lambda y: attention(y, sees, angles, None)[0], key_attention
        )
        x = self._sub_layer("mlp", x, mlp, key_mlp)
        if not cfg.gate:
            return constrain(x, "batch", "sequence", None), jnp.ones_like(x)
        both = jnp.concatenate([x, state], axis=-1)
        names = ("embed", "mlp")
        gate = _Linear(trunk, (2 * width, width), names, cfg.gate_bias, name="gate")(both)
        gate = constrain(jax.nn.sigmoid(gate), "batch", "sequence", None)
        return constrain(gate * x + (1 - gate) * state, "batch", "sequence", None), gate

    def _sub_layer(
        self,
        name: str,
        x: jax.Array,
        layer: Callable[[jax.Array], jax.Array],
        key: jax.Array | None,
    ) -> jax.Array:
        cfg, trunk = self.cfg, self.cfg.trunk
        norm = Norm(trunk, trunk.embed_dim, name=f"{name}_norm")
        y = norm(x) if cfg.norm_placement == "pre" else x
        y = layer(y.astype(trunk.compute_dtype)).astype(x.dtype)
        y = _dropout(y, cfg.dropout, key)
        if cfg.layer_scale is not None:
            draw = nn.initializers.constant(cfg.layer_scale)
            scale = parameter(self, f"{name}_scale", draw, (trunk.embed_dim,), ("norm",), trunk)
            y = scale.astype(x.dtype)[None, None] * y
        return x + y if cfg.norm_placement == "pre" else norm(x + y)


class DepthRecurrentTransformer(nn.Module):
    """The parts of the model, of one block; the functions below put them together."""

    cfg: DepthRecurrentConfig

    def setup(self) -> None:
        cfg, trunk = self.cfg, self.cfg.trunk
        width = trunk.embed_dim
        shape = (cfg.vocab_size, width)
        self.embedding = Table(trunk, shape, cfg.vocab_size, "table_rows", 1.0)
        self.embedding_norm = Norm(trunk, width)
        if cfg.roles:
            self.roles = Table(trunk, (2, width), 2, "table_rows", ROLE_DEVIATION)
        if cfg.depth_embedding != "none":
            shape, deviation = (cfg.max_steps, width), DEPTH_DEVIATIONS[cfg.depth_embedding]
            self.depth_embedding = Table(trunk, shape, cfg.max_steps, "table_rows", deviation)
        self.block = RecurrentBlock(cfg)
        size = width * (2 if cfg.readout == "endpoints" else 1)
        self.readout_norm = Norm(trunk, size)
        self.readout_hidden = _Linear(trunk, (size, width), ("embed", "mlp"))
        self.readout_logit = _Linear(trunk, (width, 1), ("mlp", "norm"))

    def embed(
        self, tokens: jax.Array, endpoints: jax.Array | None, key: jax.Array | None
    ) -> jax.Array:
        """The first state `[B, L, D]`."""
        cfg = self.cfg
        x = look_up(self.embedding(), tokens, "vocab", dtype=cfg.wide)
        if cfg.roles:
            ends = _endpoints(endpoints)
            roles = self.roles().astype(cfg.wide)
            places = jnp.arange(tokens.shape[1])[None, :, None]
            for role in range(2):
                here = places == ends[:, role, None, None]
                x = x + jnp.where(here, roles[role][None, None], 0)
        x = _dropout(self.embedding_norm(x), cfg.dropout, key)
        return constrain(x, "batch", "sequence", None)

    def step(
        self, state: jax.Array, t: Depth, sees: jax.Array, key: jax.Array | None
    ) -> tuple[jax.Array, jax.Array]:
        """The next state and its gate."""
        cfg = self.cfg
        depth = None if cfg.depth_embedding == "none" else self.depth_embedding()[t]
        angles = None
        if cfg.positions == "rotary":
            angles = rotation(jnp.arange(state.shape[1])[None], cfg.trunk)
        return self.block(state, depth, sees, angles, key)

    def readout(
        self, state: jax.Array, endpoints: jax.Array | None, key: jax.Array | None
    ) -> jax.Array:
        """The logits `[B]`."""
        x = state[:, 0]
        if self.cfg.readout == "endpoints":
            x = jnp.take_along_axis(state, _endpoints(endpoints)[:, :, None], axis=1)
            # Without this the gradient of the two rows is gathered whole under a mesh.
            x = constrain(x, "batch", None, None)
            x = constrain(x.reshape(x.shape[0], -1), "batch", None)
        x = jax.nn.gelu(self.readout_hidden(self.readout_norm(x)), approximate=False)
        return self.readout_logit(_dropout(x, self.cfg.dropout, key))[:, 0]

    def __call__(self, tokens: jax.Array, endpoints: jax.Array) -> jax.Array:
        """One step of a model, which touches every parameter."""
        state = self.embed(tokens, endpoints, None)
        state, _ = self.step(state, 0, sees_all(tokens), None)
        return self.readout(state, endpoints, None)


def _endpoints(endpoints: jax.Array | None) -> jax.Array:
    if endpoints is None:
        raise ValueError("this model reads the endpoints of each example; give endpoints [B, 2]")
    return endpoints


def _redraw(cfg: DepthRecurrentConfig, block: dict[str, Any], key: jax.Array) -> dict[str, Any]:
    """The block with kernels and biases drawn like PyTorch's, where the published models start.

    Uniform within 1 / sqrt(fan_in). Attention without positions is a `MultiheadAttention` there:
    queries, keys and values are one matrix within Xavier's sqrt(6 / (fan_in + 3 fan_out)), and the
    biases of attention are 0.
    """
    fused = cfg.positions == "none"
    places = [("attention", name) for name in ("query", "key", "value", "output")]
    places += [("mlp", name) for name in ("up", "down")]
    for (layer, name), own in zip(places, jax.random.split(key, len(places)), strict=True):
        part = block[layer][name]
        shape = part["kernel"].value.shape
        split = len(shape) - 1 if name == "output" else 1
        fan_in, fan_out = math.prod(shape[:split]), math.prod(shape[split:])
        of_fused = fused and name in ("query", "key", "value")
        limits = {"kernel": (6 / (fan_in + 3 * fan_out)) ** 0.5 if of_fused else fan_in**-0.5}
        if not (fused and layer == "attention"):
            limits["bias"] = fan_in**-0.5
        for i, (leaf, limit) in enumerate(limits.items()):
            value = part[leaf].value
            where = jax.random.fold_in(own, i)
            draw = jax.random.uniform(where, value.shape, value.dtype, -limit, limit)
            part[leaf] = part[leaf].replace_boxed(draw)
    return block


def init_params(cfg: DepthRecurrentConfig, key: jax.Array) -> dict:
    """Parameters of the model, boxed with logical axis names.

    Untied, every leaf of `block` has a leading axis of `max_steps`.
    """
    model, zeros = DepthRecurrentTransformer(cfg), jnp.zeros((1, 2), jnp.int32)

    def one_block(key: jax.Array) -> dict[str, Any]:
        key_model, key_block = jax.random.split(key)
        params = dict(model.init(key_model, zeros, zeros)["params"])
        return params | {"block": _redraw(cfg, dict(params["block"]), key_block)}

    params = one_block(key)
    if cfg.weights == "tied":
        return params
    blocks = jax.vmap(lambda key: one_block(key)["block"])(jax.random.split(key, cfg.max_steps))
    return params | {"block": nn.meta.add_axis(blocks, 0, {nn.PARTITION_NAME: "layers"})}


def embed(
    cfg: DepthRecurrentConfig,
    params: Params,
    tokens: jax.Array,
    endpoints: jax.Array | None = None,
    *,
    key: jax.Array | None = None,
) -> jax.Array:
    """The first state `[B, L, D]`, h_0 = dropout(norm(embedding + role)).

    tokens: int32 `[B, L]`, 0 on padding; endpoints: int32 `[B, 2]`, places of source and target.
    key: of the dropout, here and below; None leaves it out.
    """
    model = DepthRecurrentTransformer(cfg)
    state = model.apply({"params": params}, tokens, endpoints, key, method="embed")
    return cast(jax.Array, state)


def step(
    cfg: DepthRecurrentConfig,
    params: Params,
    state: jax.Array,
    t: Depth,
    sees: jax.Array,
    *,
    key: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Step `t`, counted from 0: the next state and its gate, both `[B, L, D]`.

    sees: bool `[B, L, L]`, which tokens (last axis) a token reads. `key` is folded with `t`.
    Raises ValueError for a Python `t` outside 0 to max_steps - 1; an array is clamped into it.
    """
    if isinstance(t, int) and not 0 <= t < cfg.max_steps:
        raise ValueError(f"step {t} does not exist; choose 0 to {cfg.max_steps - 1}")
    t = jnp.clip(t, 0, cfg.max_steps - 1)
    if cfg.weights == "untied":
        params = {**params, "block": jax.tree.map(lambda x: x[t], params["block"])}
    model, key = DepthRecurrentTransformer(cfg), _fold(key, t)
    pair = model.apply({"params": params}, state, t, sees, key, method="step")
    return cast(tuple[jax.Array, jax.Array], pair)


def readout(
    cfg: DepthRecurrentConfig,
    params: Params,
    state: jax.Array,
    endpoints: jax.Array | None = None,
    *,
    key: jax.Array | None = None,
) -> jax.Array:
    """Logits `[B]` of a state `[B, L, D]`, float32 or better."""
    model = DepthRecurrentTransformer(cfg)
    logits = model.apply({"params": params}, state, endpoints, key, method="readout")
    return cast(jax.Array, logits)


def _scan(
    cfg: DepthRecurrentConfig,
    params: Params,
    state: jax.Array,
    sees: jax.Array,
    *,
    num_steps: Depth,
    max_steps: int | None,
    key: jax.Array | None,
    observe: Callable[[jax.Array, jax.Array, jax.Array], Any],
) -> tuple[jax.Array, Any]:
    """Takes the steps; `observe(old state, new state, gate)` says what to keep of each."""
    most = cfg.max_steps if max_steps is None else max_steps
    for name, value in (("max_steps", most), ("num_steps", num_steps)):
        if isinstance(value, int) and not 0 <= value <= min(most, cfg.max_steps):
            raise ValueError(
                f"{name} {value} must be 0 to {min(most, cfg.max_steps)}; a model for more steps "
                "needs a larger DepthRecurrentConfig.max_steps"
            )
    length = num_steps if isinstance(num_steps, int) else most
    last = jnp.clip(num_steps, 0, length)

    def take(state: jax.Array, t: jax.Array) -> tuple[jax.Array, Any]:
        new, gate = step(cfg, params, state, t, sees, key=key)
        return new, observe(state, new, gate)

    def skip(state: jax.Array, t: jax.Array) -> tuple[jax.Array, Any]:
        seen = jax.eval_shape(take, state, t)[1]
        return state, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), seen)

    if cfg.trunk.remat != "none":
        policy = REMAT_POLICIES[cfg.trunk.remat]
        take = jax.checkpoint(take, policy=policy, prevent_cse=False)

    def body(state: jax.Array, t: jax.Array) -> tuple[jax.Array, Any]:
        if isinstance(num_steps, int):
            return take(state, t)
        return jax.lax.cond(t < last, take, skip, state, t)

    return jax.lax.scan(body, state, jnp.arange(length))


def iterate(
    cfg: DepthRecurrentConfig,
    params: Params,
    state: jax.Array,
    sees: jax.Array,
    *,
    num_steps: Depth,
    max_steps: int | None = None,
    key: jax.Array | None = None,
) -> jax.Array:
    """The state `[B, L, D]` after `num_steps` steps from `state`.

    num_steps: an int compiles a program of that many steps and raises ValueError above
    `cfg.max_steps`. An array, traced or not, is clamped to 0 to `max_steps` (None:
    `cfg.max_steps`) in a program for all of them: steps not taken are not computed, but its
    gradient keeps room for `max_steps`.
    """
    options: dict[str, Any] = {"num_steps": num_steps, "max_steps": max_steps, "key": key}
    return _scan(cfg, params, state, sees, observe=lambda *_: None, **options)[0]


def forward(
    cfg: DepthRecurrentConfig,
    params: Params,
    tokens: jax.Array,
    sees: jax.Array,
    endpoints: jax.Array | None = None,
    *,
    num_steps: Depth,
    max_steps: int | None = None,
    key: jax.Array | None = None,
) -> jax.Array:
    """Logits `[B]` after `num_steps` steps; see `embed`, `iterate` and `readout`."""
    key_embed, key_steps, key_readout = _keys(key, 3)
    state = embed(cfg, params, tokens, endpoints, key=key_embed)
    options: dict[str, Any] = {"num_steps": num_steps, "max_steps": max_steps, "key": key_steps}
    state = iterate(cfg, params, state, sees, **options)
    return readout(cfg, params, state, endpoints, key=key_readout)


class Trajectory(NamedTuple):
    """What each step gave, all `[T, B]`; row t belongs to the state after step t.

    norm, change, gate: means over the example's tokens of |h'|, |h' - h| / |h| and z.
    """

    logits: jax.Array
    norm: jax.Array
    change: jax.Array
    gate: jax.Array


def trajectory(
    cfg: DepthRecurrentConfig,
    params: Params,
    tokens: jax.Array,
    sees: jax.Array,
    endpoints: jax.Array | None = None,
    *,
    num_steps: Depth,
    max_steps: int | None = None,
    key: jax.Array | None = None,
) -> Trajectory:
    """Every depth up to `num_steps` in one pass; row t is what `forward` gives for t + 1 steps.

    An array of `num_steps` gives `max_steps` rows, zero from `num_steps` on; see `iterate`.
    """
    key_embed, key_steps, key_readout = _keys(key, 3)
    real = tokens > 0
    count = jnp.maximum(real.sum(axis=1), 1)

    def mean(x: jax.Array) -> jax.Array:
        return jnp.where(real, x, 0).sum(axis=1) / count

    def observe(old: jax.Array, new: jax.Array, gate: jax.Array) -> Trajectory:
        logits = readout(cfg, params, new, endpoints, key=key_readout)
        old, new, gate = jax.lax.stop_gradient((old, new, gate))
        size = jnp.linalg.norm
        change = size(new - old, axis=-1) / jnp.maximum(size(old, axis=-1), 1e-6)
        return Trajectory(logits, mean(size(new, axis=-1)), mean(change), mean(gate.mean(axis=-1)))

    state = embed(cfg, params, tokens, endpoints, key=key_embed)
    options: dict[str, Any] = {"num_steps": num_steps, "max_steps": max_steps, "key": key_steps}
    return _scan(cfg, params, state, sees, observe=observe, **options)[1]
