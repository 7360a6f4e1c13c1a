"""What goes wrong with a model that is recurrent in depth, seen by every method that trains one.

The two failures of large runs (arXiv 2502.05171, section 4.3) and what shows them: token states
that become the same vector, by their cosine; a state that is ignored, by what depth gains. A
method adds `state_metrics` to the metrics of its loss and passes itself through `watched`.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxlib_methods import linear_losses, losses
from jaxlib_methods.method import Batch, Context, LossFn, Method, Metrics
from jaxlib_methods.models import language_model
from jaxlib_methods.models.config import TransformerConfig
from jaxlib_methods.models.language_model import Trained

COLLAPSED = 0.99  # mean cosine between the states of two tokens
IGNORED = 0.02  # nats that all iterations but the first bring
EARLY = 0.25  # share of a run in which a state may be ignored


def token_similarity(state: jax.Array, *, where: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cosine between the states of two tokens of a sequence, summed over pairs, and their number.

    state: `[B, L, D]`; where: bool `[B, L]`. Without gradient, float32. 1 is a collapse.
    """
    state = jax.lax.stop_gradient(state).astype(jnp.float32)
    size = jnp.linalg.norm(state, axis=-1, keepdims=True)
    unit = jnp.where(where[:, :, None], state / jnp.maximum(size, 1e-30), 0.0)
    count = where.sum(axis=1).astype(jnp.float32)
    total = jnp.square(unit.sum(axis=1)).sum(axis=-1)
    return (total - count).sum(), (count * (count - 1)).sum()


def state_metrics(out: Trained, *, where: jax.Array) -> Metrics:
    """What training says of a recurrent model's state; nothing of a plain model.

    where: bool `[B, L]`. Metrics: `iterations` (r), `state_change` and `state_norm` of the last
    iteration (see `recurrent_training.RecurrentOutputs`), `token_similarity`.
    """
    if out.recurrent is None:
        return {}
    assert out.num_steps is not None
    count = where.sum()
    return {
        "iterations": (out.num_steps * count, count),
        "state_change": (out.recurrent.changes[-1] * count, count),
        "state_norm": (out.recurrent.norms[-1] * count, count),
        "token_similarity": token_similarity(out.recurrent.state, where=where),
    }


def with_depth_gain(evaluate: LossFn, model: TransformerConfig) -> LossFn:
    """`evaluate` with the metric `depth_gain`: the nats that all iterations but the first bring.

    `evaluate` takes the model's usual number; one iteration begins at the same state, of `key`.
    """

    def evaluate_both(
        params: Any, extra: Any, batch: Batch, *, step: jax.Array, key: jax.Array
    ) -> tuple[jax.Array, Metrics]:
        scalar, metrics = evaluate(params, extra, batch, step=step, key=key)
        once = language_model.forward(
            model,
            params,
            batch.inputs,
            positions=batch.positions,
            segments=batch.segments,
            key=key,
            num_steps=1,
        )
        nll = linear_losses.token_nll(model, params, once, batch.targets, where=batch.where)
        total, _ = losses.masked_sum(nll, where=batch.where)
        usual, count = metrics["loss"]
        return scalar, {**metrics, "depth_gain": (total - usual, count)}

    return evaluate_both


def make_monitor(
    num_steps: int, recurrence: int
) -> Callable[[Mapping[str, float]], dict[str, str | None]]:
    """The `Method.monitor` of a recurrent model: `train/collapsed`, `validation/depth_ignored`.

    The second is judged after a quarter of the `num_steps`, of more than one iteration.
    """

    def monitor(metrics: Mapping[str, float]) -> dict[str, str | None]:
        found: dict[str, str | None] = {}
        similarity = metrics.get("train/token_similarity")
        if similarity is not None:
            found["train/collapsed"] = _collapsed(similarity)
        gain = metrics.get("validation/depth_gain")
        if gain is not None and recurrence > 1 and metrics["step"] >= EARLY * num_steps:
            found["validation/depth_ignored"] = _ignored(gain, recurrence)
        return found

    return monitor


def _collapsed(similarity: float) -> str | None:
    if similarity <= COLLAPSED:
        return None
    return (
        f"the states of all tokens are the same: their mean cosine is {similarity:.4f}, above "
        f"{COLLAPSED}; begin anew with a lower optimizer.learning_rate, model.block=sandwich or "
        "model.injection=linear"
    )


def _ignored(gain: float, recurrence: int) -> str | None:
    if gain >= IGNORED:
        return None
    return (
        f"the state is ignored: {recurrence} iterations predict only {gain:.4f} nats better than "
        f"one, below {IGNORED}; begin anew with a lower optimizer.learning_rate or "
        "model.block=sandwich"
    )


def watched(method: Method, context: Context) -> Method:
    """The method with `depth_gain` in its validation and the monitor; a plain model's as it is."""
    model = context.model
    if not model.recurrence:
        return method
    assert method.evaluate is not None
    evaluate = with_depth_gain(method.evaluate, model)
    monitor = make_monitor(context.num_steps, model.recurrence)
    return dataclasses.replace(method, evaluate=evaluate, monitor=monitor)
