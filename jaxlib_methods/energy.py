"""Energy-based transformers (EBT, arXiv 2507.02092) for text: prediction by descending an energy.

The model gives an energy to (context, candidate distribution). A candidate starts as noise and
descends; a next-token loss on where it arrives trains the energy through the descent:

    p_k = softmax(z_k + sigma xi_k);  z_(k+1) = p_k - alpha dE/dp (x, p_k);  prediction softmax(z_N)

which is the official code's step, taken in probabilities; `space=logit` is the paper's equation 1,
z_(k+1) = z_k - alpha dE/dz. The defaults are the paper's System 1; its System 2 sets
`num_steps=2 max_steps=3 loss_steps=last learn_step_size=false random_step_size=2
noise=3 replay_size=192 update_rms=26`.
"""

import functools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxlib_methods import energy_flops, replay
from jaxlib_methods.descent import descend
from jaxlib_methods.energy_config import EnergyConfig
from jaxlib_methods.energy_text import (
    Descent,
    candidate_shape,
    initial_logits,
    make_evaluate,
    make_loss,
    make_replay_loss,
    observe,
    padding_factor,
)
from jaxlib_methods.method import Batch, Context, Method
from jaxlib_methods.models import energy_transformer
from jaxlib_methods.models.config import TransformerConfig
from jaxlib_methods.models.energy_transformer import EnergyTransformerConfig
from jaxlib_methods.replay import Replay

CALIBRATION_SHAPE = (8, 64)  # sequences and tokens on which the first slope is measured
FLAT, STEEP = 1e-2, 1e4  # root mean square of an update, in logits


def model_config(model: TransformerConfig, cfg: EnergyConfig) -> EnergyTransformerConfig:
    """The energy transformer of a run: the trunk's sizes and what the method says."""
    return EnergyTransformerConfig(
        trunk=model,
        num_landscapes=cfg.landscapes,
        candidate_embedding=cfg.candidate_embedding,
    )


def monitor(metrics: Mapping[str, float]) -> dict[str, str | None]:
    """The `Method.monitor` of energies: `train/descent_explodes` and `train/energy_flat`."""
    update = metrics.get("train/update")
    if update is None:
        return {}
    alpha = metrics["train/step_size"]
    return {
        "train/descent_explodes": _explodes(update, alpha),
        "train/energy_flat": _flat(update, alpha),
    }


def _explodes(update: float, alpha: float) -> str | None:
    if update > STEEP:
        return (
            f"the descent explodes: its updates have a root mean square of {update:.3g} logits at "
            f"a step size of {alpha:.3g}, above {STEEP:g}; begin anew with a smaller "
            "energy.step_size or energy.update_rms, or a lower optimizer.learning_rate"
        )
    return None


def _flat(update: float, alpha: float) -> str | None:
    if update < FLAT:
        return (
            f"the energy is flat: its slope moves candidates by {update:.3g} logits at a step size "
            f"of {alpha:.3g}, below {FLAT:g}, which leaves predictions near uniform; begin anew "
            "with a larger energy.step_size or energy.update_rms"
        )
    return None


def first_slope(
    cfg: EnergyConfig, model: EnergyTransformerConfig, params: Any, key: jax.Array
) -> jax.Array:
    """Root mean square of dE/dp over the real vocabulary, at first candidates on random tokens."""
    text_key, initial_key, noise_key = jax.random.split(key, 3)
    vocab = model.trunk.vocab_size
    shape = (CALIBRATION_SHAPE[0], min(CALIBRATION_SHAPE[1], model.trunk.max_length))
    tokens = jax.random.randint(text_key, shape, 0, vocab)
    positions = jnp.broadcast_to(jnp.arange(shape[1])[None], shape)
    ones = jnp.ones_like(tokens)
    batch = Batch(tokens, tokens, positions, ones, ones.astype(bool))
    initial = initial_logits(cfg, candidate_shape(batch, model), initial_key)
    descent = Descent(cfg, model, cfg.noise, noise_key)
    path = descend(
        descent.energy(), params, observe(model, params, batch), initial,
        step_size=1.0, num_steps=1, start=descent.start, context_at=descent.context_at,
    )  # fmt: skip
    return path.slopes[0] * padding_factor(model)


def init_params(model: TransformerConfig, cfg: EnergyConfig, key: jax.Array) -> dict:
    """The model's parameters and its step size, calibrated where none is given."""
    energy_model = model_config(model, cfg)
    params = energy_transformer.init_params(energy_model, key)
    if cfg.step_size is None:
        slope_key = jax.random.fold_in(key, 1)
        slope = first_slope(cfg, energy_model, nn.meta.unbox(params), slope_key)
        unit = cfg.update_rms / slope
    else:
        unit = jnp.asarray(cfg.step_size)
    # A factor near 1 does not move in bfloat16.
    dtype = jnp.promote_types(model.param_dtype, jnp.float32)
    params["step_size"] = {"value": jnp.ones((), dtype)}
    params["step_unit"] = {"value": unit.astype(dtype)}
    return params


def make(cfg: EnergyConfig, context: Context) -> Method:
    """EBT as a `Method`."""
    model = model_config(context.model, cfg)
    rows, length = context.batch_size, context.sequence_length
    _check_memory(cfg, context)
    init_state = None
    if cfg.replay_size:
        _check_replay(cfg, rows)
        init_state = functools.partial(_empty_replay, cfg, model, rows, length)
    rate = cfg.step_size_rate if cfg.learn_step_size else 0.0
    return Method(
        init_params=functools.partial(init_params, context.model, cfg),
        init=lambda key: (),
        loss=make_replay_loss(cfg, model) if cfg.replay_size else make_loss(cfg, model),
        flops_per_token=_flops_per_token(cfg, model, length),
        init_state=init_state,
        rows_multiple=cfg.replay_every if cfg.replay_size else 1,
        evaluate=make_evaluate(cfg, model),
        rate_factors={"step_size": rate, "step_unit": 0.0},
        monitor=monitor,
    )


def _flops_per_token(cfg: EnergyConfig, model: EnergyTransformerConfig, length: int) -> float:
    last_only = cfg.loss_steps == "last" and cfg.gradient == "one_step"
    mean_steps = (cfg.num_steps + cfg.most_steps) / 2
    flops = energy_flops.train_flops(
        model,
        length,
        free_steps=mean_steps - 1 if last_only else 0,
        trained_steps=1 if last_only else cfg.most_steps,
        learned_step=cfg.learn_step_size,
        chained=cfg.gradient == "all_steps",
        memory=cfg.memory,
    )
    return flops * (1 + (1 / cfg.replay_every if cfg.replay_size else 0))


def _check_memory(cfg: EnergyConfig, context: Context) -> None:
    vocab, limit = context.model.padded_vocab_size, cfg.max_candidate_gib
    parts, rows = context.num_microbatches, context.batch_size
    row = context.sequence_length * vocab * 4 / 2**30
    buffer = cfg.replay_size * row
    held = f" and {buffer:.1f} GiB of replay buffer" if cfg.replay_size else ""
    # Of each step: where it began, its slope, where it ended, and the loss's gradient there.
    arrays = 4 if cfg.loss_steps == "last" and cfg.gradient == "one_step" else 4 * cfg.most_steps
    every = cfg.replay_every if cfg.replay_size else 1
    size = row * (1 + 1 / every if cfg.replay_size else 1)  # array, for each fresh sequence
    what, kept = "training", cfg.most_steps + 3  # validation keeps where each step ended
    if kept * row > arrays * size:
        what, arrays, size = "validation", kept, row
    if arrays * size * rows + buffer <= limit:
        return
    whole = rows * parts
    enough = [
        n
        for n in range(parts + 1, whole + 1)
        if whole % (n * every) == 0 and arrays * size * (whole // n) + buffer <= limit
    ]
    advice = [f"--train.num_microbatches={enough[0]} (if the mesh allows)"] if enough else []
    advice.append("a tokenizer of fewer tokens")
    advice += ["a smaller energy.replay_size"] if cfg.replay_size else []
    raise ValueError(_too_large(what, vocab, arrays, size * rows, held, limit, advice))


def _too_large(
    what: str, vocab: int, arrays: int, gib: float, held: str, limit: float, advice: list[str]
) -> str:
    return (
        f"candidates over a vocabulary of {vocab} tokens take more in {what} than "
        f"energy.max_candidate_gib={limit} allows over all devices: {arrays} arrays of {gib:.2f} "
        f"GiB{held}; give {', '.join(advice)}, or a higher limit"
    )


def _check_replay(cfg: EnergyConfig, rows: int) -> None:
    if rows % cfg.replay_every:
        raise ValueError(
            f"a micro-batch of {rows} sequences is not a multiple of "
            f"energy.replay_every={cfg.replay_every}; change one of them"
        )
    if cfg.replay_size < rows:
        raise ValueError(
            f"energy.replay_size={cfg.replay_size} is below a micro-batch of {rows} sequences; "
            f"give at least {rows}, or 0 for no buffer"
        )


def _empty_replay(
    cfg: EnergyConfig, model: EnergyTransformerConfig, rows: int, length: int, key: jax.Array
) -> Replay:
    del key
    tokens: Any = jax.ShapeDtypeStruct((rows, length), jnp.int32)
    where: Any = jax.ShapeDtypeStruct((rows, length), jnp.bool_)
    batch = Batch(tokens, tokens, tokens, tokens, where)
    logits = jax.ShapeDtypeStruct((rows, length, model.trunk.padded_vocab_size), jnp.float32)
    return replay.empty((batch, logits), num_slots=cfg.replay_size // rows)
