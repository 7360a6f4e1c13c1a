"""Optimisers and learning-rate schedules, composed from optax."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers

from jaxlib_methods.train.config import OptimizerConfig

MUON_BETA = 0.95  # the momentum of Muon's published recipe


def make_schedule(cfg: OptimizerConfig, num_steps: int) -> optax.Schedule:
    """Learning rate of optimiser step s, counted from 0.

    Linear warm-up over `warmup_fraction` of the run, reaching the peak at its last step; then
    `cosine` to `final_fraction` of the peak at the end, `wsd` (the peak, then a straight line to
    `final_fraction` over the last `decay_fraction`), or `constant`.
    """
    peak = cfg.learning_rate
    warmup = round(cfg.warmup_fraction * num_steps)
    rest = max(num_steps - warmup, 1)
    if cfg.schedule == "cosine":
        after = optax.cosine_decay_schedule(peak, rest, alpha=cfg.final_fraction)
    elif cfg.schedule == "wsd":
        decay = min(max(round(cfg.decay_fraction * num_steps), 1), rest)
        line = optax.linear_schedule(peak, peak * cfg.final_fraction, decay)
        after = optax.join_schedules([optax.constant_schedule(peak), line], [rest - decay])
    else:
        after = optax.constant_schedule(peak)
    if not warmup:
        return after
    # From 1 / warmup, not from 0: a first step of size 0 would be a wasted batch.
    rise = optax.linear_schedule(peak / warmup, peak, max(warmup - 1, 1))
    return optax.join_schedules([rise, after], [warmup])


def _is_matrix(path: Any) -> bool:
    return path[-1].key in ("kernel", "table")


def decay_mask(params: Any) -> Any:
    """True where weight decay applies: kernels and tables, not norms and biases."""
    return jax.tree_util.tree_map_with_path(lambda path, _: _is_matrix(path), params)


def muon_dimensions(params: Any) -> Any:
    """What Muon orthogonalises: the blocks' kernels, as matrices of input by output features.

    A leading axis of layers is a batch of matrices. The matrix by which a recurrent model's state
    meets its input is one of them. Embeddings, head, norms and biases are None and go to AdamW.
    """

    def dimensions(path: Any, leaf: Any) -> MuonDimensionNumbers | None:
        names = [entry.key for entry in path]
        if names[-1] != "kernel" or not {"blocks", "block", "adapter"} & set(names):
            return None
        reads = names[-2] in ("query", "key", "value")
        writes = names[-2] == "output"
        first = leaf.ndim - (3 if reads or writes else 2)  # behind the axis of layers, if any
        inputs = (first, first + 1) if writes else (first,)
        outputs = (first + 1, first + 2) if reads else (leaf.ndim - 1,)
        return MuonDimensionNumbers(reduction_axis=inputs, output_axis=outputs)

    return jax.tree_util.tree_map_with_path(dimensions, params)


def make_optimizer(
    cfg: OptimizerConfig, num_steps: int, *, rate_factors: Mapping[str, float] | None = None
) -> optax.GradientTransformation:
    """Global-norm clipping, then AdamW or Muon, with the schedule of `make_schedule`.

    rate_factors: top-level name of parameters -> factor on their learning rate; 0 freezes them.

    Muon's updates are scaled to AdamW's root mean square (0.2), so that one learning rate serves
    both kinds of parameters.
    """
    schedule = make_schedule(cfg, num_steps)
    if cfg.name == "muon":
        # optax masks muon's own weight decay for the matrices only: decay behind it instead.
        inner = optax.chain(
            optax.contrib.muon(
                1.0,
                beta=MUON_BETA,
                eps=cfg.epsilon,
                adam_b1=cfg.beta1,
                adam_b2=cfg.beta2,
                muon_weight_dimension_numbers=muon_dimensions,
                consistent_rms=0.2,
            ),
            optax.add_decayed_weights(-cfg.weight_decay, decay_mask),
            optax.scale_by_schedule(schedule),
        )
    else:
        inner = optax.adamw(
            schedule,
            b1=cfg.beta1,
            b2=cfg.beta2,
            eps=cfg.epsilon,
            weight_decay=cfg.weight_decay,
            mask=decay_mask,
        )
    clip = optax.clip_by_global_norm(cfg.clip_norm) if cfg.clip_norm else optax.identity()
    if not rate_factors:
        return optax.chain(clip, inner)

    def scale(updates: Any, params: Any) -> Any:
        del params
        return {
            name: optax.tree.scale(rate_factors.get(name, 1.0), leaves)
            for name, leaves in updates.items()
        }

    return optax.chain(clip, inner, optax.stateless(scale))


def global_norm(tree: Any) -> jax.Array:
    """Euclidean norm over all leaves, float32 or better."""
    squares = [
        jnp.sum(jnp.square(x.astype(jnp.promote_types(x.dtype, jnp.float32))))
        for x in jax.tree.leaves(tree)
    ]
    return jnp.sqrt(sum(squares, start=jnp.zeros(())))
