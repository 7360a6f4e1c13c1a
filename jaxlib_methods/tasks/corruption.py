"""What is done to an image that a model must undo, and how well it was undone."""

# Dimension key: R images, S image side, C channels.

import jax
import jax.numpy as jnp
import numpy as np

DIFFUSION_STEPS = 1000
_BETAS = (1e-4, 0.02)


def alpha_bars() -> np.ndarray:
    """Share of the variance that is signal at each level of the linear schedule, `[1000]`.

    a_t = prod_(s <= t) (1 - b_s),   b from 0.0001 to 0.02      (Ho et al. 2020)
    """
    return np.cumprod(1.0 - np.linspace(*_BETAS, DIFFUSION_STEPS))


def scales(levels: jax.Array | np.ndarray, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
    """`sqrt(a_t)` and `sqrt(1 - a_t)` of levels of any shape; the roots are taken in float64."""
    signal = alpha_bars()
    tables = (np.sqrt(signal), np.sqrt(1 - signal))
    clean, noise = (jnp.asarray(table, dtype)[levels] for table in tables)
    return clean, noise


def add_noise(clean: jax.Array, noise: jax.Array, levels: jax.Array) -> jax.Array:
    """A step of diffusion taken at once: `sqrt(a_t) clean + sqrt(1 - a_t) noise`.

    clean, noise: `[R, S, S, C]`; levels: int `[R]`, t between 0 and 999.
    """
    kept, added = (scale[:, None, None, None] for scale in scales(levels, clean.dtype))
    return kept * clean + added * noise


def keys_of(seeds: jax.Array) -> jax.Array:
    """A random key for each image, from its seed alone: `[R]` keys from int32 `[R]`."""
    return jax.vmap(jax.random.key)(seeds)


def draw_patches(seeds: jax.Array, *, grid: int, patch_size: int, share: float) -> jax.Array:
    """Marks a random share of each image's patches: bool `[R, S, S, 1]`, True at the marked.

    seeds: int32 `[R]`. grid: patches to a side. Every image has the same number of marked patches,
    the nearest to the share, at least one and not all.
    """
    total = grid * grid
    count = min(max(round(share * total), 1), total - 1)
    draws = jax.vmap(lambda key: jax.random.permutation(key, total))(keys_of(seeds))
    marked = (draws < count).reshape(-1, grid, grid)
    marked = jnp.repeat(jnp.repeat(marked, patch_size, axis=1), patch_size, axis=2)
    return marked[..., None]


def squared_error(prediction: jax.Array, clean: jax.Array, *, where: jax.Array) -> jax.Array:
    """Mean squared error of each image in steps of 0 to 255, clamped: `[R]`.

    prediction, clean: `[R, S, S, C]`, -1 to 1 is the range of a pixel; where: bool of a shape that
    broadcasts to theirs, False leaves a value out. An image without values gives 0.
    """
    where = jnp.broadcast_to(where, clean.shape)
    difference = (jnp.clip(prediction, -1, 1) - jnp.clip(clean, -1, 1)) * 127.5
    total = jnp.where(where, jnp.square(difference), 0).sum(axis=(1, 2, 3))
    return total / jnp.maximum(where.sum(axis=(1, 2, 3)), 1)


def psnr(error: jax.Array) -> jax.Array:
    """Peak signal-to-noise ratio in decibels, `10 log10(255^2 / error)`; at most about 148."""
    return 10 * jnp.log10(255.0**2 / jnp.maximum(error, 1e-10))
