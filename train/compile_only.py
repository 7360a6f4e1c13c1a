"""Compiles a run's programs for machines that are not here, and says what they need; see `run`.

    python -m jaxlib_methods.train --compile_only --topology=v5p:4x4x4 \\
        --preset=late_to_early_1p4b --late_to_early.teacher=smollm_135m

The program is the run's own: the function, the shardings and the donation of `train.loop`, made
from shapes. No weights and no data are made or read.
"""

import contextlib
import dataclasses
import json
import math
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
from etils import epath
from jax.sharding import Mesh

from jaxlib_methods import flops
from jaxlib_methods.models import partitioning, recurrent_training
from jaxlib_methods.pallas_kernels import dispatch
from jaxlib_methods.train import compile_report, hlo, topology
from jaxlib_methods.train.abstract import Program, program_of
from jaxlib_methods.train.compile_report import Memory, Report
from jaxlib_methods.train.config import RunConfig
from jaxlib_methods.train.hlo import SLICES
from jaxlib_methods.train.roofline import CHIPS, GIB, Chip, Roofline, estimate

FILE_NAME = "compile_only.json"
# How libtpu refuses: "Used 20.1G of 15.75G hbm", or "the total memory required for HLO temporaries
# (20.1G) exceeds available HBM (15.75G)", which leaves the arguments out.
_REFUSED = re.compile(
    r"Used ([\d.]+)([KMGT]?) of [\d.]+[KMGT]? hbm"
    r"|total memory required[^(]*\(([\d.]+)([KMGT]?)\) exceeds available HBM"
)
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_REMATERIALISED = re.compile(r"Involuntary full rematerialization.{0,400}")


class Target(NamedTuple):
    """Devices to compile for. chip: a device's share of one; None where nothing is known."""

    topology: str
    devices: Sequence[Any]
    chip: Chip | None


def target_of(name: str, *, num_slices: int = 1) -> Target:
    """The devices of `--topology`; see `topology.devices_of`."""
    devices = topology.devices_of(name, num_slices=num_slices)
    kind = name.split(":")[0]
    if kind == "cpu":
        return Target(name, devices, None)
    chips = {(getattr(d, "slice_index", 0), tuple(d.coords)) for d in devices}
    share = len(devices) // len(chips)
    return Target(name, devices, CHIPS[kind].share(share) if kind in CHIPS else None)


def analyse(config: RunConfig, target: Target, *, evaluation: bool = True) -> Report:
    """Compiles the training step, and with `evaluation` the validation step.

    Of a method whose program changes during a run, such as LET, the first one.
    Raises ValueError where the run does not fit the mesh.
    """
    started = time.perf_counter()
    mesh = partitioning.make_mesh(**dataclasses.asdict(config.mesh), devices=target.devices)
    platform = target.devices[0].platform
    with dispatch.lowering_for(platform):  # shapes are found by tracing the model
        program = program_of(config, mesh)
    tokens = config.data.batch_size * program.length
    with jax.set_mesh(mesh), dispatch.lowering_for(platform), _captured_log() as log:
        executed = _executed_flops(program)
        compiled, needed = _compile(program.step, program.arguments, target)
        evaluated = 0
        if evaluation:
            # What a validation step has no use for, the optimiser's state above all, stays there.
            kept = jax.jit(program.evaluate, keep_unused=True)
            _, evaluated = _compile(kept, program.arguments, target)
    memory = _memory(program.arguments, needed, evaluated, target.chip)
    cost: hlo.Cost | None = None
    roofline: Roofline | None = None
    model_flops = program.method.flops_per_token * tokens
    axes = axes_of(mesh, config.mesh.dcn_data)
    if compiled is not None:
        cost = hlo.read(compiled.as_text(), axes, unknown_trips=_unknown_trips(config))
        if target.chip is not None:
            roofline = estimate(
                target.chip,
                flops=(executed or model_flops) / len(target.devices),
                memory_bytes=cost.memory_bytes,
                collectives=cost.collectives,
                axes=axes,
            )
    return Report(
        topology=target.topology,
        mesh=axes,
        memory=memory,
        model_flops=model_flops,
        executed_flops=executed,
        cost=cost,
        roofline=roofline,
        peak_flops=target.chip and target.chip.flops * len(target.devices),
        rematerialized=tuple(_REMATERIALISED.findall(log())),
        seconds=time.perf_counter() - started,
    )


def axes_of(mesh: Mesh, num_slices: int) -> dict[str, int]:
    """The mesh's axes and sizes, the data axis without its slices, which come first."""
    sizes = dict(mesh.shape)
    return {SLICES: num_slices} | sizes | {"data": sizes["data"] // num_slices}


def _executed_flops(program: Program) -> float | None:
    try:
        return float(flops.count_dot_flops(program.step, *program.arguments))
    except ValueError:  # a loop of unknown length
        return None


def _unknown_trips(config: RunConfig) -> float:
    """What counts for a loop of unknown length: a recurrent model's mean number of iterations."""
    if not config.model.recurrence:
        return 1.0
    return max(recurrent_training.mean_steps(config.model)[0], 1.0)


def _compile(function: Any, arguments: Any, target: Target) -> tuple[Any, int]:
    """The compiled program, None where the compiler refused it, and the bytes that it needs.

    Raises ValueError where it was refused for a chip of which nothing is known.
    """
    try:
        compiled = function.lower(*arguments).compile()
    except jax.errors.JaxRuntimeError as error:
        needed = refused_bytes(str(error), held_bytes(arguments[:3]))
        if needed is None:
            raise
        if target.chip is None:
            raise ValueError(
                f"a program needs {needed / GIB:.2f} GiB on a device of {target.topology}, which "
                "has less; give more devices, a smaller batch or more --train.num_microbatches"
            ) from None
        return None, needed
    stats = compiled.memory_analysis()
    outside = stats.argument_size_in_bytes + stats.output_size_in_bytes - stats.alias_size_in_bytes
    # What a TPU's compiler refuses by; on a CPU it is without the temporaries.
    peak = getattr(stats, "peak_memory_in_bytes", 0) if target.devices[0].platform == "tpu" else 0
    return compiled, peak or outside + stats.temp_size_in_bytes


def refused_bytes(message: str, held: int) -> int | None:
    """What a program needs that libtpu refuses for its memory; None for another error.

    held: bytes of the program's arguments.
    """
    found = _REFUSED.search(message)
    if found is None:
        return None
    number, unit = found[1] or found[3], found[2] or found[4] or ""
    alone = "temporaries" in found[0]
    return int(float(number) * _UNITS[unit]) + (held if alone else 0)


def _memory(arguments: Any, needed: int, evaluated: int, chip: Chip | None) -> Memory:
    state, extra, batch, _ = arguments
    parts = {
        "parameters": held_bytes(state.params),
        "optimizer": held_bytes(state.opt_state),
        "other_state": held_bytes(state.method_state),
        "frozen": held_bytes(extra),
        "batch": held_bytes(batch),
    }
    return Memory(
        **parts,
        temporaries=max(needed - sum(parts.values()), 0),
        evaluation=evaluated,
        limit=None if chip is None else int(chip.memory),
    )


def held_bytes(tree: Any) -> int:
    """Bytes of a device's part of a tree of `jax.ShapeDtypeStruct`s with shardings."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


@contextlib.contextmanager
def _captured_log() -> Iterator[Callable[[], str]]:
    """Takes what is written to the process's stderr, by the compiler above all; gives it behind.

    Where an error is raised it is let through after all.
    """
    sys.stderr.flush()
    text, kept = "", os.dup(2)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 2)
        try:
            yield lambda: text
        finally:
            sys.stderr.flush()
            os.dup2(kept, 2)
            os.close(kept)
            file.seek(0)
            text = file.read().decode(errors="replace")
            if sys.exception() is not None:
                sys.stderr.write(text)


def run(config: RunConfig, name: str, *, workdir: str | None) -> None:
    """Compiles a run for a topology and prints what it needs.

    workdir: where `compile_only.json` goes, of the same content. Raises ValueError where the
    program does not fit the chip, with what is missing and what helps.
    """
    target = target_of(name, num_slices=config.mesh.dcn_data)
    report = analyse(config, target)
    print(compile_report.text(config, report), end="")
    if workdir is not None:
        folder = epath.Path(workdir)
        folder.mkdir(parents=True, exist_ok=True)
        content = compile_report.to_dict(config, report)
        (folder / FILE_NAME).write_text(json.dumps(content, indent=2) + "\n")
    if report.memory.missing:
        raise ValueError(compile_report.refusal(config, report))
