"""The replay buffer: what it keeps, what it gives back, and that no row leaves its group."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlib_methods import replay
from jaxlib_methods.models import partitioning

B, EVERY, SLOTS, L = 6, 2, 3, 5  # three groups of two rows


def batch(number):
    """Row r of batch n holds 100 n + 10 r everywhere."""
    rows = 100 * number + 10 * jnp.arange(B)[:, None]
    return {"logits": jnp.full((B, L), rows, jnp.float32), "ids": jnp.full((B, 2), rows, jnp.int32)}


def filled(count, push=replay.push):
    state = nn.meta.unbox(replay.empty(batch(0), num_slots=SLOTS))
    for number in range(1, count + 1):
        state = push(state, batch(number))
    return state


def draws(state, count=64):
    """Drawn rows `[count, R]` by their number, and whether they count."""
    keys = jax.random.split(jax.random.key(3), count)
    drawn, found = jax.vmap(lambda key: replay.draw(state, every=EVERY, key=key))(keys)
    assert drawn["logits"].shape == (count, B // EVERY, L)
    # The leaves of a record stay together.
    np.testing.assert_array_equal(drawn["logits"][..., 0], drawn["ids"][..., 0])
    return np.asarray(drawn["ids"][..., 0]), np.asarray(found)


def test_the_oldest_is_overwritten_and_nothing_is_added():
    state = filled(0)
    for number, expected in enumerate(([1, 0, 0], [1, 2, 0], [1, 2, 3], [4, 2, 3], [4, 5, 3]), 1):
        state = replay.push(state, batch(number))
        assert state.records["logits"].shape == (SLOTS, B, L)
        np.testing.assert_array_equal(state.records["ids"][:, 0, 0] // 100, expected)
        assert int(state.count) == number


@pytest.mark.parametrize(("count", "known"), [(1, {1}), (2, {1, 2}), (5, {3, 4, 5})])
def test_draws_are_of_all_that_is_stored_and_of_nothing_else(count, known):
    drawn, found = draws(filled(count))
    assert found.all()
    assert set((drawn // 100).ravel()) == known


def test_an_empty_buffer_gives_nothing():
    drawn, found = draws(filled(0))
    assert not found.any()
    assert not drawn.any()


def test_a_group_draws_from_its_own_rows():
    drawn, _ = draws(filled(2))
    for group in range(B // EVERY):
        assert set(drawn[:, group] // 10 % 10) == {EVERY * group, EVERY * group + 1}


def test_a_key_draws_the_same_again():
    state = filled(3)
    drawn, _ = draws(state)
    np.testing.assert_array_equal(drawn, draws(state)[0])
    assert len(np.unique(drawn, axis=0)) > 20


def test_interleaved_rows_by_hand_and_back():
    fresh = {"a": jnp.arange(6), "b": 10.0 * jnp.arange(12).reshape(6, 2)}
    old = {"a": jnp.array([-1, -2, -3]), "b": -jnp.ones((3, 2))}
    whole = replay.interleave(fresh, old, every=2)
    np.testing.assert_array_equal(whole["a"], [0, 1, -1, 2, 3, -2, 4, 5, -3])
    np.testing.assert_array_equal(whole["b"][2], [-1, -1])
    back = replay.fresh_rows(whole, every=2)
    for name, leaf in fresh.items():
        np.testing.assert_array_equal(back[name], leaf)


def test_what_is_stored_has_no_gradient():
    state = filled(1)
    rows = {"logits": jnp.ones((B, L)), "ids": jnp.ones((B, 2), jnp.int32)}

    def total(logits):
        return replay.push(state, rows | {"logits": logits}).records["logits"].sum()

    assert not jax.grad(total)(rows["logits"]).any()
    assert float(total(2 * rows["logits"]) - total(rows["logits"])) == B * L


def test_the_buffer_lies_with_the_rows_and_nothing_moves():
    mesh = partitioning.make_mesh(data=2, fsdp=4)
    example = jax.ShapeDtypeStruct((16, L), jnp.float32)
    boxed: Any = replay.empty(example, num_slots=SLOTS)
    assert boxed.records.names == (None, "batch", None)
    places = partitioning.param_shardings(boxed, mesh)
    state = jax.device_put(nn.meta.unbox(boxed), places)
    assert state.records.sharding.shard_shape(state.records.shape) == (SLOTS, 2, L)
    rows = jax.device_put(
        jnp.ones(example.shape), jax.NamedSharding(mesh, jax.P(("data", "fsdp"), None))
    )

    def step(state, fresh, key):
        old, _ = replay.draw(state, every=EVERY, key=key)
        whole = replay.interleave(fresh, old, every=EVERY)
        return replay.push(state, replay.fresh_rows(whole, every=EVERY)), whole

    out = (places, rows.sharding)
    compiled = jax.jit(step, out_shardings=out).lower(state, rows, jax.random.key(0)).compile()
    program = str(compiled.as_text())
    for kind in ("all-gather", "all-to-all", "collective-permute", "all-reduce"):
        assert kind not in program
