"""Descents on text: candidates, what they see, and the losses on where they arrive.

See `jaxlib_methods.energy` for the method and its equations.
"""

import functools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxlib_methods import losses, replay
from jaxlib_methods.descent import Energy, Trajectory, descend, descend_freely
from jaxlib_methods.energy_config import SMALLEST_STEP, EnergyConfig
from jaxlib_methods.method import Batch, LossFn, Metrics, StatefulLossFn
from jaxlib_methods.models import energy_transformer
from jaxlib_methods.models.energy_transformer import EnergyTransformerConfig, ObservedCache, Rows
from jaxlib_methods.pallas_kernels.attention import MASKED_SCORE
from jaxlib_methods.replay import Replay


class Observed(NamedTuple):
    """The context of a descent: the observed stream's cache, and where the candidates stand."""

    cache: ObservedCache
    rows: Rows


def mask_padding(logits: jax.Array, vocab_size: int) -> jax.Array:
    """Logits `[..., V]` with those of the padded vocabulary out of reach."""
    if logits.shape[-1] == vocab_size:
        return logits
    real = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1) < vocab_size
    return jnp.where(real, logits, jnp.asarray(MASKED_SCORE, logits.dtype))


def _energy_of_probabilities(
    model: EnergyTransformerConfig, params: Any, context: Observed, candidate: jax.Array
) -> jax.Array:
    return energy_transformer.judge(model, params, candidate, context.rows, context.cache)


def _energy_of_logits(
    model: EnergyTransformerConfig, params: Any, context: Observed, candidate: jax.Array
) -> jax.Array:
    probabilities = jax.nn.softmax(mask_padding(candidate, model.trunk.vocab_size), axis=-1)
    return _energy_of_probabilities(model, params, context, probabilities)


def energy_function(model: EnergyTransformerConfig, space: str) -> Energy:
    """`energy(params, Observed, candidates [B, R, V]) -> [B, R]`, for `descent.descend`."""
    of = _energy_of_probabilities if space == "probability" else _energy_of_logits
    return functools.partial(of, model)


class Descent(NamedTuple):
    """The parts of a descent on text that the arguments of `descend` are made of.

    sigma: noise before each step. key: of the noise.
    """

    cfg: EnergyConfig
    model: EnergyTransformerConfig
    sigma: Any
    key: jax.Array

    def energy(self) -> Energy:
        """The energy of what `start` gives."""
        return energy_function(self.model, self.cfg.space)

    def start(self, logits: jax.Array, step: jax.Array) -> jax.Array:
        """Where step `step` begins: noise, and in the space of probabilities their softmax."""
        if not (isinstance(self.sigma, float) and self.sigma == 0):
            key = jax.random.fold_in(self.key, step)
            logits = logits + self.sigma * jax.random.normal(key, logits.shape, logits.dtype)
        if self.cfg.space == "logit":
            return logits
        return jax.nn.softmax(mask_padding(logits, self.model.trunk.vocab_size), axis=-1)

    def context_at(self, context: Observed, step: jax.Array) -> Observed:
        """The context under the landscape of a step."""
        return context._replace(cache=energy_transformer.landscape_at(context.cache, step))


def initial_logits(cfg: EnergyConfig, shape: tuple[int, ...], key: jax.Array) -> jax.Array:
    """z_0, float32: standard normal times `initial_scale`, or zeros."""
    if cfg.initial == "uniform":
        return jnp.zeros(shape)
    return cfg.initial_scale * jax.random.normal(key, shape)


def step_size(params: Mapping[str, Any]) -> jax.Array:
    """alpha, not below 1e-4: the parameters hold its start and its size relative to that.

    Its start has no gradient: it is not trained, and must not count when gradients are clipped.
    """
    alpha = params["step_size"]["value"] * jax.lax.stop_gradient(params["step_unit"]["value"])
    return jnp.maximum(alpha, SMALLEST_STEP)


def observe(model: EnergyTransformerConfig, params: Any, batch: Batch) -> Observed:
    """The observed stream of packed documents, once for all steps and candidates."""
    rows = Rows(batch.positions, batch.segments)
    cache = energy_transformer.observe(
        model, params, batch.inputs, positions=rows.positions, segments=rows.segments
    )
    return Observed(cache, rows)


def make_loss(cfg: EnergyConfig, model: EnergyTransformerConfig) -> LossFn:
    """The loss without a replay buffer; see `_train_loss` for what is minimised.

    Metrics: `loss` (of the last step's prediction), `loss_first_step` where all are trained,
    `energy` and `energy_slope` (before the last step), `update` (root mean square of the last
    update) and `step_size`.
    """

    def loss(
        params: Any, extra: Any, batch: Batch, *, step: jax.Array, key: jax.Array
    ) -> tuple[jax.Array, Metrics]:
        del extra, step
        initial_key, key = jax.random.split(key)
        initial = initial_logits(cfg, candidate_shape(batch, model), initial_key)
        scalar, metrics, _ = _train_loss(cfg, model, params, batch, initial, key)
        return scalar, metrics

    return loss


def make_replay_loss(cfg: EnergyConfig, model: EnergyTransformerConfig) -> StatefulLossFn:
    """The loss with a replay buffer: one row in `replay_every` + 1 continues a stored descent.

    The loss is over fresh and replayed rows alike; the fresh ones are stored.
    """

    def loss(
        params: Any, extra: Any, batch: Batch, state: Replay, *, step: jax.Array, key: jax.Array
    ) -> tuple[jax.Array, Metrics, Replay]:
        del extra, step
        draw_key, initial_key, key = jax.random.split(key, 3)
        initial = initial_logits(cfg, candidate_shape(batch, model), initial_key)
        (old_batch, old), found = replay.draw(state, every=cfg.replay_every, key=draw_key)
        old_batch = old_batch._replace(where=old_batch.where & found[:, None])
        whole, start = replay.interleave((batch, initial), (old_batch, old), every=cfg.replay_every)
        scalar, metrics, final = _train_loss(cfg, model, params, whole, start, key)
        fresh = replay.fresh_rows(final, every=cfg.replay_every)
        metrics["replayed"] = (old_batch.where.sum(dtype=final.dtype), metrics["loss"][1])
        return scalar, metrics, replay.push(state, (batch, fresh))

    return loss


def candidate_shape(batch: Batch, model: EnergyTransformerConfig) -> tuple[int, ...]:
    """`[B, L, V]`: a candidate for each target."""
    return (*batch.inputs.shape, model.trunk.padded_vocab_size)


def _train_loss(
    cfg: EnergyConfig,
    model: EnergyTransformerConfig,
    params: Any,
    batch: Batch,
    initial: jax.Array,
    key: jax.Array,
) -> tuple[jax.Array, Metrics, jax.Array]:
    """The loss over the steps that count, the metrics, and the last logits z_N."""
    step_key, size_key, key = jax.random.split(key, 3)
    context = observe(model, params, batch)
    alpha = step_size(params)
    if not cfg.learn_step_size:
        alpha = jax.lax.stop_gradient(alpha)
    if cfg.random_step_size > 1:
        low, high = 1 / cfg.random_step_size, cfg.random_step_size
        shape = (*initial.shape[:-1], 1)
        alpha = alpha * jax.random.uniform(size_key, shape, minval=low, maxval=high)
    taken: Any = cfg.num_steps
    if cfg.most_steps > cfg.num_steps:
        taken = jax.random.randint(step_key, (), cfg.num_steps, cfg.most_steps + 1)
    descent = Descent(cfg, model, cfg.noise, key)
    arguments = {"step_size": alpha, "start": descent.start, "context_at": descent.context_at}
    energy, steps = descent.energy(), cfg.most_steps
    if cfg.gradient == "one_step" and cfg.loss_steps == "last":
        free = taken - 1
        initial = descend_freely(energy, params, context, initial, num_steps=free, **arguments)
        arguments |= {
            "start": lambda z, k: descent.start(z, k + free),
            "context_at": lambda c, k: descent.context_at(c, k + free),
        }
        steps, taken = 1, 1
    path = descend(
        energy, params, context, initial,
        num_steps=steps, gradient=cfg.gradient, memory=cfg.memory, **arguments,
    )  # fmt: skip
    return _reduce(cfg, model, batch, path, taken, alpha)


def _reduce(
    cfg: EnergyConfig,
    model: EnergyTransformerConfig,
    batch: Batch,
    path: Trajectory,
    taken: jax.Array | int,
    alpha: jax.Array,
) -> tuple[jax.Array, Metrics, jax.Array]:
    def nll(logits: jax.Array) -> jax.Array:
        masked = mask_padding(logits, model.trunk.vocab_size)
        return losses.token_nll(masked, batch.targets, where=batch.where).sum()

    sums = jax.lax.map(nll, path.candidates)  # one step's softmax at a time
    count = batch.where.sum(dtype=sums.dtype)
    steps, last = jnp.arange(len(sums)), taken - 1
    of_last = jnp.sum(jnp.where(steps == last, sums, 0))
    of_all = jnp.sum(jnp.where(steps < taken, sums, 0)) / taken
    scalar = losses.mean(of_all if cfg.loss_steps == "all" else of_last, count)
    slope, one = path.slopes[last] * padding_factor(model), jnp.ones(())
    metrics = {
        "loss": (of_last, count),
        "energy": losses.masked_sum(path.energies[last], where=batch.where),
        "energy_slope": (slope, one),
        "update": (slope * jnp.mean(alpha), one),
        "step_size": (jnp.mean(alpha), one),
    }
    if cfg.loss_steps == "all" and len(sums) > 1:
        metrics["loss_first_step"] = (sums[0], count)
    return scalar, metrics, path.candidates[last]


def make_evaluate(
    cfg: EnergyConfig, model: EnergyTransformerConfig, *, num_steps: int | None = None
) -> LossFn:
    """Validation: `num_steps` steps (none: the largest number of training) from one noisy start.

    Metrics: `loss` (last step); `loss_step_k` and `energy_step_k` after step k, from 0 for the
    energy (each landscape has a level of its own: between two of them a fall says nothing);
    `energy_falls`, the share of positions whose energy falls at every step; `later_helps`, the
    share whose loss falls from the first step to the last.
    """
    steps = num_steps or cfg.most_steps

    def evaluate(
        params: Any, extra: Any, batch: Batch, *, step: jax.Array, key: jax.Array
    ) -> tuple[jax.Array, Metrics]:
        del extra, step
        initial_key, key = jax.random.split(key)
        initial = initial_logits(cfg, candidate_shape(batch, model), initial_key)
        descent = Descent(cfg, model, cfg.eval_noise, key)
        context, energy = observe(model, params, batch), descent.energy()
        path = descend(
            energy, params, context, initial,
            step_size=step_size(params), num_steps=steps, start=descent.start,
            context_at=descent.context_at, gradient="one_step",
        )  # fmt: skip
        last = jnp.int32(steps - 1)
        quiet = descent._replace(sigma=0.0)
        final = energy(
            params, quiet.context_at(context, last), quiet.start(path.candidates[-1], last)
        )
        energies = jnp.concatenate([path.energies, final[None]])
        return _describe(model, batch, path.candidates, energies)

    return evaluate


def _describe(
    model: EnergyTransformerConfig, batch: Batch, candidates: jax.Array, energies: jax.Array
) -> tuple[jax.Array, Metrics]:
    def nll(logits: jax.Array) -> jax.Array:
        masked = mask_padding(logits, model.trunk.vocab_size)
        return losses.token_nll(masked, batch.targets, where=batch.where)

    nlls = jax.lax.map(nll, candidates)
    where = batch.where
    falls = jnp.all(energies[1:] < energies[:-1], axis=0).astype(nlls.dtype)
    helps = (nlls[-1] < nlls[0]).astype(nlls.dtype)
    metrics: Metrics = {"loss": losses.masked_sum(nlls[-1], where=where)}
    metrics |= {
        f"loss_step_{k + 1}": losses.masked_sum(one, where=where) for k, one in enumerate(nlls)
    }
    metrics |= {
        f"energy_step_{k}": losses.masked_sum(one, where=where) for k, one in enumerate(energies)
    }
    metrics["energy_falls"] = losses.masked_sum(falls, where=where)
    metrics["later_helps"] = losses.masked_sum(helps, where=where)
    return losses.mean(*metrics["loss"]), metrics


def padding_factor(model: EnergyTransformerConfig) -> float:
    """From a root mean square over the padded vocabulary, where slopes are 0, to the real one."""
    return math.sqrt(model.trunk.padded_vocab_size / model.trunk.vocab_size)
