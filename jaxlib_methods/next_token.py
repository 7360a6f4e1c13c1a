"""Plain next-token prediction: the baseline of every method, and what LET becomes."""

import dataclasses
from typing import Any

import jax

from jaxlib_methods import depth_monitor, flops, linear_losses, losses
from jaxlib_methods.method import Batch, Context, LossFn, Method, Metrics
from jaxlib_methods.models.config import TransformerConfig
from jaxlib_methods.models.language_model import forward, init_params


@dataclasses.dataclass(frozen=True, kw_only=True)
class NextTokenConfig:
    """Next-token prediction has nothing to configure."""


def make_loss(cfg: TransformerConfig, *, num_steps: int | None = None) -> LossFn:
    """The next-token loss of a model: the mean of `losses.token_nll` over targets.

    num_steps: iterations of a recurrent model; None draws them, as training does.
    Metrics: `loss`, and of a recurrent model those of `depth_monitor.state_metrics`.
    """

    def loss(
        params: Any, extra: Any, batch: Batch, *, step: jax.Array, key: jax.Array
    ) -> tuple[jax.Array, Metrics]:
        del extra, step
        out = forward(
            cfg,
            params,
            batch.inputs,
            positions=batch.positions,
            segments=batch.segments,
            key=key,
            num_steps=num_steps,
        )
        nll = linear_losses.token_nll(cfg, params, out, batch.targets, where=batch.where)
        total, count = losses.masked_sum(nll, where=batch.where)
        metrics = {"loss": (total, count), **depth_monitor.state_metrics(out, where=batch.where)}
        return losses.mean(total, count), metrics

    return loss


def make(cfg: NextTokenConfig, context: Context) -> Method:
    """Next-token prediction as a `Method`."""
    del cfg
    model = context.model
    evaluate = make_loss(model, num_steps=model.recurrence) if model.recurrence else None
    method = Method(
        init_params=lambda key: init_params(model, key),
        init=lambda key: (),
        loss=make_loss(model),
        flops_per_token=flops.train_flops(model, context.sequence_length),
        evaluate=evaluate,
    )
    return depth_monitor.watched(method, context)
