from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlib_methods import wavefront
from jaxlib_methods.depth_config import DepthConfig
from jaxlib_methods.depth_language import RecurrentModel
from jaxlib_methods.depth_sampling import Draws, Text, append, make_draws
from jaxlib_methods.models.decoding import SamplingConfig
from jaxlib_methods.wavefront import Wave, WaveState, count_final

NEW = 6
GREEDY = SamplingConfig(temperature=0)
SAMPLINGS = {
    "greedy": GREEDY,
    "warm": SamplingConfig(temperature=0.8),
    "top_k": SamplingConfig(temperature=1.5, top_k=5, top_p=0.9),
}
# Half of the distance goes with each iteration, so that 24 of them leave nothing.
SETTLED = {"sampler": "parallel", "num_steps": 24, "freeze_tolerance": 1e-4}


@jax.jit
def start(model: RecurrentModel, params: Any, tokens: jax.Array, lengths: jax.Array) -> WaveState:
    return wavefront.start(model, params, tokens, lengths, max_new_tokens=NEW)


@jax.jit
def advance(
    model: RecurrentModel, params: Any, state: WaveState, draws: Draws, num_rounds: int
) -> WaveState:
    return wavefront.PARALLEL.advance(model, params, state, draws, num_rounds=num_rounds)


@jax.jit
def finals(model: RecurrentModel, *arguments: Any, running: jax.Array) -> jax.Array:
    return count_final(model, *arguments, running=running)


def draws_of(sampling: SamplingConfig, stop: tuple[int, ...] = (-1,)) -> Draws:
    return make_draws(sampling, jax.random.key(5), stop)


def wave_text(
    model: RecurrentModel, contraction: Any, draws: Draws, rows: tuple[int, int] = (0, 1)
) -> WaveState:
    _, params, prompts, lengths = contraction
    # How prompts are read depends on the size of the wave alone.
    reader = model_of(contraction, max_wave=model.depth.max_wave)
    at = jnp.array(rows)
    return advance(model, params, start(reader, params, prompts[at], lengths[at]), draws, 1000)


def model_of(contraction: Any, **depth: Any) -> RecurrentModel:
    return RecurrentModel(contraction.cfg, DepthConfig(**(SETTLED | depth)))


@pytest.fixture(scope="module")
def sequential(contraction: Any, one_by_one: Any) -> dict[str, np.ndarray]:
    """Texts of the same model, all iterations of a token before the next token."""
    model = model_of(contraction, sampler="sequential")
    return {name: one_by_one(model, draws_of(s), NEW) for name, s in SAMPLINGS.items()}


@pytest.fixture(scope="module")
def parallel(contraction: Any) -> dict[str, WaveState]:
    model = model_of(contraction)
    return {name: wave_text(model, contraction, draws_of(s)) for name, s in SAMPLINGS.items()}


@pytest.mark.parametrize("name", SAMPLINGS)
def test_a_wave_writes_what_sequential_sampling_writes(
    sequential: dict[str, np.ndarray], parallel: dict[str, WaveState], name: str
):
    found = parallel[name]
    np.testing.assert_array_equal(found.tokens, sequential[name])
    assert np.asarray(found.lengths).tolist() == [NEW, NEW]
    assert len(np.unique(sequential[name])) > 3


def test_a_wave_takes_fewer_serial_iterations(parallel: dict[str, WaveState]):
    assert len({found.tokens.tobytes() for found in map(_host, parallel.values())}) == 3
    for found in parallel.values():
        assert found.serial_steps == 24 + 4 * int(found.rounds.max())
        # Sequential decoding takes 24 for the prompts and 24 for each token.
        assert found.serial_steps < 0.6 * 24 * (NEW + 1)
        # Every final token has been through two rounds.
        assert (np.asarray(found.steps) >= 8).all()


def _host(state: WaveState) -> Any:
    return jax.tree.map(np.asarray, state)


def test_a_window_of_the_wave_is_enough(
    contraction: Any, parallel: dict[str, WaveState], monkeypatch: pytest.MonkeyPatch
):
    """Rounds of the first tokens alone, where there are no more, change nothing."""
    assert wavefront.window_sizes(7) == [7]
    assert wavefront.window_sizes(64) == [8, 16, 32, 64]
    monkeypatch.setattr(wavefront, "SMALLEST_WINDOW", 3)
    whole, computed = wavefront._round, []

    def counted(model: Any, params: Any, state: WaveState, draws: Draws) -> WaveState:
        computed.append(state.wave.tokens.shape[1])
        return whole(model, params, state, draws)

    monkeypatch.setattr(wavefront, "_round", counted)
    model, draws = model_of(contraction), draws_of(SAMPLINGS["warm"])
    advance = jax.jit(wavefront.PARALLEL.advance)
    found = advance(model, contraction.params, start(model, *contraction[1:]), draws)
    assert set(computed) == {4, 7}
    expected = parallel["warm"]
    np.testing.assert_array_equal(found.tokens, expected.tokens)
    np.testing.assert_array_equal(found.steps, expected.steps)
    np.testing.assert_array_equal(found.rounds, expected.rounds)


def test_all_iterations_in_a_round_of_two_tokens_are_sequential(
    contraction: Any, sequential: dict[str, np.ndarray]
):
    model = model_of(contraction, inner_steps=24, max_wave=2)
    found = wave_text(model, contraction, draws_of(GREEDY))
    np.testing.assert_array_equal(found.tokens, sequential["greedy"])
    # A draft enters beside a token that has settled and settles in its second round.
    assert np.asarray(found.rounds).tolist() == [2 * NEW + 1] * 2


def test_a_final_token_stays_and_stands_before_the_wave(
    contraction: Any, parallel: dict[str, WaveState]
):
    """Round by round the same as in one call, and c = F - 1 after each."""
    model, draws = model_of(contraction), draws_of(SAMPLINGS["warm"])
    _, params, *prompts = contraction
    state = start(model, params, *prompts)
    before = _host(state)
    for _ in range(100):
        state = advance(model, params, state, draws, 1)
        now = _host(state)
        np.testing.assert_array_equal(now.wave.start, now.first + now.lengths - 1)
        for row, length in enumerate(before.lengths):
            assert now.tokens[row, :length].tolist() == before.tokens[row, :length].tolist()
            assert (now.tokens[row, now.lengths[row] :] == 0).all()
        if now.text.done.all():
            break
        first = [row[length - 1] for row, length in zip(now.tokens, now.lengths, strict=True)]
        last = np.where(now.lengths > 0, first, np.asarray(prompts[0])[:, -1])
        np.testing.assert_array_equal(now.wave.tokens[:, 0], last)
        before = now
    np.testing.assert_array_equal(now.tokens, parallel["warm"].tokens)
    np.testing.assert_array_equal(now.rounds, parallel["warm"].rounds)


def test_a_row_does_not_see_others_and_ends_at_its_stop_token(
    contraction: Any, parallel: dict[str, WaveState]
):
    model = model_of(contraction)
    whole = np.asarray(parallel["greedy"].tokens)
    stop = int(whole[0, 2])
    both = wave_text(model, contraction, draws_of(GREEDY, (stop,)))
    for row in range(2):
        alone = wave_text(model, contraction, draws_of(GREEDY, (stop,)), (row, row))
        seen = whole[row].tolist()
        expected = seen.index(stop) + 1 if stop in seen else NEW
        assert int(both.lengths[row]) == int(alone.lengths[0]) == expected
        assert both.tokens[row].tolist() == alone.tokens[0].tolist()
        assert both.tokens[row].tolist() == seen[:expected] + [0] * (NEW - expected)
        assert int(both.rounds[row]) == int(alone.rounds[0])
    assert int(both.lengths[0]) < NEW
    assert int(both.rounds[0]) < int(parallel["greedy"].rounds[0])


def test_nothing_that_converges_changes_the_text_and_nothing_holds_the_wave(
    contraction: Any, sequential: dict[str, np.ndarray]
):
    """Noise, averages and other first states; and no change is below the tolerance.

    All tokens are final for having stood long enough, twice the model's iterations.
    """
    model = model_of(
        contraction,
        noise=0.2,
        embedding_average=0.3,
        warm_start=True,
        freeze_tolerance=1e-30,
        inner_steps=24,
    )
    found = wave_text(model, contraction, draws_of(GREEDY))
    np.testing.assert_array_equal(found.tokens, sequential["greedy"])
    assert (np.asarray(found.steps) >= 48).all()
    assert np.asarray(found.rounds).max() <= 2 * NEW + 1


def test_drafts_become_final_from_the_front_on(contraction: Any):
    """By hand: five waves of four tokens, whose states move by 1 / 10 and are bounded by 1 / 5."""
    model = model_of(contraction, freeze_tolerance=0.2)
    tokens = jnp.tile(jnp.array([[4, 5, 6, 7]]), (5, 1))
    zeros = jnp.zeros((5, 4), jnp.int32)
    before = Wave(
        tokens=tokens,
        start=zeros[:, 0],
        width=zeros[:, 0] + 4,
        state=jnp.full((5, 4, 1), 9.0).at[1, 1].set(7.0),  # row 1: the first draft has moved
        embedded=jnp.zeros((5, 4, 1)),
        steps=(zeros + 4).at[2, 2].set(0),  # row 2: the second draft has had one round
        steady=zeros,
    )
    state = jnp.full((5, 4, 1), 10.0)
    after = before._replace(state=state, steps=before.steps + 4, steady=zeros + 4)
    drawn = jnp.tile(jnp.array([[5, 6, 7, 8]]), (5, 1)).at[3, 0].set(12)  # row 3: another token
    running = jnp.ones((5, 4), bool).at[4, 3].set(False)  # row 4: a wave of three tokens
    found = finals(model, before, after, drawn, running=running)
    assert found.tolist() == [3, 0, 1, 0, 2]
    # Twice the model's iterations with the same tokens are enough.
    patient = after._replace(steady=after.steady.at[1, 1].set(48))
    found = finals(model, before, patient, drawn, running=running)
    assert found.tolist() == [3, 3, 1, 0, 2]


def test_what_cannot_be_is_refused(contraction: Any):
    cfg, params, prompts, lengths = contraction
    with pytest.raises(ValueError, match=r"kept_steps=8 must be 1 for tokens"):
        wavefront.start(RecurrentModel(cfg), params, prompts, lengths, max_new_tokens=1)
    with pytest.raises(ValueError, match="max_new_tokens 0 must be at least 1"):
        wavefront.start(model_of(contraction), params, prompts, lengths, max_new_tokens=0)


def test_append_ends_at_stop_tokens_and_at_the_end():
    text = Text(
        jnp.array([[7, 0, 0, 0], [7, 8, 1, 0], [1, 0, 0, 0], [4, 0, 0, 0]]),
        jnp.array([1, 3, 1, 1]),
        jnp.array([False, False, True, False]),
    )
    new = jnp.array([[5, 9, 5], [5, 6, 7], [5, 6, 7], [3, 3, 3]])
    found = jax.jit(append)(draws_of(GREEDY, (9,)), text, new, jnp.array([3, 2, 3, 1]))
    assert found.tokens.tolist() == [[7, 5, 9, 0], [7, 8, 1, 5], [1, 0, 0, 0], [4, 3, 0, 0]]
    assert found.lengths.tolist() == [3, 4, 1, 2]
    assert found.done.tolist() == [True, True, True, False]
