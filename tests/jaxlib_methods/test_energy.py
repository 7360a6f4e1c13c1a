"""Energy-based training of text: its formulas by hand, what gets a gradient, what is refused."""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlib_methods import energy, energy_text, replay
from jaxlib_methods.energy_config import EnergyConfig
from jaxlib_methods.method import Batch, Context, Method
from jaxlib_methods.models import energy_transformer, partitioning
from jaxlib_methods.models.config import TransformerConfig
from jaxlib_methods.models.energy_transformer import Rows
from jaxlib_methods.train.config import OptimizerConfig
from jaxlib_methods.train.optimizer import make_optimizer

V, D, L, B = 11, 16, 7, 4
MODEL = TransformerConfig(
    vocab_size=V, num_layers=2, embed_dim=D, num_heads=2, mlp_dim=10, max_length=16,
    compute_dtype="float64", param_dtype="float64",
)  # fmt: skip
ALPHA = 2.0
# Without anything drawn, so that a loss can be written again from its formula.
STILL = EnergyConfig(initial="uniform", step_size=ALPHA, num_landscapes=2)
S1 = EnergyConfig(step_size=ALPHA, replay_size=B)  # a buffer shows where descents end
S2 = EnergyConfig(
    num_steps=2, max_steps=3, loss_steps="last", num_landscapes=0, learn_step_size=False,
    random_step_size=2.0, noise=3.0, replay_size=2 * B, step_size=ALPHA,
)  # fmt: skip
LAST = dataclasses.replace(STILL, loss_steps="last", num_landscapes=0)
KEY = jax.random.key(5)


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def make_batch(length=L, rows=B, seed=0):
    """Two documents in the first row, the last two tokens of the second row padding."""
    ids = np.random.default_rng(seed).integers(0, V, (rows, L + 1), dtype=np.int32)
    segments, positions = (
        np.ones((rows, L), np.int32),
        np.tile(np.arange(L, dtype=np.int32), (rows, 1)),
    )
    segments[0, 4:], positions[0, 4:] = 2, np.arange(3)
    segments[1, 5:] = 0
    where = segments > 0
    where[0, 3] = False  # its target is of the other document
    fields = (ids[:, :-1], ids[:, 1:], positions, segments, where)
    return Batch(*(jnp.asarray(field[:, :length]) for field in fields))


def params_of(cfg: EnergyConfig) -> Any:
    """Parameters of which every number matters: norms and landscapes are drawn too."""
    return _params_of(cfg.landscapes, cfg.candidate_embedding)


@functools.cache
def _params_of(num_landscapes: int, embedding: Any) -> Any:
    cfg = EnergyConfig(
        num_landscapes=num_landscapes, candidate_embedding=embedding, step_size=ALPHA
    )
    with jax.enable_x64(True):
        init = jax.jit(functools.partial(energy.init_params, MODEL, cfg))
        drawn = partitioning.unbox(init(jax.random.key(1)))
        own = {name: drawn.pop(name) for name in ("step_size", "step_unit")}
        leaves, treedef = jax.tree.flatten(drawn)
        rng = np.random.default_rng(2)
        moved = [leaf + 0.2 * rng.normal(size=leaf.shape) for leaf in leaves]
        return treedef.unflatten(moved) | own | {"step_size": {"value": jnp.float64(0.7)}}


def context(**changes: Any) -> Context:
    values = {
        "model": MODEL, "num_steps": 20, "sequence_length": L, "batch_size": B,
        "tokenizer": "bytes", "load_pretrained": None,
    }  # fmt: skip
    return Context(**(values | changes))  # pyright: ignore[reportArgumentType]


def make(cfg: EnergyConfig, **changes: Any) -> Method:
    return energy.make(cfg, context(**changes))


def method_state(method: Method) -> Any:
    assert method.init_state is not None
    return partitioning.unbox(method.init_state(jax.random.key(0)))


class Found(NamedTuple):
    """What a loss gives: its value, metrics, gradient and, with a buffer, the new state."""

    value: Any
    metrics: Any
    grads: Any
    state: Any


@functools.cache
def compiled(cfg: EnergyConfig) -> Any:
    method = make(cfg)

    def loss(params, batch, state, key):
        before = (params, (), batch, state) if cfg.replay_size else (params, (), batch)
        value, metrics, *after = method.loss(*before, step=jnp.int32(0), key=key)
        return value, (metrics, after)

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


def run(cfg: EnergyConfig, batch=None, *, params=None, key=KEY, state=None) -> Found:
    if cfg.replay_size and state is None:
        state = method_state(make(cfg))
    batch = make_batch() if batch is None else batch
    (value, (metrics, after)), grads = compiled(cfg)(
        params_of(cfg) if params is None else params, batch, state, key
    )
    return Found(value, metrics, grads, after[0] if after else None)


def final_logits(found: Found) -> Any:
    """z_N of a first batch, over the real vocabulary: where it has been stored."""
    return np.asarray(found.state.records[1][0, :, :, :V])


def mean_of(found: Found, name: str) -> float:
    total, count = found.metrics[name]
    return float(total) / float(count)


def assert_trees_close(a: Any, b: Any, **tolerance: Any) -> None:
    def compare(path: Any, x: Any, y: Any) -> None:
        np.testing.assert_allclose(x, y, err_msg=jax.tree_util.keystr(path), **tolerance)

    jax.tree_util.tree_map_with_path(compare, a, b)


# The formula, written again: the energy from the model, everything else here.


class Step(NamedTuple):
    energies: Any  # E(p), [B, L]
    slope: Any  # dE/dp, [B, L, V]
    after: Any  # z of the next step, [B, L, V]


@functools.cache
def step_by_hand(num_landscapes: int, embedding: Any, space: str) -> Any:
    cfg = EnergyConfig(num_landscapes=num_landscapes, candidate_embedding=embedding)
    model = energy.model_config(MODEL, cfg)

    def judge(params, batch, k, p):
        rows = Rows(batch.positions, batch.segments)
        cache = energy_transformer.observe(
            model, params, batch.inputs, positions=rows.positions, segments=rows.segments
        )
        padded = jnp.pad(p, ((0, 0), (0, 0), (0, MODEL.padded_vocab_size - V)))
        landscape = energy_transformer.landscape_at(cache, k)
        energies = energy_transformer.judge(model, params, padded, rows, landscape)
        return energies.sum(), energies

    @jax.jit
    def step(params, batch, k, z):
        p = jnp.exp(z) / jnp.exp(z).sum(-1, keepdims=True)
        g, energies = jax.grad(judge, argnums=3, has_aux=True)(params, batch, k, p)
        alpha = params["step_size"]["value"] * ALPHA
        if space == "probability":
            return Step(energies, g, p - alpha * g)
        # dp_i / dz_j = p_i (delta_ij - p_j)
        return Step(energies, g, z - alpha * p * (g - (p * g).sum(-1, keepdims=True)))

    return step


def by_hand(
    cfg: EnergyConfig, batch: Batch, num_steps: int, params: Any, frozen: Any
) -> list[Step]:
    """Steps from equal logits. Where each begins comes from `frozen`, the step from `params`."""
    step = step_by_hand(cfg.landscapes, cfg.candidate_embedding, cfg.space)
    z, steps = jnp.zeros((*batch.inputs.shape, V)), []
    for k in range(num_steps):
        steps.append(step(params, batch, jnp.int32(k), z))
        z = step(frozen, batch, jnp.int32(k), z).after
    return steps


def nll(logits: Any, batch: Batch) -> Any:
    """Mean cross-entropy over the targets that count."""
    each = -(jax.nn.log_softmax(logits) * jax.nn.one_hot(batch.targets, V)).sum(-1)
    return (each * batch.where).sum() / batch.where.sum()


def losses_by_hand(cfg, batch, num_steps, params, frozen):
    return jnp.stack([nll(s.after, batch) for s in by_hand(cfg, batch, num_steps, params, frozen)])


def directions(params: Any, count: int) -> list[Any]:
    rng = np.random.default_rng(7)
    return [jax.tree.map(lambda x: rng.normal(size=x.shape), params) for _ in range(count)]


def slope_along(function: Any, params: Any, direction: Any, eps: float = 1e-4) -> float:
    """Central difference of fourth order."""

    def at(t):
        return float(function(jax.tree.map(lambda x, d: x + t * d, params, direction)))

    return (8 * (at(eps) - at(-eps)) - (at(2 * eps) - at(-2 * eps))) / (12 * eps)


def assert_slopes(function: Any, params: Any, grads: Any) -> None:
    for direction in directions(params, 2):
        # The start of the step size is not trained.
        direction = direction | {"step_unit": {"value": jnp.zeros(())}}
        parts = jax.tree.map(lambda g, d: jnp.sum(g * d), grads, direction)
        along = float(sum(jax.tree.leaves(parts)))
        assert abs(along) > 1e-3
        assert along == pytest.approx(slope_along(function, params, direction), rel=1e-5)


FORMULAS = {
    "system_1": dataclasses.replace(STILL, max_steps=3),
    "system_2": dataclasses.replace(LAST, max_steps=4),
    "in_logits": dataclasses.replace(LAST, space="logit", candidate_embedding="token"),
}


def reductions(cfg: EnergyConfig, each: Any) -> list[Any]:
    """The loss for every number of steps that may be drawn."""
    numbers = range(cfg.num_steps, cfg.most_steps + 1)
    return [each[:n].mean() if cfg.loss_steps == "all" else each[n - 1] for n in numbers]


@pytest.mark.parametrize("name", FORMULAS)
def test_the_loss_and_its_gradient_by_hand(name):
    # With what each step begins from held fixed: gradients go through one step at a time.
    cfg = FORMULAS[name]
    params, batch = params_of(cfg), make_batch()
    found = run(cfg, batch)
    hand = functools.partial(losses_by_hand, cfg, batch, cfg.most_steps)
    each = np.asarray(hand(params, params))
    possible = reductions(cfg, each)
    assert cfg.most_steps == 2 or np.diff(sorted(possible)).min() > 1e-4
    (taken,) = np.flatnonzero(np.isclose(possible, float(found.value), rtol=1e-10, atol=0))
    last = each[cfg.num_steps + taken - 1]
    assert mean_of(found, "loss") == pytest.approx(float(last), rel=1e-10)
    if cfg.loss_steps == "all":
        assert mean_of(found, "loss_first_step") == pytest.approx(float(each[0]), rel=1e-10)

    def loss(moved):
        return reductions(cfg, hand(moved, params))[taken]

    assert_slopes(loss, params, found.grads)


def test_the_gradient_through_the_whole_descent():
    cfg = dataclasses.replace(S1, gradient="all_steps")
    found, one = run(cfg), run(S1)
    assert_slopes(lambda params: run(cfg, params=params).value, params_of(cfg), found.grads)
    assert float(one.value) == pytest.approx(float(found.value), rel=1e-12)
    table, other = (x.grads["candidate_embedding"]["table"] for x in (found, one))
    assert not np.allclose(table, other, rtol=1e-2)


def test_memory_changes_no_number():
    found, saved = run(S1), run(dataclasses.replace(S1, memory="save"))
    assert float(found.value) == pytest.approx(float(saved.value), rel=1e-12)
    assert_trees_close(found.grads, saved.grads, rtol=1e-9, atol=1e-12)


def test_metrics_by_hand():
    cfg = FORMULAS["in_logits"]
    found, batch, params = run(cfg), make_batch(), params_of(cfg)
    last = by_hand(cfg, batch, 2, params, params)[-1]
    where = batch.where
    assert float(found.metrics["energy"][0]) == pytest.approx(float(last.energies[where].sum()))
    assert float(found.metrics["energy"][1]) == float(where.sum()) == B * L - 3
    assert mean_of(found, "step_size") == pytest.approx(0.7 * ALPHA)
    # Of the last step's slope, which in this space is in logits.
    before = by_hand(cfg, batch, 2, params, params)[0].after
    update = math.sqrt(float(jnp.square(last.after - before).mean()))
    assert mean_of(found, "update") == pytest.approx(update)
    assert mean_of(found, "energy_slope") == pytest.approx(update / (0.7 * ALPHA))


# What is drawn.


@pytest.mark.parametrize("name", ["system_1", "system_2"])
def test_the_number_of_steps_is_drawn_for_the_whole_batch(name):
    cfg = FORMULAS[name]
    params = params_of(cfg)
    each = losses_by_hand(cfg, make_batch(), cfg.most_steps, params, params)
    possible = {round(float(x), 9) for x in reductions(cfg, each)}
    found = {round(float(run(cfg, key=key).value), 9) for key in jax.random.split(KEY, 16)}
    assert found == possible
    assert len(found) == cfg.most_steps - cfg.num_steps + 1


def test_the_step_size_is_drawn_for_each_position():
    # One step from equal logits, whose end is stored: z = p - alpha g tells alpha.
    cfg = dataclasses.replace(
        LAST, num_steps=1, random_step_size=3.0, replay_size=B, learn_step_size=False
    )
    params, batch, drawn = params_of(cfg), make_batch(), []
    (step,) = by_hand(cfg, batch, 1, params, params)
    slope = np.asarray(step.slope)
    for key in jax.random.split(KEY, 8):
        found = run(cfg, key=key)
        alphas = (1 / V - final_logits(found)) / slope / (0.7 * ALPHA)
        largest = np.abs(slope).argmax(-1)[..., None]
        alpha = np.take_along_axis(alphas, largest, -1)
        np.testing.assert_allclose(
            1 / V - final_logits(found), alpha * slope * 0.7 * ALPHA, atol=1e-5
        )
        assert mean_of(found, "step_size") > 0
        drawn.append(alpha.ravel())
    drawn = np.concatenate(drawn)
    assert len(np.unique(drawn.round(5))) > 0.95 * drawn.size
    assert 1 / 3 < drawn.min() < 0.45
    assert 2.8 < drawn.max() < 3
    # Uniform between the two: mean 5 / 3, standard deviation (8 / 3) / sqrt(12).
    assert drawn.mean() == pytest.approx(5 / 3, abs=0.2)
    assert drawn.std() == pytest.approx(8 / 3 / math.sqrt(12), abs=0.1)


@pytest.mark.parametrize("space", ["probability", "logit"])
def test_langevin_noise_is_that_of_its_scale_in_every_step(space):
    model = energy.model_config(MODEL, S2)
    cfg = dataclasses.replace(S2, space=space)
    descent = energy_text.Descent(cfg, model, 3.0, KEY)
    zeros = jnp.zeros((50, L, MODEL.padded_vocab_size))

    def noise(descent, step):
        begun = descent.start(zeros, jnp.int32(step))[..., :V]
        return (
            begun if space == "logit" else jnp.log(begun) - jnp.log(begun).mean(-1, keepdims=True)
        )

    first, second = noise(descent, 0), noise(descent, 1)
    expected = 3.0 * (1.0 if space == "logit" else math.sqrt(1 - 1 / V))  # less the mean of V
    assert float(first.std()) == pytest.approx(expected, rel=0.03)
    assert abs(float(jnp.corrcoef(first.ravel(), second.ravel())[0, 1])) < 0.05
    np.testing.assert_array_equal(first, noise(descent, 0))
    assert float(jnp.abs(noise(descent._replace(sigma=0.0), 0)).max()) < 1e-12


def test_candidates_begin_as_normal_logits_or_all_equal():
    shape = (40, L, 128)
    cfg = dataclasses.replace(S1, initial_scale=2.0)
    z = energy_text.initial_logits(cfg, shape, KEY)
    assert float(z.mean()) == pytest.approx(0, abs=0.05)
    assert float(z.std()) == pytest.approx(2.0, rel=0.02)
    assert not energy_text.initial_logits(STILL, shape, KEY).any()


@pytest.mark.parametrize("cfg", [S1, S2])
def test_a_key_gives_the_same_again(cfg):
    first, again, other = run(cfg), run(cfg), run(cfg, key=jax.random.key(6))
    assert float(first.value) == float(again.value) != float(other.value)
    assert_trees_close(first.grads, again.grads, rtol=0)
    if cfg.replay_size:
        np.testing.assert_array_equal(final_logits(first), final_logits(again))
        assert not np.allclose(final_logits(first), final_logits(other), atol=1e-2)


# What must not be seen.


@pytest.mark.parametrize("cfg", [S1, S2])
@pytest.mark.parametrize("junk", [0, V - 1, MODEL.padded_vocab_size - 1])
def test_padding_may_hold_anything(cfg, junk):
    batch = make_batch()
    padding = batch.segments == 0
    spoiled = batch._replace(
        inputs=jnp.where(padding, junk, batch.inputs),
        targets=jnp.where(batch.where, batch.targets, junk),
        positions=jnp.where(padding, 3, batch.positions),
    )
    found, same = run(cfg, batch), run(cfg, spoiled)
    assert float(found.value) == float(same.value)
    assert float(found.metrics["loss"][1]) == float(same.metrics["loss"][1])
    assert_trees_close(found.grads, same.grads, rtol=1e-12, atol=1e-15)
    counted = run(cfg, batch._replace(where=batch.where.at[0, 3].set(True)))
    assert float(counted.value) != float(found.value)


def test_a_batch_of_padding_is_no_loss_and_no_gradient():
    found = run(S1, make_batch()._replace(where=jnp.zeros((B, L), bool)))
    assert float(found.value) == 0.0
    assert not any(leaf.any() for leaf in jax.tree.leaves(found.grads))


# The same arrays of noise for every text: what is drawn does not depend on tokens.
SEEN = {
    "system_1": S1,
    "system_2": S2,
    "whole_descent": dataclasses.replace(S1, gradient="all_steps"),
}


@pytest.mark.parametrize("name", SEEN)
@pytest.mark.parametrize("t", [1, 5])
def test_a_token_changes_no_prediction_before_itself(name, t):
    cfg = SEEN[name]
    batch = make_batch(rows=B, seed=3)
    batch = batch._replace(
        segments=jnp.ones((B, L), jnp.int32),
        positions=jnp.broadcast_to(jnp.arange(L, dtype=jnp.int32), (B, L)),
    )
    other = batch._replace(inputs=batch.inputs.at[:, t].add(1) % V)
    base, moved = final_logits(run(cfg, batch)), final_logits(run(cfg, other))
    np.testing.assert_array_equal(base[:, :t], moved[:, :t])
    assert (np.abs(base[:, t:] - moved[:, t:]).max(-1) > 1e-9).all()
    # Nor does any target: a candidate is not told what it is to become.
    answers = batch._replace(targets=(batch.targets + 1) % V)
    np.testing.assert_array_equal(base, final_logits(run(cfg, answers)))


@pytest.mark.parametrize("cfg", [S1, S2])
def test_a_token_has_no_gradient_from_predictions_before_itself(cfg):
    t, batch = 4, make_batch(seed=3)
    inputs = jnp.where(batch.inputs == 7, 6, batch.inputs).at[2:, t].set(7)
    batch = batch._replace(inputs=inputs)
    before = batch._replace(where=jnp.zeros((B, L), bool).at[2:, :t].set(True))
    at = batch._replace(where=jnp.zeros((B, L), bool).at[2:, t].set(True))
    row, reached = (run(cfg, part).grads["embedding"]["table"][7] for part in (before, at))
    assert not row.any()
    assert reached.any()


@pytest.mark.parametrize("space", ["probability", "logit"])
def test_the_padded_vocabulary_is_out_of_reach(space):
    model = energy.model_config(MODEL, S1)
    z = jnp.zeros((1, 1, 128)).at[..., V:].set(50.0)
    assert float(jax.nn.softmax(energy_text.mask_padding(z, V))[..., V:].sum()) == 0.0
    assert energy_text.mask_padding(z, 128) is z
    if space == "probability":
        descent = energy_text.Descent(S1, model, 0.0, KEY)
        start = descent.start(z, jnp.int32(0))
        np.testing.assert_allclose(start[0, 0], jnp.where(jnp.arange(128) < V, 1 / V, 0.0))
        return
    params, batch = params_of(S1), make_batch()
    judge = energy_text.energy_function(model, space)

    @jax.jit
    @jax.grad
    def slope_at(z):
        seen = energy_text.observe(model, params, batch)
        seen = energy_text.Descent(S1, model, 0.0, KEY).context_at(seen, jnp.int32(0))
        return judge(params, seen, z).sum()

    slope = slope_at(jax.random.normal(KEY, (B, L, 128)))
    assert not slope[..., V:].any()
    assert slope[..., :V].any()


# The step size.


def test_the_step_size_is_clamped_in_the_forward_pass_alone():
    def sizes(value):
        return {"step_size": {"value": value}, "step_unit": {"value": jnp.float64(4.0)}}

    def alpha(value):
        return energy_text.step_size(sizes(value))

    assert float(alpha(0.5)) == 2.0
    assert float(alpha(1e-9)) == float(alpha(-3.0)) == 1e-4
    params = params_of(S1) | sizes(jnp.float64(-3.0))
    found = run(S1, params=params)
    assert mean_of(found, "step_size") == 1e-4
    assert float(found.grads["step_size"]["value"]) == 0.0
    assert found.grads["candidate_embedding"]["table"].any()


@pytest.fixture(scope="module")
def step_gradients():
    with jax.enable_x64(True):
        return run(S1).grads


def optimizer_of(cfg: EnergyConfig, **fields: Any) -> optax.GradientTransformation:
    values = {"learning_rate": 0.01, "warmup_fraction": 0.0, "schedule": "constant"}
    method = make(cfg)
    return make_optimizer(
        OptimizerConfig(**(values | fields)), 10, rate_factors=method.rate_factors
    )


def test_a_relative_rate_of_three_is_a_rate_of_three_alpha(step_gradients):
    # The paper: alpha itself under Adam, at 3 alpha times the learning rate, without decay.
    optimizer = optimizer_of(S1, weight_decay=0.5, clip_norm=0.0, epsilon=1e-14)
    params, grads = params_of(S1), step_gradients
    moved: Any
    params = params | {"step_size": {"value": jnp.float64(1.0)}}
    alpha = jnp.float64(ALPHA)
    of_alpha = grads["step_size"]["value"] / ALPHA  # the chain rule: alpha = value * ALPHA
    absolute = optax.adam(3 * ALPHA * 0.01, eps=1e-14, b2=OptimizerConfig().beta2)
    state, absolute_state, moved = optimizer.init(params), absolute.init(alpha), params
    update: Any
    for factor in (1.0, -0.5, 2.0):
        scaled = jax.tree.map(lambda g, factor=factor: factor * g, grads)
        update, state = optimizer.update(scaled, state, moved)
        moved = optax.apply_updates(moved, update)
        update, absolute_state = absolute.update(factor * of_alpha, absolute_state, alpha)
        alpha = alpha + update
        assert float(energy_text.step_size(moved)) == pytest.approx(float(alpha), rel=1e-6)
    assert float(moved["step_unit"]["value"]) == ALPHA


def test_a_step_of_adam_on_the_step_size_by_hand(step_gradients):
    # Adam's first step is the rate times the sign: 1 -/+ 3 * 0.01, whatever the gradient.
    optimizer = optimizer_of(S1, weight_decay=0.5)
    params = params_of(S1) | {"step_size": {"value": jnp.float64(1.0)}}
    update: Any = optimizer.update(step_gradients, optimizer.init(params), params)[0]
    sign = math.copysign(1, float(step_gradients["step_size"]["value"]))
    assert float(update["step_size"]["value"]) == pytest.approx(-0.03 * sign, rel=1e-4)


def test_a_frozen_step_size_stays_and_does_not_count_in_the_norm():
    optimizer = optimizer_of(S2, weight_decay=0.5)
    params = params_of(S2)
    grads = run(S2).grads
    assert not grads["step_size"]["value"].any()
    assert not grads["step_unit"]["value"].any()
    assert run(S1).grads["step_size"]["value"].any()
    ones = jax.tree.map(jnp.ones_like, params)
    update: Any = optimizer.update(ones, optimizer.init(params), params)[0]
    assert not update["step_size"]["value"].any()
    assert not update["step_unit"]["value"].any()
    assert update["energy_head"]["kernel"].all()


def first_update(model: TransformerConfig, cfg: EnergyConfig) -> float:
    """Root mean square of a new model's first update, on the text that it was calibrated on."""
    key = jax.random.key(3)
    init = functools.partial(energy.init_params, model, cfg)
    params = partitioning.unbox(jax.jit(init)(key))
    energy_model = energy.model_config(model, cfg)
    text_key, initial_key, _ = jax.random.split(jax.random.fold_in(key, 1), 3)
    shape = energy.CALIBRATION_SHAPE
    tokens = jax.random.randint(text_key, shape, 0, model.vocab_size)
    positions = jnp.broadcast_to(jnp.arange(shape[1])[None], shape)
    ones = jnp.ones_like(tokens)
    logits = jax.random.normal(initial_key, (*shape, model.padded_vocab_size))
    logits = logits[..., : model.vocab_size]
    pad = ((0, 0), (0, 0), (0, model.padded_vocab_size - model.vocab_size))
    p = jnp.pad(jax.nn.softmax(logits), pad)

    @jax.jit
    @jax.grad
    def slope_at(p):
        cache = energy_transformer.observe(
            energy_model, params, tokens, positions=positions, segments=ones
        )
        cache = energy_transformer.landscape_at(cache, jnp.int32(0))
        rows = Rows(positions, ones)
        return energy_transformer.judge(energy_model, params, p, rows, cache).sum()

    slope = slope_at(p)[..., : model.vocab_size]
    return float(energy_text.step_size(params) * jnp.sqrt(jnp.square(slope).mean()))


@pytest.mark.parametrize("vocab_size", [V, 200])
def test_the_calibrated_step_moves_by_what_was_asked(vocab_size):
    model = dataclasses.replace(MODEL, vocab_size=vocab_size, max_length=64)
    cfg = EnergyConfig(update_rms=30.0)
    assert first_update(model, cfg) == pytest.approx(30.0, rel=1e-6)


# Validation.


@functools.cache
def evaluated(cfg: EnergyConfig, num_steps: int | None = None) -> Any:
    model = energy.model_config(MODEL, cfg)
    evaluate = energy_text.make_evaluate(cfg, model, num_steps=num_steps)
    step = {"step": jnp.int32(0), "key": KEY}
    run = jax.jit(lambda params, batch: evaluate(params, (), batch, **step)[1])
    return run(params_of(cfg), make_batch())


def test_validation_by_hand():
    cfg = dataclasses.replace(STILL, max_steps=3)
    metrics, batch, params = evaluated(cfg), make_batch(), params_of(cfg)
    steps = by_hand(cfg, batch, 4, params, params)
    where = np.asarray(batch.where)
    # The last energy is judged under the landscape of the last step, without noise.
    assert metrics.keys() == {
        "loss", "loss_step_1", "loss_step_2", "loss_step_3", "energy_step_0", "energy_step_1",
        "energy_step_2", "energy_step_3", "energy_falls", "later_helps",
    }  # fmt: skip
    picked = [
        np.asarray(-jax.nn.log_softmax(s.after))[np.indices((B, L))[0], np.indices((B, L))[1],
                                                 batch.targets]
        for s in steps[:3]
    ]  # fmt: skip
    energies = np.stack([np.asarray(s.energies) for s in steps])
    expected = {f"loss_step_{k + 1}": each for k, each in enumerate(picked)}
    expected |= {f"energy_step_{k}": each for k, each in enumerate(energies)}
    expected["loss"] = picked[2]
    expected["energy_falls"] = (np.diff(energies, axis=0) < 0).all(0)
    expected["later_helps"] = picked[2] < picked[0]
    for name, each in expected.items():
        total, count = (float(part) for part in metrics[name])
        assert total == pytest.approx(float(each[where].sum()), rel=1e-6), name
        assert count == where.sum(), name


def test_validation_can_think_longer_and_with_noise():
    cfg = dataclasses.replace(STILL, max_steps=3)
    longer = evaluated(dataclasses.replace(cfg, eval_noise=1.0), 5)
    assert len([name for name in longer if name.startswith("loss_step_")]) == 5
    assert float(longer["loss_step_1"][0]) != float(evaluated(cfg)["loss_step_1"][0])


def test_validation_has_no_replay_buffer():
    evaluate: Any = make(S2).evaluate
    batch = make_batch()
    _, metrics = jax.eval_shape(
        lambda params: evaluate(params, (), batch, step=jnp.int32(0), key=KEY),
        params_of(S2),
    )
    assert "loss_step_3" in metrics  # the largest number of steps
    assert "replayed" not in metrics


# The replay buffer in the loss.


def test_an_empty_buffer_is_no_more_than_rows_that_do_not_count():
    state = method_state(make(S2))
    found = run(S2, state=state)
    assert float(found.metrics["replayed"][0]) == 0
    assert float(found.metrics["loss"][1]) == float(make_batch().where.sum())


def test_a_replayed_row_goes_on_from_its_last_logits():
    # One step, without anything drawn but the row: a loss over fresh and continued rows.
    cfg = dataclasses.replace(LAST, num_steps=1, replay_size=B, replay_every=B)
    old, fresh, params = make_batch(seed=8), make_batch(), params_of(cfg)
    stored = run(cfg, old).state
    assert_trees_close(jax.tree.map(lambda x: x[0], stored.records[0]), old)
    logits = np.asarray(stored.records[1][0, :, :, :V])
    (step,) = by_hand(cfg, old, 1, params, params)
    np.testing.assert_allclose(logits, step.after, rtol=1e-5, atol=1e-6)
    found = run(cfg, fresh, state=stored)

    def end(batch, z):
        return step_by_hand(0, "own", "probability")(params, batch, jnp.int32(0), z).after

    def total(batch, z, row: Any = slice(None)):
        each = -(jax.nn.log_softmax(z) * jax.nn.one_hot(batch.targets, V)).sum(-1)
        return float((each * batch.where)[row].sum())

    of_fresh = total(fresh, end(fresh, jnp.zeros(logits.shape)))
    continued = end(old, logits.astype(np.float64))
    possible = [of_fresh + total(old, continued, row) for row in range(B)]
    rows = np.flatnonzero(np.isclose(possible, float(found.metrics["loss"][0]), rtol=1e-5))
    assert len(rows) == 1
    count = float(old.where[rows[0]].sum())
    assert float(found.metrics["replayed"][0]) == count
    assert float(found.metrics["loss"][1]) == float(fresh.where.sum()) + count
    # Fresh rows alone are stored, in place of the oldest.
    assert_trees_close(jax.tree.map(lambda x: x[0], found.state.records[0]), fresh)
    assert int(found.state.count) == 2


def test_the_buffer_holds_what_its_size_allows():
    state = method_state(make(dataclasses.replace(S2, replay_size=3 * B + 1)))
    assert state.records[1].shape == (3, B, L, MODEL.padded_vocab_size)
    assert state.records[1].dtype == jnp.float32
    assert isinstance(state, replay.Replay)


# What goes wrong, and what is refused.


def test_the_monitor_names_a_collapse():
    monitor = make(S1).monitor
    assert monitor is not None

    def said(update):
        found = monitor({"train/update": update, "train/step_size": 2.0})
        return str(found["train/energy_flat"]), str(found["train/descent_explodes"])

    assert said(100.0) == ("None", "None")
    assert monitor({"train/loss": 1.0}) == {}
    flat, fine = said(1e-6)
    assert fine == "None"
    assert "the energy is flat: its slope moves candidates by 1e-06 logits" in flat
    assert "below 0.01, which leaves" in flat
    fine, explodes = said(1e5)
    assert fine == "None"
    assert "the descent explodes: its updates have a root mean square of 1e+05" in explodes
    assert "above 10000; begin" in explodes
    for sentence in (flat, explodes):
        assert "energy.step_size" in sentence
        assert "\n" not in sentence


REFUSED = [
    ({"num_steps": 0}, r"energy\.num_steps=0 must be at least 1"),
    ({"step_size": -1.0}, r"energy\.step_size=-1\.0 must be at least 0\.0001, or none"),
    ({"num_steps": 3, "max_steps": 2}, r"energy\.max_steps=2 must be at least num_steps=3"),
    ({"random_step_size": 0.5}, r"energy\.random_step_size=0\.5 is a factor: at least 1"),
    ({"replay_every": 0}, r"energy\.replay_every=0 must be at least 1"),
    ({"noise": -1.0}, r"energy\.noise=-1\.0 must not be negative"),
    ({"update_rms": 0.0}, r"energy\.update_rms=0\.0 must be positive"),
    ({"num_landscapes": 3}, r"energy\.num_landscapes=3 must be between 0 and the 2 that these"),
    ({"loss_steps": "last", "num_landscapes": 2}, r"=2 must be between 0 and the 1 that these"),
    ({"space": "simplex"}, "space.*simplex.*probability.*logit"),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "message"), REFUSED)
def test_nonsense_is_refused_in_one_line(fields, message):
    with pytest.raises(ValueError, match=message) as refused:
        EnergyConfig(**fields)
    assert "\n" not in str(refused.value)


def test_what_does_not_fit_the_run_is_refused():
    with pytest.raises(ValueError, match=r"micro-batch of 4 sequences is not a multiple of "
                                         r"energy\.replay_every=3"):  # fmt: skip
        make(dataclasses.replace(S2, replay_every=3))
    with pytest.raises(ValueError, match=r"energy\.replay_size=3 is below a micro-batch of 4 "
                                         r"sequences; give at least 4, or 0"):  # fmt: skip
        make(dataclasses.replace(S2, replay_size=3))
    learned = dataclasses.replace(MODEL, positions="learned")
    with pytest.raises(ValueError, match=r"set model\.positions=rotary"):
        make(S1, model=learned)
    tied = dataclasses.replace(MODEL, tie_embeddings=True)
    with pytest.raises(ValueError, match=r"model\.tie_embeddings=True has no meaning in an energy"):
        make(S1, model=tied)


BIG = dataclasses.replace(MODEL, vocab_size=2**15, num_layers=1)


def too_large(cfg: EnergyConfig, **changes: Any) -> str:
    # An array of 16 rows of 2048 tokens over 2 ** 15 ids in float32 has 4 GiB.
    values = {"model": BIG, "batch_size": 16, "sequence_length": 2048} | changes
    with pytest.raises(ValueError, match="GiB") as refused:
        make(cfg, **values)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_candidates_that_do_not_fit_are_refused_with_a_way_out():
    # Two steps, of each of which training holds four arrays; validation would hold two and three.
    limit = dataclasses.replace(S1, replay_size=0, max_candidate_gib=20.0)
    said = too_large(limit)
    assert "in training than energy.max_candidate_gib=20.0 allows" in said
    assert "8 arrays of 4.00 GiB; give --train.num_microbatches=2 (if the mesh allows)," in said
    make(limit, model=BIG, batch_size=8, num_microbatches=2, sequence_length=2048)
    # One step of up to three is trained, and validation keeps them all.
    said = too_large(dataclasses.replace(S2, replay_size=0, max_candidate_gib=20.0))
    assert "in validation than" in said
    assert "6 arrays of 4.00 GiB; give --train.num_microbatches=2 (if the mesh allows)," in said
    # Not even one sequence fits.
    assert "batch" not in too_large(dataclasses.replace(limit, max_candidate_gib=1.0))


def test_the_replay_buffer_counts_and_micro_batches_do_not_shrink_it():
    cfg = dataclasses.replace(S2, replay_size=64, replay_every=1, max_candidate_gib=40.0)
    said = too_large(cfg)
    assert "4 arrays of 8.00 GiB and 16.0 GiB of replay buffer" in said
    # A micro-batch of 8 takes 16 + 16 GiB.
    assert "--train.num_microbatches=2 (if the mesh allows), a tokenizer of fewer" in said
    assert "a smaller energy.replay_size" in said
    assert "batch" not in too_large(dataclasses.replace(cfg, max_candidate_gib=16.0))
