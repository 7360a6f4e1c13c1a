"""Decoder-only transformer trunk: Llama, Qwen, GPT-NeoX and OPT families."""

# Dimension key: B batch, L sequence, M cache slots, D width, V padded vocabulary.

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxlib_methods.models.config import TransformerConfig
from jaxlib_methods.models.layers import (
    Block,
    KeysValues,
    LayerCache,
    Norm,
    Projection,
    Rotation,
    Table,
    rotation,
    write_slots,
)
from jaxlib_methods.models.partitioning import constrain, look_up
from jaxlib_methods.models.self_attention import Sight, sight
from jaxlib_methods.pallas_kernels.attention import MASKED_SCORE, Part, visible

REMAT_POLICIES = {
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


_Carry = tuple[jax.Array, jax.Array | None, tuple[LayerCache, ...]]


class KVCache(NamedTuple):
    """Keys and values of the tokens seen so far.

    layers: of each layer keys and values `[B, K, M, C]`, arrays of their own, so that a step writes
    them in place; positions, segments: int32 `[B, M]`, segment 0 marks an empty slot; length: int32
    scalar, the next free slot, common to the batch. prefix: a cache of N rows, of which B / N rows
    behind one another see one, nothing is written to it; or None.
    """

    layers: tuple[KeysValues, ...]
    positions: jax.Array
    segments: jax.Array
    length: jax.Array
    prefix: "KVCache | None" = None

    @property
    def num_slots(self) -> int:
        """M: how many tokens the cache can hold."""
        return self.positions.shape[1]


class Outputs(NamedTuple):
    """What a forward pass gives.

    logits: `[B, L, V]`, or of the last tokens that were asked for; float32 or better, V the padded
    vocabulary, padding masked. hidden: `[B, L, D]`, the layer that was asked for, or None. cache:
    the new cache, or None. final: `[B, L, D]`, the state behind each of the logits, which the head
    reads; None where no linear head made them.
    """

    logits: jax.Array
    hidden: jax.Array | None
    cache: KVCache | None
    final: jax.Array | None = None


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
        num_logits: int | None = None,
    ) -> Outputs:
        """Runs the trunk.

        inputs: int32 `[B, L]`. positions: int32 `[B, L]`, counted within each document, below
        `cfg.max_length` where they are learned, which is not checked; None counts from 0.
        segments: int32 `[B, L]`, 0 on padding; None is one document. A token sees the tokens of
        its own segment whose position is not after its own.
        hidden_layer: k returns the residual stream after block k (0: the embedding), "final" the
        state after the final norm. cache: appends the tokens, which need positions, and attends to
        what it holds. That it has room is the caller's to see to: tokens that do not fit take the
        place of the last ones. num_logits: gives the logits of the last so many tokens alone, of
        all where None.
        Raises ValueError for a hidden layer that does not exist, an impossible num_logits, no
        positions where they cannot be counted, and a recurrent configuration.
        """
        cfg = self.cfg
        if cfg.recurrence:
            raise ValueError(
                f"a model of recurrence {cfg.recurrence} is no plain transformer; use init_params "
                "and forward of models.language_model, or give recurrence 0"
            )
        if hidden_layer not in (None, "final", *range(cfg.num_layers + 1)):
            raise ValueError(
                f"hidden_layer {hidden_layer!r} does not exist; choose 0 to {cfg.num_layers}, "
                "or 'final'"
            )
        if num_logits is not None and not 1 <= num_logits <= inputs.shape[1]:
            raise ValueError(
                f"num_logits {num_logits} is impossible for {inputs.shape[1]} tokens; choose 1 to "
                f"{inputs.shape[1]}, or None"
            )
        if positions is None and cache is not None:
            raise ValueError(
                "a cache does not say where the next token of a row stands; give its positions"
            )
        if positions is None:
            positions = count_positions(cfg, inputs)
        if segments is None:
            segments = jnp.ones_like(inputs)
        keys_positions, keys_segments = positions, segments
        if cache is None:
            where = sight(cfg, positions, segments)
        else:
            keys_positions = write_slots(cache.positions, positions, cache.length)
            keys_segments = write_slots(cache.segments, segments, cache.length)
            where = visible(positions, keys_positions, segments, keys_segments)
        angles = rotation(positions, cfg) if cfg.positions == "rotary" else None
        table, x = self._embed(inputs, positions)
        tap_layer = hidden_layer if isinstance(hidden_layer, int) else None
        layers = () if cache is None else _layers(cache, positions, segments)
        x, tap, kept = run_blocks(cfg, cfg.num_layers, x, where, angles, layers, tap_layer)
        x = Norm(cfg, cfg.embed_dim, name="final_norm")(x)
        new_cache = None
        if cache is not None:
            new_length = cache.length + inputs.shape[1]
            new_cache = KVCache(kept, keys_positions, keys_segments, new_length, cache.prefix)
        hidden = x if hidden_layer == "final" else tap
        if num_logits is not None:
            x = x[:, -num_logits:]
        return Outputs(self._logits(x, table), hidden, new_cache, x)

    def _embed(self, inputs: jax.Array, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
        cfg = self.cfg
        dtype = jnp.dtype(cfg.compute_dtype)
        table = token_table(cfg, name="embedding")()
        x = look_up(table, inputs, "vocab", dtype=dtype)
        if cfg.positions == "learned":
            learned = position_table(cfg, name="position_embedding")()
            rows = positions + cfg.learned_position_offset
            x = x + look_up(learned, rows, "table_rows", dtype=dtype)
        return table, constrain(x, "batch", "sequence", None)

    def _logits(self, x: jax.Array, table: jax.Array) -> jax.Array:
        cfg = self.cfg
        if cfg.tie_embeddings:
            return mask_padding(cfg, tied_logits(x, table))
        return mask_padding(cfg, output_head(cfg, name="head")(x))


def count_positions(cfg: TransformerConfig, inputs: jax.Array) -> jax.Array:
    """Positions `[B, L]` of rows that are one document each; refused where no such is learned."""
    length = inputs.shape[1]
    if cfg.positions == "learned" and length > cfg.max_length:
        raise ValueError(
            f"rows of {length} tokens are longer than the {cfg.max_length} learned positions; give "
            "shorter rows, or a model of a larger max_length"
        )
    return jnp.broadcast_to(jnp.arange(length)[None], inputs.shape)


def token_table(cfg: TransformerConfig, name: str | None = None) -> Table:
    """The table of embeddings of tokens."""
    shape = (cfg.padded_vocab_size, cfg.embed_dim)
    return Table(cfg, shape, cfg.vocab_size, "vocab", cfg.embed_dim**-0.5, name=name)


def position_table(cfg: TransformerConfig, name: str | None = None) -> Table:
    """The table of embeddings of learned positions."""
    rows = cfg.max_length + cfg.learned_position_offset
    return Table(cfg, (rows, cfg.embed_dim), rows, "table_rows", cfg.embed_dim**-0.5, name=name)


def output_head(cfg: TransformerConfig, name: str | None = None) -> Projection:
    """The matrix from the last state to logits, where it is not the table of embeddings."""
    return Projection(
        in_shape=(cfg.embed_dim,),
        out_shape=(cfg.padded_vocab_size,),
        in_names=("embed",),
        out_names=("vocab",),
        use_bias=False,
        cfg=cfg,
        used=cfg.vocab_size,
        output="wide",
        name=name,
    )


def tied_logits(x: jax.Array, table: jax.Array) -> jax.Array:
    """States `[B, L, D]` against a table `[V, D]`: logits `[B, L, V]`, float32 or better."""
    wide = jnp.promote_types(x.dtype, jnp.float32)
    return jnp.einsum("bld,vd->blv", x, table.astype(x.dtype), preferred_element_type=wide)


def head_rows(cfg: TransformerConfig, params: Mapping[str, Any]) -> jax.Array:
    """The rows `[V, D]` that states are multiplied by: the embeddings, or the head transposed."""
    return params["embedding"]["table"] if cfg.tie_embeddings else params["head"]["kernel"].T


def mask_padding(cfg: TransformerConfig, logits: jax.Array) -> jax.Array:
    """Logits `[B, L, V]` with those of the padded vocabulary out of reach, placed."""
    logits = constrain(logits, "batch", "sequence", "vocab")
    if cfg.padded_vocab_size == cfg.vocab_size:
        return logits
    real = jnp.arange(cfg.padded_vocab_size) < cfg.vocab_size
    return jnp.where(real[None, None], logits, MASKED_SCORE)


def _layers(cache: KVCache, positions: jax.Array, segments: jax.Array) -> tuple[LayerCache, ...]:
    """The cache of each layer, for queries at `positions` of `segments`, int32 `[B, L]`."""
    prefix = cache.prefix
    if prefix is None:
        return tuple(LayerCache(own, cache.length) for own in cache.layers)
    # The queries of the rows that share one, as if they were those of one row.
    rows = (prefix.segments.shape[0], -1)
    queries, documents = positions.reshape(rows), segments.reshape(rows)
    where = visible(queries, prefix.positions, documents, prefix.segments)
    return tuple(
        LayerCache(own, cache.length, Part(*shared, where))
        for own, shared in zip(cache.layers, prefix.layers, strict=True)
    )


def run_blocks(
    cfg: TransformerConfig,
    num_layers: int,
    x: jax.Array,
    where: Sight,
    angles: Rotation | None,
    cache: tuple[LayerCache, ...] = (),
    tap_layer: int | None = None,
) -> tuple[jax.Array, jax.Array | None, tuple[KeysValues, ...]]:
    """Scans `num_layers` blocks that are declared as `blocks` in the calling compact module.

    cache: of each block, or of none. Returns the stream, that after block `tap_layer` (0: the
    input), the new keys and values of each cache.
    """
    block_class = Block
    if cfg.remat != "none":
        policy = REMAT_POLICIES[cfg.remat]
        block_class = nn.remat(Block, policy=policy, prevent_cse=False)

    def body(block: Block, carry: _Carry, index: jax.Array) -> tuple[_Carry, None]:
        x, tap, layers = carry
        x, kept = block(x, where, angles, layers[0] if layers else None)
        if kept is not None:
            # The next block's comes first; after all blocks each is in its place again.
            layers = (*layers[1:], layers[0]._replace(own=kept))
        if tap is not None:
            # Outside the remat: a select needs nothing saved, so a tap costs one array.
            tap = jnp.where(index + 1 == tap_layer, x, tap)
        return (x, tap, layers), None

    scan = nn.scan(
        body,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        length=num_layers,
        # A loop would copy the caches at every block: with them there is none.
        unroll=num_layers if cache else 1,
        metadata_params={nn.PARTITION_NAME: "layers"},
    )
    carry = (x, None if tap_layer is None else x, cache)
    (x, tap, cache), _ = scan(block_class(cfg, name="blocks"), carry, jnp.arange(num_layers))
    return x, tap, tuple(layer.own for layer in cache)


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
    num_logits: int | None = None,
) -> Outputs:
    """`Transformer(cfg)` as a function of its parameters; see `Transformer.__call__`."""
    outputs = Transformer(cfg).apply(
        {"params": params},
        inputs,
        positions=positions,
        segments=segments,
        hidden_layer=hidden_layer,
        cache=cache,
        num_logits=num_logits,
    )
    return cast(Outputs, outputs)
