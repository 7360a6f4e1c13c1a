"""One optimiser step: gradients over micro-batches, the optimiser, the metrics."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxlib_methods.method import Batch, LossFn, Metrics
from jaxlib_methods.train.optimizer import global_norm
from jaxlib_methods.train.state import TrainState, shardings_of

TrainStep = Callable[[TrainState, Any, Batch, jax.Array], tuple[TrainState, Metrics]]
EvalStep = Callable[[TrainState, Any, Batch, jax.Array], Metrics]


def split_microbatches(batch: Batch, num_microbatches: int) -> Batch:
    """`[B, L]` fields to `[num_microbatches, B / num_microbatches, L]`.

    Micro-batch i holds rows i, i + n, ...: a device that holds neighbouring rows keeps them.
    """

    def split(x: jax.Array) -> jax.Array:
        return jnp.swapaxes(x.reshape(-1, num_microbatches, *x.shape[1:]), 0, 1)

    return jax.tree.map(split, batch)


def loss_and_gradients(
    loss: LossFn,
    params: Any,
    extra: Any,
    batch: Batch,
    *,
    step: jax.Array,
    key: jax.Array,
    num_microbatches: int = 1,
) -> tuple[Any, Metrics]:
    """Gradients of the scalar over the whole batch, and its metrics.

    A micro-batch's gradient is weighted by its number of tokens, `metrics["loss"][1]`, summed in
    the type of that number, float32 or better, and divided once, so that micro-batches of unequal
    padding give the gradient of the whole batch.
    """

    def one(params: Any, batch: Batch, key: jax.Array) -> tuple[Any, Metrics]:
        function = jax.grad(loss, has_aux=True)
        return function(params, extra, batch, step=step, key=key)

    if num_microbatches == 1:
        return one(params, batch, key)

    def weighted(batch: Batch, key: jax.Array) -> tuple[Any, Metrics]:
        grads, metrics = one(params, batch, key)
        return jax.tree.map(lambda g: g * metrics["loss"][1], grads), metrics

    def add(total: Any, part: tuple[Batch, jax.Array]) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, weighted(*part)), None

    parts = split_microbatches(batch, num_microbatches)
    keys = jax.random.split(key, num_microbatches)
    shapes = jax.eval_shape(weighted, *jax.tree.map(lambda x: x[0], (parts, keys)))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    (grads, metrics), _ = jax.lax.scan(add, zeros, (parts, keys))
    tokens = jnp.maximum(metrics["loss"][1], 1)
    return jax.tree.map(lambda g, p: (g / tokens).astype(p.dtype), grads, params), metrics


def make_train_step(
    loss: LossFn,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    abstract: TrainState,
    *,
    num_microbatches: int = 1,
) -> TrainStep:
    """`step(state, extra, batch, key) -> (state, metrics)`, jitted; the state is donated.

    The loss gets the run's key folded with the step, so that a restart draws what an unbroken run
    would have drawn. Adds the metrics `gradient_norm` (before clipping), `parameter_norm` (after
    the step) and `learning_rate`.
    """

    def train_step(
        state: TrainState, extra: Any, batch: Batch, key: jax.Array
    ) -> tuple[TrainState, Metrics]:
        grads, metrics = loss_and_gradients(
            loss,
            state.params,
            extra,
            batch,
            step=state.step,
            key=jax.random.fold_in(key, state.step),
            num_microbatches=num_microbatches,
        )
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params: Any = optax.apply_updates(state.params, updates)
        one = jnp.ones(())
        metrics["gradient_norm"] = (global_norm(grads), one)
        metrics["parameter_norm"] = (global_norm(params), one)  # finite, or nothing is saved
        metrics["learning_rate"] = (jnp.asarray(schedule(state.step), jnp.float32), one)
        return TrainState(state.step + 1, params, opt_state), metrics

    out_shardings = (shardings_of(abstract), None)
    return jax.jit(train_step, donate_argnums=0, out_shardings=out_shardings)


def make_eval_step(loss: LossFn) -> EvalStep:
    """`evaluate(state, extra, batch, key) -> metrics`, jitted: the loss without its gradient."""

    def evaluate(state: TrainState, extra: Any, batch: Batch, key: jax.Array) -> Metrics:
        return loss(state.params, extra, batch, step=state.step, key=key)[1]

    return jax.jit(evaluate)
