"""Recurrent-depth language models: the loss, validation at other depths, baselines."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlib_methods import depth_monitor, depth_recurrence, flops, next_token, registry
from jaxlib_methods.depth_recurrence_config import DepthRecurrenceConfig
from jaxlib_methods.method import Batch, Context, Method
from jaxlib_methods.models import language_model, partitioning, recurrent_training
from jaxlib_methods.models.config import TransformerConfig
from jaxlib_methods.train import state as train_state
from jaxlib_methods.train.config import OptimizerConfig
from jaxlib_methods.train.optimizer import make_optimizer, make_schedule
from jaxlib_methods.train.step import make_train_step

MODEL = TransformerConfig(
    vocab_size=13,
    num_layers=3,
    embed_dim=8,
    num_heads=2,
    mlp_dim=12,
    max_length=8,
    block="sandwich",
    recurrence=3,
    backprop_steps=2,
    compute_dtype="float32",
)
CFG = DepthRecurrenceConfig(eval_steps=(2, 5))
STEP = jnp.int32(0)
KEY = jax.random.key(4)


def build(cfg: DepthRecurrenceConfig = CFG, model: TransformerConfig = MODEL) -> Method:
    def no_teacher(source: str, *, weights: bool = True, dtype: str | None = None) -> Any:
        raise AssertionError(f"read {source}")

    context = Context(
        model=model,
        num_steps=8,
        sequence_length=6,
        batch_size=2,
        tokenizer="bytes",
        load_pretrained=no_teacher,
    )
    return depth_recurrence.make(cfg, context)


@functools.cache
def params() -> Any:
    """Parameters of which none is where it starts, so that depth matters."""
    rng = np.random.default_rng(1)
    shapes = jax.eval_shape(lambda: language_model.init_params(MODEL, jax.random.key(0)))
    return jax.tree.map(
        lambda x: jnp.asarray(rng.normal(size=x.shape) * 0.5, x.dtype), partitioning.unbox(shapes)
    )


def packed() -> Batch:
    """Two documents in the first row, one and padding in the second."""
    tokens = np.random.default_rng(0).integers(0, 13, (2, 7)).astype(np.int32)
    positions = np.array([[0, 1, 2, 0, 1, 2], [0, 1, 2, 3, 0, 0]], np.int32)
    segments = np.array([[1, 1, 1, 2, 2, 2], [1, 1, 1, 1, 0, 0]], np.int32)
    where = np.array([[1, 1, 0, 1, 1, 1], [1, 1, 1, 0, 0, 0]], bool)
    return Batch(tokens[:, :-1], tokens[:, 1:], positions, segments, where)  # pyright: ignore[reportArgumentType]


@functools.cache
def compiled(name: str) -> Any:
    """`loss`, `evaluate` or `slope` of (params, batch, key)."""
    method = build()
    fn: Any = method.evaluate if name == "evaluate" else method.loss

    def run(params: Any, batch: Batch, key: jax.Array) -> Any:
        return fn(params, (), batch, step=STEP, key=key)

    return jax.jit(jax.value_and_grad(run, has_aux=True) if name == "slope" else run)


@functools.cache
def forward() -> Any:
    """`recurrent_training.forward` of (params, batch, key, num_steps)."""

    def run(params: Any, batch: Batch, key: jax.Array, num_steps: jax.Array) -> Any:
        return recurrent_training.forward(
            MODEL, params, batch.inputs, key=key, num_steps=num_steps,
            positions=batch.positions, segments=batch.segments,
        )  # fmt: skip

    return jax.jit(run)


def means(metrics: Any) -> dict[str, float]:
    return {name: float(total / count) for name, (total, count) in metrics.items()}


def nll_by_hand(logits: jax.Array, batch: Batch) -> float:
    z = np.asarray(logits, np.float64)[..., :13]
    log_probs = z - np.log(np.exp(z).sum(-1, keepdims=True))
    chosen = np.take_along_axis(log_probs, np.asarray(batch.targets)[..., None], axis=-1)[..., 0]
    return float(-chosen[np.asarray(batch.where)].mean())


# The loss.


def test_the_loss_is_the_last_iteration_s():
    batch, seen = packed(), set()
    for number in range(6):
        key = jax.random.key(number)
        scalar, metrics = compiled("loss")(params(), batch, key)
        steps_key, state_key = jax.random.split(key)
        steps = recurrent_training.draw_steps(MODEL, steps_key)
        out = forward()(params(), batch, state_key, steps)
        found = means(metrics)
        assert float(scalar) == pytest.approx(nll_by_hand(out.logits, batch), rel=1e-5)
        assert found["loss"] == pytest.approx(float(scalar), rel=1e-6)
        assert found["iterations"] == float(steps)
        assert found["state_change"] == pytest.approx(float(out.changes[-1]), rel=1e-4)
        assert found["state_norm"] == pytest.approx(float(out.norms[-1]), rel=1e-4)
        total, count = depth_monitor.token_similarity(out.state, where=jnp.asarray(batch.where))
        of_tokens = float(total / count)
        assert found["token_similarity"] == pytest.approx(of_tokens, rel=1e-3, abs=1e-4)
        counts = {name: float(count) for name, (_, count) in metrics.items()}
        # Five and three targets; pairs of five and of three tokens.
        assert counts == dict.fromkeys(counts, 8.0) | {"token_similarity": 5 * 4 + 3 * 2}
        seen.add(float(steps))
    assert len(seen) > 2


def test_masked_targets_may_be_anything():
    batch = packed()
    other = batch._replace(
        targets=np.where(batch.where, batch.targets, 99),  # pyright: ignore[reportArgumentType]
        inputs=np.where(batch.segments, batch.inputs, 12),  # pyright: ignore[reportArgumentType]
    )
    (expected, metrics), wanted = compiled("slope")(params(), batch, KEY)
    (got, found), slope = compiled("slope")(params(), other, KEY)
    assert float(got) == float(expected)
    assert means(found) == means(metrics)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), slope, wanted)
    judged = [means(compiled("evaluate")(params(), rows, KEY)[1]) for rows in (batch, other)]
    assert judged[0] == judged[1]


def test_one_program_serves_every_depth():
    method, traced = build(), []

    def loss(*args: Any, **kwargs: Any) -> Any:
        traced.append(1)
        return method.loss(*args, **kwargs)

    options = OptimizerConfig()
    optimizer, mesh = make_optimizer(options, 9), partitioning.make_mesh(devices=jax.devices()[:1])
    with jax.set_mesh(mesh):
        abstract = train_state.abstract_state(method, optimizer, mesh)
        state = train_state.create_state(method, optimizer, abstract, jax.random.key(0))
        schedule = make_schedule(options, 9)
        step: Any = make_train_step(loss, optimizer, schedule, abstract)
        seen = []
        for _ in range(5):
            state, metrics = step(state, (), packed(), jax.random.key(1))
            seen.append(means(metrics)["iterations"])
    assert len(set(seen)) > 2
    assert (len(traced), step._cache_size()) == (1, 1)


# Validation.


def test_validation_is_the_model_at_each_number_of_iterations():
    batch = packed()
    scalar, metrics = compiled("evaluate")(params(), batch, KEY)
    found = means(metrics)
    at = {
        steps: nll_by_hand(forward()(params(), batch, KEY, jnp.int32(steps)).logits, batch)
        for steps in (1, 2, 3, 5)
    }
    assert set(found) == {"loss", "loss_at_1", "loss_at_2", "loss_at_5", "depth_gain"}
    for steps in (1, 2, 5):
        assert found[f"loss_at_{steps}"] == pytest.approx(at[steps], rel=1e-5)
    assert found["loss"] == pytest.approx(at[3], rel=1e-5)
    assert float(scalar) == pytest.approx(at[3], rel=1e-5)
    assert found["depth_gain"] == pytest.approx(at[1] - at[3], rel=1e-3, abs=1e-5)
    assert {float(count) for _, count in metrics.values()} == {8.0}
    assert len({round(loss, 3) for loss in at.values()}) == 4  # depth does something here


def test_a_model_of_one_iteration_is_measured_at_one():
    once = dataclasses.replace(MODEL, recurrence=1, backprop_steps=1)
    method = build(DepthRecurrenceConfig(), once)
    assert method.evaluate is not None
    metrics = jax.eval_shape(
        lambda p, b: method.evaluate(p, (), b, step=STEP, key=KEY)[1],  # pyright: ignore[reportOptionalCall]
        params(),
        packed(),
    )
    assert set(metrics) == {"loss", "depth_gain"}


# What it is compared with.


def test_a_method_of_text_has_the_flops_of_its_model():
    method = build()
    assert method.flops_per_token == flops.train_flops(MODEL, 6)
    assert method.dataset is None


def test_the_baseline_of_language_is_the_same_blocks_once():
    full = dataclasses.replace(
        MODEL, recurrence_sampling="uniform", injection="add", tie_embeddings=True
    )
    found = registry.baseline("depth_recurrence", full, CFG)
    assert (found.method, found.config) == ("next_token", next_token.NextTokenConfig())
    shapes, of_full = (
        jax.eval_shape(lambda model=model: language_model.init_params(model, jax.random.key(0)))
        for model in (found.model, full)
    )
    assert jax.tree.map(jnp.shape, shapes) == jax.tree.map(jnp.shape, of_full)
    assert recurrent_training.mean_steps(found.model) == (0.0, 1.0)
    assert dataclasses.replace(found.model, recurrence=4, recurrence_sampling="uniform") == (
        dataclasses.replace(full, recurrence=4, backprop_steps=None)
    )


@pytest.mark.parametrize("recurrence", ["gated", "tied"])
def test_the_baseline_of_questions_has_a_block_for_each_step(recurrence: Any):
    model = TransformerConfig(embed_dim=8, num_heads=2)
    cfg = DepthRecurrenceConfig(task="logic", recurrence=recurrence, max_steps=5, dropout=0.2)
    found = registry.baseline("depth_recurrence", model, cfg)
    expected = dataclasses.replace(cfg, recurrence="untied")
    assert found == registry.Baseline("depth_recurrence", model, expected)
    questions = found.config.resolved()
    assert questions.model(model).weights == "untied"
    assert questions.train_steps == (5, 5)
    assert questions.dataset("train").fingerprint == cfg.resolved().dataset("train").fingerprint
    again = registry.baseline("depth_recurrence", model, expected)
    assert again == found  # which `prepare.plan` refuses to train twice


@pytest.mark.parametrize(
    ("cfg", "model"),
    [
        (CFG, MODEL),
        (DepthRecurrenceConfig(task="kinship"), TransformerConfig(embed_dim=8, num_heads=2)),
    ],
)
def test_the_model_of_a_run_is_the_one_that_inference_makes(cfg: Any, model: TransformerConfig):
    method = build(dataclasses.replace(cfg, num_train=0) if cfg.task != "language" else cfg, model)
    key = jax.random.key(0)
    trained = jax.eval_shape(method.init_params, key)
    made = jax.eval_shape(lambda key: registry.init_model("depth_recurrence", model, cfg, key), key)
    assert jax.tree.structure(made) == jax.tree.structure(trained)
    assert jax.tree.leaves(made) == jax.tree.leaves(trained)
