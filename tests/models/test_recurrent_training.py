"""Training in depth: where gradients stop, how many iterations are drawn, what is tapped."""

import dataclasses
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlib_methods import flops
from jaxlib_methods.models import language_model, partitioning, recurrent_depth, transformer
from jaxlib_methods.models.config import TransformerConfig
from jaxlib_methods.models.recurrent_training import (
    check_hidden_layer,
    draw_steps,
    forward,
    mean_steps,
    movement,
)

B, L, V = 2, 7, 13
WINDOW = 2
BASE = TransformerConfig(
    vocab_size=V,
    num_layers=3,
    embed_dim=16,
    num_heads=2,
    mlp="gelu",
    mlp_dim=20,
    max_length=16,
    block="post_norm",
    tie_embeddings=True,
    recurrence=8,
    compute_dtype="float32",
)
TOKENS = np.random.default_rng(0).integers(0, V, size=(B, L), dtype=np.int32)
SEGMENTS = np.array([[1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 2, 2, 0]], np.int32)
POSITIONS = np.array([[0, 1, 2, 3, 4, 5, 6], [0, 1, 2, 3, 0, 1, 0]], np.int32)
PLACES = {"positions": POSITIONS, "segments": SEGMENTS}
KEY = jax.random.key(0)


def changed(**changes: Any) -> TransformerConfig:
    return dataclasses.replace(BASE, **changes)


@functools.cache
def params_of(cfg: TransformerConfig) -> Any:
    init = functools.partial(language_model.init_params, cfg)
    rng = np.random.default_rng(1)

    def draw(path: Any, leaf: Any) -> np.ndarray:
        mean = float(path[-1].key == "scale")
        return (mean + 0.2 * rng.normal(size=leaf.shape)).astype(leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, partitioning.unbox(jax.eval_shape(init, KEY)))


PARAMS = params_of(BASE)


def nll(logits: jax.Array) -> jax.Array:
    return -(jax.nn.log_softmax(logits[..., :V]) * jax.nn.one_hot(TOKENS, V)).sum() / TOKENS.size


def loss(params: Any, num_steps: Any, cfg: TransformerConfig = BASE, k: int = WINDOW) -> jax.Array:
    places: Any = {name: jnp.asarray(x) for name, x in PLACES.items()}
    steps: dict[str, Any] = {"num_steps": num_steps, "trained_steps": k}
    return nll(forward(cfg, params, jnp.asarray(TOKENS), key=KEY, **steps, **places).logits)


@functools.cache
def compiled(num_steps: int) -> Any:
    """The program of value and gradient with this number of iterations."""
    run = jax.jit(functools.partial(jax.value_and_grad(loss), num_steps=num_steps))
    return run.lower(PARAMS).compile()


def assert_equal_trees(got: Any, want: Any, atol: float) -> None:
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=0, atol=atol), got, want)


# Where gradients stop.


def test_gradient_is_that_of_the_last_iterations_from_a_constant():
    n, rows = 56, {name: jnp.asarray(x) for name, x in PLACES.items()}
    read = functools.partial(recurrent_depth.read, BASE, inputs=jnp.asarray(TOKENS), **rows)

    def advance(params: Any, state: jax.Array, count: int) -> jax.Array:
        reading = read(params)[0]
        return jax.lax.scan(
            lambda s, _: (recurrent_depth.iterate(BASE, params, s, reading)[0], None),
            state,
            length=count,
        )[0]

    def truncated(params: Any, state: jax.Array) -> jax.Array:
        state = advance(params, state, WINDOW)
        return nll(recurrent_depth.predict(BASE, params, state, read(params)[0])[0])

    @jax.jit
    def by_hand(params: Any) -> Any:
        start = recurrent_depth.initial_state(BASE, KEY, (B, L))
        return jax.value_and_grad(truncated)(params, advance(params, start, n))

    (value, got), (wanted, want) = compiled(n + WINDOW)(PARAMS), by_hand(PARAMS)
    np.testing.assert_allclose(value, wanted, rtol=1e-5)
    assert_equal_trees(got, want, 1e-5)
    for part in ("prelude", "embedding", "adapter"):
        assert all(np.any(leaf != 0) for leaf in jax.tree.leaves(got[part]))


def test_gradient_of_all_iterations_is_the_slope():
    wide: dict[str, Any] = {"compute_dtype": "float64", "param_dtype": "float64"}
    cfg = changed(**wide, num_layers=2, coda_layers=0, block="pre_norm")
    with jax.enable_x64(True):
        params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), params_of(cfg))
        rng = np.random.default_rng(3)
        along = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape)), params)

        @jax.jit
        def slopes(params: Any) -> Any:
            def moved(t: Any) -> jax.Array:
                there = jax.tree.map(lambda x, d: x + t * d, params, along)
                return loss(there, 2, cfg)

            zero, step = jnp.zeros(()), 1e-5
            ahead, behind = jax.lax.map(moved, jnp.stack([zero + step, zero - step]))
            return jax.grad(moved)(zero), (ahead - behind) / (2 * step)

        got, want = slopes(params)
    assert got.dtype == np.float64
    assert abs(float(got)) > 0.1
    np.testing.assert_allclose(got, want, rtol=1e-7)


def test_one_program_serves_every_number_of_iterations():
    traces = []

    @jax.jit
    def any_number(params: Any, num_steps: jax.Array) -> Any:
        traces.append(num_steps)
        return jax.value_and_grad(loss)(params, num_steps)

    for r in (1, WINDOW, WINDOW + 56):
        value, got = any_number(PARAMS, np.int32(r))
        wanted, want = (
            compiled(r)(PARAMS) if r >= WINDOW else below_the_window(PARAMS)
        )  # fmt: skip
        np.testing.assert_allclose(value, wanted, rtol=1e-5)
        assert_equal_trees(got, want, 1e-5)
    for r in range(3, 9):
        any_number(PARAMS, np.int32(r))
    assert len(traces) == 1


@jax.jit
def below_the_window(params: Any) -> Any:
    return jax.value_and_grad(functools.partial(loss, k=1))(params, 1)


def test_iterations_without_gradient_need_no_memory():
    none, many = (
        compiled(n + WINDOW).memory_analysis().temp_size_in_bytes for n in (0, 56)
    )  # fmt: skip
    assert none > 10_000
    assert abs(many - none) < B * L * BASE.embed_dim * 4  # one more state


def test_iterations_without_gradient_cost_a_forward_pass():
    def count(num_steps: int) -> int:
        return flops.count_dot_flops(
            functools.partial(jax.grad(loss), num_steps=num_steps), PARAMS
        )  # fmt: skip

    extra = count(WINDOW + 6) - count(WINDOW)
    assert extra == 6 * B * L * flops.iteration_flops(BASE, L)


def test_remat_changes_no_gradient():
    value, want = compiled(WINDOW)(PARAMS)
    run = jax.jit(jax.value_and_grad(loss), static_argnums=(1, 2))
    got_value, got = run(PARAMS, WINDOW, changed(remat="dots"))
    np.testing.assert_allclose(got_value, value, rtol=1e-5)
    assert_equal_trees(got, want, 1e-5)


# How many iterations.


def draws(cfg: TransformerConfig, count: int) -> np.ndarray:
    draw = jax.jit(jax.vmap(functools.partial(draw_steps, cfg)))
    return np.asarray(draw(jax.random.split(KEY, count)))


def test_the_paper_draws_a_poisson_with_a_lognormal_rate():
    cfg = changed(recurrence=32, backprop_steps=8)
    found = draws(cfg, 200_000)
    assert found.dtype == np.int32
    assert found.min() >= 1
    assert abs(found.mean() - 33) < 0.3
    assert 28 <= np.median(found) <= 30
    np.testing.assert_allclose(found.std(), 18, atol=0.3)
    np.testing.assert_allclose(np.percentile(found, [5, 95]), [12, 67], atol=1)
    assert abs(np.mean(found <= 8) - 0.014) < 0.002
    free, trained = mean_steps(cfg)
    np.testing.assert_allclose(trained, np.minimum(found, 8).mean(), rtol=0.01)
    np.testing.assert_allclose(free, np.maximum(found - 8, 0).mean(), rtol=0.01)


def test_fixed_and_uniform_numbers():
    assert draw_steps(changed(recurrence_sampling="fixed"), KEY) == 8
    found = draws(changed(recurrence_sampling="uniform"), 3000)
    numbers, counts = np.unique(found, return_counts=True)
    assert numbers.tolist() == list(range(1, 16))
    np.testing.assert_allclose(counts, 200, atol=60)


def test_expected_iterations():
    def expected(recurrence: int, window: int, sampling: str = "lognormal_poisson") -> Any:
        return mean_steps(
            changed(recurrence=recurrence, backprop_steps=window, recurrence_sampling=sampling)
        )

    np.testing.assert_allclose(expected(8, 4), (9 - 3.86, 3.86), atol=0.01)
    np.testing.assert_allclose(expected(1, 1), (1, 1), rtol=1e-6)
    np.testing.assert_allclose(expected(8, 3, "uniform"), (8 - 42 / 15, 42 / 15))
    assert expected(8, 3, "fixed") == (5, 3)
    assert expected(1, 1, "uniform") == expected(1, 1, "fixed") == (0, 1)


# What is returned.


DEVICE_PARAMS, DEVICE_TOKENS = jax.tree.map(jnp.asarray, (PARAMS, TOKENS))


@functools.partial(jax.jit, static_argnums=1)
def program(num_steps: Any, hidden_layer: Any, key: Any) -> Any:
    steps = {"num_steps": num_steps, "hidden_layer": hidden_layer}
    return forward(BASE, DEVICE_PARAMS, DEVICE_TOKENS, key=key, **steps)


def outputs(num_steps: int, hidden_layer: Any = "final", *, key: Any = KEY) -> Any:
    return jax.device_get(program(np.int32(num_steps), hidden_layer, key))


def test_hidden_layers():
    same = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
    embedded = PARAMS["embedding"]["table"][TOKENS] * 4
    same(outputs(5, 0).hidden, embedded)
    # Nothing but the prelude lies between: the same whatever the iterations do.
    prelude = outputs(5, 1).hidden
    same(prelude, outputs(1, 1, key=jax.random.key(1)).hidden)
    assert not np.any(prelude == embedded)
    first, second = (functools.partial(outputs, hidden_layer=1 + j) for j in (1, 2))
    same(first(5).hidden, outputs(4).state)
    same(second(5).hidden, outputs(5).state)
    same(first(2).hidden, outputs(1).state)
    same(second(1).hidden, outputs(1).state)  # there is no second
    assert not np.any(outputs(4).state == outputs(5).state)
    final = outputs(5)
    same(final.logits[..., :V], final.hidden @ PARAMS["embedding"]["table"][:V].T, atol=1e-4)


def test_changes_and_norms_are_of_the_iterations_with_gradient():
    states = [outputs(r).state for r in (3, 4, 5)]
    size = [np.linalg.norm(x, axis=-1) for x in states]
    moved = [np.linalg.norm(b - a, axis=-1) for a, b in itertools.pairwise(states)]
    out = outputs(5)
    want = [np.mean(m / s) for m, s in zip(moved, size[1:], strict=True)]
    np.testing.assert_allclose(out.changes, want, rtol=1e-4)
    np.testing.assert_allclose(out.norms, [np.mean(s / 4) for s in size[1:]], rtol=1e-4)
    few = outputs(1)
    assert few.changes.shape == (WINDOW,)
    assert few.changes[0] == few.changes[1] > 0


def test_movement_by_hand():
    before = jnp.array([[[0.0, 0.0], [3.0, 4.0], [7.0, 7.0]]])
    after = jnp.array([[[3.0, 4.0], [6.0, 8.0], [jnp.nan, 7.0]]])
    change, norm = movement(before, after, where=jnp.array([[True, True, False]]))
    np.testing.assert_allclose(change, (1 + 0.5) / 2, rtol=1e-6)
    np.testing.assert_allclose(norm, (5 + 10) / 2 / 2**0.5, rtol=1e-6)


# The language model of either depth.


def test_a_language_model_draws_its_iterations_from_the_key():
    model = functools.partial(language_model.forward, BASE, DEVICE_PARAMS, DEVICE_TOKENS)
    run = jax.jit(lambda key: model(key=key))
    found = set()
    for seed in range(3):
        steps_key, state_key = jax.random.split(jax.random.key(seed))
        got, steps = run(jax.random.key(seed)), int(draw_steps(BASE, steps_key))
        found.add(steps)
        assert int(got.num_steps) == steps
        want = outputs(steps, key=state_key)
        np.testing.assert_allclose(got.logits, want.logits, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(got.recurrent.changes, want.changes, rtol=1e-4)
    assert len(found) > 1


def test_a_plain_language_model_is_the_transformer():
    plain = changed(recurrence=0)
    params, places = params_of(plain), jax.tree.map(jnp.asarray, PLACES)
    assert set(params) == {"embedding", "blocks", "final_norm"}

    def ours(params: Any) -> Any:
        out = language_model.forward(
            plain, params, DEVICE_TOKENS, key=KEY, num_steps=4, hidden_layer=2, **places
        )
        assert (out.recurrent, out.num_steps) == (None, None)
        return out.logits, out.hidden

    def theirs(params: Any) -> Any:
        return transformer.forward(plain, params, DEVICE_TOKENS, hidden_layer=2, **places)[:2]

    assert str(jax.make_jaxpr(ours)(params)) == str(jax.make_jaxpr(theirs)(params))


# Refusals.


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ({"num_steps": 0}, "num_steps 0 must be at least 1 iteration of the core"),
        (
            {"num_steps": 3, "trained_steps": 4},
            "trained_steps 4 is more than the num_steps 3 that are taken; give at most 3",
        ),
        ({"trained_steps": -1}, "trained_steps -1 must not be negative"),
    ],
)
def test_impossible_numbers_of_iterations_are_refused(steps, message):
    with pytest.raises(ValueError, match=message):
        forward(BASE, DEVICE_PARAMS, DEVICE_TOKENS, key=KEY, **steps)


def test_a_plain_configuration_and_rows_beyond_the_learned_positions_are_refused():
    plain = dataclasses.replace(BASE, recurrence=0)
    with pytest.raises(ValueError, match="0 is a plain transformer; use init_params and forward"):
        forward(plain, DEVICE_PARAMS, DEVICE_TOKENS, key=KEY)
    short = dataclasses.replace(BASE, positions="learned", max_length=2)
    with pytest.raises(ValueError, match="longer than the 2 learned positions"):
        forward(short, DEVICE_PARAMS, DEVICE_TOKENS, key=KEY)


@pytest.mark.parametrize("layer", [-1, 4, "last"])
def test_hidden_layers_that_do_not_exist_are_refused(layer):
    message = rf"hidden_layer {layer!r} does not exist; choose 0 to 1 \(prelude\), to 3 \(iter"
    with pytest.raises(ValueError, match=message):
        forward(BASE, DEVICE_PARAMS, DEVICE_TOKENS, key=KEY, hidden_layer=layer)
    for there in (None, 0, 3, "final"):
        check_hidden_layer(BASE, there)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"recurrence": -1}, "recurrence -1 must not be negative"),
        ({"prelude_layers": -1}, "prelude_layers -1 must not be negative"),
        ({"coda_layers": -2}, "coda_layers -2 must not be negative"),
        ({"backprop_steps": 0}, "backprop_steps 0 must be at least 1, or None for a quarter of"),
        (
            {"backprop_steps": 9},
            "backprop_steps 9 is more than the recurrence of 8 iterations; give at most 8",
        ),
        (
            {"num_layers": 2},
            "num_layers 2 leaves no block for the core beside prelude_layers 1 and coda_layers 1; "
            "give at least 3",
        ),
        ({"injection": "ffn"}, r"injection 'ffn' is unknown; choose one of \['linear', 'add', "),
        ({"recurrence_sampling": "poisson"}, "recurrence_sampling 'poisson' is unknown; choose"),
        ({"block": "none"}, "block 'none' is unknown; choose one of"),
        (
            {"parallel_residual": True},
            "parallel_residual is for block 'pre_norm', not 'post_norm'; change one of them",
        ),
        (
            {"qk_bias": True, "qkv_bias": True},
            "qk_bias and qkv_bias both give queries and keys a bias; choose one of them",
        ),
    ],
)
def test_impossible_configurations_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        changed(**changes)


def test_derived_numbers():
    assert (BASE.core_layers, BASE.trained_steps, BASE.unfolded_layers) == (1, 2, 10)
    assert changed(recurrence=3).trained_steps == 1
    assert changed(backprop_steps=5).trained_steps == 5
    assert changed(recurrence=0).unfolded_layers == 3


@pytest.mark.parametrize("num_steps", [2, 3])
def test_without_injection_the_prelude_learns_where_every_iteration_has_a_gradient(
    num_steps: int,
) -> None:
    cfg = changed(injection="none", recurrence=4, backprop_steps=2)
    params = partitioning.unbox(recurrent_depth.init_params(cfg, KEY))

    def loss(params: Any, num_steps: Any) -> jax.Array:
        out = forward(cfg, params, jnp.asarray(TOKENS), key=KEY, num_steps=num_steps)
        return jnp.square(out.logits[..., : cfg.vocab_size]).mean()

    fixed = jax.jit(lambda params: jax.grad(loss)(params, num_steps))(params)
    drawn = jax.jit(jax.grad(loss))(params, jnp.int32(num_steps))
    for found in (fixed, drawn):
        size = sum(float(jnp.abs(leaf).sum()) for leaf in jax.tree.leaves(found["prelude"]))
        assert (size > 0) == (num_steps == 2)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), fixed, drawn)
