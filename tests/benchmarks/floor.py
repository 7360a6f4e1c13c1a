"""What a compiled step sends, against the least that fsdp and tensor must.

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
core is counted once, as if it were kept while it is repeated, and so are the weights of rollouts;
what `sequence` sends is not counted. A step may stay below: look-ups send the rows that they find
instead of the table, and one gather may serve two walks.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
from absl import flags

from jaxlib_methods.models import partitioning
from jaxlib_methods.train import compile_only, roofline
from jaxlib_methods.train import flags as train_flags
from jaxlib_methods.train.abstract import program_of
from jaxlib_methods.train.compile_report import Report
from jaxlib_methods.train.config import RunConfig

GOAL = 1.2


class Row(NamedTuple):
    """Bytes that a device sends in a step by axis, and the least; of a refused step none."""

    report: Report
    sent: Mapping[str, float]
    floor: Mapping[str, float]

    @property
    def ratio(self) -> float:
        """What is sent, of the floor."""
        return sum(self.sent.values()) / sum(self.floor.values())


def configured(*given: str) -> RunConfig:
    """The run of these flags, to be compiled alone."""
    values = flags.FlagValues()
    train_flags.define(values)
    train_flags.parse(["train", "--compile_only", *given], values)
    return train_flags.run_config(values)


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


def measure(config: RunConfig, target: compile_only.Target, *, evaluation: bool = False) -> Row:
    """Compiles a training step, and one of validation where it is asked for."""
    report = compile_only.analyse(config, target, evaluation=evaluation)
    mesh = partitioning.make_mesh(**dataclasses.asdict(config.mesh), devices=target.devices)
    state, frozen, _, _ = program_of(config, mesh).arguments
    sent: dict[str, float] = {}
    for (kind, axes), moved in (report.cost.collectives if report.cost else {}).items():
        size = math.prod(report.mesh[name] for name in axes.split("+"))
        sent[axes] = sent.get(axes, 0.0) + roofline.sent(kind, moved.num_bytes, size)
    return Row(report, sent, least(config, report, state.params, frozen))
