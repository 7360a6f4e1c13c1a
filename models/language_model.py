"""A language model of either depth, plain or recurrent, as training sees it."""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import jax

from jaxlib_methods.models import recurrent_depth, recurrent_training, transformer
from jaxlib_methods.models.config import TransformerConfig


class Trained(NamedTuple):
    """What a forward pass of training gives.

    logits, hidden, final: see `transformer.Outputs`. recurrent: all of a recurrent model's outputs,
    and num_steps: how many iterations were taken; both None for a plain one.
    """

    logits: jax.Array
    hidden: jax.Array | None
    final: jax.Array
    recurrent: recurrent_training.RecurrentOutputs | None = None
    num_steps: jax.Array | None = None


def init_params(cfg: TransformerConfig, key: jax.Array) -> dict:
    """Parameters of the model, boxed with logical axis names."""
    init = recurrent_depth.init_params if cfg.recurrence else transformer.init_params
    return init(cfg, key)


def forward(
    cfg: TransformerConfig,
    params: Mapping[str, Any],
    inputs: jax.Array,
    *,
    positions: jax.Array | None = None,
    segments: jax.Array | None = None,
    hidden_layer: int | Literal["final"] | None = None,
    key: jax.Array,
    num_steps: jax.Array | int | None = None,
    num_logits: int | None = None,
) -> Trained:
    """The model on whole sequences, int32 `[B, L]`.

    A recurrent model draws its number of iterations and its first state from `key`; num_steps
    sets the number instead. A plain model reads neither. num_logits: see `transformer.Transformer`.
    Raises ValueError where a recurrent model is asked for fewer logits than it has tokens.
    """
    arguments: dict[str, Any] = {"positions": positions, "segments": segments}
    arguments["hidden_layer"] = hidden_layer
    if not cfg.recurrence:
        out = transformer.forward(cfg, params, inputs, num_logits=num_logits, **arguments)
        assert out.final is not None
        return Trained(out.logits, out.hidden, out.final)
    if num_logits is not None:
        raise ValueError(
            f"num_logits {num_logits} is for plain transformers; a model of recurrence "
            f"{cfg.recurrence} gives all logits: leave it None"
        )
    steps_key, state_key = jax.random.split(key)
    steps = recurrent_training.draw_steps(cfg, steps_key) if num_steps is None else num_steps
    out = recurrent_training.forward(
        cfg, params, inputs, key=state_key, num_steps=steps, **arguments
    )
    return Trained(out.logits, out.hidden, out.final, out, jax.numpy.asarray(steps))
