"""Memory of the energy training step against sequence length and number of descent steps.

    python tests/benchmarks/energy_memory.py

Measured: temporary bytes that the compiler reserves for the gradient of System 1's loss, one row,
blocks rematerialised, with attention in tiles. Against: the same with the whole square of scores,
and with `memory=save`. Nothing is run. Goal: twice the length takes at most 2.2 times the memory;
each descent step more takes at most a quarter of what it takes with `memory=save`.
"""

import dataclasses
import functools
import itertools
from typing import Any

import harness
import jax
import jax.numpy as jnp
import shapes
import training
from absl import app
from energy_step import SYSTEM_1

from jaxlib_methods import energy
from jaxlib_methods.energy_config import EnergyConfig
from jaxlib_methods.models import partitioning

LENGTHS = (512, 1024, 2048, 4096)
STEPS = (1, 2, 4)
GROWTH, SHARE = 2.2, 0.25
MEGABYTE = 2**20


def temporary(length: int, *, attention: Any = "xla", **fields: Any) -> float:
    """Megabytes of temporaries of one gradient."""
    model = shapes.model_config(length)
    model = dataclasses.replace(model, remat="full", attention_implementation=attention)
    cfg = EnergyConfig(**SYSTEM_1 | fields)
    method = energy.make(cfg, training.context(model))
    params = jax.eval_shape(lambda: partitioning.unbox(method.init_params(jax.random.key(0))))
    batch = jax.eval_shape(lambda: shapes.make_batch(model, 1, documents=1))

    def gradient(params: Any, batch: Any) -> Any:
        loss = functools.partial(method.loss, step=jnp.int32(0), key=jax.random.key(0))
        return jax.grad(loss, has_aux=True)(params, (), batch)

    compiled = jax.jit(gradient).lower(params, batch).compile()
    analysis: Any = compiled.memory_analysis()
    return analysis.temp_size_in_bytes / MEGABYTE


def main(_: list[str]) -> None:
    """Compiles, prints the tables and the goals."""
    print(", ".join(harness.provenance()) + "\n")
    tiled = [temporary(length) for length in LENGTHS]
    square = [temporary(length, attention="plain") for length in LENGTHS]
    print("| tokens | tiled, MiB | whole scores, MiB | tiled, times the last length |")
    print("|---|---|---|---|")
    growth = [1.0, *(b / a for a, b in itertools.pairwise(tiled))]
    for row in zip(LENGTHS, tiled, square, growth, strict=True):
        print("| {} | {:.1f} | {:.1f} | {:.2f} |".format(*row))
    harness.check_goal("growth from 2048 to 4096 tokens", growth[-1], limit=GROWTH)
    print("\n| descent steps | recompute, MiB | save, MiB |\n|---|---|---|")
    policies = ("recompute", "save")
    found = {
        policy: [
            temporary(512, num_steps=steps, num_landscapes=1, memory=policy) for steps in STEPS
        ]
        for policy in policies
    }
    for index, steps in enumerate(STEPS):
        print(f"| {steps} | {found['recompute'][index]:.1f} | {found['save'][index]:.1f} |")
    each = {p: (values[-1] - values[0]) / (STEPS[-1] - STEPS[0]) for p, values in found.items()}
    share = each["recompute"] / each["save"]
    harness.check_goal("memory of a further step, recompute / save", share, limit=SHARE)


if __name__ == "__main__":
    app.run(main)
