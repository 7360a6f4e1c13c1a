"""Which remat policy, micro-batches and mesh a run does best with on a pod; see `run`."""

import dataclasses
import sys
from collections.abc import Iterator
from typing import NamedTuple

from jaxlib_methods.train.compile_only import Target, analyse, target_of
from jaxlib_methods.train.compile_report import Report, mesh_flags
from jaxlib_methods.train.config import RunConfig
from jaxlib_methods.train.roofline import GIB

REMAT = ("none", "dots", "full")  # from what keeps the most to what computes the most again


class Tried(NamedTuple):
    """A compiled variant of a run; `report.roofline` is there where it fits."""

    config: RunConfig
    report: Report

    @property
    def flags(self) -> str:
        """What it differs in, as flags."""
        parts = self.config.train.num_microbatches
        return (
            f"--model.remat={self.config.model.remat} --train.num_microbatches={parts} "
            f"{mesh_flags(self.report.mesh)}"
        )

    @property
    def seconds(self) -> float:
        """Of a step, all of it overlapped."""
        return self.report.roofline.overlapped if self.report.roofline else float("inf")

    @property
    def fits(self) -> bool:
        """Whether a training step fits the chip."""
        return not self.report.memory.missing


def run(config: RunConfig, name: str, *, most: int) -> None:
    """Compiles up to `most` variants and prints those that nothing beats in memory and time.

    First remat policies and micro-batches on the mesh of the run, then, with the fastest of
    them, a part of fsdp as tensor or data parallelism. The global batch stays. Raises ValueError
    where the topology has no chip whose rates are known, and where nothing fits.
    """
    if most < 1:
        raise ValueError(f"--search={most} compiles no variant; give 1 or more")
    target = target_of(name, num_slices=config.mesh.dcn_data)
    if target.chip is None:
        raise ValueError(
            f"--search compares by the rates of a chip, and none are known of {name}; give a TPU's "
            "topology such as v5p:4x4x4"
        )
    tried: list[Tried] = []
    for wanted in _variants(config, tried):
        if len(tried) >= most:
            break
        _try(wanted, target, tried, most)
    if not tried:
        raise ValueError(
            f"no variant is possible on {name}, as said above; change the mesh or data.batch_size"
        )
    best = frontier(tried)
    if not best:
        raise ValueError(
            f"none of {len(tried)} variants fits {name}; give more devices, or a smaller model or "
            "batch"
        )
    print("memory GiB   seconds   limited by")
    for one in best:
        roofline = one.report.roofline
        assert roofline is not None
        memory = one.report.memory.peak / GIB
        print(f"{memory:>10.2f}{one.seconds:>10.3g}   {roofline.limit:<10}  {one.flags}")


def frontier(tried: list[Tried]) -> list[Tried]:
    """Those that fit and that no other beats in memory and in time, the fastest first."""
    found: list[Tried] = []
    for one in sorted(
        (one for one in tried if one.fits), key=lambda one: (one.seconds, one.report.memory.peak)
    ):
        if not found or one.report.memory.peak < found[-1].report.memory.peak:
            found.append(one)
    return found


def _try(wanted: RunConfig, target: Target, tried: list[Tried], most: int) -> None:
    try:
        report = analyse(wanted, target, evaluation=False)
    except ValueError as error:
        print(f"not possible: {error}", file=sys.stderr, flush=True)
        return
    one = Tried(wanted, report)
    tried.append(one)
    result = f"{report.memory.missing / GIB:.2f} GiB too much"
    if one.fits:
        result = f"{report.memory.peak / GIB:.2f} GiB, {one.seconds:.3g} s"
    print(f"{len(tried)}/{most} {one.flags}: {result}", file=sys.stderr, flush=True)


def _variants(config: RunConfig, tried: list[Tried]) -> Iterator[RunConfig]:
    """What to compile next, given what has been; what must need too much memory is left out."""
    parts = config.train.num_microbatches
    for count in (2 * parts, parts, parts // 2):
        for remat in reversed(REMAT):
            wanted = _with(config, remat, count)
            if wanted is not None and not any(_needs_more(wanted, one) for one in tried):
                yield wanted
    fastest = min(tried, key=lambda one: (one.seconds, one.report.memory.peak), default=None)
    if fastest is None or fastest.report.mesh["fsdp"] % 2:
        return
    mesh = fastest.report.mesh
    data = mesh["slices"] * mesh["data"]
    for change in ({"tensor": 2 * mesh["tensor"], "data": data}, {"data": 2 * data}):
        sizes = {**change, "fsdp": mesh["fsdp"] // 2}
        yield dataclasses.replace(fastest.config, mesh=dataclasses.replace(config.mesh, **sizes))


def _with(config: RunConfig, remat: str, parts: int) -> RunConfig | None:
    """The variant, None where the batch cannot be cut so."""
    try:
        return dataclasses.replace(
            config,
            model=dataclasses.replace(config.model, remat=remat),
            train=dataclasses.replace(config.train, num_microbatches=parts),
        )
    except ValueError:
        return None


def _needs_more(wanted: RunConfig, one: Tried) -> bool:
    """Whether a variant keeps at least as much as one that did not fit."""
    more = REMAT.index(wanted.model.remat) <= REMAT.index(one.config.model.remat)
    rows = wanted.train.num_microbatches <= one.config.train.num_microbatches
    return not one.fits and more and rows and wanted.mesh == one.config.mesh
