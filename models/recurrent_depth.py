"""Recurrent-depth language model (Huginn, arXiv 2502.05171) on the common trunk.

    e   = prelude(E[x] * sqrt(D));  s_0 ~ N(0, 2/5) per token and channel, cut at 3 deviations
    s_i = core(inject(s_(i-1), e)),   i = 1 .. r, the same weights each time, no step index
    logits = norm(coda(norm(s_r))) E^T,   the same norm twice

The number of iterations is an argument: one compiled program serves all of them. `read`, `iterate`
and `predict` are the three parts, pure functions with a cache; `recurrent_training.forward` is all
of it, with truncated back-propagation.
"""

# Dimension key: B batch, L sequence, M cache slots, D width, V padded vocabulary, P blocks of the
# prelude, R of the core, Q of the coda, S iterations that a cache keeps, K key heads, C head size.

from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxlib_methods.models.config import TransformerConfig
from jaxlib_methods.models.layers import (
    KeysValues,
    LayerCache,
    Norm,
    Projection,
    Rotation,
    rotation,
    truncated_normal,
    write_slots,
)
from jaxlib_methods.models.partitioning import constrain, look_up
from jaxlib_methods.models.self_attention import Sight, sight
from jaxlib_methods.models.transformer import (
    mask_padding,
    output_head,
    position_table,
    run_blocks,
    tied_logits,
    token_table,
)
from jaxlib_methods.pallas_kernels.attention import visible

STATE_DEVIATION = (2 / 5) ** 0.5  # of s_0, before it is cut: sqrt(D) times that of the embedding

_Kept = tuple[KeysValues, ...]  # of the blocks of a stack


class RecurrentCache(NamedTuple):
    """Keys and values; a token's slot is its position, counted from 0 in its row.

    prelude and coda: of each of the P and Q blocks keys and values `[B, K, M, C]`. core: of each of
    the R blocks `[S, B, K, M, C]`: iteration i (from 0) of a token is kept at i mod S until a later
    one takes its place. steps: int32 `[B, M]`, iterations that each token has taken.

    Nothing is ever taken back: a token sees no position after its own, and whoever comes to a
    position writes it first.
    """

    prelude: _Kept
    core: _Kept
    coda: _Kept
    steps: jax.Array

    @property
    def num_slots(self) -> int:
        """M: how many tokens the cache can hold."""
        return self.steps.shape[1]

    @property
    def kept_steps(self) -> int:
        """S: how many iterations of each token it keeps."""
        return self.core[0][0].shape[0]


class Reading(NamedTuple):
    """What the prelude gives, and what every iteration needs beside the state.

    embedded: e, `[B, L, D]`. hidden: the stream after the block that was asked for, or None.
    where: which keys each token sees, with a cache bool `[B, L, M]`. angles: of the rotation, or
    None. slots: int32 `[B, L]`, where each token stands in the cache (M: nowhere), or None.
    """

    embedded: jax.Array
    hidden: jax.Array | None
    where: Sight
    angles: Rotation | None
    slots: jax.Array | None


class _Stack(nn.Module):
    """Blocks one after the other, or none."""

    cfg: TransformerConfig
    num_layers: int

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        reading: Reading,
        kept: _Kept = (),
        tap_layer: int | None = None,
    ) -> tuple[jax.Array, jax.Array | None, _Kept]:
        if not self.num_layers:
            return x, None if tap_layer is None else x, kept
        slots = reading.slots
        cache = () if slots is None else tuple(LayerCache(own, slots) for own in kept)
        where, angles = reading.where, reading.angles
        return run_blocks(self.cfg, self.num_layers, x, where, angles, cache, tap_layer)


class RecurrentTransformer(nn.Module):
    """The three parts; call them through `read`, `iterate` and `predict` of this file."""

    cfg: TransformerConfig

    def setup(self) -> None:
        cfg = self.cfg
        self.embedding = token_table(cfg)
        if cfg.positions == "learned":
            self.position_embedding = position_table(cfg)
        self.prelude = _Stack(cfg, cfg.prelude_layers)
        self.core = _Stack(cfg, cfg.core_layers)
        self.coda = _Stack(cfg, cfg.coda_layers)
        if cfg.injection == "linear":
            self.adapter = Projection(
                in_shape=(2 * cfg.embed_dim,),
                out_shape=(cfg.embed_dim,),
                in_names=("embed",),
                out_names=("norm",),
                use_bias=False,
                cfg=cfg,
            )
        self.final_norm = Norm(cfg, cfg.embed_dim)
        if not cfg.tie_embeddings:
            self.head = output_head(cfg)

    def __call__(self, inputs: jax.Array) -> jax.Array:
        """One iteration of everything, for the parameters' sake."""
        ones = jnp.ones_like(inputs)
        reading, _ = self.run_prelude(inputs, jnp.zeros_like(inputs), ones, None, None)
        state, _ = self.run_core(reading.embedded, reading)
        return self.run_coda(state, reading)[0]

    def run_prelude(
        self,
        inputs: jax.Array,
        positions: jax.Array,
        segments: jax.Array,
        cache: RecurrentCache | None,
        tap_layer: int | None,
    ) -> tuple[Reading, _Kept]:
        cfg = self.cfg
        dtype = jnp.dtype(cfg.compute_dtype)
        x = look_up(self.embedding(), inputs, "vocab", dtype=dtype)
        x = x * jnp.asarray(cfg.embed_dim**0.5, dtype)
        if cfg.positions == "learned":
            rows = positions + cfg.learned_position_offset
            x = x + look_up(self.position_embedding(), rows, "table_rows", dtype=dtype)
        x = constrain(x, "batch", "sequence", None)
        angles = rotation(positions, cfg) if cfg.positions == "rotary" else None
        slots = None
        if cache is None:
            where = sight(cfg, positions, segments)
        else:
            every = jnp.broadcast_to(jnp.arange(cache.num_slots)[None], cache.steps.shape)
            real = (segments != 0).astype(jnp.int32)
            where = visible(positions, every, real, jnp.ones_like(every))
            slots = jnp.where(segments != 0, positions, cache.num_slots)
        reading = Reading(x, None, where, angles, slots)
        kept = () if cache is None else cache.prelude
        x, tap, kept = self.prelude(x, reading, kept, tap_layer)
        return reading._replace(embedded=x, hidden=tap), kept

    def run_core(
        self, state: jax.Array, reading: Reading, kept: _Kept = ()
    ) -> tuple[jax.Array, _Kept]:
        e = reading.embedded
        injection = self.cfg.injection
        if injection == "linear":
            state = self.adapter(jnp.concatenate([state, e], axis=-1))
        elif injection == "add":
            state = state + e
        elif injection == "gate":
            state = state * e
        state, _, kept = self.core(state, reading, kept)
        return state, kept

    def run_coda(
        self, state: jax.Array, reading: Reading, kept: _Kept = ()
    ) -> tuple[jax.Array, jax.Array, _Kept]:
        x, _, kept = self.coda(self.final_norm(state), reading, kept)
        x = self.final_norm(x)
        table = self.embedding()
        logits = tied_logits(x, table) if self.cfg.tie_embeddings else self.head(x)
        return mask_padding(self.cfg, logits), x, kept


def _apply(cfg: TransformerConfig, params: Mapping[str, Any], method: Any, *args: Any) -> Any:
    return RecurrentTransformer(cfg).apply({"params": params}, *args, method=method)


def init_params(cfg: TransformerConfig, key: jax.Array) -> dict:
    """Parameters of `RecurrentTransformer(cfg)`, boxed with logical axis names."""
    return dict(RecurrentTransformer(cfg).init(key, jnp.zeros((1, 1), jnp.int32))["params"])


def init_cache(
    cfg: TransformerConfig, *, batch_size: int, length: int, kept_steps: int = 1
) -> RecurrentCache:
    """An empty cache of `length` slots. kept_steps: S; 1 makes it no larger than without depth.

    Raises ValueError where S is below 1.
    """
    if kept_steps < 1:
        raise ValueError(f"kept_steps {kept_steps} must be at least 1")
    tail = (batch_size, cfg.kv_heads, length, cfg.head_size)

    def empty(*lead: int) -> jax.Array:
        zeros = jnp.zeros((*lead, *tail), jnp.dtype(cfg.compute_dtype))
        return constrain(zeros, *(None,) * len(lead), "batch", "kv_heads", None, None)

    def blocks(count: int, *lead: int) -> _Kept:
        return tuple((empty(*lead), empty(*lead)) for _ in range(count))

    steps = constrain(jnp.zeros((batch_size, length), jnp.int32), "batch", None)
    core = blocks(cfg.core_layers, kept_steps)
    return RecurrentCache(blocks(cfg.prelude_layers), core, blocks(cfg.coda_layers), steps)


def initial_state(cfg: TransformerConfig, key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """s_0 `[..., D]`, drawn for every token and channel, in the compute dtype.

    Its deviation is 0.987 of `STATE_DEVIATION`, since it is cut at three of them.
    """
    draw = truncated_normal(STATE_DEVIATION)
    return draw(key, (*shape, cfg.embed_dim), jnp.dtype(cfg.compute_dtype))


def state_at(
    cfg: TransformerConfig, positions: jax.Array, key: jax.Array, *, scale: jax.Array | float = 1.0
) -> jax.Array:
    """s_0 of inference `[B, L, D]`: a function of the key and of each token's position alone.

    So it is the same in whatever batch, and whether tokens come at once or one by one. scale: 0
    begins at zero. positions: int32 `[B, L]`.
    """
    draw = jax.vmap(jax.vmap(lambda at: initial_state(cfg, jax.random.fold_in(key, at), ())))
    state = draw(positions)
    return constrain(state * jnp.asarray(scale, state.dtype), "batch", "sequence", None)


def read(
    cfg: TransformerConfig,
    params: Mapping[str, Any],
    inputs: jax.Array,
    *,
    positions: jax.Array,
    segments: jax.Array,
    cache: RecurrentCache | None = None,
    tap_layer: int | None = None,
) -> tuple[Reading, RecurrentCache | None]:
    """The prelude: tokens int32 `[B, L]` to what the core iterates upon, and the new cache.

    positions, segments: int32 `[B, L]`, see `transformer.Transformer`. With a cache the rows hold
    one document each, whose tokens come in the order of their positions, from 0 on; those of
    segment 0 are padding and are not written.
    tap_layer: k returns the stream after block k (0: the embedding) as `hidden`.
    """
    method = RecurrentTransformer.run_prelude
    reading, kept = _apply(cfg, params, method, inputs, positions, segments, cache, tap_layer)
    return reading, None if cache is None else cache._replace(prelude=kept)


def iterate(
    cfg: TransformerConfig,
    params: Mapping[str, Any],
    state: jax.Array,
    reading: Reading,
    *,
    cache: RecurrentCache | None = None,
    step: jax.Array | None = None,
    active: jax.Array | None = None,
) -> tuple[jax.Array, RecurrentCache | None]:
    """One iteration of the core: s_(i-1) to s_i, `[B, L, D]`.

    cache: then `step` is needed, int32 `[B]` or scalar: i - 1, how many iterations the tokens have
    taken. A token attends to what others kept of this iteration; where they stopped before it, to
    their deepest. active: bool `[B, L]`; the others keep their state and their keys.
    """
    if cache is None:
        new, _ = _apply(cfg, params, RecurrentTransformer.run_core, state, reading)
    else:
        assert reading.slots is not None
        assert step is not None
        slots = reading.slots
        if active is not None:
            slots = jnp.where(active, slots, cache.num_slots)
        step = jnp.broadcast_to(step, slots.shape[:1])
        here = reading._replace(slots=slots)
        seen = _seen(cache, step)
        new, seen = _apply(cfg, params, RecurrentTransformer.run_core, state, here, seen)
        core = _keep(cache, seen, step, slots)
        taken = jnp.broadcast_to(step[:, None] + 1, slots.shape)
        cache = cache._replace(core=core, steps=write_slots(cache.steps, taken, slots))
    if active is not None:
        new = jnp.where(active[:, :, None], new, state)
    return new, cache


def _seen(cache: RecurrentCache, step: jax.Array) -> _Kept:
    """Keys and values that iteration `step` (int32 `[B]`) of each block attends to."""
    if cache.kept_steps == 1:
        return jax.tree.map(lambda x: x[0], cache.core)
    deepest = jnp.clip(jnp.minimum(step[:, None], cache.steps - 1), 0) % cache.kept_steps
    index = deepest[None, :, None, :, None]
    return jax.tree.map(lambda x: jnp.take_along_axis(x, index, axis=0)[0], cache.core)


def _keep(cache: RecurrentCache, seen: _Kept, step: jax.Array, slots: jax.Array) -> _Kept:
    """Puts what was written at `slots` of `seen` where iteration `step` is kept."""
    if cache.kept_steps == 1:
        return jax.tree.map(lambda x: x[None], seen)
    # Heads are indexed too: a slice between indices makes XLA transpose the whole array.
    rows = jnp.arange(slots.shape[0])[:, None, None]
    heads = jnp.arange(seen[0][0].shape[1])[None, None]
    at, rings = slots[:, :, None], (step % cache.kept_steps)[:, None, None]

    def put(core: jax.Array, seen: jax.Array) -> jax.Array:
        return core.at[rings, rows, heads, at].set(seen[rows, heads, at], mode="drop")

    return jax.tree.map(put, cache.core, seen)


def predict(
    cfg: TransformerConfig,
    params: Mapping[str, Any],
    state: jax.Array,
    reading: Reading,
    *,
    cache: RecurrentCache | None = None,
) -> tuple[jax.Array, jax.Array, RecurrentCache | None]:
    """The coda and the head: a state to logits `[B, L, V]`, the last hidden layer, the cache."""
    kept = () if cache is None else cache.coda
    method = RecurrentTransformer.run_coda
    logits, hidden, kept = _apply(cfg, params, method, state, reading, kept)
    return logits, hidden, None if cache is None else cache._replace(coda=kept)
