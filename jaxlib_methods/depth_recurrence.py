"""Depth recurrence: the same block again and again, deeper at test time than in training.

Two kinds of models, whose depth is an argument: recurrent-depth language models (arXiv
2502.05171), trained here, and classifiers for compositional reasoning (arXiv 2603.21676), trained
by `depth_reasoning`. The language loss is next-token prediction at the last of r iterations,

    min E_x E_r E_(s_0) [-log p(x_(t+1) | x_(<=t), r)],   r drawn for each micro-batch

with gradients through the last iterations only; see `models.recurrent_training`. `depth_monitor`
watches for its two known failures.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from jaxlib_methods import depth_reasoning, linear_losses, losses, next_token
from jaxlib_methods.depth_recurrence_config import DepthRecurrenceConfig
from jaxlib_methods.method import Batch, Context, LossFn, Method, Metrics
from jaxlib_methods.models import language_model, recurrent_depth
from jaxlib_methods.models.config import TransformerConfig
from jaxlib_methods.models.partitioning import constrain
from jaxlib_methods.models.transformer import Outputs


def outputs_at(
    model: TransformerConfig,
    params: Any,
    batch: Batch,
    steps: tuple[int, ...],
    *,
    key: jax.Array,
    observe: Callable[[Outputs], Any],
) -> list[Any]:
    """What `observe(outputs)` makes of the model's outputs after each of `steps`.

    steps: ascending. Each iteration runs once; what one step gives is gone before the next.
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
        logits, final, _ = recurrent_depth.predict(model, params, state, reading)
        found.append(observe(Outputs(logits, None, None, final)))
    return found


def make_evaluate(cfg: DepthRecurrenceConfig, model: TransformerConfig) -> LossFn:
    """Validation at the model's usual number of iterations, at 1 and at those of `eval_steps`.

    Metrics: `loss`; `loss_at_K` for each other number K; `depth_gain`, the nats between 1 iteration
    and the usual number, which a model that ignores its state does not have.
    """
    usual = model.recurrence
    steps = tuple(sorted({1, usual, *(cfg.eval_steps or ())}))

    def evaluate(
        params: Any, extra: Any, batch: Batch, *, step: jax.Array, key: jax.Array
    ) -> tuple[jax.Array, Metrics]:
        del extra, step

        def nll(out: Outputs) -> tuple[jax.Array, jax.Array]:
            each = linear_losses.token_nll(model, params, out, batch.targets, where=batch.where)
            return losses.masked_sum(each, where=batch.where)

        found = dict(
            zip(steps, outputs_at(model, params, batch, steps, key=key, observe=nll), strict=True)
        )
        metrics = {f"loss_at_{k}": pair for k, pair in found.items() if k != usual}
        total, count = found[usual]
        metrics["loss"] = (total, count)
        metrics["depth_gain"] = (found[1][0] - total, count)
        return losses.mean(total, count), metrics

    return evaluate


def init_params(model: TransformerConfig, cfg: DepthRecurrenceConfig, key: jax.Array) -> dict:
    """Boxed parameters of the model that a run trains."""
    if cfg.task == "language":
        return language_model.init_params(model, key)
    return depth_reasoning.init_params(model, cfg.resolved(), key)


def make(cfg: DepthRecurrenceConfig, context: Context) -> Method:
    """Depth recurrence as a `Method`.

    Raises ValueError where the model is not recurrent, or a field would not be read.
    """
    cfg.check_read()
    if cfg.task != "language":
        return depth_reasoning.make(cfg.resolved(), context)
    model = context.model
    if not model.recurrence:
        raise ValueError(
            "depth_recurrence.task=language trains a model that is recurrent in depth, and "
            "model.recurrence=0 is not; give --model.recurrence=8 or another number of iterations, "
            "or --preset=depth_recurrence_tiny"
        )
    plain = next_token.make(next_token.NextTokenConfig(), context)
    return dataclasses.replace(plain, evaluate=make_evaluate(cfg, model))
