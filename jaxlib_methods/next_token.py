"""Plain next-token prediction: the baseline of every method, and what LET becomes."""

import dataclasses
from typing import Any

import jax

from jaxlib_methods import flops, losses
from jaxlib_methods.method import Batch, Context, LossFn, Method, Metrics
from jaxlib_methods.models.config import TransformerConfig
from jaxlib_methods.models.transformer import forward, init_params


@dataclasses.dataclass(frozen=True, kw_only=True)
class NextTokenConfig:
    """Next-token prediction has nothing to configure."""


def make_loss(cfg: TransformerConfig) -> LossFn:
    """The next-token loss of `Transformer(cfg)`: the mean of `losses.token_nll` over targets."""

    def loss(
        params: Any, extra: Any, batch: Batch, *, step: jax.Array, key: jax.Array
    ) -> tuple[jax.Array, Metrics]:
        del extra, step, key
        out = forward(cfg, params, batch.inputs, positions=batch.positions, segments=batch.segments)
        nll = losses.token_nll(out.logits, batch.targets, where=batch.where)
        total, count = losses.masked_sum(nll, where=batch.where)
        return losses.mean(total, count), {"loss": (total, count)}

    return loss


def make(cfg: NextTokenConfig, context: Context) -> Method:
    """Next-token prediction as a `Method`."""
    del cfg
    return Method(
        init_params=lambda key: init_params(context.model, key),
        init=lambda key: (),
        loss=make_loss(context.model),
        flops_per_token=flops.transformer_train_flops(context.model, context.sequence_length),
    )
