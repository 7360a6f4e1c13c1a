"""A replay buffer of unfinished descents (EBT, arXiv 2507.02092, appendix; official code).

The buffer holds, for each row of the batch, what the last steps saw there and where their descent
ended. One replayed row stands behind every `every` fresh rows and continues one of their stored
descents; only fresh rows are stored, so that a descent is continued at most once. A replayed row
draws from the rows beside it, not from the whole buffer: nothing moves between devices.
"""

# Dimension key: B fresh rows, E fresh rows per replayed one, R = B / E replayed rows, S slots.

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp


class Replay(NamedTuple):
    """records: any pytree of `[S, B, ...]`; count: int32 scalar, how many batches were stored."""

    records: Any
    count: jax.Array


def empty(example: Any, *, num_slots: int) -> Replay:
    """A buffer for `num_slots` batches like `example`, a tree of `[B, ...]`, boxed.

    The rows have the logical axis `batch`. example: arrays or `jax.ShapeDtypeStruct`s.
    """

    def box(leaf: Any) -> nn.LogicallyPartitioned:
        names = (None, "batch", *(None,) * (len(leaf.shape) - 1))
        return nn.LogicallyPartitioned(jnp.zeros((num_slots, *leaf.shape), leaf.dtype), names)

    return Replay(jax.tree.map(box, example), jnp.zeros((), jnp.int32))


def draw(replay: Replay, *, every: int, key: jax.Array) -> tuple[Any, jax.Array]:
    """One record for each of R rows, `[R, ...]`, and whether there was one, bool `[R]`."""
    num_slots, batch_size = jax.tree.leaves(replay.records)[0].shape[:2]
    rows = batch_size // every
    slot_key, member_key = jax.random.split(key)
    filled = jnp.minimum(replay.count, num_slots)
    slots = jax.random.randint(slot_key, (rows,), 0, jnp.maximum(filled, 1))
    members = jax.random.randint(member_key, (rows,), 0, every)

    def pick(leaf: jax.Array) -> jax.Array:
        groups = leaf.reshape(num_slots, rows, every, *leaf.shape[2:])
        one = jax.vmap(lambda group, slot, member: group[slot, member], in_axes=(1, 0, 0))
        return one(groups, slots, members)

    return jax.tree.map(pick, replay.records), jnp.broadcast_to(filled > 0, (rows,))


def interleave(fresh: Any, replayed: Any, *, every: int) -> Any:
    """`[B, ...]` and `[R, ...]` to `[B + R, ...]`: a replayed row behind every `every` fresh."""

    def join(new: jax.Array, old: jax.Array) -> jax.Array:
        groups = new.reshape(-1, every, *new.shape[1:])
        return jnp.concatenate([groups, old[:, None]], axis=1).reshape(-1, *new.shape[1:])

    return jax.tree.map(join, fresh, replayed)


def fresh_rows(rows: Any, *, every: int) -> Any:
    """The fresh rows of what `interleave` gave."""
    return jax.tree.map(
        lambda x: x.reshape(-1, every + 1, *x.shape[1:])[:, :every].reshape(-1, *x.shape[1:]), rows
    )


def push(replay: Replay, fresh: Any) -> Replay:
    """Stores a batch in place of the oldest; nothing stored has a gradient."""
    records = jax.tree.map(
        lambda slots, new: jax.lax.dynamic_update_index_in_dim(
            slots,
            jax.lax.stop_gradient(new).astype(slots.dtype),
            replay.count % slots.shape[0],
            axis=0,
        ),
        replay.records,
        fresh,
    )
    return Replay(records, replay.count + 1)
