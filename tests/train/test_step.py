"""Accumulation over micro-batches, the train step's bookkeeping, and the second program of LET."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlib_methods import late_to_early, losses, next_token
from jaxlib_methods.method import Batch, Context, Method, Pretrained
from jaxlib_methods.models import partitioning
from jaxlib_methods.models.config import TransformerConfig
from jaxlib_methods.models.transformer import init_params
from jaxlib_methods.train import state as train_state
from jaxlib_methods.train.config import OptimizerConfig
from jaxlib_methods.train.optimizer import make_optimizer, make_schedule
from jaxlib_methods.train.step import loss_and_gradients, make_eval_step, make_train_step

L = 7
MODEL = TransformerConfig(
    vocab_size=11, num_layers=2, embed_dim=12, num_heads=2, mlp_dim=10, max_length=L,
    compute_dtype="float64", param_dtype="float64",
)  # fmt: skip
SINGLE = dataclasses.replace(MODEL, compute_dtype="float32", param_dtype="float32")
TEACHER = dataclasses.replace(SINGLE, embed_dim=26, num_heads=1)


def make_batch(lengths):
    """Rows of `lengths` random tokens, the rest padding."""
    ids = np.random.default_rng(0).integers(1, 11, (len(lengths), L + 1), dtype=np.int32)
    where = np.arange(L) < np.array(lengths)[:, None]
    positions = np.broadcast_to(np.arange(L, dtype=np.int32), where.shape)
    fields = (ids[:, :-1], ids[:, 1:], positions, where.astype(np.int32), where)
    return Batch(*map(jnp.asarray, fields))


def test_microbatches_of_unequal_padding_are_one_batch():
    batch = make_batch([7, 1, 2, 0, 7, 3, 5, 0])  # rows 3 and 7 are the fourth micro-batch: empty
    loss = next_token.make_loss(MODEL)

    @jax.jit
    def three_ways():
        params = partitioning.unbox(init_params(MODEL, jax.random.key(0)))

        def gradients(batch, num_microbatches):
            return loss_and_gradients(
                loss, params, (), batch,
                step=jnp.int32(0), key=jax.random.key(1), num_microbatches=num_microbatches,
            )  # fmt: skip

        of_each, _, _ = jax.vmap(lambda part: gradients(part, 1))(partitioning.split_rows(batch, 4))
        mean_of_means = jax.tree.map(lambda g: g[:3].mean(0), of_each)
        return gradients(batch, 1), gradients(batch, 4), mean_of_means

    with jax.enable_x64(True):
        (whole, metrics, _), (parts, same, _), mean_of_means = three_ways()
    assert float(metrics["loss"][1]) == float(same["loss"][1]) == 25
    assert float(metrics["loss"][0]) == pytest.approx(float(same["loss"][0]), rel=1e-12)
    assert max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(whole)) > 0.01
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(parts), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-12)
    table, wrong = (np.asarray(tree["embedding"]["table"]) for tree in (whole, mean_of_means))
    assert not np.allclose(table, wrong, rtol=1e-2)


def toy_loss(params, extra, batch, *, step, key):
    """Every token pulls by one; the metric `draw` shows the key, `step` the step."""
    del extra
    count = jnp.sum(batch.where, dtype=jnp.float32)
    scalar = params["kernel"].sum() * jnp.where(count > 0, 1.0, 0.0).astype(params["kernel"].dtype)
    draw = (jax.random.uniform(key), jnp.ones(()))
    return scalar, {"loss": (count, count), "draw": draw, "step": (step * 1.0, jnp.ones(()))}


def test_half_precision_gradients_are_added_up_in_float32():
    # 320 micro-batches of one token with slope 1; a bfloat16 sum stops at 256.
    params = {"kernel": jnp.ones(1, jnp.bfloat16)}
    grads, _, _ = loss_and_gradients(
        toy_loss, params, (), make_batch([1] * 320),
        step=jnp.int32(0), key=jax.random.key(0), num_microbatches=320,
    )  # fmt: skip
    assert grads["kernel"].dtype == jnp.bfloat16
    assert float(grads["kernel"][0]) == 1.0


def counting_loss(params, extra, batch, state, *, step, key):
    """Adds what has been seen so far to the slope: it shows which state a micro-batch was given."""
    del extra, step, key
    count = batch.where.sum(dtype=jnp.float32)
    scalar = params["kernel"].sum() * state["seen"]
    return scalar, {"loss": (state["seen"], count)}, {"seen": state["seen"] + count}


def test_the_state_goes_from_one_micro_batch_to_the_next():
    # Micro-batches of rows (0, 2) and (1, 3): 3 and 6 tokens, behind 10 of an earlier step.
    params, state = {"kernel": jnp.ones(2)}, {"seen": jnp.float32(10)}

    def three(num_microbatches):
        return loss_and_gradients(
            counting_loss, params, (), make_batch([1, 4, 2, 2]), state=state,
            step=jnp.int32(0), key=jax.random.key(0), num_microbatches=num_microbatches,
        )  # fmt: skip

    grads, metrics, after = three(1)
    np.testing.assert_allclose(grads["kernel"], [10, 10])
    assert (float(metrics["loss"][0]), float(after["seen"])) == (10, 19)
    grads, metrics, after = three(2)
    np.testing.assert_allclose(grads["kernel"], np.full(2, (3 * 10 + 6 * 13) / 9), rtol=1e-6)
    assert (float(metrics["loss"][0]), float(after["seen"])) == (10 + 13, 19)


def test_the_train_step_keeps_the_state_and_validation_has_none():
    optimizer = optax.sgd(1.0)
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    params = {"kernel": jnp.zeros(3)}
    state = train_state.TrainState(
        jnp.int32(0), params, optimizer.init(params), {"seen": jnp.float32(0)}
    )
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), state
    )
    step = make_train_step(counting_loss, optimizer, lambda step: 0.0 * step, abstract)
    for seen in (7.0, 14.0):
        state, _ = step(state, (), make_batch([7]), jax.random.key(0))
        assert float(state.method_state["seen"]) == seen
    method = Method(
        init_params=jnp.zeros, init=lambda key: (), loss=counting_loss, flops_per_token=0.0,
        evaluate=toy_loss,
    )  # fmt: skip
    metrics = make_eval_step(method)(state, (), make_batch([7, 3]), jax.random.key(0))
    assert metrics.keys() == {"loss", "draw", "step"}


def test_what_a_step_collects_is_what_its_micro_batches_get():
    def collect(params, extra, batch, state, *, step, key):
        """Rows 1, 3 are left out; the state is a moving copy of the parameters."""
        del extra, key
        where = batch.where & (jnp.arange(4) % 2 == 0)[:, None]
        new = {"copy": jnp.where(step == 0, params["kernel"], state["copy"] / 2)}
        return batch._replace(where=where), new, {"kept": (where.sum() * 1.0, jnp.ones(()))}

    optimizer = optax.sgd(1.0)
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    params = {"kernel": jnp.full(3, 5.0)}
    state = train_state.TrainState(
        jnp.int32(0), params, optimizer.init(params), {"copy": jnp.zeros(3)}
    )
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), state
    )
    step = make_train_step(
        toy_loss, optimizer, lambda step: 0.0 * step, abstract, collect=collect, num_microbatches=2
    )
    for kernel, copy in ((4.0, 5.0), (3.0, 2.5)):
        state, metrics = step(state, (), make_batch([7, 1, 2, 5]), jax.random.key(0))
        assert [float(x) for x in metrics["loss"]] == [9, 9]
        assert float(metrics["kept"][0]) == 9
        np.testing.assert_array_equal(state.params["kernel"], np.full(3, kernel))
        np.testing.assert_array_equal(state.method_state["copy"], np.full(3, copy))


def make_toy(num_microbatches=1):
    optimizer = optax.sgd(1.0)
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    state = train_state.TrainState(jnp.int32(0), {"kernel": jnp.zeros(3)}, ())
    state = state._replace(opt_state=optimizer.init(state.params))
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), state
    )
    step = make_train_step(
        toy_loss, optimizer, lambda step: 0.5 * step, abstract, num_microbatches=num_microbatches
    )
    return step, state


def test_train_step_counts_donates_and_reports():
    step, state = make_toy()
    old = state.params["kernel"]
    for i in range(3):
        state, metrics = step(state, (), make_batch([7] * 4), jax.random.key(0))
        assert int(state.step) == i + 1
        assert float(metrics["step"][0]) == i
        assert float(metrics["learning_rate"][0]) == 0.5 * i
        assert float(metrics["gradient_norm"][0]) == pytest.approx(math.sqrt(3))
    np.testing.assert_allclose(state.params["kernel"], -3.0 * jnp.ones(3))
    assert old.is_deleted()


def test_gradient_norm_is_that_before_clipping():
    cfg = OptimizerConfig(clip_norm=0.01)
    optimizer = make_optimizer(cfg, 10)
    _, state = make_toy()
    state = state._replace(opt_state=optimizer.init(state.params))
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), state
    )
    step = make_train_step(toy_loss, optimizer, make_schedule(cfg, 10), abstract)
    _, metrics = step(state, (), make_batch([7] * 4), jax.random.key(0))
    assert float(metrics["gradient_norm"][0]) == pytest.approx(math.sqrt(3))


def test_draws_depend_on_the_step_alone_and_differ_between_microbatches():
    step, first = make_toy()
    draws = []
    state = first
    for _ in range(2):
        state, metrics = step(state, (), make_batch([7] * 4), jax.random.key(5))
        draws.append(float(metrics["draw"][0]))
    assert draws[0] != draws[1]
    _, restarted = make_toy()
    again = step(restarted._replace(step=jnp.int32(1)), (), make_batch([7] * 4), jax.random.key(5))
    assert float(again[1]["draw"][0]) == draws[1]
    step, state = make_toy(num_microbatches=2)
    both = float(step(state, (), make_batch([7] * 4), jax.random.key(5))[1]["draw"][0])
    assert both != pytest.approx(2 * draws[0], abs=1e-3)


def test_eval_step_is_the_loss_alone():
    _, state = make_toy()
    plain = Method(init_params=jnp.zeros, init=lambda key: (), loss=toy_loss, flops_per_token=0.0)
    metrics = make_eval_step(plain)(state, (), make_batch([7, 3]), jax.random.key(0))
    assert metrics.keys() == {"loss", "draw", "step"}
    assert float(metrics["loss"][1]) == 10
    assert not state.params["kernel"].is_deleted()


def test_evaluation_goes_in_the_parts_of_a_step():
    _, state = make_toy()
    plain = Method(init_params=jnp.zeros, init=lambda key: (), loss=toy_loss, flops_per_token=0.0)
    key = jax.random.key(0)
    batch = make_batch([7, 1, 2, 5])
    in_parts = make_eval_step(plain, num_microbatches=2)(state, (), batch, key)
    draws = jax.vmap(jax.random.uniform)(jax.random.split(key))
    np.testing.assert_allclose(in_parts["loss"], (15, 15))
    np.testing.assert_allclose(in_parts["draw"], (float(draws.sum()), 2), rtol=1e-6)


def make_let():
    def load_pretrained(source, *, weights=True, dtype=None):
        params = None
        if weights:
            params = partitioning.unbox(init_params(TEACHER, jax.random.key(9)))
        return Pretrained(TEACHER, params, None)

    context = Context(
        model=SINGLE, num_steps=10, sequence_length=L, batch_size=4, tokenizer="bytes",
        load_pretrained=load_pretrained,
    )  # fmt: skip
    return (
        late_to_early.make(late_to_early.LateToEarlyConfig(teacher="folder"), context),
        next_token.make(next_token.NextTokenConfig(), context),
    )


def test_after_the_stop_step_the_program_is_that_of_plain_training():
    method, plain = make_let()
    assert method.until == 5
    mesh = partitioning.make_mesh(devices=jax.devices()[:1])
    optimizer = make_optimizer(OptimizerConfig(), 10)
    abstract = train_state.abstract_state(plain, optimizer, mesh)

    def program(one):
        step = make_train_step(one.loss, optimizer, optax.constant_schedule(0.1), abstract)
        extra = one.init(jax.random.key(0))
        text = step.lower(abstract, extra, make_batch([7] * 4), jax.random.key(0)).as_text()
        return text, len(jax.tree.leaves(extra))

    (before, teacher), (after, none), (baseline, _) = map(program, (method, method.then, plain))
    assert teacher
    assert "x26xf32" in before  # the teacher's width
    assert none == 0
    assert after == baseline


def test_losses_mean_of_nothing_is_zero():
    # What lets a micro-batch be all padding.
    assert float(losses.mean(jnp.zeros(()), jnp.zeros(()))) == 0.0
