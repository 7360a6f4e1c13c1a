"""What compiled steps send on 8 to 256 chips, against the least that fsdp and tensor must.

    python tests/benchmarks/scaling_on_paper.py --topologies=v5e:2x4,v5e:4x4 \\
        --run="--preset=transformer_1b --model.num_layers=2 --data.sequence_length=256"

Nothing is run: every step is compiled by libtpu. Weak scaling keeps the batch of a chip, strong
scaling the global one, that of the largest topology. `--run` gives the flags of a run; chips beyond
mesh.fsdp x mesh.tensor become data parallelism.

The floor, in bytes that a device sends in a step. A ring of n devices sends (n - 1) / n of an array
to gather it or to add it up in parts, twice that to add it up whole.

    fsdp    (n - 1) / n * P * (forward + backward + 1): the weights of a device's tensor part, P
            bytes in the compute dtype, are gathered in every walk through the blocks, and their
            gradients added up in parts, once a micro-batch. Recomputation is in the backward walk.
            A teacher's weights are gathered once.
    data    2 (n - 1) / n * P / fsdp: gradients of what fsdp has left of them, once a micro-batch.
    tensor  2 (n - 1) / n * A * layers * (2 forward + 2 backward): A bytes of a micro-batch's
            states, added up behind attention and the feed-forward, and their gradients in
            front of both; with `remat=full` once more behind attention.

Energy walks twice each way in a descent step: its slope, and the derivative of that. A recurrent
core is counted once, as if it were kept while it is repeated, and so are the weights of rollouts.
Goal: at most 1.2 times the floor.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import harness
import jax
from absl import app, flags

from jaxlib_methods.models import partitioning
from jaxlib_methods.train import compile_only, presets, roofline
from jaxlib_methods.train import flags as train_flags
from jaxlib_methods.train.abstract import program_of
from jaxlib_methods.train.compile_report import Report
from jaxlib_methods.train.config import RunConfig

RUN = flags.DEFINE_string(
    "run",
    "--preset=transformer_1b --model.num_layers=2 --data.sequence_length=256 "
    "--train.num_microbatches=1 --mesh.fsdp=8",
    "Flags of the run that is compiled.",
)
TOPOLOGIES = flags.DEFINE_list(
    "topologies", ["v5e:2x4", "v5e:4x4", "v5e:8x8", "v5e:16x16"], "Of growing size."
)
ROWS = flags.DEFINE_integer("rows", 1, "Sequences of a chip and micro-batch where most chips are.")
GOAL = 1.2
GIB = roofline.GIB


class Row(NamedTuple):
    """Bytes that a device sends in a step by axis, and the least."""

    report: Report
    sent: Mapping[str, float]
    floor: Mapping[str, float]

    @property
    def ratio(self) -> float:
        """What is sent, of the floor."""
        return sum(self.sent.values()) / sum(self.floor.values())


def walks(config: RunConfig) -> tuple[int, int]:
    """How often a step goes through the blocks, forward and backward."""
    if config.method == "energy":
        steps = config.method_config.max_steps or config.method_config.num_steps
        return 2 * steps, 2 * steps
    return 1, 1


def least(config: RunConfig, report: Report, params: Any, frozen: Any) -> dict[str, float]:
    """The floor by axis, of abstract parameters and a teacher; see this file's docstring."""
    mesh, model = report.mesh, config.model
    width = jax.numpy.dtype(model.compute_dtype).itemsize
    held = sum(math.prod(x.sharding.shard_shape(x.shape)) * width for x in jax.tree.leaves(params))
    whole, parts = held * mesh["fsdp"], config.train.num_microbatches
    taught = sum(
        math.prod(x.shape) * x.dtype.itemsize // mesh["tensor"]
        for x in jax.tree.leaves(frozen)
        if x.sharding.shard_shape(x.shape) != x.shape
    )
    rows = config.data.batch_size // (parts * mesh["data"] * mesh["fsdp"])
    states = rows * config.data.sequence_length * model.embed_dim * width
    forward, backward = walks(config)
    sums = 2 * forward + (3 if model.remat == "full" else 2) * backward
    return {
        "fsdp": parts * _ring((forward + backward + 1) * whole + taught, mesh["fsdp"]),
        "data": parts * 2 * _ring(held, mesh["data"]),
        "tensor": parts * sums * model.num_layers * 2 * _ring(states, mesh["tensor"]),
    }


def _ring(num_bytes: float, size: int) -> float:
    return num_bytes * (size - 1) / size


def measure(config: RunConfig, target: compile_only.Target) -> Row:
    """Compiles a training step."""
    report = compile_only.analyse(config, target, evaluation=False)
    mesh = partitioning.make_mesh(**dataclasses.asdict(config.mesh), devices=target.devices)
    state, frozen, _, _ = program_of(config, mesh).arguments
    assert report.cost is not None
    sent: dict[str, float] = {}
    for (kind, axes), moved in report.cost.collectives.items():
        size = math.prod(report.mesh[name] for name in axes.split("+"))
        sent[axes] = sent.get(axes, 0.0) + roofline.sent(kind, moved.num_bytes, size)
    return Row(report, sent, least(config, report, state.params, frozen))


def configured(batch_size: int) -> RunConfig:
    """The run with another batch, on any number of chips."""
    values = flags.FlagValues()
    train_flags.define(values)
    given = [
        "--compile_only",
        *RUN.value.split(),
        "--mesh.data=-1",
        f"--data.batch_size={batch_size}",
    ]
    train_flags.parse(["train", *given], values)
    return train_flags.run_config(values)


def main(_: list[str]) -> None:
    """Compiles, prints the table and the goal."""
    # The largest first: a CPU has the devices that are asked for first.
    targets = {name: compile_only.target_of(name) for name in reversed(TOPOLOGIES.value)}
    print(", ".join(harness.provenance()) + "\n")
    base = configured(presets.get("transformer_1b").data.batch_size)
    sizes = [len(targets[name].devices) for name in TOPOLOGIES.value]
    rows = ROWS.value * base.train.num_microbatches
    batches = [size // base.mesh.tensor * rows for size in sizes]
    runs = [("weak", *run) for run in zip(TOPOLOGIES.value, batches, strict=True)]
    runs += [("strong", name, batches[-1]) for name in TOPOLOGIES.value[:-1]]
    print("| scaling | topology | batch | fsdp GiB | data | tensor | several | floor | ratio |")
    print("|---|---|---|---|---|---|---|---|---|")
    worst = 0.0
    for kind, topology, batch in runs:
        row = measure(configured(batch), targets[topology])
        alone = [row.sent.get(axis, 0.0) / GIB for axis in ("fsdp", "data", "tensor")]
        several = sum(row.sent.values()) / GIB - sum(alone)
        cells = " | ".join(f"{x:.3f}" for x in (*alone, several, sum(row.floor.values()) / GIB))
        print(f"| {kind} | {topology} | {batch} | {cells} | {row.ratio:.2f} |", flush=True)
        worst = max(worst, row.ratio)
    harness.check_goal("bytes sent, of the floor", worst, limit=GOAL)


if __name__ == "__main__":
    app.run(main)
