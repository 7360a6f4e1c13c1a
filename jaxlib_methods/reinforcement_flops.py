"""FLOPs of reinforcement mid-training: rollouts, scores and update apart."""

from typing import NamedTuple

from jaxlib_methods.flops import TRAIN_TO_FORWARD, transformer_forward_flops
from jaxlib_methods.models.config import TransformerConfig
from jaxlib_methods.reinforcement_midtraining_config import ReinforcementMidtrainingConfig


class Parts(NamedTuple):
    """FLOPs of one row of a step. Every response is counted at its longest.

    rollout: reading the prompts and drawing the responses. score: forward passes without gradient.
    policy: forward and backward over prompts and responses. text: the same over the row.
    """

    rollout: float
    score: float
    policy: float
    text: float


def parts(
    model: TransformerConfig,
    length: int,
    cfg: ReinforcementMidtrainingConfig,
    *,
    prompt_length: int,
) -> Parts:
    """FLOPs of one row of `length` tokens; prompts of `prompt_length` tokens."""
    slots = cfg.response_slots
    whole = prompt_length + slots
    prompts = cfg.positions_per_row
    responses = prompts * cfg.rollouts
    head = 2.0 * model.embed_dim * model.padded_vocab_size
    blocks = transformer_forward_flops(model, whole, head=False)
    response = whole * blocks + (slots + 1) * head
    prompt = transformer_forward_flops(model, prompt_length, head=False)
    # The prompt is read but for its last token; caches have room for everything from the start.
    rollout = prompts * (prompt_length - 1) * prompt + responses * slots * (blocks + head)
    text = length * transformer_forward_flops(model, length)
    score = 0.0
    if cfg.reward == "information_gain":
        score += responses * (whole * blocks + (slots + 1) * head)
        score += prompts * (prompt_length * prompt + head)
    if cfg.kl_weight:
        score += responses * response
    if cfg.task == "text" and cfg.has_tiers and cfg.entropy is None:
        score += text
    return Parts(
        rollout=rollout,
        score=score,
        policy=TRAIN_TO_FORWARD * responses * response,
        text=(TRAIN_TO_FORWARD if cfg.ntp_weight else 1) * text,
    )


def train_flops(
    model: TransformerConfig,
    length: int,
    cfg: ReinforcementMidtrainingConfig,
    *,
    prompt_length: int,
) -> float:
    """FLOPs of a step per token of its rows."""
    return sum(parts(model, length, cfg, prompt_length=prompt_length)) / length
