"""A descent step on logits in tiles of the vocabulary against the probabilities and their slopes.

    python tests/benchmarks/softmax_embed.py
    python tests/benchmarks/softmax_embed.py --shape=8192,384,50304,bfloat16

Measured: `softmax_embed` (`embed`), the step y' = y - alpha dE/dy of an energy of its result
(`step`), and the gradient of a loss of y' in logits and table (`gradient`), as `auto` chooses.
Against: `softmax_embed_reference` and JAX's derivatives. Temporaries are what the compiler reserves
beyond arguments and results. Counted by hand, of N tokens, V classes and width D: 2, 4 and 14 N V D
operations; the roofline's bytes are the float32 logits, read once, read twice and written once, and
read six times and written three times, and the table once in each sweep. Goal: temporaries of the
step stay below a tenth of an array of the logits.
"""

import functools
from collections.abc import Callable
from typing import Any

import harness
import jax
import jax.numpy as jnp
from absl import app, flags

from jaxlib_methods.pallas_kernels.softmax_embed import (
    softmax_embed,
    softmax_embed_reference,
    softmax_embed_update,
)

_SHAPES = flags.DEFINE_multi_string(
    "shape",
    ["512,384,50304,float32", "512,384,50304,bfloat16"],
    "Tokens, width, vocabulary and the table's dtype; may be given several times.",
)
ALPHA, GOAL, MEGABYTE = 0.5, 0.1, 2**20

PRODUCTS = {"embed": 2, "step": 4, "gradient": 14}  # in N V D
LOGITS = {"embed": 1, "step": 3, "gradient": 9}  # arrays that are read or written
SWEEPS = {"embed": 1, "step": 2, "gradient": 5}  # readings of the table

Step = Callable[..., jax.Array]


def plain(logits: jax.Array, table: jax.Array, bend: jax.Array) -> jax.Array:
    """A step against JAX's gradient of the energy."""

    def energy(y: jax.Array) -> jax.Array:
        return jnp.sin(softmax_embed_reference(y, table)[0] * bend).astype(jnp.float32).sum()

    return logits - ALPHA * jax.grad(energy)(logits)


def tiles(logits: jax.Array, table: jax.Array, bend: jax.Array) -> jax.Array:
    """The same step by the operations."""
    embedded = softmax_embed(logits, table)
    slope = jnp.cos(embedded[0] * bend) * bend
    return softmax_embed_update(logits, table, embedded, slope, ALPHA)


def operation(what: str, step: Step, embed: Callable[..., Any]) -> Callable[..., Any]:
    """A function of logits, table and bend."""
    if what == "embed":
        return lambda y, w, _: embed(y, w)
    if what == "step":
        return step
    return jax.grad(lambda *x: jnp.sin(step(*x)).sum(), argnums=(0, 1))


def compare(tokens: int, width: int, vocabulary: int, dtype: str) -> None:
    """Prints the rows, the temporaries and the goal of one shape."""
    keys = jax.random.split(jax.random.key(0), 3)
    logits = jax.random.normal(keys[0], (tokens, vocabulary))
    table = (jax.random.normal(keys[1], (vocabulary, width)) * width**-0.5).astype(dtype)
    arrays = logits, table, jax.random.normal(keys[2], (tokens, width), dtype)
    shape = f"{tokens} tokens, width {width}, vocabulary {vocabulary}, {dtype}"
    candidates = {"plain": (plain, softmax_embed_reference), "tiles": (tiles, softmax_embed)}
    shares = {}
    for what in PRODUCTS:
        programs = {
            name: jax.jit(operation(what, *ops)).lower(*arrays).compile()
            for name, ops in candidates.items()
        }
        calls: dict[str, harness.Candidate] = {
            name: functools.partial(program, *arrays) for name, program in programs.items()
        }
        flops = PRODUCTS[what] * tokens * vocabulary * width
        moved = LOGITS[what] * logits.nbytes + SWEEPS[what] * table.nbytes
        times = harness.measure(calls | harness.bounds(flops, moved, dtype))
        harness.report(f"{what}: {shape}", times, reference="plain", tokens_per_call=tokens)
        harness.report_roofline(times)
        memory = {}
        for name, program in programs.items():
            analysis: Any = program.memory_analysis()
            memory[name] = analysis.temp_size_in_bytes / MEGABYTE
        print("\nTemporaries: " + ", ".join(f"{n} {m:.1f} MiB" for n, m in memory.items()))
        shares[what] = memory["tiles"] * MEGABYTE / logits.nbytes
    harness.check_goal("temporaries of the step in arrays of logits", shares["step"], limit=GOAL)


def main(_: list[str]) -> None:
    """Compares every shape."""
    for shape in _SHAPES.value:
        tokens, width, vocabulary, dtype = shape.split(",")
        compare(int(tokens), int(width), int(vocabulary), dtype)


if __name__ == "__main__":
    app.run(main)
