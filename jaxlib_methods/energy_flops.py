"""Floating-point operations of energy-based transformers: training, and thinking.

Matmuls only, a multiply and an add counted apart, per predicted token, over the plain square of
scores, without what `remat` and tiles compute again and without the energy head, whose matrix has
one column. With a pass of the candidate stream

    F = blocks + attention + candidate embedding

a descent step costs 2 F (the energy and its slope in the candidate). Its outer derivative costs
6 F more forward over reverse (`memory=recompute`: energy and slope, each with a tangent, and two
products for each weight) and 4 F more reverse over reverse (`memory=save`), but for the products
of the candidate embedding that give a gradient to the candidate or the step size: they are there
where that gradient is.
"""

from typing import NamedTuple

from jaxlib_methods.descent import Memory
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
    return Pass(2.0 * weights, attention, vocabulary)


def observe_flops(model: EnergyTransformerConfig, length: int) -> float:
    """The observed stream of a sequence of `length` tokens, per token, for all landscapes."""
    keys = length + model.shift
    blocks, attention, _ = candidate_pass(model, keys)
    return max(model.num_landscapes, 1) * (blocks + attention) * keys / length


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
    memory: Memory = "recompute",
) -> float:
    """A training step per token of a sequence of `length` tokens.

    free_steps: descent steps without a derivative (their mean number). trained_steps: those with
    one. learned_step: the step size has a gradient. chained: so have the candidates between steps.
    memory: how a step's derivative is computed, see `descent.descent_step`.
    """
    blocks, attention, vocabulary = candidate_pass(model, length + model.shift)
    if memory == "recompute":
        backward = 6 * (blocks + attention) + (4 + learned_step + chained) * vocabulary
    else:
        backward = 4 * (blocks + attention) + (3 + chained) * vocabulary
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
