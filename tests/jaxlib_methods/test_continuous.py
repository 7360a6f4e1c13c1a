import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlib_methods import continuous
from jaxlib_methods.continuous import ContinuousState
from jaxlib_methods.depth_config import DepthConfig
from jaxlib_methods.depth_language import RecurrentModel
from jaxlib_methods.depth_sampling import Draws, make_draws
from jaxlib_methods.models.decoding import SamplingConfig

NEW = 6
SAMPLINGS = {"greedy": SamplingConfig(temperature=0), "warm": SamplingConfig(temperature=1.0)}
DEPTH = DepthConfig(
    sampler="continuous",
    num_steps=12,
    exit="kl",
    tolerance=0.003,
    check_every=2,
    warm_start=True,
)


@jax.jit
def start(
    model: RecurrentModel, params: Any, tokens: jax.Array, lengths: jax.Array
) -> ContinuousState:
    return continuous.start(model, params, tokens, lengths, max_new_tokens=NEW)


@jax.jit
def advance(
    model: RecurrentModel, params: Any, state: ContinuousState, draws: Draws, num_rounds: int
) -> ContinuousState:
    return continuous.CONTINUOUS.advance(model, params, state, draws, num_rounds=num_rounds)


def draws_of(name: str, stop: tuple[int, ...] = (-1,)) -> Draws:
    return make_draws(SAMPLINGS[name], jax.random.key(7), stop)


def test_rows_out_of_step_write_what_they_write_alone(contraction: Any, one_by_one: Any):
    model = RecurrentModel(contraction.cfg, DEPTH)
    sequential = dataclasses.replace(model, depth=dataclasses.replace(DEPTH, sampler="sequential"))
    begun = start(model, *contraction[1:])
    for name in SAMPLINGS:
        found = advance(model, contraction.params, begun, draws_of(name), 1000)
        expected = one_by_one(sequential, draws_of(name), NEW)
        np.testing.assert_array_equal(found.tokens, expected)
        steps = np.asarray(found.steps)
        assert len(np.unique(steps)) > 1
        assert (steps % 2 == 0).all()
        assert steps.min() >= 2
        assert int(found.ticks) == steps.sum(axis=1).max()
        assert int(found.lock_step_ticks) == steps.max(axis=0).sum()


def test_no_row_waits_for_another(contraction: Any):
    # States from which one row is the slower one now, and the other then.
    model = RecurrentModel(contraction.cfg, DEPTH, seed=3)
    _, params, prompts, lengths = contraction
    both = advance(model, params, start(model, params, prompts, lengths), draws_of("greedy"), 1000)
    assert int(both.ticks) < int(both.lock_step_ticks)
    for row in range(2):
        at = jnp.array([row, row])
        twice = start(model, params, prompts[at], lengths[at])
        alone = advance(model, params, twice, draws_of("greedy"), 1000)
        assert alone.tokens[0].tolist() == both.tokens[row].tolist()
        assert alone.steps[0].tolist() == both.steps[row].tolist()
        assert int(alone.ticks) == int(alone.lock_step_ticks) == int(both.steps[row].sum())


def test_ticks_may_come_in_any_number_of_calls_and_end_at_stop_tokens(contraction: Any):
    model = RecurrentModel(contraction.cfg, DEPTH)
    _, params, prompts, lengths = contraction
    begun = start(model, params, prompts, lengths)
    full = advance(model, params, begun, draws_of("warm"), 1000)
    stop = int(full.tokens[0, 2])
    whole = advance(model, params, begun, draws_of("warm", (stop,)), 1000)
    for row, seen in enumerate(full.tokens.tolist()):
        expected = seen.index(stop) + 1 if stop in seen else NEW
        assert int(whole.lengths[row]) == expected
        assert whole.tokens[row].tolist() == seen[:expected] + [0] * (NEW - expected)
        assert (np.asarray(whole.steps[row]) > 0).sum() == expected
    np.testing.assert_array_equal(whole.positions, lengths - 1 + whole.lengths)
    state = begun
    for tick in range(int(whole.ticks)):
        assert not state.text.done.all()
        state = advance(model, params, state, draws_of("warm", (stop,)), 1)
        assert int(state.ticks) == tick + 1
    assert state.text.done.all()
    for one, other in zip(jax.tree.leaves(state), jax.tree.leaves(whole), strict=True):
        np.testing.assert_array_equal(one, other)
