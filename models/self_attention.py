"""Attention of whole sequences to themselves: all scores at once, or in tiles on each device.

`TransformerConfig.attention_implementation` says which. Decoding with a cache has its own form.
"""

# Dimension key: B batch, L sequence, H query heads, K key heads, C head size.

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jaxlib_methods.models.config import TransformerConfig
from jaxlib_methods.models.partitioning import constrain, cut_axes
from jaxlib_methods.pallas_kernels import dispatch
from jaxlib_methods.pallas_kernels.attention import Keys, attention, attention_reference, visible

# Platform -> length from which training steps were measured to take no longer in tiles.
NO_SLOWER = {"cpu": 256}


class Places(NamedTuple):
    """Of tokens, int32 `[B, L]`: the position in its document and the segment, 0 on padding."""

    positions: jax.Array
    segments: jax.Array


Sight = jax.Array | Places  # which keys each query sees, bool `[B, L, M]`; or what decides it


def sight(cfg: TransformerConfig, positions: jax.Array, segments: jax.Array) -> Sight:
    """Which of the other tokens each one sees, in the form that the configuration asks for.

    positions, segments: int32 `[B, L]`, see `visible`. `auto` logs once what it chose and why.
    """
    if _in_tiles(cfg, positions.shape[1]):
        return Places(positions, segments)
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

    def on_each(
        query: jax.Array, key: jax.Array, value: jax.Array, rows: Places, columns: Places
    ) -> jax.Array:
        context = Keys(key, value, *columns)
        return attention(query, context, **rows._asdict(), implementation=asked)[0]

    batch, rows, heads, _ = cut_axes(query, "batch", "sequence", "heads", None)
    if not any((batch, rows, heads)):
        return on_each(query, key, value, where, where)
    if heads != cut_axes(key, "batch", None, "kv_heads", None)[2]:
        # Fewer key heads than devices: each takes copies for its own queries.
        group = query.shape[2] // key.shape[2]
        key, value = (jnp.repeat(x, group, axis=2) for x in (key, value))
    of_queries, of_keys = PartitionSpec(batch, rows, heads), PartitionSpec(batch, None, heads)
    in_specs = (of_queries, of_keys, of_keys, PartitionSpec(batch, rows), PartitionSpec(batch))
    mapped = jax.shard_map(on_each, in_specs=in_specs, out_specs=of_queries, check_vma=False)
    return mapped(query, key, value, where, where)
