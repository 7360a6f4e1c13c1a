"""Attention of whole sequences to themselves: all scores at once, or in tiles on each device.

`TransformerConfig.attention_implementation` says which. Decoding with a cache has its own form.
"""

# Dimension key: B batch, L sequence, H query heads, K key heads, C head size.

import math

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jaxlib_methods.models.config import TransformerConfig
from jaxlib_methods.models.partitioning import axis_size, constrain, cut_axes
from jaxlib_methods.pallas_kernels import dispatch
from jaxlib_methods.pallas_kernels.attention import (
    Keys,
    Places,
    attention,
    attention_reference,
    visible,
)

# Platform -> length from which training steps were measured to take no longer in tiles.
NO_SLOWER = {"cpu": 256}


Sight = jax.Array | Places  # which keys each query sees, bool `[B, L, M]`; or what decides it


def sight(cfg: TransformerConfig, positions: jax.Array, segments: jax.Array) -> Sight:
    """Which of the other tokens each one sees, in the form that the configuration asks for.

    positions, segments: int32 `[B, L]`, see `visible`. `auto` logs once what it chose and why.
    """
    if _in_tiles(cfg, positions.shape[1]):
        return Places(positions, segments, positions, segments)
    return visible(positions, positions, segments, segments)


def _in_tiles(cfg: TransformerConfig, length: int) -> bool:
    if cfg.attention_implementation != "auto":
        return cfg.attention_implementation != "plain"
    here = dispatch.platform()
    least = NO_SLOWER.get(here)
    wins = least is not None and length >= least
    known = "nowhere" if least is None else f"from {least} tokens on"
    reason = f"tiles are known to be no slower on {here} {known}, this is {length}"
    dispatch.log_once("self-attention", "tiles" if wins else "plain", reason)
    return wins


def attend(
    cfg: TransformerConfig, query: jax.Array, key: jax.Array, value: jax.Array, where: Sight
) -> jax.Array:
    """Grouped-query softmax attention; see `attention_reference` and `attention`.

    query: `[B, L, H, C]`; key, value: `[B, L, K, C]`. Returns `[B, L, H, C]` in query's dtype. What
    a query that sees nothing gets is finite, and for padding only.
    """
    # Context parallelism: queries stay cut along the sequence, keys and values are gathered.
    key, value = (constrain(x, "batch", None, "kv_heads", None) for x in (key, value))
    if not isinstance(where, Places):
        return attention_reference(query, key, value, where=where)
    asked = cfg.attention_implementation
    assert asked != "plain"

    def on_each(query: jax.Array, key: jax.Array, value: jax.Array, where: Places) -> jax.Array:
        positions, segments, key_positions, key_segments = where
        context = Keys(key, value, key_positions, key_segments)
        return attention(
            query, context, positions=positions, segments=segments, implementation=asked
        )[0]

    batch, rows, heads, _ = cut_axes(query, "batch", "sequence", "heads", None)
    if not any((batch, rows, heads)):
        return on_each(query, key, value, where)
    if heads != cut_axes(key, "batch", None, "kv_heads", None)[2]:
        # The fewest copies of key heads that as many devices as share the query heads can share.
        num_heads = key.shape[2]
        copies = math.lcm(num_heads, math.prod(axis_size(axis) for axis in heads)) // num_heads
        key, value = (jnp.repeat(x, copies, axis=2) for x in (key, value))
    of_queries, of_keys = PartitionSpec(batch, rows, heads), PartitionSpec(batch, None, heads)
    own, all_keys = PartitionSpec(batch, rows), PartitionSpec(batch)
    in_specs = (of_queries, of_keys, of_keys, Places(own, own, all_keys, all_keys))
    mapped = jax.shard_map(on_each, in_specs=in_specs, out_specs=of_queries, check_vma=False)
    return mapped(query, key, value, where)
