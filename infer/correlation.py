"""Pearson's correlation of two values of each token, over batches."""

import math
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np


def moments(x: jax.Array, y: jax.Array, where: jax.Array) -> jax.Array:
    """Count, means and centred second moments (xx, yy, xy) of two values: `[6]`."""
    count = jnp.maximum(where.sum(), 1)
    means = [jnp.sum(jnp.where(where, v, 0)) / count for v in (x, y)]
    dx, dy = (jnp.where(where, v - mean, 0) for v, mean in zip((x, y), means, strict=True))
    return jnp.stack([where.sum(), *means, (dx * dx).sum(), (dy * dy).sum(), (dx * dy).sum()])


def correlation(parts: Iterable[np.ndarray]) -> float:
    """Pearson's, over all tokens, from `moments` of the batches; nan where nothing varies."""
    counts, x, y, xx, yy, xy = np.array([*parts], np.float64).T
    weights = counts / counts.sum()
    dx, dy = x - weights @ x, y - weights @ y
    square = (xx.sum() + counts @ (dx * dx)) * (yy.sum() + counts @ (dy * dy))
    both = xy.sum() + counts @ (dx * dy)
    return float(both / math.sqrt(square)) if square > 0 else math.nan
