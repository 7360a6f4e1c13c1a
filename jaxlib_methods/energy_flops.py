"""Floating-point operations of energy-based transformers: training, and thinking.

Matmuls only, a multiply and an add counted apart, per predicted token, over the plain square of
scores, without what `remat` and tiles compute again. With a pass of the candidate stream

    F = blocks + attention + candidate embedding

a descent step costs 2 F (the energy and its slope in the candidate) and its outer derivative,
forward over reverse, 6 F more: energy and slope, each with a tangent, and two products for each
weight.
"""

from typing import NamedTuple

from jaxlib_methods.models.energy_transformer import EnergyTransformerConfig


class Pass(NamedTuple):
    """Forward FLOPs of a stream per token: of the blocks' kernels, of the scores and their use
    (two matmuls over all keys), and of the vocabulary's matrix."""

    blocks: float
    attention: float
    vocabulary: float


def candidate_pass(model: EnergyTransformerConfig, num_keys: int) -> Pass:
    """One candidate through the candidate stream, over `num_keys` keys."""
    cfg = model.trunk
    matrices = 3 if cfg.mlp == "swiglu" else 2
    projections = cfg.embed_dim * cfg.head_size * (2 * cfg.num_heads + 2 * cfg.kv_heads)
    weights = cfg.num_layers * (projections + matrices * cfg.embed_dim * cfg.mlp_size)
    attention = 4.0 * cfg.num_layers * cfg.num_heads * cfg.head_size * num_keys
    vocabulary = 2.0 * cfg.padded_vocab_size * cfg.embed_dim
    # The energy head is a matrix of one column.
    return Pass(2.0 * weights + 2.0 * cfg.embed_dim, attention, vocabulary)


def observe_flops(model: EnergyTransformerConfig, length: int) -> float:
    """The observed stream of a sequence of `length` tokens, per token, for all landscapes."""
    keys = length + model.shift
    one = candidate_pass(model, keys)
    per_token = one.blocks - 2.0 * model.trunk.embed_dim + one.attention
    return max(model.num_landscapes, 1) * per_token * keys / length


def descent_flops(model: EnergyTransformerConfig, length: int) -> float:
    """One descent step per candidate, without an outer derivative: the energy and its slope."""
    return 2 * sum(candidate_pass(model, length + model.shift))


def train_flops(
    model: EnergyTransformerConfig,
    length: int,
    *,
    free_steps: float,
    trained_steps: int,
    learned_step: bool = True,
    chained: bool = False,
) -> float:
    """A training step per token of a sequence of `length` tokens, with memory=recompute.

    free_steps: descent steps without a derivative (their mean number). trained_steps: those with
    one. learned_step: the step size has a gradient. chained: so have the candidates between steps.
    """
    blocks, attention, vocabulary = candidate_pass(model, length + model.shift)
    slope = 4 + learned_step + (chained and trained_steps > 1)
    backward = 6 * blocks + 6 * attention + slope * vocabulary
    steps = free_steps + trained_steps
    return (
        3 * observe_flops(model, length)
        + steps * descent_flops(model, length)
        + trained_steps * backward
    )


def think_flops(
    model: EnergyTransformerConfig, length: int, *, num_steps: float, num_candidates: int
) -> float:
    """Thinking per token: reading it once, then the steps of every candidate and their energies."""
    descent = num_steps * descent_flops(model, length)
    judged = sum(candidate_pass(model, length + model.shift))
    return observe_flops(model, length) + num_candidates * (descent + judged)
