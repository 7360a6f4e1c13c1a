"""From easy to hard tokens: tiers by entropy, how often each is drawn, and the draw itself."""

# Dimension key: D rows, L sequence, K draws of a row. Tiers are the last axis of three.

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

TIERS = ("easy", "medium", "hard")


def assign_tiers(entropy: Any, thresholds: Sequence[float] | jax.Array) -> Any:
    """Cuts tokens by the entropy of their prediction (RMT, arXiv 2509.24375).

        -1 below the first threshold, 0 (easy) from it, 1 (medium) from the second, 2 (hard) from
        the third on

    RPT's thresholds are 0.5, 1 and 1.5 nats. entropy: `[...]` of numpy or jax; NaN gives -1.
    thresholds: three ascending numbers; of an array (quantiles of a batch) it is not checked.
    Returns int8 `[...]` of the same kind.

    >>> import numpy as np
    >>> assign_tiers(np.array([0.4, 0.5, 1.2, 9.0, np.nan]), (0.5, 1.0, 1.5)).tolist()
    [-1, 0, 1, 2, -1]
    """
    if not isinstance(thresholds, jax.Array) and (
        len(thresholds) != len(TIERS) or not all(np.diff(thresholds) >= 0)
    ):
        raise ValueError(f"thresholds {tuple(thresholds)} must be {len(TIERS)} ascending numbers")
    reached = [(entropy >= threshold).astype("int8") for threshold in thresholds]
    return sum(reached[1:], reached[0]) - 1


def quantile_thresholds(
    entropies: np.ndarray, quantiles: Sequence[float] = (0.5, 0.7, 0.85)
) -> tuple[float, ...]:
    """Thresholds for `assign_tiers` that leave known shares of the tokens to each tier.

    entropies: `[...]`; NaN is left out. By the defaults half of the tokens are in no tier.

    >>> import numpy as np
    >>> quantile_thresholds(np.arange(101.0))
    (50.0, 70.0, 85.0)
    """
    ascending = len(quantiles) == len(TIERS) and all(np.diff([0.0, *quantiles, 1.0]) >= 0)
    if not ascending:
        raise ValueError(
            f"quantiles {tuple(quantiles)} must be {len(TIERS)} ascending numbers from 0 to 1"
        )
    known = entropies[~np.isnan(entropies)]
    if not known.size:
        raise ValueError(
            f"entropies of shape {entropies.shape} hold no number to take quantiles of"
        )
    return tuple(float(threshold) for threshold in np.quantile(known, quantiles))


def tier_probabilities(
    step: jax.Array | int,
    *,
    num_steps: int,
    first: Sequence[float],
    last: Sequence[float],
    begin: float = 0.3,
    end: float = 0.7,
) -> jax.Array:
    """How often each tier is drawn (RMT, arXiv 2509.24375, curriculum-based adaptive sampling).

        p_t = (1 - a) first + a last,   a = (t - begin T) / ((end - begin) T) held within [0, 1]

    Exactly `first` before begin T and `last` from end T on, T = num_steps. step: int scalar.
    first, last: of `TIERS`, each summing to 1. Returns float32 `[3]`.

    >>> p = tier_probabilities(500, num_steps=1000, first=(1, 0, 0), last=(0, 0, 1))
    >>> p.tolist()
    [0.5, 0.0, 0.5]
    """
    for name, shares in (("first", first), ("last", last)):
        if len(shares) != len(TIERS) or min(shares) < 0 or not np.isclose(sum(shares), 1.0):
            raise ValueError(
                f"{name} {tuple(shares)} must be {len(TIERS)} shares of {', '.join(TIERS)} that "
                "sum to 1"
            )
    if not 0 <= begin < end <= 1:
        raise ValueError(f"begin {begin} must lie before end {end}, both from 0 to 1")
    # Compared in float32, in which 100 * 0.55 is 55: in float64 it is 55.00000000000001.
    now, start, stop = (jnp.float32(x) for x in (step, begin * num_steps, end * num_steps))
    way = jnp.where(now >= stop, 1.0, jnp.clip((now - start) / (stop - start), 0.0, 1.0))
    return (1 - way) * jnp.asarray(first, jnp.float32) + way * jnp.asarray(last, jnp.float32)


def _draw_row(
    tiers: jax.Array, probabilities: jax.Array, key: jax.Array, num_per_row: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`draw_positions` for one row, `[L]` -> `[K]`."""
    names = jnp.arange(len(TIERS), dtype=tiers.dtype)

    def draw(taken: jax.Array, number: jax.Array) -> tuple[jax.Array, Any]:
        key_tier, key_position = jax.random.split(jax.random.fold_in(key, number))
        free = (tiers[None] == names[:, None]) & ~taken[None]
        left = free.sum(axis=-1)
        shares = jnp.where(left > 0, probabilities, 0.0)
        tier = jax.random.categorical(key_tier, jnp.log(shares))
        found = shares.sum() > 0
        rank = jax.random.randint(key_position, (), 0, jnp.maximum(left[tier], 1))
        position = jnp.argmax(jnp.cumsum(free[tier]) > rank)
        taken |= found & (jnp.arange(taken.shape[0]) == position)
        chosen = (jnp.where(found, position, 0), jnp.where(found, tier, -1), found)
        return taken, chosen

    taken = jnp.zeros(tiers.shape, bool)
    _, (positions, drawn, found) = jax.lax.scan(draw, taken, jnp.arange(num_per_row))
    return positions.astype(jnp.int32), drawn.astype(jnp.int8), found


def draw_positions(
    tiers: jax.Array, probabilities: jax.Array, *, num_per_row: int, keys: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Draws the tokens of each row that are reasoned about (RMT, arXiv 2509.24375).

    Each of K = num_per_row draws takes a tier by the probabilities, renormalised over the tiers
    that still have a candidate in the row, and one of its candidates uniformly; none is drawn
    twice. A tier of probability 0 is never drawn, even where the row has no other.
    tiers: int8 `[D, L]`, -1 is no candidate; probabilities: `[3]`; keys: `[D]`, of which row r uses
    its own alone. Returns positions int32 `[D, K]`, their tiers int8 `[D, K]` and where bool
    `[D, K]`; where it is False the row had no candidate left, with position 0 and tier -1.

    >>> import jax, jax.numpy as jnp
    >>> tiers, keys = jnp.array([[-1, -1, 1], [-1, -1, -1]], jnp.int8), jax.random.split(
    ...     jax.random.key(0), 2)
    >>> positions, drawn, where = draw_positions(tiers, jnp.ones(3) / 3, num_per_row=1, keys=keys)
    >>> positions.tolist(), drawn.tolist(), where.tolist()
    ([[2], [0]], [[1], [-1]], [[True], [False]])
    """
    return jax.vmap(lambda row, key: _draw_row(row, probabilities, key, num_per_row))(tiers, keys)
