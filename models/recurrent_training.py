"""Training a recurrent-depth language model (arXiv 2502.05171, sections 3.2 and 3.3).

The number of iterations is drawn for each step. The first r - k run without gradient: a forward
pass each, and no memory; gradients flow through the last k.
"""

# Dimension key: B batch, L sequence, D width, V padded vocabulary.

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxlib_methods.models.config import TransformerConfig
from jaxlib_methods.models.partitioning import constrain
from jaxlib_methods.models.recurrent_depth import Reading, initial_state, iterate, predict, read
from jaxlib_methods.models.transformer import REMAT_POLICIES, count_positions

SIGMA = 0.5  # of the logarithm of the rate, in `lognormal_poisson`

_Carry = tuple[jax.Array, jax.Array | None, jax.Array, jax.Array]


class RecurrentOutputs(NamedTuple):
    """What a forward pass gives.

    logits: `[B, L, V]`, float32 or better, padding masked. hidden: `[B, L, D]`, what was asked for,
    or None. state: the last, `[B, L, D]`. final: `[B, L, D]`, what the head reads. changes, norms:
    of the iterations with gradient, `[trained steps]`: ||s_i - s_(i-1)|| / ||s_i|| and the root
    mean square of s_i, averaged over tokens; an iteration that was not taken repeats the last.
    Without gradient.
    """

    logits: jax.Array
    hidden: jax.Array | None
    state: jax.Array
    final: jax.Array
    changes: jax.Array
    norms: jax.Array


def check_hidden_layer(cfg: TransformerConfig, layer: int | Literal["final"] | None) -> None:
    """Raises ValueError for a `hidden_layer` of `forward` that does not exist."""
    last = cfg.prelude_layers + cfg.trained_steps
    if layer not in (None, "final", *range(last + 1)):
        raise ValueError(
            f"hidden_layer {layer!r} does not exist; choose 0 to {cfg.prelude_layers} (prelude), "
            f"to {last} (iterations of the core with gradient), or 'final'"
        )


def forward(
    cfg: TransformerConfig,
    params: Mapping[str, Any],
    inputs: jax.Array,
    *,
    key: jax.Array,
    num_steps: jax.Array | int | None = None,
    trained_steps: int | None = None,
    positions: jax.Array | None = None,
    segments: jax.Array | None = None,
    hidden_layer: int | Literal["final"] | None = None,
    state: jax.Array | None = None,
) -> RecurrentOutputs:
    """The model on whole sequences, int32 `[B, L]`, with truncated back-propagation.

    num_steps: r, an int or an int32 scalar array; None is `cfg.recurrence`. trained_steps: k, the
    last iterations, which have a gradient (into e, and through it into the prelude, at each);
    None is `cfg.trained_steps`. The r - k before them cost a forward pass and no memory.
    positions, segments: see `transformer.Transformer`. hidden_layer: 0 to `prelude_layers` is the
    stream after that block, `prelude_layers + j` the state after the j-th iteration with gradient
    (the last one where fewer are taken), "final" what the head reads. key: of s_0, unless a
    `state` is given. Raises ValueError for an impossible number of iterations or layer, for rows
    longer than what positions were learned, and for the configuration of a plain model.
    """
    if not cfg.recurrence:
        raise ValueError(
            "recurrence 0 is a plain transformer; use init_params and forward of "
            "models.language_model, or give a model with recurrence"
        )
    check_hidden_layer(cfg, hidden_layer)
    num_steps = cfg.recurrence if num_steps is None else num_steps
    window = _window(cfg, num_steps, trained_steps)
    if positions is None:
        positions = count_positions(cfg, inputs)
    if segments is None:
        segments = jnp.ones_like(inputs)
    tap = hidden_layer if isinstance(hidden_layer, int) else None
    in_prelude = tap is not None and tap <= cfg.prelude_layers
    tap_layer = tap if in_prelude else None
    reading, _ = read(
        cfg, params, inputs, positions=positions, segments=segments, tap_layer=tap_layer
    )
    if cfg.injection == "none":
        state = reading.embedded
    elif state is None:
        state = initial_state(cfg, key, inputs.shape)
        state = constrain(state, "batch", "sequence", None)
    trained = jnp.minimum(num_steps, window) if isinstance(num_steps, jax.Array) else window
    real = segments != 0
    state = _without_gradient(cfg, params, state, reading, num_steps - trained)
    wanted = None if tap is None or in_prelude else tap - cfg.prelude_layers
    state, tapped, changes, norms = _with_gradient(
        cfg, params, state, reading, trained, window, wanted, real
    )
    logits, final, _ = predict(cfg, params, state, reading)
    hidden = reading.hidden if in_prelude else tapped
    hidden = final if hidden_layer == "final" else hidden
    return RecurrentOutputs(logits, hidden, state, final, changes, norms)


def _window(cfg: TransformerConfig, num_steps: jax.Array | int, trained_steps: int | None) -> int:
    """How many iterations have a gradient at most; raises ValueError for impossible numbers."""
    wanted = cfg.trained_steps if trained_steps is None else trained_steps
    if wanted < 0:
        raise ValueError(f"trained_steps {wanted} must not be negative; 0 trains no iteration")
    if isinstance(num_steps, jax.Array):
        return wanted
    if num_steps < 1:
        raise ValueError(f"num_steps {num_steps} must be at least 1 iteration of the core")
    if trained_steps is not None and trained_steps > num_steps:
        raise ValueError(
            f"trained_steps {trained_steps} is more than the num_steps {num_steps} that are taken; "
            f"give at most {num_steps}"
        )
    return min(wanted, num_steps)


def _without_gradient(
    cfg: TransformerConfig,
    params: Mapping[str, Any],
    state: jax.Array,
    reading: Reading,
    num_steps: jax.Array | int,
) -> jax.Array:
    # A loop of unknown length has no reverse derivative: nothing in it may ask for one.
    if isinstance(num_steps, int) and num_steps == 0:
        return state
    frozen, reading = jax.lax.stop_gradient((params, reading))

    def body(_: Any, state: jax.Array) -> jax.Array:
        return iterate(cfg, frozen, state, reading)[0]

    later = jax.lax.fori_loop(0, num_steps, body, jax.lax.stop_gradient(state))
    # Without such an iteration the state is still what was given, with its gradient.
    return jnp.where(jnp.asarray(num_steps) > 0, jax.lax.stop_gradient(later), state)


def _with_gradient(
    cfg: TransformerConfig,
    params: Mapping[str, Any],
    state: jax.Array,
    reading: Reading,
    num_steps: jax.Array | int,
    window: int,
    tap: int | None,
    real: jax.Array,
) -> tuple[jax.Array, jax.Array | None, jax.Array, jax.Array]:
    """`num_steps` iterations of at most `window`: the state, that after `tap`, changes, norms."""

    def step(state: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        new, _ = iterate(cfg, params, state, reading)
        change, norm = movement(state, new, where=real)
        return new, change, norm

    def body(carry: _Carry, index: jax.Array) -> tuple[_Carry, tuple[jax.Array, jax.Array]]:
        state, tapped, change, norm = carry
        if isinstance(num_steps, int):
            state, change, norm = step(state)
        else:
            # A branch, not a select: an iteration that is not taken costs nothing.
            state, change, norm = jax.lax.cond(
                index < num_steps, step, lambda state: (state, change, norm), state
            )
        if tapped is not None and tap is not None:
            tapped = jnp.where(index < tap, state, tapped)
        return (state, tapped, change, norm), (change, norm)

    zero = jnp.zeros((), jnp.float32)
    carry = (state, None if tap is None else state, zero, zero)
    if cfg.remat != "none":
        body = jax.checkpoint(body, prevent_cse=False, policy=REMAT_POLICIES[cfg.remat])
    (state, tapped, _, _), (changes, norms) = jax.lax.scan(body, carry, jnp.arange(window))
    return state, tapped, changes, norms


def movement(
    before: jax.Array, after: jax.Array, *, where: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """||after - before|| / ||after|| and the root mean square of `after`: means over tokens.

    Of states `[B, L, D]`, over the tokens where bool `[B, L]`; float32, without gradient.
    """
    before, after = (jax.lax.stop_gradient(x).astype(jnp.float32) for x in (before, after))
    size = jnp.linalg.norm(after, axis=-1)
    moved = jnp.linalg.norm(after - before, axis=-1) / jnp.maximum(size, 1e-30)
    count = jnp.maximum(where.sum(), 1)
    rms = size / after.shape[-1] ** 0.5
    return jnp.where(where, moved, 0).sum() / count, jnp.where(where, rms, 0).sum() / count


def draw_steps(cfg: TransformerConfig, key: jax.Array) -> jax.Array:
    """The number of iterations of a training step, int32 scalar, at least 1 (paper, section 3.3).

    tau ~ N(log(recurrence) - sigma^2 / 2, sigma),  sigma = 0.5;  r ~ Poisson(exp(tau)) + 1
    """
    mean = cfg.recurrence
    if cfg.recurrence_sampling == "fixed":
        return jnp.int32(mean)
    if cfg.recurrence_sampling == "uniform":
        return jax.random.randint(key, (), 1, 2 * mean)
    rate_key, count_key = jax.random.split(key)
    tau = np.log(mean) - SIGMA**2 / 2 + SIGMA * jax.random.normal(rate_key)
    return jax.random.poisson(count_key, jnp.exp(tau), dtype=jnp.int32) + 1


def mean_steps(cfg: TransformerConfig) -> tuple[float, float]:
    """Expected iterations of a training step: forward only, and with gradient."""
    mean, window = cfg.recurrence, cfg.trained_steps
    if cfg.recurrence_sampling == "fixed":
        return float(mean - window), float(window)
    if cfg.recurrence_sampling == "uniform":
        counts = np.arange(1, 2 * mean)
        probabilities = np.full(len(counts), 1 / len(counts))
    else:
        # The lognormal rate by Gauss-Hermite quadrature; behind 40 times the mean is nothing.
        nodes, weights = np.polynomial.hermite_e.hermegauss(60)
        rates = np.exp(np.log(mean) - SIGMA**2 / 2 + SIGMA * nodes)[:, None]
        counts = np.arange(40 * mean + 60)
        factorials = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, len(counts))))])
        pmf = np.exp(counts * np.log(rates) - rates - factorials)
        probabilities = weights @ pmf / weights.sum()
        counts = counts + 1
    trained = float(probabilities @ np.minimum(counts, window))
    return float(probabilities @ counts) - trained, trained
