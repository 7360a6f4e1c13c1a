"""Attention of sequences, and of candidates to a sequence: all scores, or tiles on each device.

`TransformerConfig.attention_implementation` says which. Decoding a language model with a cache has
its own form, `attend_parts`.
"""

# Dimension key: B batch, L sequence, M keys, H query heads, K key heads, C head size.

import math
from typing import Any

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
# Queries whose scores may exist at once in a second derivative. Measured on a CPU: with 512 tiles
# save memory and no time, with 1024 both.
MOST_TWICE = 512

Sight = jax.Array | Places  # which keys each query sees, bool `[B, L, M]`; or what decides it


def sight(
    cfg: TransformerConfig,
    positions: jax.Array,
    segments: jax.Array,
    key_positions: jax.Array | None = None,
    key_segments: jax.Array | None = None,
    *,
    twice: bool = False,
) -> Sight:
    """Which keys each token sees, in the form that the configuration asks for.

    positions, segments: int32 `[B, L]`, see `visible`; of the keys, `[B, M]`, or the same. twice:
    whether what attends is differentiated twice. `auto` logs once what it chose and why.
    """
    if key_positions is None or key_segments is None:
        key_positions, key_segments = positions, segments
    if _in_tiles(cfg, positions.shape[1], twice=twice):
        return Places(positions, segments, key_positions, key_segments)
    return visible(positions, key_positions, segments, key_segments)


def _in_tiles(cfg: TransformerConfig, length: int, *, twice: bool) -> bool:
    if cfg.attention_implementation != "auto":
        return cfg.attention_implementation != "plain"
    if length == 1:
        return False
    here = dispatch.platform()
    least = MOST_TWICE + 1 if twice else NO_SLOWER.get(here)
    tiles = least is not None and length >= least
    if twice:
        reason = f"scores of more than {MOST_TWICE} queries, differentiated twice, fill memory"
    else:
        known = "nowhere" if least is None else f"from {least} tokens on"
        reason = f"tiles are known to be no slower on {here} {known}"
    dispatch.log_once(
        "self-attention", "tiles" if tiles else "plain", f"{reason}, this is {length}"
    )
    return tiles


def attend(
    cfg: TransformerConfig,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    where: Sight,
    own: tuple[jax.Array, jax.Array] | None = None,
) -> jax.Array:
    """Grouped-query softmax attention; see `attention_reference` and `attention`.

    query: `[B, L, H, C]`; key, value: `[B, M, K, C]`; own: a further key and value of each query,
    `[B, L, K, C]`. Returns `[B, L, H, C]` in query's dtype. What a query that sees nothing gets is
    finite, and for padding only.
    """
    # Context parallelism: queries stay cut along the sequence, keys and values are gathered.
    key, value = (constrain(x, "batch", None, "kv_heads", None) for x in (key, value))
    if not isinstance(where, Places):
        return attention_reference(query, key, value, where=where, own=own)
    asked = cfg.attention_implementation
    assert asked != "plain"

    def on_each(query: jax.Array, key: jax.Array, value: jax.Array, where: Places, own: Any) -> Any:
        positions, segments, key_positions, key_segments = where
        context = Keys(key, value, key_positions, key_segments)
        return attention(
            query, context, positions=positions, segments=segments, own=own, implementation=asked
        )[0]

    batch, rows, heads, _ = cut_axes(query, "batch", "sequence", "heads", None)
    if not any((batch, rows, heads)):
        return on_each(query, key, value, where, own)
    if heads != cut_axes(key, "batch", None, "kv_heads", None)[2]:
        # The fewest copies of key heads that as many devices as share the query heads can share.
        key_heads = key.shape[2]
        copies = math.lcm(key_heads, math.prod(axis_size(axis) for axis in heads)) // key_heads
        key, value, own = jax.tree.map(lambda x: jnp.repeat(x, copies, axis=2), (key, value, own))
    of_queries, of_keys = PartitionSpec(batch, rows, heads), PartitionSpec(batch, None, heads)
    places, key_places = PartitionSpec(batch, rows), PartitionSpec(batch)
    where_specs = Places(places, places, key_places, key_places)
    in_specs = (of_queries, of_keys, of_keys, where_specs, of_queries)
    mapped = jax.shard_map(on_each, in_specs=in_specs, out_specs=of_queries, check_vma=False)
    return mapped(query, key, value, where, own)
