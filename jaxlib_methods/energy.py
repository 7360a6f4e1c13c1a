"""Energy-based transformers (EBT, arXiv 2507.02092) for text: prediction by descending an energy.

The model gives an energy to (context, candidate distribution). A candidate starts as noise and
descends; a next-token loss on where it arrives trains the energy through the descent:

    p_k = softmax(z_k + sigma xi_k);  z_(k+1) = p_k - alpha dE/dp (x, p_k);  prediction softmax(z_N)

which is the official code's step, taken in probabilities; `space=logit` is the paper's equation 1,
z_(k+1) = z_k - alpha dE/dz. The defaults are the paper's System 1; its System 2 sets
`num_steps=2 max_steps=3 loss_steps=last num_landscapes=0 learn_step_size=false random_step_size=2
noise=3 replay_size=192`.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxlib_methods import energy_flops, losses, replay
from jaxlib_methods.descent import Energy, Trajectory, descend, descend_freely
from jaxlib_methods.method import Batch, Context, LossFn, Method, Metrics, StatefulLossFn
from jaxlib_methods.models import energy_transformer
from jaxlib_methods.models.config import TransformerConfig, check_choices
from jaxlib_methods.models.energy_transformer import EnergyTransformerConfig, Rows
from jaxlib_methods.models.transformer import KVCache
from jaxlib_methods.pallas_kernels.attention import MASKED_SCORE
from jaxlib_methods.replay import Replay

SMALLEST_STEP = 1e-4  # the official code's clamp, in the forward pass only
CALIBRATION_LENGTH = 64  # tokens of the text on which the first slope is measured
FLAT = 1e-5  # a fall of the energy below this share of it is none
STEEP = 1e4  # root mean square of an update, in logits


@dataclasses.dataclass(frozen=True, kw_only=True)
class EnergyConfig:
    """How a candidate begins, how it descends, and what of the descent is trained.

    num_steps: descent steps in training.
    max_steps: draw the number of each batch between num_steps and this; none always takes
        num_steps. Evaluation takes the largest.
    step_size: alpha at the start; none calibrates it so that the first update has the root mean
        square update_rms, whatever the vocabulary and width (the paper's 500 and 5 belong to a
        vocabulary of 50277 alone).
    update_rms: of the first update, in logits, where step_size is none. The paper's sizes come to
        1590 (System 1) and 16 (System 2); 100 was the best of a sweep on bytes.
    learn_step_size: alpha is trained, without weight decay.
    step_size_rate: factor on the learning rate of alpha relative to its start; the paper's rule
        of three times alpha is 3.
    random_step_size: f draws alpha uniformly between alpha / f and alpha * f, for each position;
        1 does not.
    noise: standard deviation of the Langevin noise on the logits before each step.
    eval_noise: the same in evaluation. Not published; 0 is recommended for a single candidate.
    space: `probability` steps as the official code does, `logit` as the paper's equation 1.
    initial: candidates begin as standard normal logits (`noise`) or all equal (`uniform`).
    initial_scale: factor on the standard normal logits.
    loss_steps: the loss is the mean over `all` steps (with a drawn number, those taken), or that
        of the `last`.
    gradient: `one_step` takes each step's beginning as a constant; with loss_steps=last the steps
        before the last are then free. `all_steps` differentiates through the whole descent.
    memory: `recompute` saves one candidate a step; `save` keeps what its derivative needs.
    num_landscapes: learned vectors in front of the text, one per step and the last for all later
        ones; 0: none.
    candidate_embedding: `own` is a matrix of its own, `token` the token embedding.
    replay_size: descents kept to go on from, in sequences; 0: none.
    replay_every: fresh sequences for each replayed one.
    max_candidate_gib: refuse a batch whose candidates and their slopes take more, over all devices.
    """

    num_steps: int = 2
    max_steps: int | None = None
    step_size: float | None = None
    update_rms: float = 100.0
    learn_step_size: bool = True
    step_size_rate: float = 3.0
    random_step_size: float = 1.0
    noise: float = 0.0
    eval_noise: float = 0.0
    space: Literal["probability", "logit"] = "probability"
    initial: Literal["noise", "uniform"] = "noise"
    initial_scale: float = 1.0
    loss_steps: Literal["all", "last"] = "all"
    gradient: Literal["one_step", "all_steps"] = "one_step"
    memory: Literal["recompute", "save"] = "recompute"
    num_landscapes: int = 2
    candidate_embedding: Literal["own", "token"] = "own"
    replay_size: int = 0
    replay_every: int = 2
    max_candidate_gib: float = 64.0

    def __post_init__(self) -> None:
        check_choices(self)
        _require(
            self.num_steps >= 1,
            f"energy.num_steps={self.num_steps} must be at least 1: a descent takes a step",
        )
        _require(
            self.max_steps is None or self.max_steps >= self.num_steps,
            f"energy.max_steps={self.max_steps} must be at least num_steps={self.num_steps}, "
            "or none",
        )
        _require(
            self.step_size is None or self.step_size >= SMALLEST_STEP,
            f"energy.step_size={self.step_size} must be at least {SMALLEST_STEP}, or none to "
            "calibrate it",
        )
        for name in ("update_rms", "max_candidate_gib", "initial_scale"):
            value = getattr(self, name)
            _require(value > 0, f"energy.{name}={value} must be positive")
        for name in ("step_size_rate", "noise", "eval_noise", "num_landscapes", "replay_size"):
            value = getattr(self, name)
            _require(value >= 0, f"energy.{name}={value} must not be negative")
        _require(
            self.random_step_size >= 1,
            f"energy.random_step_size={self.random_step_size} is a factor: at least 1",
        )
        _require(
            self.replay_every >= 1, f"energy.replay_every={self.replay_every} must be at least 1"
        )

    @property
    def most_steps(self) -> int:
        """The largest number of descent steps in training."""
        return self.max_steps or self.num_steps


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def model_config(model: TransformerConfig, cfg: EnergyConfig) -> EnergyTransformerConfig:
    """The energy transformer of a run: the trunk's sizes and what the method says."""
    return EnergyTransformerConfig(
        trunk=model,
        num_landscapes=cfg.num_landscapes,
        candidate_embedding=cfg.candidate_embedding,
    )


class Observed(NamedTuple):
    """The context of a descent: the observed stream's cache, and where the candidates stand."""

    cache: KVCache
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
    """alpha, not below 1e-4: the parameters hold its start and its size relative to that."""
    alpha = params["step_size"]["value"] * params["step_unit"]["value"]
    return jnp.maximum(alpha, SMALLEST_STEP)


def observe(model: EnergyTransformerConfig, params: Any, batch: Batch) -> Observed:
    """The observed stream of packed documents, once for all steps and candidates."""
    where = {"positions": batch.positions, "segments": batch.segments}
    cache = energy_transformer.observe(model, params, batch.inputs, **where)
    return Observed(cache, Rows(**where))


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
        initial = initial_logits(cfg, _candidate_shape(batch, model), initial_key)
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
        initial = initial_logits(cfg, _candidate_shape(batch, model), initial_key)
        (old_batch, old), found = replay.draw(state, every=cfg.replay_every, key=draw_key)
        old_batch = old_batch._replace(where=old_batch.where & found[:, None])
        whole, start = replay.interleave((batch, initial), (old_batch, old), every=cfg.replay_every)
        scalar, metrics, final = _train_loss(cfg, model, params, whole, start, key)
        fresh = replay.fresh_rows(final, every=cfg.replay_every)
        metrics["replayed"] = (old_batch.where.sum(dtype=final.dtype), metrics["loss"][1])
        return scalar, metrics, replay.push(state, (batch, fresh))

    return loss


def _candidate_shape(batch: Batch, model: EnergyTransformerConfig) -> tuple[int, ...]:
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
    slope, one = path.slopes[last] * _over_real(model), jnp.ones(())
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
    energy; `energy_falls`, the share of positions whose energy falls at every step; `later_helps`,
    the share whose loss falls from the first step to the last.
    """
    steps = num_steps or cfg.most_steps

    def evaluate(
        params: Any, extra: Any, batch: Batch, *, step: jax.Array, key: jax.Array
    ) -> tuple[jax.Array, Metrics]:
        del extra, step
        initial_key, key = jax.random.split(key)
        initial = initial_logits(cfg, _candidate_shape(batch, model), initial_key)
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


def monitor(metrics: Mapping[str, float]) -> str | None:
    """Names a collapse: an energy that has become flat, or a step that explodes."""
    update = metrics.get("train/update")
    if update is None:
        return None
    alpha = metrics["train/step_size"]
    if update > STEEP:
        return (
            f"the descent explodes: its updates have a root mean square of {update:.3g} logits at a "
            f"step size of {alpha:.3g}; lower energy.step_size or optimizer.learning_rate"
        )
    if update < FLAT:
        return (
            f"the energy is flat: its slope moves candidates by {update:.3g} logits at a step size "
            f"of {alpha:.3g}, so that predictions stay where they began; raise energy.step_size"
        )
    return None


def first_slope(
    cfg: EnergyConfig, model: EnergyTransformerConfig, params: Any, key: jax.Array
) -> jax.Array:
    """Root mean square of dE/dp over the real vocabulary, at first candidates on random tokens."""
    text_key, initial_key, noise_key = jax.random.split(key, 3)
    vocab, length = model.trunk.vocab_size, min(CALIBRATION_LENGTH, model.trunk.max_length)
    tokens = jax.random.randint(text_key, (1, length), 0, vocab)
    positions = jnp.arange(length)[None]
    ones = jnp.ones_like(tokens)
    batch = Batch(tokens, tokens, positions, ones, ones.astype(bool))
    initial = initial_logits(cfg, _candidate_shape(batch, model), initial_key)
    descent = Descent(cfg, model, cfg.noise, noise_key)
    path = descend(
        descent.energy(), params, observe(model, params, batch), initial,
        step_size=1.0, num_steps=1, start=descent.start, context_at=descent.context_at,
    )  # fmt: skip
    return path.slopes[0] * _over_real(model)


def _over_real(model: EnergyTransformerConfig) -> float:
    """From a root mean square over the padded vocabulary, where slopes are 0, to the real one."""
    return math.sqrt(model.trunk.padded_vocab_size / model.trunk.vocab_size)


def init_params(model: TransformerConfig, cfg: EnergyConfig, key: jax.Array) -> dict:
    """The model's parameters and its step size, calibrated where none is given."""
    energy_model = model_config(model, cfg)
    params = energy_transformer.init_params(energy_model, key)
    if cfg.step_size is None:
        slope_key = jax.random.fold_in(key, 1)
        slope = first_slope(cfg, energy_model, nn.meta.unbox(params), slope_key)
        unit = cfg.update_rms / slope
    else:
        unit = jnp.asarray(cfg.step_size, model.param_dtype)
    params["step_size"] = {"value": jnp.ones((), model.param_dtype)}
    params["step_unit"] = {"value": unit.astype(model.param_dtype)}
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
    )
    return flops * (1 + (1 / cfg.replay_every if cfg.replay_size else 0))


def _check_memory(cfg: EnergyConfig, context: Context) -> None:
    vocab = context.model.padded_vocab_size
    rows = context.batch_size * (1 + (1 / cfg.replay_every if cfg.replay_size else 0))
    # Of each step: where it began, its slope, where it ended, and the loss's gradient there.
    arrays = 4 if cfg.loss_steps == "last" and cfg.gradient == "one_step" else 4 * cfg.most_steps
    one = rows * context.sequence_length * vocab * 4 / 2**30
    buffer = cfg.replay_size * context.sequence_length * vocab * 4 / 2**30
    needed = arrays * one + buffer
    if needed > cfg.max_candidate_gib:
        parts = math.ceil(arrays * one / max(cfg.max_candidate_gib - buffer, one / 64))
        raise ValueError(
            f"candidates over a vocabulary of {vocab} tokens take {needed:.1f} GiB over all "
            f"devices ({arrays} arrays of {one:.2f} GiB, and {buffer:.1f} GiB of replay buffer), "
            f"energy.max_candidate_gib={cfg.max_candidate_gib} allows less; give "
            f"--train.num_microbatches={parts} times as large, a tokenizer of fewer tokens, a "
            "smaller energy.replay_size, or a higher limit"
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
    tokens = jax.ShapeDtypeStruct((rows, length), jnp.int32)
    batch = Batch(*(tokens,) * 4, jax.ShapeDtypeStruct((rows, length), jnp.bool_))
    logits = jax.ShapeDtypeStruct((rows, length, model.trunk.padded_vocab_size), jnp.float32)
    return replay.empty((batch, logits), num_slots=cfg.replay_size // rows)
