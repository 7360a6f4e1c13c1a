"""What goes wrong with a recurrent model: how it is measured, named, and seen by every method."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlib_methods import depth_monitor, late_to_early, next_token, registry
from jaxlib_methods.depth_recurrence_config import DepthRecurrenceConfig
from jaxlib_methods.method import Batch, Context, Method, Pretrained
from jaxlib_methods.models import language_model, partitioning
from jaxlib_methods.models.config import TransformerConfig

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
PLAIN = dataclasses.replace(MODEL, recurrence=0, block="pre_norm", backprop_steps=None)
CONFIGS: dict[str, Any] = {
    "depth_recurrence": DepthRecurrenceConfig(),
    "next_token": next_token.NextTokenConfig(),
    "late_to_early": late_to_early.LateToEarlyConfig(teacher="small", stop_step=4),
}
KEY = jax.random.key(4)
WHERE = np.array([[1, 1, 1, 1, 0, 1], [1, 1, 1, 0, 0, 0]], bool)


def build(name: str, model: TransformerConfig = MODEL) -> Method:
    def small(source: str, *, weights: bool = True, dtype: str | None = None) -> Pretrained:
        return Pretrained(PLAIN, params(PLAIN) if weights else None, "bytes")

    context = Context(
        model=model,
        num_steps=8,
        sequence_length=6,
        batch_size=2,
        tokenizer="bytes",
        load_pretrained=small,
    )
    return registry.build(name, CONFIGS[name], context)


@functools.cache
def params(model: TransformerConfig) -> Any:
    """Parameters of which none is where it starts, so that depth matters."""
    rng = np.random.default_rng(1)
    shapes = jax.eval_shape(lambda: language_model.init_params(model, jax.random.key(0)))
    return jax.tree.map(
        lambda x: jnp.asarray(rng.normal(size=x.shape) * 0.5, x.dtype), partitioning.unbox(shapes)
    )


def batch() -> Batch:
    tokens = np.random.default_rng(0).integers(0, 13, (2, 7)).astype(np.int32)
    positions = np.broadcast_to(np.arange(6, dtype=np.int32), (2, 6))
    segments = np.ones((2, 6), np.int32)
    return Batch(tokens[:, :-1], tokens[:, 1:], positions, segments, WHERE)  # pyright: ignore[reportArgumentType]


def means(metrics: Any) -> dict[str, float]:
    return {name: float(total / count) for name, (total, count) in metrics.items()}


# Two tokens of a sequence.


def similarity(state: Any, where: Any) -> float:
    total, count = depth_monitor.token_similarity(jnp.asarray(state), where=jnp.asarray(where))
    return float(total / count)


def test_token_similarity_by_hand():
    everywhere = jnp.ones((1, 3), bool)
    same = np.array([[[3.0, 4.0], [6.0, 8.0], [0.3, 0.4]]])
    assert similarity(same, everywhere) == pytest.approx(1.0)
    assert similarity(np.eye(3)[None], everywhere) == pytest.approx(0.0, abs=1e-6)
    # Cosines 0.6, -1 and -0.6.
    three = np.array([[[1.0, 0.0], [6.0, 8.0], [-2.0, 0.0]]])
    assert similarity(three, everywhere) == pytest.approx((0.6 - 1.0 - 0.6) / 3)
    total, count = depth_monitor.token_similarity(jnp.asarray(three), where=everywhere)
    assert (float(total), float(count)) == (pytest.approx(-2.0), 6.0)  # each pair twice


def test_token_similarity_reads_no_masked_token_and_no_other_row():
    state = np.array([[[1.0, 0.0], [np.nan, np.inf], [6.0, 8.0]], [[0.0, -1.0]] * 3])
    where = np.array([[True, False, True], [True, False, False]])
    assert similarity(state, where) == pytest.approx(0.6)
    slope = jax.grad(lambda x: depth_monitor.token_similarity(x, where=jnp.asarray(where))[0])(
        jnp.asarray(state)
    )
    assert not slope.any()


# What every method measures.


@functools.cache
def measured(name: str) -> tuple[dict[str, float], dict[str, float]]:
    """Metrics of a step of training and of a validation, from the same first states."""
    method = build(name)
    extra = method.init(KEY)

    def run(fn: Any, key: jax.Array) -> dict[str, float]:
        step = jnp.int32(0)
        jitted = jax.jit(lambda p, extra: fn(p, extra, batch(), step=step, key=key)[1])
        return means(jitted(params(MODEL), extra))

    # `outputs_at` draws no number of iterations, and takes the key as it is.
    of_state = jax.random.split(KEY)[1] if name == "depth_recurrence" else KEY
    return run(method.loss, KEY), run(method.evaluate, of_state)


@pytest.mark.parametrize("name", ["next_token", "late_to_early"])
def test_every_method_measures_what_depth_recurrence_does(name: str):
    expected, found = measured("depth_recurrence"), measured(name)
    for state in ("iterations", "state_change", "state_norm", "token_similarity"):
        assert found[0][state] == pytest.approx(expected[0][state], rel=1e-5), state
    assert found[1]["loss"] == pytest.approx(expected[1]["loss"], rel=1e-5)
    assert found[1]["depth_gain"] == pytest.approx(expected[1]["depth_gain"], rel=1e-4)
    assert abs(expected[1]["depth_gain"]) > 1e-2, "weights that tell nothing"


@pytest.mark.parametrize("name", ["next_token", "late_to_early"])
def test_a_plain_model_is_not_watched(name: str):
    method = build(name, PLAIN)
    assert method.monitor is None
    found = jax.eval_shape(
        lambda: method.loss(params(PLAIN), method.init(KEY), batch(), step=jnp.int32(0), key=KEY)
    )[1]
    assert not {"token_similarity", "iterations"} & set(found)


# What it says.


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_the_two_failures_of_large_runs_are_named(name: str):
    method: Method | None = build(name)
    while method is not None:  # after the stop step too
        check_names(method.monitor)
        method = method.then


def check_names(monitor: Any) -> None:
    assert monitor({"step": 1, "train/token_similarity": 0.99}) == {"train/collapsed": None}
    assert monitor({"step": 1, "train/token_similarity": 0.9912}) == {
        "train/collapsed": "the states of all tokens are the same: their mean cosine is 0.9912, "
        "above 0.99; begin anew with a lower optimizer.learning_rate, model.block=sandwich or "
        "model.injection=linear"
    }
    name = "validation/depth_ignored"
    assert monitor({"step": 8, "validation/depth_gain": 0.02}) == {name: None}
    assert monitor({"step": 8, "validation/depth_gain": 0.0199}) == {
        name: "the state is ignored: 3 iterations predict only 0.0199 nats better than one, below "
        "0.02; begin anew with a lower optimizer.learning_rate or model.block=sandwich"
    }
    assert monitor({"step": 8, "train/loss": 1.0}) == {}


def test_a_state_may_be_ignored_for_a_quarter_of_the_run():
    monitor = depth_monitor.make_monitor(8, 3)
    judged = [monitor({"step": step, "validation/depth_gain": -1.0}) for step in range(1, 9)]
    assert [bool(found) for found in judged] == [False] + [True] * 7  # of 8 steps
    once = depth_monitor.make_monitor(8, 1)
    assert once({"step": 8, "validation/depth_gain": 0.0}) == {}
    assert once({"step": 8, "train/token_similarity": 1.0})["train/collapsed"] is not None
