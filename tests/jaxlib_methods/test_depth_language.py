import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlib_methods.depth_config import DepthConfig, resolve
from jaxlib_methods.depth_language import (
    RecurrentModel,
    Thought,
    check,
    start_state,
    start_watch,
    think_steps,
)
from jaxlib_methods.depth_sampling import make_draws
from jaxlib_methods.models import decoding, recurrent_depth
from jaxlib_methods.models.decoding import SamplingConfig, Stream

CHANGES = {
    "num_steps": [1, 40],
    "exit": ["kl", "latent", "entropy", "argmax"],
    "tolerance": [0.0, float("inf")],
    "min_steps": [3],
    "check_every": [4],
    "exit_in_prompt": [True],
    "kept_steps": [1, 2],
    "warm_start": [True],
    "state_scale": [0.0, 2.0],
    "sampler": ["sequential", "continuous", "parallel", "speculative"],
    "inner_steps": [1, 9],
    "freeze_tolerance": [0.1],
    "embedding_average": [0.0, 0.5],
    "noise": [0.5],
    "max_wave": [2],
    "draft_steps": [1, 9],
    "draft_tokens": [1],
}


@jax.jit
def think(model: RecurrentModel, params: Any, inputs: jax.Array, **arguments: Any) -> Thought:
    return think_steps(model, params, inputs, **arguments)


@jax.jit
def call(model: RecurrentModel, params: Any, inputs: jax.Array, **arguments: Any) -> Any:
    return model(params, inputs, **arguments)


@functools.partial(jax.jit, static_argnames="cfg")
def read(cfg: Any, params: Any, inputs: jax.Array, **arguments: Any) -> Any:
    return recurrent_depth.read(cfg, params, inputs, **arguments)


@functools.partial(jax.jit, static_argnames="cfg")
def step_by_hand(cfg: Any, params: Any, state: jax.Array, reading: Any, cache: Any, i: Any) -> Any:
    state, cache = recurrent_depth.iterate(cfg, params, state, reading, cache=cache, step=i)
    logits, _, cache = recurrent_depth.predict(cfg, params, state, reading, cache=cache)
    return state, logits, cache


def places(inputs: jax.Array, first: int = 0) -> dict[str, jax.Array]:
    positions = jnp.arange(first, first + inputs.shape[1])[None]
    positions = jnp.broadcast_to(positions, inputs.shape)
    return {"positions": positions, "segments": jnp.ones_like(inputs)}


def text(length: int = 9) -> jax.Array:
    return jax.random.randint(jax.random.key(3), (2, 9), 0, 13)[:, :length]


def model_of(contraction: Any, seed: int = 0, **depth: Any) -> RecurrentModel:
    return RecurrentModel(contraction.cfg, DepthConfig(**depth), seed)


def test_each_field_alone_may_change():
    assert set(CHANGES) == {field.name for field in dataclasses.fields(DepthConfig)}
    for name, values in CHANGES.items():
        for value in values:
            found = resolve(DepthConfig(**{name: value}), 32)
            assert getattr(found, name) in (value, 32, 1)
    assert resolve(DepthConfig(), 32).kept_steps == 32
    assert resolve(DepthConfig(sampler="parallel"), 32).kept_steps == 1
    assert resolve(DepthConfig(), 32).max_wave == 2 * 32 / 4 + 2
    assert resolve(DepthConfig(inner_steps=1), 32).max_wave == 64
    assert DepthConfig(exit="kl").threshold == 5e-4
    assert DepthConfig(exit="argmax", tolerance=2).threshold == 2


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_steps": 0}, "num_steps=0 must be at least 1, or none"),
        ({"min_steps": 0}, "min_steps=0 must be at least 1"),
        ({"num_steps": 4, "min_steps": 5}, "min_steps=5 is more than the 4 iterations"),
        ({"num_steps": 4, "kept_steps": 5}, "kept_steps=5 is more than the 4 iterations"),
        ({"max_wave": 1}, "max_wave=1 must be at least 2"),
        ({"tolerance": -1.0}, "tolerance=-1.0 must not be negative"),
        ({"embedding_average": 1.0}, "embedding_average=1.0 must be at least 0, below 1"),
        ({"noise": 1.5}, "noise=1.5 must be between 0 and 1"),
        ({"sampler": "parallel", "exit": "kl"}, "exit=kl is for sampler=sequential or continuous"),
        ({"sampler": "speculative", "warm_start": True}, "warm_start=True is for sampler="),
        ({"sampler": "parallel", "kept_steps": 2}, "kept_steps=2 must be 1 for sampler=parallel"),
        ({"sampler": "speculative", "num_steps": 2}, "draft_steps=4 is more than the 2 iterations"),
        ({"exit": "never"}, "exit 'never' is unknown"),
    ],
)
def test_what_cannot_be_is_refused(fields: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        DepthConfig(**fields)


def test_a_model_takes_its_recurrence_and_is_equal_where_it_does_the_same(contraction: Any):
    model = model_of(contraction)
    assert (model.num_steps, model.depth.kept_steps) == (8, 8)
    assert hash(model) == hash(model_of(contraction, num_steps=8, kept_steps=8))
    assert model == model_of(contraction, num_steps=8)
    with pytest.raises(ValueError, match="recurrence 0 is a plain transformer"):
        RecurrentModel(dataclasses.replace(contraction.cfg, recurrence=0))
    with pytest.raises(ValueError, match="min_steps=9 is more than the 8 iterations"):
        model_of(contraction, min_steps=9)


def test_a_cache_that_is_not_the_models_is_refused(contraction: Any):
    model, cfg = model_of(contraction), contraction.cfg
    plain = decoding.init_cache(cfg, batch_size=2, length=9)
    with pytest.raises(ValueError, match="a KVCache is no cache of a recurrent model"):
        model(contraction.params, text(), **places(text()), cache=plain)  # pyright: ignore
    shared = model_of(contraction, kept_steps=1).init_cache(None, batch_size=2, length=9)
    with pytest.raises(ValueError, match="keeps 1 iterations of each token and"):
        model(contraction.params, text(), **places(text()), cache=shared)


def test_token_by_token_equals_the_full_forward(contraction: Any):
    model = model_of(contraction, num_steps=5)
    full = call(model, contraction.params, text(), **places(text()))
    assert full.cache is None
    cache = model.init_cache(None, batch_size=2, length=9)
    for begin, end in [(0, 4), *((at, at + 1) for at in range(4, 9))]:
        inputs = text()[:, begin:end]
        out = call(model, contraction.params, inputs, **places(inputs, begin), cache=cache)
        cache = out.cache
        np.testing.assert_allclose(out.logits, full.logits[:, begin:end], rtol=1e-5, atol=1e-5)
    assert (np.asarray(cache.tokens.steps) == 5).all()


def test_tokens_end_at_once_as_they_end_one_by_one(contraction: Any):
    """Those that run on see the deepest keys of those that have ended."""
    model = model_of(contraction, exit="latent", tolerance=0.2, exit_in_prompt=True)
    cache = model.init_cache(None, batch_size=2, length=9).tokens
    whole = think(model, contraction.params, text(), **places(text()), cache=cache)
    assert whole.cache is not None
    used = np.asarray(whole.steps_used)
    assert len(np.unique(used)) > 2
    assert 1 < used.min() <= used.max() < 8
    np.testing.assert_array_equal(whole.cache.steps, used)
    for at in range(9):
        inputs = text()[:, at : at + 1]
        one = think(model, contraction.params, inputs, **places(inputs, at), cache=cache)
        assert one.cache is not None
        cache = one.cache
        np.testing.assert_array_equal(one.steps_used[:, 0], used[:, at])
        np.testing.assert_allclose(one.logits[:, 0], whole.logits[:, at], rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(one.state[:, 0], whole.state[:, at], rtol=1e-5, atol=1e-5)


class Trajectory:
    """All iterations of one token after a prompt, by hand."""

    def __init__(self, contraction: Any) -> None:
        cfg, params = contraction.cfg, contraction.params
        model = model_of(contraction)
        inputs = text(5)
        empty = model.init_cache(None, batch_size=2, length=6).tokens
        before = think(model, params, inputs, **places(inputs), cache=empty)
        assert before.cache is not None
        self.cache, self.inputs = before.cache, text(6)[:, 5:]
        self.where = places(self.inputs, 5)
        reading, cache = read(cfg, params, self.inputs, **self.where, cache=self.cache)
        state = recurrent_depth.state_at(cfg, self.where["positions"], model.key(Stream.STATE))
        self.states, self.logits = [np.asarray(state[:, 0])], []
        for i in range(8):
            state, logits, cache = step_by_hand(cfg, params, state, reading, cache, jnp.int32(i))
            self.states.append(np.asarray(state[:, 0]))
            self.logits.append(np.asarray(logits[:, 0, :13], np.float64))

    def change(self, kind: str, before: int, after: int, row: int) -> float:
        """How much check `after` differs from check `before`, iterations counted from 1."""
        if kind == "latent":
            new, old = self.states[after][row], self.states[before][row]
            return float(np.linalg.norm(new - old) / np.linalg.norm(new))
        if before == 0:
            return np.inf
        p, q = (_softmax(self.logits[at - 1][row]) for at in (before, after))
        if kind == "kl":
            return float((p * np.log(p / q)).sum())
        return float(abs((p * np.log(p)).sum() - (q * np.log(q)).sum()))

    def end(self, kind: str, tolerance: float, min_steps: int, check_every: int, row: int) -> int:
        for step in range(check_every, 9, check_every):
            before = step - check_every
            if kind == "argmax":
                words = [int(logits[row].argmax()) for logits in self.logits]
                seen = [words[at - 1] for at in range(check_every, step + 1, check_every)]
                same = next((i for i, w in enumerate(seen[::-1]) if w != seen[-1]), len(seen))
                small = (same - 1) * check_every >= tolerance
            else:
                small = self.change(kind, before, step, row) < tolerance
            if small and step >= min_steps and (before > 0 or kind == "latent"):
                return step
        return 8


def _softmax(logits: np.ndarray) -> np.ndarray:
    p = np.exp(logits - logits.max())
    return p / p.sum()


@pytest.fixture(scope="module")
def trajectory(contraction: Any) -> Trajectory:
    return Trajectory(contraction)


def test_the_model_contracts(trajectory: Trajectory):
    """Each iteration shortens the next, so that there is one limit."""
    for row in range(2):
        changes = [trajectory.change("latent", at - 1, at, row) for at in range(2, 9)]
        assert (np.array(changes[1:]) < 0.8 * np.array(changes[:-1])).all()


@pytest.mark.parametrize(
    ("kind", "tolerance", "min_steps", "check_every", "expected"),
    [
        ("kl", 5e-3, 1, 1, None),
        ("kl", 0.1, 1, 2, None),
        ("latent", 0.07, 1, 1, None),
        ("latent", 0.3, 1, 3, None),
        ("latent", 10.0, 3, 1, (3, 3)),
        ("entropy", 0.02, 1, 1, None),
        ("argmax", 2.0, 1, 1, None),
        ("argmax", 3.0, 1, 2, None),
        ("kl", 0.0, 1, 1, (8, 8)),
        ("latent", 0.0, 1, 1, (8, 8)),
        ("argmax", np.inf, 1, 1, (8, 8)),
        ("kl", np.inf, 1, 1, (2, 2)),
        ("entropy", np.inf, 1, 1, (2, 2)),
        ("latent", np.inf, 1, 1, (1, 1)),
    ],
)
def test_the_rule_of_a_check(
    contraction: Any,
    trajectory: Trajectory,
    kind: Any,
    tolerance: float,
    min_steps: int,
    check_every: int,
    expected: tuple[int, int] | None,
):
    model = model_of(
        contraction,
        exit=kind,
        tolerance=tolerance,
        min_steps=min_steps,
        check_every=check_every,
    )
    watch = start_watch(model, jnp.asarray(trajectory.states[0])[:, None])
    found = np.full(2, 8)
    for step in range(1, 9):
        state = jnp.asarray(trajectory.states[step])[:, None]
        logits = jnp.asarray(trajectory.logits[step - 1], jnp.float32)[:, None]
        logits = jnp.pad(logits, ((0, 0), (0, 0), (0, 115)), constant_values=-1e30)
        taken = jnp.full((2, 1), step)
        small, watch = check(model.depth, watch, state, logits, taken)
        found = np.where(np.asarray(small)[:, 0] & (found == 8), step, found)
    ends = [trajectory.end(kind, tolerance, min_steps, check_every, row) for row in range(2)]
    assert found.tolist() == ends
    assert ends == list(expected) if expected else min(ends) < 8


def watched(contraction: Any, tokens: list[list[float]], **depth: Any) -> list[bool]:
    """Where a token with these probabilities `[steps][V]` has converged."""
    model = model_of(contraction, **depth)
    state = jnp.zeros((1, 1, 16))
    watch, found = start_watch(model, state), []
    for step, p in enumerate(tokens, start=1):
        logits = jnp.pad(jnp.log(jnp.array(p)), (0, 128 - len(p)), constant_values=-1e30)
        small, watch = check(model.depth, watch, state, logits[None, None], jnp.full((1, 1), step))
        found.append(bool(small[0, 0]))
    return found


def test_the_divergence_is_of_the_last_prediction_from_this_one(contraction: Any):
    # KL((.9, .1) || (.5, .5)) = 0.368 nats, the other way round 0.511.
    tokens = [[0.9, 0.1], [0.5, 0.5], [0.9, 0.1]]
    assert watched(contraction, tokens, exit="kl", tolerance=0.4) == [False, True, False]


def test_what_happens_between_checks_is_not_seen(contraction: Any):
    tokens = [[0.9, 0.1], [0.9, 0.1], [0.1, 0.9], [0.9, 0.1]]
    found = watched(contraction, tokens, exit="argmax", tolerance=2, check_every=2)
    assert found == [False, False, False, True]


@pytest.mark.parametrize(
    ("kind", "tolerance", "check_every"), [("kl", 5e-3, 1), ("latent", 0.3, 2), ("argmax", 2.0, 2)]
)
def test_a_token_ends_where_the_rule_says(
    contraction: Any, trajectory: Trajectory, kind: Any, tolerance: float, check_every: int
):
    model = model_of(contraction, exit=kind, tolerance=tolerance, check_every=check_every)
    found = think(
        model, contraction.params, trajectory.inputs, **trajectory.where, cache=trajectory.cache
    )
    ends = [trajectory.end(kind, tolerance, 1, check_every, row) for row in range(2)]
    assert np.asarray(found.steps_used)[:, 0].tolist() == ends
    assert min(ends) < 8
    for row, end in enumerate(ends):
        np.testing.assert_allclose(
            found.logits[row, 0, :13], trajectory.logits[end - 1][row], rtol=1e-5, atol=1e-5
        )
        np.testing.assert_allclose(
            found.state[row, 0], trajectory.states[end][row], rtol=1e-5, atol=1e-5
        )


def test_prompts_end_early_only_where_they_may(contraction: Any):
    model = model_of(contraction, exit="latent", tolerance=1e9, exit_in_prompt=True)
    cache = model.init_cache(None, batch_size=2, length=6)
    inputs = text(5)
    cache = call(model, contraction.params, inputs, **places(inputs), cache=cache).cache
    assert (np.asarray(cache.tokens.steps)[:, :5] == 1).all()


@jax.jit
def read_and_decode(model: RecurrentModel, params: Any, done: jax.Array) -> tuple[Any, Any]:
    cache: Any = model.init_cache(None, batch_size=2, length=2)
    two = jnp.full((2,), 2)
    state = decoding.prefill(model, params, text(2), two, cache=cache, max_new_tokens=1)
    return state.cache, decoding.next_logits(model, params, state._replace(done=done))[1]


def test_a_prompt_of_one_token_is_not_decoded_and_a_finished_row_does_not_think(contraction: Any):
    """Any change is small enough, but not in a prompt, even where all but its last is one token."""
    model = model_of(contraction, exit="latent", tolerance=1e9, warm_start=True)
    done = jnp.array([True, False])
    prompt, after = read_and_decode(model, contraction.params, done)
    assert prompt.tokens.steps.tolist() == [[8, 0], [8, 0]]
    assert after.tokens.steps.tolist() == [[8, 0], [8, 1]]
    np.testing.assert_array_equal(after.state[0], prompt.state[0])
    assert (np.asarray(after.state[1]) != np.asarray(prompt.state[1])).any()


def test_a_warm_start_begins_where_the_token_before_ended(contraction: Any):
    """Any change is small enough, but in a prompt: the token after it ends after one iteration."""
    cfg, params = contraction.cfg, contraction.params
    model = model_of(contraction, exit="latent", tolerance=1e9, warm_start=True)
    cache = model.init_cache(None, batch_size=2, length=6)
    # Row 0 has no prompt: its first token begins from noise.
    inputs = text(5)
    where = places(inputs)
    segments = where["segments"].at[0].set(0)
    out = call(model, params, inputs, positions=where["positions"], segments=segments, cache=cache)
    assert out.cache.tokens.steps.tolist() == [[0] * 6, [8] * 5 + [0]]
    after = {"positions": jnp.array([[0], [5]]), "segments": jnp.ones((2, 1), jnp.int32)}
    found = call(model, params, text(6)[:, 5:], **after, cache=out.cache)
    assert found.cache.tokens.steps.tolist() == [[1] + [0] * 5, [8] * 5 + [1]]
    cold = recurrent_depth.state_at(cfg, after["positions"], model.key(Stream.STATE))
    began = jnp.stack([cold[0], out.cache.state[1][None]])
    reading, tokens = read(cfg, params, text(6)[:, 5:], **after, cache=out.cache.tokens)
    state, logits, _ = step_by_hand(cfg, params, began, reading, tokens, jnp.int32(0))
    np.testing.assert_allclose(found.logits, logits, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(found.cache.state, state[:, 0], rtol=1e-5, atol=1e-5)


def test_without_noise_the_seed_means_nothing(contraction: Any):
    positions = places(text())["positions"]

    def state(seed: int, scale: float) -> np.ndarray:
        model = model_of(contraction, seed, state_scale=scale)
        return np.asarray(of_model(model, positions))

    def begin(model: RecurrentModel, positions: jax.Array) -> jax.Array:
        reading: Any = None  # injection `none` alone begins from it
        return start_state(model, reading, positions)

    of_model: Any = jax.jit(begin)

    assert (state(0, 0.0) == 0).all()
    assert (state(2**32 + 1, 1.0) == state(1, 1.0)).all()
    assert np.abs(state(0, 1.0) - state(1, 1.0)).max() > 0.1
    np.testing.assert_allclose(state(1, 2.0), 2 * state(1, 1.0), rtol=1e-6)
    # A program for each of the scales, and none for a seed.
    assert of_model._cache_size() == 3


def test_what_is_drawn_from_a_seed_has_keys_of_its_own(contraction: Any):
    keys = [decoding.stream_key(4, stream) for stream in Stream]
    # Samplers fold rows and tokens into theirs, states fold positions.
    folded = [jax.random.fold_in(key, at) for key in keys for at in range(8)]
    every = np.stack([jax.random.key_data(key) for key in [jax.random.key(4), *keys, *folded]])
    assert len(np.unique(every, axis=0)) == len(every)
    assert model_of(contraction, 4).key(Stream.STATE) == keys[Stream.STATE]


def test_a_converged_prediction_does_not_depend_on_what_is_kept(contraction: Any):
    params = contraction.params
    full = call(model_of(contraction, num_steps=32), params, text(), **places(text())).logits
    model = model_of(contraction, num_steps=32, kept_steps=3)
    cache = model.init_cache(None, batch_size=2, length=9)
    assert cache.tokens.kept_steps == 3
    for first in (0, 4):  # the fifth token is read again
        inputs = text()[:, first : first + 5]
        out = call(model, params, inputs, **places(inputs, first), cache=cache)
        cache = out.cache
        found = full[:, first : first + 5]
        np.testing.assert_allclose(out.logits, found, rtol=1e-3, atol=3e-3)


def test_a_row_is_continued_whatever_the_others_are(contraction: Any, one_by_one: Any):
    # The program is that of `test_continuous`.
    rule: dict[str, Any] = {"exit": "kl", "tolerance": 0.003, "check_every": 2}
    model = model_of(contraction, num_steps=12, warm_start=True, **rule)
    draws = make_draws(SamplingConfig(temperature=0), jax.random.key(0), (-1,))
    both = one_by_one(model, draws, 6)
    for row in range(2):
        # Beside a copy of itself.
        np.testing.assert_array_equal(one_by_one(model, draws, 6, (row, row))[0], both[row])
    assert len(np.unique(both)) > 2
