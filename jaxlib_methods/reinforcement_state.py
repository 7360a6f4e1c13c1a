"""What reinforcement mid-training changes beside the parameters: a slow average, and its guard."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxlib_methods import losses
from jaxlib_methods.models import transformer
from jaxlib_methods.models.config import TransformerConfig
from jaxlib_methods.reinforcement_midtraining_config import ReinforcementMidtrainingConfig

SMOOTHING = 0.9  # of the running mean of the reward that the guard watches


def init_state(
    cfg: ReinforcementMidtrainingConfig, model: TransformerConfig, key: jax.Array
) -> dict[str, Any]:
    """The running mean of the reward and its best; the moving average of the parameters."""
    state: dict[str, Any] = {"reward": jnp.zeros(()), "best": jnp.zeros(())}
    if cfg.reward == "information_gain":
        params = transformer.init_params(model, key)
        # The first step replaces it. In bfloat16 it would not move: 0.999 is 1 there.
        state["average"] = jax.tree.map(
            lambda leaf: jnp.zeros_like(leaf, jnp.promote_types(leaf.dtype, jnp.float32)), params
        )
    return state


def move(
    cfg: ReinforcementMidtrainingConfig, state: Any, params: Any, step: jax.Array
) -> dict[str, Any]:
    """The moving average after the last update, phi <- tau phi + (1 - tau) theta; first theta."""
    if "average" not in state:
        return state
    tau = jnp.where(step == 0, 0.0, cfg.ema_decay)
    average = jax.tree.map(
        lambda phi, theta: (tau * phi + (1 - tau) * theta.astype(phi.dtype)).astype(phi.dtype),
        state["average"],
        params,
    )
    return {**state, "average": average}


def watch(
    state: Any, total: jax.Array, count: jax.Array, step: jax.Array
) -> tuple[dict[str, Any], jax.Array]:
    """The state with the running mean of the reward, and how far that is below its best.

    total, count: of the step's rewards; where none was given, the mean stays.
    """
    first, reward = step == 0, losses.mean(total, count)
    running = jnp.where(first, reward, SMOOTHING * state["reward"] + (1 - SMOOTHING) * reward)
    running = jnp.where(count > 0, running, state["reward"])
    best = jnp.where(first, running, jnp.maximum(state["best"], running))
    return {**state, "reward": running, "best": best}, best - running
