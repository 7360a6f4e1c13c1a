from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlib_methods import speculative
from jaxlib_methods.depth_config import DepthConfig
from jaxlib_methods.depth_language import RecurrentModel
from jaxlib_methods.depth_sampling import Draws, make_draws
from jaxlib_methods.models.decoding import SamplingConfig
from jaxlib_methods.speculative import SpeculativeState

NEW = 6
SAMPLINGS = {"greedy": SamplingConfig(temperature=0), "warm": SamplingConfig(temperature=1.0)}
# Three iterations are far from the limit: equal texts are equal for no other reason.
SHALLOW = {"sampler": "speculative", "num_steps": 3, "draft_steps": 1, "draft_tokens": 3}


@jax.jit
def start(
    model: RecurrentModel, params: Any, tokens: jax.Array, lengths: jax.Array
) -> SpeculativeState:
    return speculative.start(model, params, tokens, lengths, max_new_tokens=NEW)


@jax.jit
def advance(
    model: RecurrentModel, params: Any, state: SpeculativeState, draws: Draws, num_rounds: int
) -> SpeculativeState:
    return speculative.SPECULATIVE.advance(model, params, state, draws, num_rounds=num_rounds)


def draws_of(name: str, stop: tuple[int, ...] = (-1,)) -> Draws:
    return make_draws(SAMPLINGS[name], jax.random.key(6), stop)


def model_of(contraction: Any, **depth: Any) -> RecurrentModel:
    return RecurrentModel(contraction.cfg, DepthConfig(**(SHALLOW | depth)))


@pytest.fixture(scope="module")
def begun(contraction: Any) -> SpeculativeState:
    return start(model_of(contraction), *contraction[1:])


@pytest.mark.parametrize("name", SAMPLINGS)
def test_verified_drafts_are_what_sequential_sampling_writes(
    contraction: Any, begun: SpeculativeState, one_by_one: Any, name: str
):
    model, params = model_of(contraction), contraction.params
    expected = one_by_one(model_of(contraction, sampler="sequential"), draws_of(name), NEW)
    found = advance(model, params, begun, draws_of(name), 100)
    np.testing.assert_array_equal(found.tokens, expected)
    rounds, accepted = np.asarray(found.rounds), np.asarray(found.accepted)
    # Each round adds a token of its own, but for the last one of a full row.
    assert (rounds + accepted >= NEW).all()
    assert (rounds + accepted <= NEW + 1).all()
    assert 2 < rounds.max() < NEW
    assert found.serial_steps == 3 + rounds.max() * (3 * 1 + 3)
    assert len(np.unique(expected)) > 3


def test_rounds_may_come_in_any_number_of_calls(contraction: Any, begun: SpeculativeState):
    model, params = model_of(contraction), contraction.params
    whole = advance(model, params, begun, draws_of("warm"), 100)
    state, lengths = begun, np.zeros(2, int)
    for _ in range(int(whole.rounds.max())):
        state = advance(model, params, state, draws_of("warm"), 1)
        assert (np.asarray(state.lengths) <= lengths + 4).all()
        kept = np.arange(NEW)[None] < lengths[:, None]
        np.testing.assert_array_equal(
            np.where(kept, state.tokens, 0), np.where(kept, whole.tokens, 0)
        )
        lengths = np.asarray(state.lengths)
    for one, other in zip(jax.tree.leaves(state), jax.tree.leaves(whole), strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_row_does_not_see_others_and_ends_at_its_stop_token(
    contraction: Any, begun: SpeculativeState
):
    model, params = model_of(contraction), contraction.params
    whole = np.asarray(advance(model, params, begun, draws_of("greedy"), 100).tokens)
    stop = int(whole[0, 1])
    both = advance(model, params, begun, draws_of("greedy", (stop,)), 100)
    for row in range(2):
        at = jnp.array([row, row])
        twice = start(model, params, contraction.prompts[at], contraction.lengths[at])
        alone = advance(model, params, twice, draws_of("greedy", (stop,)), 100)
        seen = whole[row].tolist()
        expected = seen.index(stop) + 1 if stop in seen else NEW
        assert int(both.lengths[row]) == int(alone.lengths[0]) == expected
        assert both.tokens[row].tolist() == seen[:expected] + [0] * (NEW - expected)
        assert both.tokens[row].tolist() == alone.tokens[0].tolist()
        assert int(both.rounds[row]) == int(alone.rounds[0])
    assert int(both.lengths[0]) < NEW


def test_drafts_of_all_iterations_are_all_accepted(contraction: Any, begun: SpeculativeState):
    model = model_of(contraction, draft_steps=3)
    found = advance(model, contraction.params, begun, draws_of("warm"), 100)
    # 3 drafts and one more, then 2 drafts for which there is room.
    assert found.rounds.tolist() == [2, 2]
    assert found.accepted.tolist() == [5, 5]
    assert found.serial_steps == 3 + 2 * (3 * 3 + 3)


def test_what_cannot_be_is_refused(contraction: Any):
    cfg, params, prompts, lengths = contraction
    for depth in (DepthConfig(exit="kl"), DepthConfig(warm_start=True)):
        model = RecurrentModel(cfg, depth)
        with pytest.raises(ValueError, match="are not for drafts, which are verified at once"):
            speculative.start(model, params, prompts, lengths, max_new_tokens=1)
