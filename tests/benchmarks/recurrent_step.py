"""What a training step of a recurrent-depth model costs against the iterations that it takes.

    python tests/benchmarks/recurrent_step.py

Measured: value and gradient of `depth_recurrence_tiny`'s loss at 4, 8, 16 and 32 iterations, of
which the last 4 have a gradient: one compiled program, the number is an argument. A straight line
through the times gives the cost of an iteration without gradient (slope) and of all the rest
(intercept). Against: a forward pass of one iteration alone, and a program that always runs 32
iterations and keeps the state of the one that was asked for, which is what a scan of fixed length
does.
Goal: the slope is at most 1.15 forward passes of an iteration, and a step of 8 iterations takes
at most half of the fixed program's time.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import harness
import jax
import jax.numpy as jnp
import numpy as np
import shapes
from absl import app, flags

from jaxlib_methods import losses
from jaxlib_methods.method import Batch
from jaxlib_methods.models import language_model, partitioning, recurrent_depth, recurrent_training
from jaxlib_methods.models.config import TransformerConfig
from jaxlib_methods.train import presets

STEPS = (4, 8, 16, 32)
SLOPE_GOAL, FIXED_GOAL = 1.15, 0.5
_BATCH = flags.DEFINE_integer("batch_size", 8, "Sequences a step.", lower_bound=1)
flags.set_default(harness.CALLS, 2)


def loss(
    model: TransformerConfig, batch: Batch, params: Any, num_steps: jax.Array, key: jax.Array
) -> jax.Array:
    """The training loss with a number of iterations that is an argument."""
    out = recurrent_training.forward(model, params, batch.inputs, key=key, num_steps=num_steps)
    nll = losses.token_nll(out.logits, batch.targets)
    return nll.mean()


def fixed_loss(
    model: TransformerConfig, batch: Batch, params: Any, num_steps: jax.Array, key: jax.Array
) -> jax.Array:
    """The same from a scan over the largest number, with a select and the same truncation."""
    positions = jnp.broadcast_to(jnp.arange(batch.inputs.shape[1])[None], batch.inputs.shape)
    ones = jnp.ones_like(batch.inputs)
    reading, _ = recurrent_depth.read(
        model, params, batch.inputs, positions=positions, segments=ones
    )
    state = recurrent_depth.initial_state(model, key, batch.inputs.shape)

    def body(state: jax.Array, index: jax.Array) -> tuple[jax.Array, None]:
        new, _ = recurrent_depth.iterate(model, params, state, reading)
        free = index < num_steps - model.trained_steps
        new = jnp.where(free, jax.lax.stop_gradient(new), new)
        return jnp.where(index < num_steps, new, state), None

    state, _ = jax.lax.scan(body, state, jnp.arange(max(STEPS)))
    logits, _, _ = recurrent_depth.predict(model, params, state, reading)
    return losses.token_nll(logits, batch.targets).mean()


def main(_: list[str]) -> None:
    """Times the programs, prints the rows, the line through them and the goals."""
    preset = presets.get("depth_recurrence_tiny")
    model = dataclasses.replace(preset.model, remat="none")
    batch = shapes.make_batch(model, _BATCH.value, documents=1)
    init = jax.jit(lambda key: partitioning.unbox(language_model.init_params(model, key)))
    params, key = init(jax.random.key(0)), jax.random.key(1)
    step: Any = jax.jit(jax.value_and_grad(functools.partial(loss, model, batch)))
    fixed = jax.jit(jax.value_and_grad(functools.partial(fixed_loss, model, batch)))
    _agree(step, fixed, params, key)

    @jax.jit
    def iteration(state: jax.Array) -> jax.Array:
        reading, _ = recurrent_depth.read(
            model, params, batch.inputs, positions=batch.positions, segments=batch.segments
        )
        body = lambda _, s: recurrent_depth.iterate(model, params, s, reading)[0]  # noqa: E731
        return jax.lax.fori_loop(0, 16, body, state)

    state = recurrent_depth.initial_state(model, key, batch.inputs.shape)
    candidates: dict[str, Callable[[], Any]] = {
        f"{n} iterations": functools.partial(step, params, jnp.int32(n), key) for n in STEPS
    }
    candidates["fixed scan of 32, 8 wanted"] = functools.partial(fixed, params, jnp.int32(8), key)
    candidates["16 iterations forward"] = functools.partial(iteration, state)
    times = harness.measure(candidates)
    ratio = harness.report(
        "Training step against iterations",
        times,
        reference="8 iterations",
        tokens_per_call=batch.inputs.size,
    )
    rounds = np.stack([times[f"{n} iterations"] for n in STEPS])
    slopes, intercepts = np.polyfit(STEPS, rounds, 1)  # a line for each round
    alone = times["16 iterations forward"] / 16
    slope, intercept, forward = map(np.median, (slopes, intercepts, alone))
    print(f"\n{slope:.2f} ms an iteration + {intercept:.2f} ms; one forward alone {forward:.2f} ms")
    print(f"Programs compiled for {len(STEPS)} numbers of iterations: {step._cache_size()}")
    over = float(np.median(slopes / alone))
    harness.check_goal("slope / forward pass of an iteration", over, limit=SLOPE_GOAL)
    share = 1 / ratio["fixed scan of 32, 8 wanted"]
    harness.check_goal("8 iterations / fixed scan of 32", share, limit=FIXED_GOAL)


def _agree(step: Any, fixed: Any, params: Any, key: jax.Array) -> None:
    """Both programs give the same loss and gradients."""
    mine, other = (f(params, jnp.int32(8), key) for f in (step, fixed))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-4), mine, other)


if __name__ == "__main__":
    app.run(main)
