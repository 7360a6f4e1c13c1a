"""Decoder-only transformer trunk: Llama, Qwen, GPT-NeoX and OPT families."""

# Dimension key: B batch, L sequence, M cache slots, D width, V padded vocabulary.

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxlib_methods.models.config import TransformerConfig
from jaxlib_methods.models.layers import Block, Norm, Projection, Rotation, Table, rotation
from jaxlib_methods.models.partitioning import constrain
from jaxlib_methods.pallas_kernels.attention import MASKED_SCORE, visible

REMAT_POLICIES = {
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


_KeysValues = tuple[jax.Array, jax.Array]
_Carry = tuple[jax.Array, jax.Array | None]
_Layer = tuple[jax.Array, _KeysValues | None]


class KVCache(NamedTuple):
    """Keys and values of the tokens seen so far.

    keys, values: `[num_layers, B, M, K, C]`; positions, segments: int32 `[B, M]`, segment 0 marks
    an empty slot; length: int32 scalar, the next free slot, common to the batch.
    """

    keys: jax.Array
    values: jax.Array
    positions: jax.Array
    segments: jax.Array
    length: jax.Array


class Outputs(NamedTuple):
    """What a forward pass gives.

    logits: `[B, L, V]`, float32 or better, V the padded vocabulary, padding masked.
    hidden: `[B, L, D]`, the layer that was asked for, or None. cache: the new cache, or None.
    """

    logits: jax.Array
    hidden: jax.Array | None
    cache: KVCache | None


class Transformer(nn.Module):
    """Maps tokens to next-token logits. See `TransformerConfig` for the variants."""

    cfg: TransformerConfig

    @nn.compact
    def __call__(
        self,
        inputs: jax.Array,
        *,
        positions: jax.Array | None = None,
        segments: jax.Array | None = None,
        hidden_layer: int | Literal["final"] | None = None,
        cache: KVCache | None = None,
    ) -> Outputs:
        """Runs the trunk.

        inputs: int32 `[B, L]`. positions: int32 `[B, L]`, counted within each document; None
        counts from 0. segments: int32 `[B, L]`, 0 on padding; None is one document. A token sees
        the tokens of its own segment whose position is not after its own.
        hidden_layer: k returns the residual stream after block k (0: the embedding), "final" the
        state after the final norm. cache: appends the tokens and attends to what it holds.
        Raises ValueError for a hidden layer that does not exist.
        """
        cfg = self.cfg
        if hidden_layer not in (None, "final", *range(cfg.num_layers + 1)):
            raise ValueError(
                f"hidden_layer {hidden_layer!r} does not exist; choose 0 to {cfg.num_layers}, "
                "or 'final'"
            )
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(inputs.shape[1])[None], inputs.shape)
        if segments is None:
            segments = jnp.ones_like(inputs)
        keys_positions, keys_segments = positions, segments
        if cache is not None:
            keys_positions = write_slots(cache.positions, positions, cache.length)
            keys_segments = write_slots(cache.segments, segments, cache.length)
        where = visible(positions, keys_positions, segments, keys_segments)
        angles = rotation(positions, cfg) if cfg.positions == "rotary" else None
        table, x = self._embed(inputs, positions)
        tap_layer = hidden_layer if isinstance(hidden_layer, int) else None
        x, tap, kv = self._blocks(x, where, angles, cache, tap_layer)
        x = Norm(cfg, cfg.embed_dim, name="final_norm")(x)
        new_cache = None
        if cache is not None:
            new_length = cache.length + inputs.shape[1]
            assert kv is not None
            new_cache = KVCache(*kv, keys_positions, keys_segments, new_length)
        hidden = x if hidden_layer == "final" else tap
        return Outputs(self._logits(x, table), hidden, new_cache)

    def _embed(self, inputs: jax.Array, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
        cfg = self.cfg
        dtype = jnp.dtype(cfg.compute_dtype)
        deviation = cfg.embed_dim**-0.5
        shape = (cfg.padded_vocab_size, cfg.embed_dim)
        table = Table(cfg, shape, cfg.vocab_size, "vocab", deviation, name="embedding")()
        # A gather from a table that is cut along the vocabulary makes XLA rematerialise it:
        # gather the table first, in the compute dtype.
        x = constrain(table.astype(dtype), None, None)[inputs]
        if cfg.positions == "learned":
            rows = cfg.max_length + cfg.learned_position_offset
            shape = (rows, cfg.embed_dim)
            learned = Table(cfg, shape, rows, "table_rows", deviation, name="position_embedding")()
            learned = constrain(learned.astype(dtype), None, None)
            x = x + learned[positions + cfg.learned_position_offset]
        return table, constrain(x, "batch", "sequence", None)

    def _blocks(
        self,
        x: jax.Array,
        where: jax.Array,
        angles: Rotation | None,
        cache: KVCache | None,
        tap_layer: int | None,
    ) -> tuple[jax.Array, jax.Array | None, _KeysValues | None]:
        cfg = self.cfg
        block_class = Block
        if cfg.remat != "none":
            policy = REMAT_POLICIES[cfg.remat]
            block_class = nn.remat(Block, policy=policy, prevent_cse=False)

        def body(block: Block, carry: _Carry, layer: _Layer) -> tuple[_Carry, _KeysValues | None]:
            (x, tap), (index, kv) = carry, layer
            slots = None if kv is None or cache is None else (*kv, cache.length)
            x, kv = block(x, where, angles, slots)
            if tap is not None:
                # Outside the remat: a select needs nothing saved, so a tap costs one array.
                tap = jnp.where(index + 1 == tap_layer, x, tap)
            return (x, tap), kv

        scan = nn.scan(
            body,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=cfg.num_layers,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        kv = None if cache is None else (cache.keys, cache.values)
        carry = (x, None if tap_layer is None else x)
        (x, tap), kv = scan(
            block_class(cfg, name="blocks"), carry, (jnp.arange(cfg.num_layers), kv)
        )
        return x, tap, kv

    def _logits(self, x: jax.Array, table: jax.Array) -> jax.Array:
        cfg = self.cfg
        if cfg.tie_embeddings:
            wide = jnp.promote_types(x.dtype, jnp.float32)
            kernel = table.astype(x.dtype)
            logits = jnp.einsum("bld,vd->blv", x, kernel, preferred_element_type=wide)
        else:
            logits = Projection(
                in_shape=(cfg.embed_dim,),
                out_shape=(cfg.padded_vocab_size,),
                in_names=("embed",),
                out_names=("vocab",),
                use_bias=False,
                cfg=cfg,
                used=cfg.vocab_size,
                output="wide",
                name="head",
            )(x)
        logits = constrain(logits, "batch", "sequence", "vocab")
        if cfg.padded_vocab_size == cfg.vocab_size:
            return logits
        real = jnp.arange(cfg.padded_vocab_size) < cfg.vocab_size
        return jnp.where(real[None, None], logits, MASKED_SCORE)


def write_slots(slots: jax.Array, new: jax.Array, at: jax.Array) -> jax.Array:
    """Writes `new` `[B, L, ...]` into the slots `[B, M, ...]` of a cache, from slot `at` on."""
    return jax.lax.dynamic_update_slice_in_dim(slots, new.astype(slots.dtype), at, axis=1)


def init_params(cfg: TransformerConfig, key: jax.Array) -> dict:
    """Parameters of `Transformer(cfg)`, boxed with logical axis names (see `partitioning`)."""
    return dict(Transformer(cfg).init(key, jnp.zeros((1, 1), jnp.int32))["params"])


def forward(
    cfg: TransformerConfig,
    params: Mapping[str, Any],
    inputs: jax.Array,
    *,
    positions: jax.Array | None = None,
    segments: jax.Array | None = None,
    hidden_layer: int | Literal["final"] | None = None,
    cache: KVCache | None = None,
) -> Outputs:
    """`Transformer(cfg)` as a function of its parameters; see `Transformer.__call__`."""
    outputs = Transformer(cfg).apply(
        {"params": params},
        inputs,
        positions=positions,
        segments=segments,
        hidden_layer=hidden_layer,
        cache=cache,
    )
    return cast(Outputs, outputs)
