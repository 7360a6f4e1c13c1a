"""Thinking: any energy first, then text, alone and with a cache."""

import dataclasses
import functools
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlib_methods import energy, energy_text, thinking, thinking_text
from jaxlib_methods.descent import descend, descend_freely
from jaxlib_methods.energy_config import EnergyConfig
from jaxlib_methods.energy_text import Descent, Observed, energy_function
from jaxlib_methods.models import decoding, energy_transformer, partitioning
from jaxlib_methods.models.config import TransformerConfig
from jaxlib_methods.models.decoding import SamplingConfig
from jaxlib_methods.models.energy_transformer import EnergyTransformerConfig, Rows
from jaxlib_methods.thinking import Problem, ThinkConfig, Thought, think
from jaxlib_methods.thinking_text import Thinker

B, L, V = 2, 7, 11
TRUNK = TransformerConfig(
    num_layers=2, embed_dim=16, num_heads=2, mlp_dim=24, max_length=32, vocab_size=V,
    compute_dtype="float32",
)  # fmt: skip
RUN = EnergyConfig(num_steps=2, step_size=0.5, noise=0.5)
MODEL = energy.model_config(TRUNK, RUN)
TOKENS: Any = np.random.default_rng(0).integers(0, V, (B, L)).astype(np.int32)
POSITIONS: Any = np.broadcast_to(np.arange(L, dtype=np.int32), (B, L))
ONES: Any = np.ones((B, L), np.int32)


@pytest.fixture(scope="module")
def params() -> Any:
    return new_params(RUN)


def new_params(run: EnergyConfig) -> Any:
    return jax.jit(lambda: partitioning.unbox(energy.init_params(TRUNK, run, jax.random.key(3))))()


@functools.partial(jax.jit, static_argnums=0)
def observed(model: EnergyTransformerConfig, params: Any) -> Observed:
    places, ones = jnp.asarray(POSITIONS), jnp.asarray(ONES)
    tokens = jnp.asarray(TOKENS)
    cache = energy_transformer.observe(model, params, tokens, positions=places, segments=ones)
    return Observed(cache, Rows(places, ones))


def keys_of(num_candidates: int) -> jax.Array:
    return thinking_text.candidate_keys(jax.random.key(5), num_candidates)


@functools.partial(jax.jit, static_argnums=(0, 1))
def thought(cfg: ThinkConfig, run: EnergyConfig, params: Any, keys: jax.Array) -> Thought:
    """Thinking about the tokens."""
    problem, candidates = problem_of(cfg, run, params, keys)
    return think(problem, candidates, thinking_text.resolve(cfg, run))


def problem_of(cfg: ThinkConfig, run: EnergyConfig, params: Any, keys: jax.Array) -> Any:
    cfg, model = thinking_text.resolve(cfg, run), energy.model_config(TRUNK, run)
    context = observed(model, params)
    return thinking_text.make_problem(run, model, params, context, cfg, keys=keys)


class Traced(NamedTuple):
    """`[N, B, M, L]`: energies before, candidates, quiet energies and entropies after each step;
    first: quiet energies before the first."""

    before: jax.Array
    candidates: jax.Array
    energies: jax.Array
    entropies: jax.Array
    first: jax.Array


@functools.partial(jax.jit, static_argnums=(0, 1))
def traced(cfg: ThinkConfig, run: EnergyConfig, params: Any, keys: jax.Array) -> Traced:
    problem, candidates = problem_of(cfg, run, params, keys)

    def read(z: jax.Array, step: jax.Array) -> Any:
        return z, thinking.judge(problem, z, step), problem.entropy(z)

    before, (path, energies, entropies) = thinking.trace(problem, candidates, cfg, read)
    first = thinking.judge(problem, candidates, 0)
    return Traced(before, path, energies, entropies, first)


@functools.partial(jax.jit, static_argnums=0)
def predict(model: Thinker, params: Any, tokens: Any, positions: Any, segments: Any) -> Any:
    """Logits of all positions at once."""
    return model(params, tokens, positions=positions, segments=segments).logits


# A parabola for each of two parts of two values: E = (a / 2) |y - x|^2.
def bowl(a: Any, x: Any, y: jax.Array) -> jax.Array:
    return 0.5 * a * jnp.sum((y - x) ** 2, axis=-1)


def test_steps_by_hand_and_those_of_a_plain_descent():
    start = jnp.array([[[4.0, 2.0], [1.0, 0.0]]])[:, None]  # [B=1, M=1, 2 parts, 2 values]
    problem = Problem(bowl, 1.0, 0.0, 0.5)
    got = think(problem, start, ThinkConfig(num_steps=3))
    np.testing.assert_allclose(got.candidate, start[:, 0] / 8)
    np.testing.assert_allclose(got.energies[0, 0], [0.5 * 20 / 64, 0.5 / 64])
    np.testing.assert_allclose(got.first_energies[0, 0], [10.0, 0.5])
    assert got.steps_used.tolist() == [[[3, 3]]]
    path = descend(bowl, 1.0, 0.0, start, step_size=0.5, num_steps=3)
    np.testing.assert_array_equal(got.candidate, path.candidates[-1, :, 0])
    before, after = thinking.trace(problem, start, ThinkConfig(num_steps=3), lambda z, k: (z, k))
    np.testing.assert_array_equal(before, path.energies)
    np.testing.assert_array_equal(after[0], path.candidates)
    assert after[1].tolist() == [0, 1, 2]


def test_each_rule_keeps_another_candidate_of_each_part():
    # Three candidates of two parts: energies at the start 8, 0.5, 2 and 0.5, 2, 8; each step of
    # 0.5 divides them by 4.
    start = jnp.array([[[[4.0], [1.0]], [[1.0], [2.0]], [[2.0], [4.0]]]])
    problem = Problem(bowl, 1.0, 0.0, 0.5)
    expected = {"min_energy": ([1, 0], [0.5, 0.5]), "max_energy": ([0, 2], [2, 2]),
                "max_gap": ([0, 2], [2, 2])}  # fmt: skip
    for select, (chosen, values) in expected.items():
        cfg: Any = {"num_steps": 1, "num_candidates": 3, "select": select}
        got = think(problem, start, ThinkConfig(**cfg))
        assert got.chosen.tolist() == [chosen], select
        np.testing.assert_allclose(got.candidate[0, :, 0], values)
    # A tilted energy, in which the largest fall is not the highest end.
    tilted = Problem(lambda a, x, y: y[..., 0] * a[:, None], jnp.array([[1.0, 1.0]]), None, 1.0)
    several = jnp.array([[[[5.0], [0.0]], [[1.0], [0.0]]]])
    cfg = ThinkConfig(num_steps=1, num_candidates=2, select="max_gap")
    assert think(tilted, several, cfg).chosen.tolist() == [[0, 0]]


def test_over_candidates_gives_any_energy_its_candidates():
    def coupled(a: Any, x: jax.Array, y: jax.Array) -> jax.Array:  # [B, 2] -> [B]
        return a * (y[:, 0] - x[:, 0]) ** 2 + y[:, 1] ** 2

    x, y = jnp.array([[1.0], [2.0]]), jnp.arange(12.0).reshape(2, 3, 2)
    got = thinking.over_candidates(coupled)(2.0, x, y)
    expected = jnp.stack([coupled(2.0, x, y[:, m]) for m in range(3)], axis=1)
    np.testing.assert_allclose(got, expected)


@pytest.mark.parametrize(("tolerance", "used"), [(0.0, 6), (0.02, 5), (0.1, 4), (0.3, 3)])
def test_stopping_by_energy_counts_and_freezes(tolerance, used):
    # Energies fall by a factor of 4 a step: the k-th change is 4^-(k-1) of the first.
    start = jnp.array([[[[4.0]]]])
    problem = Problem(bowl, 1.0, 0.0, 0.5)
    cfg = ThinkConfig(num_steps=6, stop="energy", tolerance=tolerance)
    got = think(problem, start, cfg)
    assert got.steps_used.tolist() == [[[used]]]
    np.testing.assert_allclose(got.candidate, 4.0 * 0.5**used)
    before, _ = thinking.trace(problem, start, cfg, lambda z, k: ())
    assert thinking.stop_steps(cfg, before, before).tolist() == [[[used]]]


def test_a_part_that_stops_changes_no_other_and_the_loop_ends_with_the_last():
    calls = []

    def counted(a: Any, x: Any, y: jax.Array) -> jax.Array:
        jax.debug.callback(lambda: calls.append(1))
        return bowl(a, x, y)

    # The second part has a steep energy, which falls at once; the first falls slowly.
    problem = Problem(counted, jnp.array([[[0.2, 1.0]]]), 0.0, 0.9)
    start = jnp.array([[[[4.0], [4.0]]]])
    cfg = ThinkConfig(num_steps=50, stop="energy", tolerance=0.1)
    got = think(problem, start, cfg)
    jax.effects_barrier()
    slow, fast = got.steps_used[0, 0].tolist()
    assert 2 < fast < slow < 50 or 2 == fast < slow < 50
    assert len(calls) == slow + 1, "the steps of the slowest part, and the energies at the end"
    for part, used in ((0, slow), (1, fast)):
        path = descend(bowl, problem.params, 0.0, start, step_size=0.9, num_steps=used)
        np.testing.assert_allclose(got.candidate[0, part], path.candidates[-1, 0, 0, part])


def test_if_lower_keeps_only_steps_that_help():
    start = jnp.array([[[[4.0], [1.0]]]])
    # A step of 3 overshoots the parabola of curvature 1 (y -> -2 y) and lands in that of 1/3.
    problem = Problem(bowl, jnp.array([[[1.0, 1 / 3]]]), 0.0, 3.0)
    always = think(problem, start, ThinkConfig(num_steps=2))
    np.testing.assert_allclose(always.candidate[0, :, 0], [16.0, 0.0], atol=1e-6)
    careful = think(problem, start, ThinkConfig(num_steps=2, accept="if_lower"))
    np.testing.assert_allclose(careful.candidate[0, :, 0], [4.0, 0.0], atol=1e-6)


@pytest.mark.parametrize("noise", [0.0, 1.5])
def test_if_lower_never_raises_the_energy_of_text(noise):
    run = dataclasses.replace(RUN, num_landscapes=0, step_size=100.0)
    params = new_params(run)
    cfg: dict[str, Any] = {"num_steps": 5, "noise": noise}

    def changes(accept: Any) -> jax.Array:
        got = traced(ThinkConfig(**cfg, accept=accept), run, params, keys_of(1))
        return jnp.diff(jnp.concatenate([got.first[None], got.energies]), axis=0)

    assert float(changes("if_lower").max()) <= 1e-6
    assert float(changes("if_lower").min()) < -1e-3
    assert float(changes("always").max()) > 1e-3


@pytest.mark.parametrize("space", ["probability", "logit"])
def test_one_candidate_is_the_descent_of_training(params, space):
    run = dataclasses.replace(RUN, space=space)
    cfg = ThinkConfig(num_steps=3)

    @jax.jit
    def both(params: Any) -> Any:
        context = observed(MODEL, params)
        descent = Descent(run, MODEL, 0.5, jax.random.key(2))
        initial = jax.random.normal(jax.random.key(1), (B, L, TRUNK.padded_vocab_size))
        arguments: dict[str, Any] = {
            "step_size": energy_text.step_size(params), "num_steps": 3, "start": descent.start,
            "context_at": descent.context_at,
        }  # fmt: skip
        path = descend(descent.energy(), params, context, initial, **arguments)
        free = descend_freely(descent.energy(), params, context, initial, **arguments)
        problem, _ = problem_of(cfg, run, params, keys_of(1))
        quiet, last = descent._replace(sigma=0.0), jnp.int32(2)
        problem = problem._replace(start=descent.start, settle=quiet.start)
        got = think(problem, initial[:, None], cfg)
        settled = quiet.start(path.candidates[-1], last)
        final = descent.energy()(params, quiet.context_at(context, last), settled)
        return got, path, free, final

    got, path, free, final = both(params)
    np.testing.assert_allclose(got.candidate, path.candidates[-1], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(got.candidate, free, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(got.first_energies[:, 0], path.energies[0], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(got.energies[:, 0], final, rtol=1e-4, atol=1e-4)


def test_candidates_do_not_see_each_other(params):
    cfg = ThinkConfig(num_steps=3, num_candidates=3)
    keys = keys_of(3)
    base = thought(cfg, RUN, params, keys)
    moved = thought(cfg, RUN, params, keys.at[1].set(jax.random.key(77)))
    np.testing.assert_array_equal(base.energies[:, ::2], moved.energies[:, ::2])
    assert bool((base.energies[:, 1] != moved.energies[:, 1]).all())
    one = ThinkConfig(num_steps=3, noise=0.5)
    for m in range(3):
        alone = thought(one, RUN, params, keys[m][None])
        np.testing.assert_allclose(alone.energies[:, 0], base.energies[:, m], atol=1e-4)
        picked = base.chosen == m
        np.testing.assert_allclose(alone.candidate[picked], base.candidate[picked], atol=1e-3)
    assert len(set(base.chosen.ravel().tolist())) > 1
    np.testing.assert_array_equal(base.chosen, base.energies.argmin(axis=1))
    same = thought(cfg, RUN, params, keys[jnp.zeros(3, int)])
    alone = thought(one, RUN, params, keys[:1])
    np.testing.assert_allclose(same.candidate, alone.candidate, atol=1e-3)
    np.testing.assert_allclose(same.energies, jnp.repeat(alone.energies, 3, axis=1), atol=1e-4)


def test_stopping_by_entropy(params):
    cfg = ThinkConfig(num_steps=4, step_size=0.1)
    path = traced(cfg, RUN, params, keys_of(1))
    tolerance = float(np.median(path.entropies[1]))
    cfg = dataclasses.replace(cfg, stop="entropy", tolerance=tolerance)
    got = thought(cfg, RUN, params, keys_of(1))
    p = np.asarray(jax.nn.softmax(path.candidates[0, 0, 0, 0, :V]), np.float64)
    by_hand = -np.sum(p * np.log(np.maximum(p, 1e-300)))
    assert float(path.entropies[0, 0, 0, 0]) == pytest.approx(float(by_hand), abs=1e-5)
    used = np.asarray(got.steps_used)
    assert 1 <= used.min() < used.max()
    np.testing.assert_array_equal(used, thinking.stop_steps(cfg, path.before, path.entropies))
    steps = used[None, ..., None] - 1
    expected = np.take_along_axis(np.asarray(path.candidates), steps, axis=0)[0]
    np.testing.assert_allclose(got.candidate, expected[:, 0], rtol=1e-4, atol=1e-4)


def test_step_size_and_noise(params):
    trained = float(energy_text.step_size(params))
    for given, expected in ((None, trained), (0.25, trained / 4), (7.0, 7.0), (1.0, 1.0)):
        problem, _ = problem_of(ThinkConfig(step_size=given), RUN, params, keys_of(1))
        assert float(problem.step_size) == pytest.approx(expected)
    run = dataclasses.replace(RUN, max_steps=5, eval_noise=0.1)
    assert thinking_text.resolve(ThinkConfig(), run) == ThinkConfig(num_steps=5, noise=0.1)
    several = thinking_text.resolve(ThinkConfig(num_candidates=2), run)
    assert (several.num_steps, several.noise) == (5, 0.5)
    given = ThinkConfig(num_steps=1, num_candidates=2, noise=3.0)
    assert thinking_text.resolve(given, run) == given
    zeros = jnp.zeros((B, 1, L, TRUNK.padded_vocab_size))
    for noise, spread in ((0.0, 0.0), (3.0, 3.0)):
        run = dataclasses.replace(RUN, space="logit")
        problem, _ = problem_of(ThinkConfig(noise=noise), run, params, keys_of(1))
        first, second = (problem.start(zeros, jnp.int32(k)) for k in (0, 1))
        assert float(first.std()) == pytest.approx(spread, rel=0.1)
        assert bool((first == second).all()) == (noise == 0)


def test_score_is_the_energy_of_the_text_by_judge(params):
    context = observed(MODEL, params)
    targets = jnp.asarray((TOKENS + 1) % V)
    got = jax.jit(thinking_text.score, static_argnums=0)(MODEL, params, context, targets)
    certain = np.zeros((B, L, TRUNK.padded_vocab_size), np.float32)
    for b in range(B):
        for r in range(L):
            certain[b, r, int(targets[b, r])] = 1
    cache = context.cache
    last = cache._replace(keys=cache.keys[1], values=cache.values[1])
    judge = jax.jit(energy_function(MODEL, "probability"))
    expected = judge(params, context._replace(cache=last), jnp.asarray(certain))
    np.testing.assert_allclose(got, expected, rtol=1e-5)
    assert not np.allclose(got, np.roll(expected, 1, axis=1), atol=1e-3)


THINKERS = {
    "one": ThinkConfig(),
    "several": ThinkConfig(num_candidates=3, num_steps=3),
    "early": ThinkConfig(num_steps=4, stop="energy", tolerance=0.5, noise=0.3),
}


@pytest.mark.parametrize("name", THINKERS)
def test_one_by_one_with_a_cache_is_all_at_once(params, name):
    model = Thinker(RUN, MODEL, THINKERS[name])
    whole = predict(model, params, TOKENS, POSITIONS, ONES)
    assert whole.shape == (B, L, TRUNK.padded_vocab_size)
    assert float(whole[..., V:].max()) < -1e20
    cache = model.init_cache(params, batch_size=B, length=L)
    step = jax.jit(lambda tokens, positions, cache: model(
        params, tokens, positions=positions, segments=jnp.ones_like(tokens), cache=cache
    ))  # fmt: skip
    for t in range(L):
        out = step(TOKENS[:, t : t + 1], POSITIONS[:, t : t + 1], cache)
        cache = out.cache
        # Descents carry rounding on, and machines round differently: 1.5e-5 has been seen.
        np.testing.assert_allclose(
            jax.nn.softmax(out.logits[:, 0]), jax.nn.softmax(whole[:, t]), atol=1e-4
        )
    assert int(cache.length) == L + 1


def test_a_prediction_is_that_of_the_prefix_whatever_the_batch(params):
    model = Thinker(RUN, MODEL, ThinkConfig(num_candidates=2))
    whole = predict(model, params, TOKENS, POSITIONS, ONES)
    part = predict(model, params, TOKENS[1:, :4], POSITIONS[1:, :4], ONES[1:, :4])
    np.testing.assert_allclose(jax.nn.softmax(part), jax.nn.softmax(whole[1:, :4]), atol=1e-4)
    packed = np.where(np.arange(L) < 3, 1, 2)[None]
    places = np.concatenate([np.arange(3), np.arange(4)])[None]
    joined = np.concatenate([TOKENS[:1, :3], TOKENS[1:, :4]], axis=1)
    both = predict(model, params, joined, places, packed)
    np.testing.assert_allclose(jax.nn.softmax(both[:, 3:]), jax.nn.softmax(part), atol=1e-4)


def test_greedy_text_with_the_cache_is_that_of_computing_everything_again(params):
    model, new = Thinker(RUN, MODEL, ThinkConfig(num_steps=3)), 5
    prompts = np.array([[0, 0, 4, 9], [3, 1, 2, 5]], np.int32)
    lengths = np.array([2, 4], np.int32)
    generate = jax.jit(functools.partial(
        decoding.generate, model, max_new_tokens=new, sampling=SamplingConfig(temperature=0.0),
        key=jax.random.key(0),
    ))  # fmt: skip
    cache = model.init_cache(params, batch_size=2, length=4 + new - 1)
    tokens, counts = generate(params, prompts, lengths, cache=cache)
    assert counts.tolist() == [new, new]
    for row, (prompt, length) in enumerate(zip(prompts, lengths, strict=True)):
        text = prompt[4 - length :].tolist()
        for t in range(new):
            ids = np.zeros((1, 9), np.int32)
            ids[0, : len(text)] = text
            positions = np.arange(9)[None]
            segments = (positions < len(text)).astype(np.int32)
            logits = predict(model, params, ids, positions, segments)
            text.append(int(logits[0, len(text) - 1].argmax()))
            assert int(tokens[row, t]) == text[-1]


def test_reading_a_prompt_holds_no_descent(params):
    model = Thinker(RUN, MODEL, ThinkConfig(num_steps=9))
    cache = model.init_cache(params, batch_size=B, length=L)
    lengths = jnp.full((B,), L, jnp.int32)

    def read(params: Any) -> Any:
        return decoding.prefill(
            model, params, jnp.asarray(TOKENS), lengths, cache=cache, max_new_tokens=1
        )

    def alone(params: Any) -> Any:
        return energy_transformer.observe(
            MODEL, params, TOKENS[:, 1:], positions=POSITIONS[:, 1:], segments=ONES[:, 1:],
            cache=cache,
        )  # fmt: skip

    def dots(function: Any) -> int:
        return len(re.findall(r" dot\(", str(jax.jit(function).lower(params).compile().as_text())))

    def whole(params: Any) -> Any:
        arguments: Any = {"positions": POSITIONS, "segments": ONES}
        return model(params, TOKENS, **arguments).logits

    assert 0 < dots(read) <= dots(alone) < dots(whole)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_steps": 0}, "think.num_steps=0 must be at least 1"),
        ({"num_candidates": 0}, "think.num_candidates=0 must be at least 1"),
        ({"step_size": 0.0}, "think.step_size=0.0 must be positive"),
        ({"noise": -1.0}, "think.noise=-1.0 must not be negative"),
        ({"tolerance": -0.1}, "think.tolerance=-0.1 must not be negative"),
        ({"select": "best"}, "select 'best' is unknown"),
        ({"stop": "never"}, "stop 'never' is unknown"),
        ({"accept": "lower"}, "accept 'lower' is unknown"),
    ],
)
def test_impossible_values_are_refused_in_one_line(fields, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011  the message is checked below
        ThinkConfig(**fields)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_what_a_problem_does_not_allow_is_refused():
    problem, start = Problem(bowl, 1.0, 0.0, 0.5), jnp.zeros((1, 2, 3))
    with pytest.raises(ValueError, match=r"\(1, 2, 3\) are not .* think.num_candidates=1"):
        think(problem, start, ThinkConfig(num_steps=1))
    with pytest.raises(ValueError, match=r"num_steps is none; `resolve` fills in"):
        think(problem, start, ThinkConfig(num_candidates=2))
    with pytest.raises(ValueError, match=r"stop=entropy needs an entropy"):
        think(problem, start, ThinkConfig(num_steps=1, num_candidates=2, stop="entropy"))


def test_the_landscape_s_slot_is_not_room_for_a_token(params):
    model = Thinker(RUN, MODEL, ThinkConfig(num_steps=1))
    lengths = jnp.full((B,), L, jnp.int32)

    def read(length: int) -> Any:
        cache = model.init_cache(params, batch_size=B, length=length)
        return decoding.prefill(
            model, params, jnp.asarray(TOKENS), lengths, cache=cache, max_new_tokens=3
        )

    assert MODEL.shift == 1
    read(L + 2)
    with pytest.raises(ValueError, match=f"a cache of {L + 1} slots is too small"):
        read(L + 1)


def test_candidates_that_do_not_fit_are_refused():
    run = dataclasses.replace(RUN, max_candidate_gib=1.0)
    model = Thinker(run, MODEL, ThinkConfig(num_steps=1, num_candidates=4))
    model.check_memory(2**17)  # four arrays of 2 ** 17 x 4 x 128 numbers in float32: 1 GiB
    with pytest.raises(
        ValueError, match=r"4 candidates .* take 1\.0 GiB .* --think.num_candidates"
    ):
        model.check_memory(2**17 + 1)
