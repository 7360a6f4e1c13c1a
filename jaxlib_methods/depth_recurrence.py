"""Depth recurrence: the same block again and again, deeper at test time than in training.

Two kinds of models, whose depth is an argument: recurrent-depth language models (arXiv
2502.05171), trained here, and classifiers for compositional reasoning (arXiv 2603.21676), trained
by `depth_reasoning`. The language loss is next-token prediction at the last of r iterations,

    min E_x E_r E_(s_0) [-log p(x_(t+1) | x_(<=t), r)],   r drawn for each micro-batch

with gradients through the last iterations only; see `models.recurrent_training`. Its two known
failures are watched: token states that become the same vector, and a state that is ignored.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxlib_methods import depth_reasoning, flops, losses
from jaxlib_methods.depth_recurrence_config import DepthRecurrenceConfig
from jaxlib_methods.method import Batch, Context, LossFn, Method, Metrics
from jaxlib_methods.models import language_model, recurrent_depth
from jaxlib_methods.models.config import TransformerConfig
from jaxlib_methods.models.partitioning import constrain

COLLAPSED = 0.99  # mean cosine between the states of two tokens
IGNORED = 0.02  # nats that all iterations but the first bring


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


def make_loss(model: TransformerConfig) -> LossFn:
    """The loss of training.

    Metrics: `loss`, `iterations` (r), `state_change` and `state_norm` of the last iteration (see
    `recurrent_training.movement`), `token_similarity`.
    """

    def loss(
        params: Any, extra: Any, batch: Batch, *, step: jax.Array, key: jax.Array
    ) -> tuple[jax.Array, Metrics]:
        del extra, step
        out = language_model.forward(
            model,
            params,
            batch.inputs,
            positions=batch.positions,
            segments=batch.segments,
            key=key,
        )
        assert out.recurrent is not None
        assert out.num_steps is not None
        nll = losses.masked_sum(
            losses.token_nll(out.logits, batch.targets, where=batch.where), where=batch.where
        )
        count = nll[1]
        metrics = {
            "loss": nll,
            "iterations": (out.num_steps * count, count),
            "state_change": (out.recurrent.changes[-1] * count, count),
            "state_norm": (out.recurrent.norms[-1] * count, count),
            "token_similarity": token_similarity(out.recurrent.state, where=batch.where),
        }
        return losses.mean(*nll), metrics

    return loss


def logits_at(
    model: TransformerConfig,
    params: Any,
    batch: Batch,
    steps: tuple[int, ...],
    *,
    key: jax.Array,
    observe: Callable[[jax.Array, int], Any],
) -> list[Any]:
    """What `observe(logits, step)` makes of the logits `[B, L, V]` after each of `steps`.

    steps: ascending. Each iteration runs once; the logits of one step are gone before the next.
    """
    reading, _ = recurrent_depth.read(
        model, params, batch.inputs, positions=batch.positions, segments=batch.segments
    )
    state = reading.embedded
    if model.injection != "none":
        state = recurrent_depth.initial_state(model, key, batch.inputs.shape)
        state = constrain(state, "batch", "sequence", None)
    found, taken = [], 0
    for step in steps:
        state = jax.lax.fori_loop(
            taken,
            step,
            lambda _, state: recurrent_depth.iterate(model, params, state, reading)[0],
            state,
        )
        taken = step
        logits, _, _ = recurrent_depth.predict(model, params, state, reading)
        found.append(observe(logits, step))
    return found


def make_evaluate(cfg: DepthRecurrenceConfig, model: TransformerConfig) -> LossFn:
    """Validation at the model's usual number of iterations, at 1 and at those of `eval_steps`.

    Metrics: `loss`; `loss_at_K` for each other number K; `depth_gain`, the nats between 1 iteration
    and the usual number, which a model that ignores its state does not have.
    """
    usual = model.recurrence
    steps = tuple(sorted({1, usual, *cfg.eval_steps}))

    def evaluate(
        params: Any, extra: Any, batch: Batch, *, step: jax.Array, key: jax.Array
    ) -> tuple[jax.Array, Metrics]:
        del extra, step

        def nll(logits: jax.Array, _: int) -> tuple[jax.Array, jax.Array]:
            each = losses.token_nll(logits, batch.targets, where=batch.where)
            return losses.masked_sum(each, where=batch.where)

        found = dict(
            zip(steps, logits_at(model, params, batch, steps, key=key, observe=nll), strict=True)
        )
        metrics = {f"loss_at_{k}": pair for k, pair in found.items() if k != usual}
        total, count = found[usual]
        metrics["loss"] = (total, count)
        metrics["depth_gain"] = (found[1][0] - total, count)
        return losses.mean(total, count), metrics

    return evaluate


def make_monitor(num_steps: int, recurrence: int) -> Callable[[Mapping[str, float]], str | None]:
    """Names the two failures of large runs (paper, section 4.3), the second after a quarter."""

    def monitor(metrics: Mapping[str, float]) -> str | None:
        similarity = metrics.get("train/token_similarity")
        if similarity is not None and similarity > COLLAPSED:
            return (
                f"the states of all tokens are the same: their mean cosine is {similarity:.4f}; "
                "begin anew with a lower optimizer.learning_rate, model.block=sandwich or "
                "model.injection=linear"
            )
        gain = metrics.get("validation/depth_gain")
        if gain is None or recurrence == 1 or metrics["step"] < num_steps / 4:
            return None
        if gain < IGNORED:
            return (
                f"the state is ignored: {recurrence} iterations predict only {gain:.4f} nats "
                "better than one; begin anew with a lower optimizer.learning_rate or "
                "model.block=sandwich"
            )
        return None

    return monitor


def init_params(model: TransformerConfig, cfg: DepthRecurrenceConfig, key: jax.Array) -> dict:
    """Boxed parameters of the model that a run trains."""
    if cfg.task == "language":
        return language_model.init_params(model, key)
    return depth_reasoning.init_params(model, cfg.resolved(), key)


def make(cfg: DepthRecurrenceConfig, context: Context) -> Method:
    """Depth recurrence as a `Method`. Raises ValueError where the model is not recurrent."""
    if cfg.task != "language":
        return depth_reasoning.make(cfg.resolved(), context)
    model = context.model
    if not model.recurrence:
        raise ValueError(
            "depth_recurrence.task=language trains a model that is recurrent in depth, and "
            "model.recurrence=0 is not; give --model.recurrence=8 or another number of iterations, "
            "or --preset=depth_recurrence_tiny"
        )
    return Method(
        init_params=lambda key: language_model.init_params(model, key),
        init=lambda key: (),
        loss=make_loss(model),
        flops_per_token=flops.train_flops(model, context.sequence_length),
        evaluate=make_evaluate(cfg, model),
        monitor=make_monitor(context.num_steps, model.recurrence),
    )
