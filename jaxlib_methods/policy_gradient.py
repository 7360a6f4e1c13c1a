"""Policy gradients on sampled responses: advantages, the clipped surrogate, the penalty.

An advantage is a number per response and a constant: no gradient flows through it. What the
policy is charged is a number per token; `per_response` makes one of a response again.
"""

# Dimension key: G rollouts of a prompt, R response slots. Dots: prompts, or prompts and rollouts.

import jax
import jax.numpy as jnp


def _wide(x: jax.Array) -> jax.Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _above_least(rewards: jax.Array) -> jax.Array:
    if rewards.shape[-1] < 2:
        raise ValueError(
            f"rewards of shape {rewards.shape} have {rewards.shape[-1]} rollout of a prompt; an "
            "advantage compares at least 2"
        )
    rewards = _wide(jax.lax.stop_gradient(rewards))
    # The mean of equal numbers may round to another one, and the division would make it large.
    return rewards - rewards.min(axis=-1, keepdims=True)


def group_advantages(rewards: jax.Array, *, epsilon: float = 1e-6) -> jax.Array:
    """Rewards of a prompt's rollouts, standardised (GRPO, arXiv 2402.03300; RMT, 2509.24375).

        A_i = (r_i - mean(r)) / (std(r) + epsilon)      mean and population std over the G rollouts

    Exactly 0 where all rewards of a group are equal. rewards: `[..., G]`, G at least 2. Returns
    `[..., G]` without a gradient, float32 or better.

    >>> import jax.numpy as jnp
    >>> group_advantages(jnp.array([[1.0, 0.0, 0.0, 1.0], [0.7] * 4])).round(4).tolist()
    [[1.0, -1.0, -1.0, 1.0], [0.0, 0.0, 0.0, 0.0]]
    """
    above = _above_least(rewards)
    above -= above.mean(axis=-1, keepdims=True)
    std = jnp.sqrt(jnp.square(above).mean(axis=-1, keepdims=True))
    return above / (std + epsilon)


def leave_one_out_advantages(rewards: jax.Array) -> jax.Array:
    """A reward less the mean of its group's other ones (RLP, arXiv 2510.01265, eq. 7).

        A_i = G / (G - 1) (r_i - mean(r)) = r_i - mean_(j != i) r_j

    Not divided by a standard deviation. rewards: `[..., G]`, G at least 2. Returns `[..., G]`
    without a gradient, float32 or better; each group sums to 0.

    >>> import jax.numpy as jnp
    >>> leave_one_out_advantages(jnp.array([3.0, 1.0, 1.0])).tolist()
    [2.0, -1.0, -1.0]
    """
    above, size = _above_least(rewards), rewards.shape[-1]
    return (size * above - above.sum(axis=-1, keepdims=True)) / (size - 1)


def _log_ratio(
    log_probs: jax.Array, old_log_probs: jax.Array, where: jax.Array | None
) -> jax.Array:
    log_ratio = _wide(log_probs) - _wide(jax.lax.stop_gradient(old_log_probs))
    return log_ratio if where is None else jnp.where(where, log_ratio, 0.0)


def clipped(
    log_probs: jax.Array,
    old_log_probs: jax.Array,
    advantages: jax.Array,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    where: jax.Array | None = None,
) -> jax.Array:
    """Where `clipped_surrogate` is clipped, so that the token has no gradient.

        rho > 1 + clip_high and A > 0,  or  rho < 1 - clip_low and A < 0

    Arguments as there. Returns bool `[..., R]`; in the first update after sampling all are False.

    >>> import jax.numpy as jnp
    >>> clipped(jnp.log(jnp.array([1.5, 1.1])), jnp.zeros(2), jnp.array(1.0)).tolist()
    [True, False]
    """
    ratio = jnp.exp(_log_ratio(log_probs, old_log_probs, where))
    advantage = advantages[..., None]
    above = (advantage > 0) & (ratio > 1 + clip_high)
    return above | ((advantage < 0) & (ratio < 1 - clip_low))


def clipped_surrogate(
    log_probs: jax.Array,
    old_log_probs: jax.Array,
    advantages: jax.Array,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    where: jax.Array | None = None,
) -> jax.Array:
    """What the policy is charged per token (PPO, arXiv 1707.06347, eq. 7; RLP, 2510.01265, eq. 8).

        l_u = -min(rho_u A, clip(rho_u, 1 - clip_low, 1 + clip_high) A)
        rho_u = exp(log pi(o_u) - log pi_old(o_u))

    Only `log_probs` gets a gradient; where it equals `old_log_probs` this is -A grad log pi.
    log_probs, old_log_probs: `[..., R]`; advantages: `[...]`; where: bool `[..., R]`, False gives
    0 and no gradient. Returns `[..., R]`, float32 or better.

    >>> import jax.numpy as jnp
    >>> log_ratio, advantages = jnp.log(jnp.array([[1.5], [1.5]])), jnp.array([1.0, -1.0])
    >>> loss = clipped_surrogate(log_ratio, jnp.zeros((2, 1)), advantages, clip_high=0.25)
    >>> loss.tolist()
    [[-1.25], [1.5]]
    """
    advantages = _wide(jax.lax.stop_gradient(advantages))
    active = clipped(
        jax.lax.stop_gradient(log_probs),
        old_log_probs,
        advantages,
        clip_low=clip_low,
        clip_high=clip_high,
        where=where,
    )
    # Before exp: a clipped ratio may overflow, and infinity times a gradient of 0 is NaN.
    log_ratio = jnp.where(active, 0.0, _log_ratio(log_probs, old_log_probs, where))
    advantage = advantages[..., None]
    bound = jnp.where(advantage > 0, 1 + clip_high, 1 - clip_low)
    loss = -advantage * jnp.where(active, bound, jnp.exp(log_ratio))
    return loss if where is None else jnp.where(where, loss, 0.0)


def k3_kl(
    log_probs: jax.Array, reference_log_probs: jax.Array, *, where: jax.Array | None = None
) -> jax.Array:
    """Estimate of KL(pi || pi_ref) from sampled tokens, never negative (GRPO, 2402.03300, eq. 4).

        k_u = exp(d_u) - d_u - 1,   d_u = log pi_ref(o_u) - log pi(o_u)

    The reference's gradient is stopped. log_probs, reference_log_probs: `[..., R]`; where: bool
    `[..., R]`, False gives 0 and no gradient. Returns `[..., R]` nats, float32 or better.

    >>> import jax.numpy as jnp
    >>> [round(float(k), 4) for k in k3_kl(jnp.zeros(2), jnp.log(jnp.array([1.0, 2.0])))]
    [0.0, 0.3069]
    """
    d = -_log_ratio(log_probs, reference_log_probs, where)
    return jnp.expm1(d) - d


def per_response(values: jax.Array, *, where: jax.Array, divisor: int | None = None) -> jax.Array:
    """One number per response of the numbers of its tokens.

        sum_u w_u v_u / max(1, sum_u w_u),   or, with a divisor,   sum_u w_u v_u / divisor

    The mean weighs responses alike whatever their lengths (GRPO); a constant divisor weighs tokens
    alike. A response without tokens gives 0. values: `[..., R]`, anything where `where` is False;
    where: bool `[..., R]`. Returns `[...]`.

    >>> import jax.numpy as jnp
    >>> values, where = jnp.array([3.0, 1.0, jnp.nan]), jnp.array([True, True, False])
    >>> [float(per_response(values, where=where, divisor=divisor)) for divisor in (None, 8)]
    [2.0, 0.5]
    """
    if where.dtype != jnp.bool_ or where.shape != values.shape:
        raise ValueError(
            f"where must be bool of shape {values.shape}, got {where.dtype} of {where.shape}"
        )
    if divisor is not None and divisor < 1:
        raise ValueError(f"divisor {divisor} must be at least 1, or None for the mean")
    total = jnp.where(where, values, 0).sum(axis=-1)
    count = jnp.maximum(where.sum(axis=-1), 1) if divisor is None else divisor
    return total / count
