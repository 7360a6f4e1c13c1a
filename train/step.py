"""One optimiser step: gradients over micro-batches, the optimiser, the metrics."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxlib_methods.method import CollectFn, LossFn, Method, Metrics
from jaxlib_methods.models import partitioning
from jaxlib_methods.train.optimizer import global_norm
from jaxlib_methods.train.state import TrainState, shardings_of

TrainStep = Callable[[TrainState, Any, Any, jax.Array], tuple[TrainState, Metrics]]
EvalStep = Callable[[TrainState, Any, Any, jax.Array], Metrics]


def loss_and_gradients(
    loss: Callable[..., Any],
    params: Any,
    extra: Any,
    batch: Any,
    *,
    step: jax.Array,
    key: jax.Array,
    num_microbatches: int = 1,
    state: Any = (),
) -> tuple[Any, Metrics, Any]:
    """Gradients of the scalar over the whole batch, its metrics and the method's new state.

    A micro-batch's gradient is weighted by its number of tokens, `metrics["loss"][1]`, summed in
    the type of that number, float32 or better, and divided once, so that micro-batches of unequal
    padding give the gradient of the whole batch. The state goes from one to the next; without
    leaves there is none, and the loss is a plain `LossFn`.
    """
    stateful = bool(jax.tree.leaves(state))

    def scalar_of(params: Any, batch: Any, state: Any, key: jax.Array) -> tuple[jax.Array, Any]:
        before = (params, extra, batch, state) if stateful else (params, extra, batch)
        scalar, metrics, *after = loss(*before, step=step, key=key)
        return scalar, (metrics, after[0] if stateful else state)

    def one(batch: Any, state: Any, key: jax.Array) -> tuple[Any, Metrics, Any]:
        grads, (metrics, state) = jax.grad(scalar_of, has_aux=True)(params, batch, state, key)
        return grads, metrics, state

    if num_microbatches == 1:
        return one(batch, state, key)

    def weighted(batch: Any, state: Any, key: jax.Array) -> tuple[Any, Any]:
        grads, metrics, state = one(batch, state, key)
        return (jax.tree.map(lambda g: g * metrics["loss"][1], grads), metrics), state

    def add(carry: Any, part: tuple[Any, jax.Array]) -> tuple[Any, None]:
        (total, state), (batch, key) = carry, part
        found, state = weighted(batch, state, key)
        return (jax.tree.map(jnp.add, total, found), state), None

    parts = partitioning.split_rows(batch, num_microbatches)
    keys = jax.random.split(key, num_microbatches)
    first_part, first_key = jax.tree.map(lambda x: x[0], (parts, keys))
    shapes, _ = jax.eval_shape(weighted, first_part, state, first_key)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    ((grads, metrics), state), _ = jax.lax.scan(add, (zeros, state), (parts, keys))
    tokens = jnp.maximum(metrics["loss"][1], 1)
    grads = jax.tree.map(lambda g, p: (g / tokens).astype(p.dtype), grads, params)
    return grads, metrics, state


def make_train_step(
    loss: Callable[..., Any],
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    abstract: TrainState,
    *,
    collect: CollectFn | None = None,
    num_microbatches: int = 1,
) -> TrainStep:
    """`step(state, extra, batch, key) -> (state, metrics)`, jitted; the state is donated.

    The loss gets the run's key folded with the step, so that a restart draws what an unbroken run
    would have drawn; `collect` gets another one. Adds the metrics `gradient_norm` (before
    clipping), `parameter_norm` (after the step) and `learning_rate`.
    """

    def train_step(
        state: TrainState, extra: Any, batch: Any, key: jax.Array
    ) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(key, state.step)
        method_state, collected = state.method_state, {}
        if collect is not None:
            batch, method_state, collected = collect(
                state.params,
                extra,
                batch,
                method_state,
                step=state.step,
                key=jax.random.fold_in(key, 1),
            )
        grads, metrics, after = loss_and_gradients(
            loss,
            state.params,
            extra,
            batch,
            step=state.step,
            key=key,
            num_microbatches=num_microbatches,
            state=method_state if collect is None else (),
        )
        method_state = after if collect is None else method_state
        metrics |= collected
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params: Any = optax.apply_updates(state.params, updates)
        one = jnp.ones(())
        metrics["gradient_norm"] = (global_norm(grads), one)
        metrics["parameter_norm"] = (global_norm(params), one)  # finite, or nothing is saved
        metrics["learning_rate"] = (jnp.asarray(schedule(state.step), jnp.float32), one)
        return TrainState(state.step + 1, params, opt_state, method_state), metrics

    out_shardings = (shardings_of(abstract), None)
    return jax.jit(train_step, donate_argnums=0, out_shardings=out_shardings)


def make_eval_step(method: Method, *, num_microbatches: int = 1) -> EvalStep:
    """`evaluate(state, extra, batch, key) -> metrics`, jitted: no gradient, no new state.

    In the parts of an optimiser step, whose metrics are summed: it fits where that fits.
    """
    loss: LossFn = method.evaluate or method.loss

    def evaluate(state: TrainState, extra: Any, batch: Any, key: jax.Array) -> Metrics:
        def one(part: tuple[Any, jax.Array]) -> Metrics:
            batch, key = part
            return loss(state.params, extra, batch, step=state.step, key=key)[1]

        if num_microbatches == 1:
            return one((batch, key))
        parts = partitioning.split_rows(batch, num_microbatches)
        found = jax.lax.map(one, (parts, jax.random.split(key, num_microbatches)))
        return jax.tree.map(lambda x: x.sum(axis=0), found)

    return jax.jit(evaluate)
